"""What a look found: ok, a warning or a failure, and the remedy."""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Finding", "Level", "ok", "split_failure"]


class Level(StrEnum):
    """How a finding is to be taken."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, and the remedy where it is not as it should be."""

    name: str
    level: Level
    what: str
    remedy: str | None = None


def ok(name: str, what: str) -> Finding:
    """Return that something is as it should be."""
    return Finding(name, Level.OK, what)


def split_failure(name: str, error: Exception) -> Finding:
    """Take an error's first sentence for what was found, and the rest for the remedy."""
    what, _, remedy = str(error).partition(". ")
    return Finding(name, Level.FAILURE, what, remedy)
