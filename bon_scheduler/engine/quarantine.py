"""
Quarantine: a process whose ledger is a copy, or went back in time, touches nobody.

Looked at before anything is worked on, and every two seconds. What the ledger remembers of its place is compared with
where this process finds it (`ledger.place`); its mark with the highest one that this process has seen, or that an
earlier one has left in SPOOL_DIR. Whoever finds a lower mark writes that into the ledger, so that all are quarantined.
Claims compare the mark themselves, in their own statement, so that nothing is taken between a restore and a look.
A fail-over to a replica may lose what was committed in its last moments; it begins another timeline of the server, and
then marks of the last half minute do not count.
"""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from uuid import UUID

import structlog

from bon_scheduler import ledger
from bon_scheduler.clock import seconds_since_boot
from bon_scheduler.config import Settings
from bon_scheduler.database import Outage, Pool
from bon_scheduler.files import WrongFileError, read_file, write_private
from bon_scheduler.jobs import Connection, NotNowError
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS, REMEDY, Caller, Found, Place
from bon_scheduler.log import describe_error

__all__ = ["Quarantine", "QuarantinedError"]

log = structlog.get_logger()
LOOK_SECONDS = 2.0
MARK_SECONDS = 4.0
"""How often a process raises the mark: a restore of a state that is younger goes unnoticed, but for its tables."""
WRITE_SECONDS = 60.0
LOST_AT_FAILOVER_SECONDS = 30.0
AGAIN = timedelta(seconds=30)
FILE = "ledger.mark"
MAGIC = "bon_scheduler-mark-1"
MOST_BYTES = 200


