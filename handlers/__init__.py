"""BON's jobs, one file each. A new job is one file here and one line in `JOBS`."""

from bon_scheduler.jobs import AnyJob
from handlers.draft_cleanup import draft_cleanup
from handlers.ledger_pruning import ledger_pruning
from handlers.notify_reauth import notify_reauth
from handlers.overdue_detection import overdue_detection
from handlers.overdue_digest import overdue_digest
from handlers.rehearsal import rehearsal
from handlers.send_overdue_digest import send_overdue_digest
from handlers.session_cleanup import session_cleanup
from handlers.shaam_refresh_batch import shaam_refresh_batch
from handlers.shaam_token_refresh import shaam_token_refresh

__all__ = ["JOBS"]

JOBS: tuple[AnyJob, ...] = (
    overdue_detection,
    overdue_digest,
    send_overdue_digest,
    draft_cleanup,
    session_cleanup,
    shaam_token_refresh,
    shaam_refresh_batch,
    notify_reauth,
    ledger_pruning,
    rehearsal,
)
