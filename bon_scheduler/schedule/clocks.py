"""
What time it is, when no single clock is believed.

Three are read: this machine's wall clock, the database's, and an anchor, which is an instant that was
agreed on once plus the time that has passed since by a clock that nobody can set (it counts suspension).
Any one of them may be wrong. What must never happen is to believe a clock that jumped ahead: the last tick
only moves forwards, so ticks recorded early would be lost for as long as the jump.

- Two or three within a minute of each other: their median, and the anchor follows it.
- The wall and the database both ahead of the anchor: the anchor, until they have agreed for ten minutes.
- No two agree, or there is no anchor yet and the other two differ: the earliest that is not behind what is in
  the ledger already. A tick may then be late, never early, and the disagreement is reported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from bon_scheduler.clock import Clock, seconds_since_boot
from bon_scheduler.jobs import Connection

__all__ = ["ClockError", "Clocks"]

TOLERANCE = timedelta(seconds=60)
CONFIRM_SECONDS = 600.0
READ_TIMEOUT_SECONDS = 5.0
# The newest tick was recorded at an instant that was believed then: a clock behind it is wrong.
DATABASE_NOW = "select clock_timestamp() as now, max(last_tick) as newest_tick from bon_scheduler.jobs"

log = structlog.get_logger()


class ClockError(Exception):
    """This machine's clock and the database's differ; the message says by how much, and the remedy."""


@dataclass(frozen=True, slots=True)
class _Anchor:
    """An instant that was agreed on, and when that was by the clock that cannot be set."""

    instant: datetime
    seconds: float

    def at(self, seconds: float) -> datetime:
        return self.instant + timedelta(seconds=seconds - self.seconds)


class Clocks:
    """
    The clocks of one process, and a `Clock` that says what they are believed to.

    `elapsed` is seconds by a clock that nobody can set.
    """

    def __init__(self, wall: Clock, *, elapsed: Callable[[], float] = seconds_since_boot) -> None:
        self._wall = wall
        self._elapsed = elapsed
        self._anchor: _Anchor | None = None
        self._ahead_since: float | None = None
        self._apart = timedelta(0)
        self._agreed = True
        self._database: datetime | None = None
        self._believed: _Anchor | None = None

    def now(self) -> datetime:
        """Return the present instant (UTC, aware): what was last believed, and the time since."""
        return self._believed.at(self._elapsed()) if self._believed else self._wall.now()

    @property
    def apart(self) -> timedelta:
        """By how much this machine's clock and the database's differed when they were last judged."""
        return self._apart

    @property
    def all_agree(self) -> bool:
        """Whether this machine's clock, the database's and what is believed were within a minute of each other."""
        return self._agreed and self._apart <= TOLERANCE

    @property
    def database(self) -> datetime:
        """What the database's clock said when it was last judged; the wall's before that."""
        return self._database or self._wall.now()

    def drift(self) -> float:
        """Return wall time less unsettable time, in seconds: a change of it is a step of the wall clock."""
        return self._wall.now().timestamp() - self._elapsed()

    async def require_agreement(self, connection: Connection) -> None:
        """Raise ClockError when this machine's clock and the database's are more than a minute apart."""
        await self.read(connection)
        if self._apart > TOLERANCE:
            raise ClockError(
                f"This machine's clock and the database's are {self._apart} apart. What is old would be judged by a "
                "wrong clock. Synchronise both (NTP), then try again."
            )

    async def read(self, connection: Connection) -> datetime:
        """Return the present instant (UTC, aware) that is believed, asking the database for its own."""
        asked = self._elapsed()
        row = await connection.fetchrow(DATABASE_NOW, timeout=READ_TIMEOUT_SECONDS)
        answered = self._elapsed()
        if row is None:
            raise LookupError("an aggregate always returns one row")
        database = row["now"] + timedelta(seconds=(answered - asked) / 2)
        return self.believe(database, answered, row["newest_tick"])

    def believe(self, database: datetime, seconds: float, newest_tick: datetime | None = None) -> datetime:
        """
        Judge the clocks.

        `database` is its reading, `seconds` the unsettable clock's, `newest_tick` the newest in the ledger.
        """
        believed = self._judge(database, seconds, newest_tick)
        self._believed = _Anchor(believed, seconds)
        return believed

    def _judge(self, database: datetime, seconds: float, newest_tick: datetime | None) -> datetime:
        wall = self._wall.now()
        self._database = database
        self._apart = abs(wall - database)
        outer_agree = self._apart <= TOLERANCE
        if self._anchor is None:
            self._report(outer_agree, wall, database, None)
            if outer_agree:
                self._anchor = _Anchor(min(wall, database), seconds)
            return _earliest(newest_tick, wall, database)
        anchored = self._anchor.at(seconds)
        middle = sorted((wall, database, anchored))[1]
        together = abs(wall - anchored) <= TOLERANCE or abs(database - anchored) <= TOLERANCE
        self._report(outer_agree and together, wall, database, anchored)
        if together:
            self._ahead_since = None
            self._anchor = _Anchor(middle, seconds)
            return middle
        if not outer_agree:
            return _earliest(newest_tick, wall, database, anchored)
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


def _earliest(newest_tick: datetime | None, *clocks: datetime) -> datetime:
    """Return the earliest of the clocks that are not behind the newest tick; the latest if all are."""
    possible = [clock for clock in clocks if newest_tick is None or clock >= newest_tick - TOLERANCE]
    return min(possible, default=max(clocks))
