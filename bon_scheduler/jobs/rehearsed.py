"""What a rehearsal says of one job's next run."""

from dataclasses import dataclass
from datetime import datetime

__all__ = ["Rehearsed"]


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What a job's next run would do, and whether the brake would trip."""

    job: str
    fire_time: datetime
    """When it fires next (UTC, aware)."""
    candidates: int
    of_all: int
    """All rows of their kind."""
    usual: int | None
    """The median of the last runs; None without any."""
    would_hold: str | None
    """Why the brake would trip, in words with the figures; None: it would not."""
