"""
What time it is, when no single clock is believed.

Three are read: this machine's wall clock, the database's, and an anchor, which is an instant that was
agreed on once plus the time that has passed since by a clock that nobody can set (it counts suspension).
Any one of them may be wrong. What must never happen is to believe a clock that jumped ahead: the last tick
only moves forwards, so ticks recorded early would be lost for as long as the jump.

- Two or three within a minute of each other: their median, and the anchor follows it.
- The wall and the database both ahead of the anchor: the anchor, until they have agreed for ten minutes.
- No two agree, or there is no anchor yet and the other two differ: the earliest. A tick may then be late,
  never early, and the disagreement is reported.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from bon_scheduler.clock import Clock
from bon_scheduler.jobs import Connection

__all__ = ["Clocks", "seconds_since_boot"]

TOLERANCE = timedelta(seconds=60)
CONFIRM_SECONDS = 600.0
READ_TIMEOUT_SECONDS = 5.0
DATABASE_NOW = "select clock_timestamp()"

log = structlog.get_logger()


def seconds_since_boot() -> float:
    """Return seconds by a clock that nobody can set; where the system has one, it counts suspension."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)


@dataclass(frozen=True, slots=True)
class _Anchor:
    """An instant that was agreed on, and when that was by the clock that cannot be set."""

    instant: datetime
    seconds: float

    def at(self, seconds: float) -> datetime:
        return self.instant + timedelta(seconds=seconds - self.seconds)


class Clocks:
    """The clocks of one process; `elapsed` is seconds by a clock that nobody can set."""

    def __init__(self, wall: Clock, *, elapsed: Callable[[], float] = seconds_since_boot) -> None:
        self._wall = wall
        self._elapsed = elapsed
        self._anchor: _Anchor | None = None
        self._ahead_since: float | None = None
        self._agreed = True

    def drift(self) -> float:
        """Return wall time less unsettable time, in seconds: a change of it is a step of the wall clock."""
        return self._wall.now().timestamp() - self._elapsed()

    async def read(self, connection: Connection) -> datetime:
        """Return the present instant (UTC, aware) that is believed, asking the database for its own."""
        asked = self._elapsed()
        database = await connection.fetchval(DATABASE_NOW, timeout=READ_TIMEOUT_SECONDS)
        answered = self._elapsed()
        return self.believe(database + timedelta(seconds=(answered - asked) / 2), answered)

    def believe(self, database: datetime, seconds: float) -> datetime:
        """Judge the clocks, given the database's reading and the unsettable clock's, in seconds."""
        wall = self._wall.now()
        outer_agree = abs(wall - database) <= TOLERANCE
        if self._anchor is None:
            self._report(outer_agree, wall, database, None)
            if outer_agree:
                self._anchor = _Anchor(min(wall, database), seconds)
            return min(wall, database)
        anchored = self._anchor.at(seconds)
        middle = sorted((wall, database, anchored))[1]
        together = abs(wall - anchored) <= TOLERANCE or abs(database - anchored) <= TOLERANCE
        self._report(outer_agree and together, wall, database, anchored)
        if together:
            self._ahead_since = None
            self._anchor = _Anchor(middle, seconds)
            return middle
        if not outer_agree:
            return min(wall, database, anchored)
        return self._doubt(middle, anchored, seconds)

    def _doubt(self, outer: datetime, anchored: datetime, seconds: float) -> datetime:
        """Judge the other two, which agree against the anchor: right if behind it, or if they have agreed long."""
        if self._ahead_since is None:
            self._ahead_since = seconds
        if seconds - self._ahead_since >= CONFIRM_SECONDS:
            log.warning("clock.believed", moved_seconds=round((outer - anchored).total_seconds()))
            self._ahead_since = None
            self._anchor = _Anchor(outer, seconds)
            return outer
        return min(outer, anchored)

    def _report(self, agreed: bool, wall: datetime, database: datetime, anchored: datetime | None) -> None:
        if agreed == self._agreed:
            return
        self._agreed = agreed
        if agreed:
            log.info("clock.agreed")
            return
        log.error(
            "clock.disagreed",
            wall=wall.isoformat(),
            database=database.isoformat(),
            anchor=anchored.isoformat() if anchored else None,
        )
