"""
What each command does, given settings and somewhere to report: returns the exit status.

0 done, 1 a run ended badly, a check failed or a tick is not accounted for; wrong usage is a UsageError.
"""

from bon_scheduler.cli.act import cancel, migrate, pause, resend, resume, retry
from bon_scheduler.cli.look import STATES, check, jobs, runs, show
from bon_scheduler.cli.parsing import UsageError
from bon_scheduler.cli.signals import INTERRUPTED, run
from bon_scheduler.cli.ticks import audit, timeline
from bon_scheduler.cli.work import enqueue, run_once, serve

__all__ = [
    "INTERRUPTED",
    "STATES",
    "UsageError",
    "audit",
    "cancel",
    "check",
    "enqueue",
    "jobs",
    "migrate",
    "pause",
    "resend",
    "resume",
    "retry",
    "run",
    "run_once",
    "runs",
    "serve",
    "show",
    "timeline",
]