class QuarantinedError(NotNowError):
    """The ledger is not where it lives, or went back in time; the message says which, and the remedy."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, after=AGAIN)


class _Memory:
    """The marks that this process has seen: `highest`, and `floor`, which was seen half a minute before the last."""

    def __init__(self, elapsed: Callable[[], float]) -> None:
        self._elapsed = elapsed
        self._trail: deque[tuple[float, int]] = deque()
        self._timeline: str | None = None
        self.highest = self.floor = 0

    def note(self, mark: int, timeline: str | None) -> None:
        """Remember what was seen now."""
        now = self._elapsed()
        self.highest, self._timeline = mark, timeline
        self._trail.append((now, mark))
        while self._trail and self._trail[0][0] <= now - LOST_AT_FAILOVER_SECONDS:
            self.floor = self._trail.popleft()[1]

    def before(self, found: Found) -> int | None:
        """Return the mark that was seen before, where the ledger is behind it; None: it is not."""
        promoted = None not in (found.timeline, self._timeline) and found.timeline != self._timeline
        least = self.floor if promoted else self.highest
        now = found.place.mark if found.place else 0
        return self.highest if now < least else None

    def forget(self) -> None:
        """Begin anew: what was seen of another ledger, or before a fail-over, counts no more."""
        self._trail.clear()
        self._timeline, self.highest, self.floor = None, 0, 0


class Quarantine:
    """Whether one process may work with its ledger. One that `serves` remembers the place, and raises the mark."""

    def __init__(
        self, settings: Settings, pool: Pool, *, serves: bool, elapsed: Callable[[], float] = seconds_since_boot
    ) -> None:
        self.reason: str | None = None
        """Why nothing may be done, in words and with the remedy, as of the last look; None: all is well."""
        self._caller = Caller.of(settings)
        self._spool = settings.spool_dir
        self._pool = pool
        self._serves = serves
        self._elapsed = elapsed
        self._memory = _Memory(elapsed)
        self._admitted = False
        self._id: UUID | None = None
        self._marked = self._written = float("-inf")
        self._one_at_a_time = asyncio.Lock()

    @property
    def seen(self) -> int:
        """The highest mark that is known; 0: none."""
        return self._memory.highest

    def refuse(self) -> None:
        """Raise QuarantinedError while the last look found a reason."""
        if self.reason is not None:
            raise QuarantinedError(self.reason)

    async def require(self) -> None:
        """Look, and raise QuarantinedError where there is a reason, or what a database that is away raises."""
        await self.look()
        self.refuse()

    async def allows(self) -> bool:
        """Look; return whether there is no reason. Raises what a database that is away raises."""
        await self.look()
        return self.reason is None

    @asynccontextmanager
    async def watching(self, outage: Outage) -> AsyncIterator["Quarantine"]:
        """
        Look once, and then again until the block ends; `outage` is told whether the database answers.

        Raises what a database that is away raises, and QuarantinedError in a person's process, which is not to wait.
        """
        await self.look()
        if not self._serves:
            self.refuse()
        loop = asyncio.create_task(self._repeat(outage), name="quarantine")
        try:
            yield self
        finally:
            loop.cancel()
            await asyncio.wait([loop])
            if self._serves and self.reason is None:
                await asyncio.to_thread(self._write, self._memory.floor)

    async def _repeat(self, outage: Outage) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
                outage.answered("place")
            except Exception as error:  # noqa: BLE001 - whatever failed, the next look is made: a copy may come any time
                outage.failed("place", error)

    async def look(self) -> None:
        """Compare, and remember; while others look wait for them, and look anew."""
        async with self._one_at_a_time, self._pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
            found = await ledger.find_place(connection)
            if found.place is None and self._serves and not self._memory.highest:
                found = await self._remember(connection)
            what = await self._judge(connection, found)
            self._tell(what, found.place)
            self._admitted = what is None
            if what is None and found.place is not None:
                await self._note(connection, found, found.place)

    async def _remember(self, connection: Connection) -> Found:
        """Have a ledger that never was worked with live here."""
        remembered = await ledger.remember_place(connection, self._caller)
        found = await ledger.find_place(connection)
        if remembered:
            log.info("place.remembered", place=str(found.place))
        return found

    async def _judge(self, connection: Connection, found: Found) -> str | None:
        """Return what is the matter; of a ledger that went back in time, write that down."""
        if (what := ledger.fault(found, self._caller, admitted=self._admitted)) is not None:
            return what
        seen = self._memory.before(found)
        if seen is None and found.place is not None and not self._memory.highest:
            seen = await asyncio.to_thread(self._read, found.place)
        if seen is None:
            return None
        # BEFORE it is told: nobody could adopt what only this process knows.
        await ledger.report_behind(connection, seen, self._caller)
        return ledger.fault(await ledger.find_place(connection), self._caller, admitted=self._admitted)

    def _tell(self, what: str | None, place: Place | None) -> None:
        reason = None if what is None else f"{what}. {REMEDY}"
        if reason is not None and reason != self.reason:
            log.error("place.quarantined", error=what, remedy=REMEDY)
        elif reason is None and self.reason is not None:
            log.info("place.trusted", place=str(place))
        self.reason = reason

    async def _note(self, connection: Connection, found: Found, place: Place) -> None:
        """Remember the mark, and raise it when it is time to."""
        now, mark = self._elapsed(), place.mark
        if self._serves and now - self._marked >= MARK_SECONDS:
            raised = await ledger.mark_place(connection, place, self._caller)
            if raised is None:
                return  # it went back since: the next look finds it
            mark, self._marked = raised, now
        if mark < self._memory.highest:
            self._memory.forget()  # a fail-over
        self._memory.note(mark, found.timeline)
        self._id = place.id
        if self._serves and now - self._written >= WRITE_SECONDS:
            self._written = now
            await asyncio.to_thread(self._write, self._memory.floor)

    def _write(self, mark: int) -> None:
        """Leave a mark for the next process."""
        if self._spool is None or self._id is None or not mark:
            return
        try:
            directory = os.open(self._spool, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                write_private(directory, FILE, f"{MAGIC} {self._id} {mark}\n".encode())
            finally:
                os.close(directory)
        except OSError as error:
            log.warning("place.unwritten", error=describe_error(error))

    def _read(self, place: Place) -> int | None:
        """Return the mark that an earlier process has left of this ledger, where it is behind that; None: it is not."""
        if self._spool is None:
            return None
        try:
            words = read_file(self._spool / FILE, MOST_BYTES).decode("ascii", "replace").split()
        except FileNotFoundError:
            return None
        except (OSError, WrongFileError) as error:
            log.warning("place.unread", error=describe_error(error))
            return None
        match words:
            case [magic, of, mark] if magic == MAGIC and of == str(place.id) and mark.isdecimal():
                return int(mark) if int(mark) > place.mark else None
        return None
