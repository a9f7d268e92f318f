"""What the command line knows before it imports anything: how a wrong call is told, and the words it takes."""

__all__ = ["EXIT_STATUSES", "INTERRUPTED", "STATES", "UsageError"]

INTERRUPTED = 130
"""The exit status after Ctrl-C."""
EXIT_STATUSES = {
    0: "Done.",
    1: "A run ended `partial` or `dead`, the database is unreachable or its schema not as expected, the ledger is "
    "quarantined, a check failed, or the audit found a gap or an unresolved miss.",
    2: "Wrong usage or settings, `serve` or `migrate` with a broken job, or nothing can listen on `HEALTH_PORT`. "
    "Nothing was changed.",
    3: "The brake holds the run, or a rehearsal says that it would.",
    4: "The job is already running elsewhere.",
    INTERRUPTED: "Interrupted.",
}
STATES = "queued, running, retrying, succeeded, partial, dead, held, cancelled, missed, paused"


class UsageError(Exception):
    """The command was called wrongly; the message says what, which value and the remedy."""
