"""What the command line knows before it imports anything: how a wrong call is told, and the words it takes."""

__all__ = ["INTERRUPTED", "STATES", "UsageError"]

INTERRUPTED = 130
"""The exit status after Ctrl-C."""
STATES = "queued, running, retrying, succeeded, partial, dead, held, cancelled, missed, paused"


class UsageError(Exception):
    """The command was called wrongly; the message says what, which value and the remedy."""
