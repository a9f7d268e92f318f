"""
Change many rows in batches: each commits by itself, blocks nobody for long, and one bad row stops no other.

The ids of what is to be changed are read first, without a lock. A batch of them is changed by one statement, which
judges each row again. Where that waits for somebody, or BON's database refuses it, the same batch is done with care:
rows that somebody uses are passed over, and it is halved until a row that is refused is alone; that row is kept as it
is and reported for its business. A row that somebody edits meanwhile is left to a later pass of the same run. What a
batch did is recorded in its transaction: an attempt that dies loses nothing, and the next one goes on from there.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import structlog

from bon_scheduler import BusinessOutcome, JobContext
from bon_scheduler.jobs import Connection

__all__ = ["LARGEST", "Changed", "NotChangedError", "Sweep", "Swept", "bounded", "next_size", "sweep"]

log = structlog.get_logger()
FIRST, LARGEST = 2000, 5000
"""Rows of the first batch, and of any. A batch that takes long is followed by a smaller one, and the reverse."""
SHORT_SECONDS, LONG_SECONDS = 0.1, 0.25
FOUND_AT_ONCE = 20_000
"""How many ids are read at a time, and held in memory."""
PASSES = 3
PAUSE_SECONDS = 1.0
"""Between two passes, for those who are editing what was left."""
MOST_REFUSED = 100
"""Rows that are kept because the database refuses to change them, before the run gives up."""
MOST_REFUSED_AT_FIRST = 5
"""The same, while it has refused every row: then the fault is not a row's."""
WAIT_LITTLE = "set local lock_timeout = '50ms'"
"""Of a batch whose rows are not locked first: it waits for whoever uses one of them, and others wait for it."""
WAIT_AT_MOST = "set local lock_timeout = '1s'"
"""Of a batch that is done with care: it waits for more than the rows it has locked, as in BON's triggers."""
CHECK_ALL = "set constraints all immediate; set local lock_timeout = 0"
"""Has BON's deferred triggers speak before the commit; ends the limit, which is not for the ledger's own waits."""
_IN_USE = (asyncpg.LockNotAvailableError, asyncpg.TransactionRollbackError)
_NOT_A_ROWS = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.ReadOnlySQLTransactionError,
)
"""Of the database, whatever the row: the attempt ends with it."""
_PLACE = re.compile(r"PL/pgSQL function ([\w.]{1,100})\(")


# $1 invoice. Index: invoices_pkey.
BUSINESS_OF = "select business_id from public.invoices where id = $1"


class NotChangedError(Exception):
    """The database refuses to change one of a batch's rows."""

    def __init__(self, why: asyncpg.PostgresError) -> None:
        super().__init__(str(why))
        self.why = why


@dataclass(frozen=True, slots=True)
class Changed:
    """What one batch did."""

    counts: Mapping[UUID | None, Counter[str]]
    """By business; None: of rows that belong to none."""
    rows: int
    """How many rows it changed or kept. The others were in use, or are no longer to be changed."""
    kept: Mapping[UUID, UUID | None] = field(default_factory=dict)
    """Rows that were looked at and stay candidates, and their businesses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """
    Which rows are changed, in which order, and how.

    `find` takes $1, ids to pass over: uuid[]; $2, how many are wanted; then `arguments`. It returns their ids, and
    locks nothing. `left` takes $1, ids to pass over, then `arguments`, and counts what `find` would find. `change` is
    given ids and whether to take care: then it passes over rows that somebody uses.
    """

    name: str
    find: str
    left: str
    change: Callable[[Connection, Sequence[UUID], bool], Awaitable[Changed]]
    arguments: tuple[Any, ...] = ()
    business_of: str | None = BUSINESS_OF
    """Whose a row is, by its id; None: nobody's."""
    locks: bool = False
    """Whether each batch is done with care, because what it judges must be locked."""
    first: int = FIRST
    """Rows of the first batch."""
    event: str | None = None
    """What `Swept.log` is told when the attempt fails. One that goes well logs once it has committed all of it."""


@dataclass(slots=True)
class Swept:
    """What became of all rows."""

    counts: Counter[str] = field(default_factory=Counter)
    """Of this attempt. `ctx.progress` has those of the run."""
    of_business: dict[UUID | None, Counter[str]] = field(default_factory=dict)
    """The same by business, as far as the batches tell."""
    refused: dict[UUID, tuple[UUID | None, str]] = field(default_factory=dict)
    """Rows that the database refused to change: their business, and how it said so."""
    kept: dict[UUID, UUID | None] = field(default_factory=dict)
    """Rows that were looked at and stay, and their businesses."""
    left: int = 0
    """Rows that are left to the next run: in use in each pass, or not reached in time."""
    in_time: bool = True

    @property
    def undone(self) -> bool:
        """Whether a person should know of what was not done. That somebody uses a row is no reason."""
        return bool(self.refused) or not self.in_time

    def add(self, other: "Swept") -> None:
        """Take in what became of other rows of the same run."""
        self.counts.update(other.counts)
        self.refused |= other.refused
        self.kept |= other.kept
        self.left += other.left
        self.in_time &= other.in_time

    def failures(self) -> list[BusinessOutcome]:
        """Return an outcome for each business of which a row was refused."""
        errors = dict(self.refused.values())
        number = Counter(business for business, _ in self.refused.values())
        return [
            BusinessOutcome(business, "failed", counts={"refused": number[business]}, error=error)
            for business, error in errors.items()
            if business is not None
        ]

    def log(self, event: str | None) -> None:
        """Log the counts of each business under this name."""
        if event is None:
            return
        kept = Counter(self.kept.values())
        for business, counts in self.of_business.items():
            log.info(event, business_id=str(business), **counts, kept=kept[business])

    def shortfall(self) -> dict[str, int]:
        """Return how many rows were refused and left, as far as any were."""
        numbers = {"refused": len(self.refused), "left": self.left}
        return {name: number for name, number in numbers.items() if number}


async def sweep(ctx: JobContext, what: Sweep, *, within: timedelta) -> Swept:
    """Go through all rows, for `within` at most; raise what the database says when it is not about single rows."""
    swept = Swept()
    ends = time.monotonic() + within.total_seconds()
    try:
        await _go_through(ctx, what, swept, ends)
    except BaseException:
        swept.log(what.event)
        raise
    if swept.left:
        log.warning("rows.left", change=what.name, left=swept.left, why="in use" if swept.in_time else "time is over")
    return swept


async def _go_through(ctx: JobContext, what: Sweep, swept: Swept, ends: float) -> None:
    for number in range(PASSES):
        if number:
            await asyncio.sleep(PAUSE_SECONDS)
        swept.left = 0
        complete = await _Pass(ctx, what, swept, ends).run()
        if complete or ctx.dry_run:
            break
        async with ctx.connection() as connection:
            swept.left = await connection.fetchval(what.left, _passed_over(swept), *what.arguments)
        if not swept.left or not swept.in_time:
            break


def _passed_over(swept: Swept) -> list[UUID]:
    return [*swept.kept, *swept.refused]


@asynccontextmanager
async def bounded(tx: Connection, *, with_care: bool = False) -> AsyncIterator[None]:
    """Limit how long a batch waits for others; raise NotChangedError where the database refuses one of its rows."""
    try:
        await tx.execute(WAIT_AT_MOST if with_care else WAIT_LITTLE)
        yield
        await tx.execute(CHECK_ALL)
    except _NOT_A_ROWS:
        raise
    except asyncpg.PostgresError as error:
        raise NotChangedError(error) from error


@dataclass(slots=True)
class _Pass:
    """One way through what is there now."""

    ctx: JobContext
    what: Sweep
    swept: Swept
    ends: float
    size: int = 0
    seen: list[UUID] = field(default_factory=list)
    """What was tried in vain, or in a dry run at all: to be found no more in this pass."""
    complete: bool = True
    """Whether each row that was found is changed, kept or refused by now."""

    async def run(self) -> bool:
        """Return whether all that it found was done."""
        self.size = min(self.what.first, LARGEST)
        while True:
            ids = await self._find()
            self.swept.in_time = await self._go_through(ids)
            if not self.swept.in_time or len(ids) < FOUND_AT_ONCE:
                return self.complete and self.swept.in_time

    async def _find(self) -> list[UUID]:
        over = [*_passed_over(self.swept), *self.seen]
        async with self.ctx.connection() as connection:
            rows = await connection.fetch(self.what.find, over, FOUND_AT_ONCE, *self.what.arguments)
        return [row["id"] for row in rows]

    async def _go_through(self, ids: Sequence[UUID]) -> bool:
        """Change these, batch by batch; return False when time was over before the end."""
        done, with_care_until = 0, len(ids) if self.what.locks else 0
        while done < len(ids):
            began = time.monotonic()
            if began >= self.ends:
                return False
            with_care = done < with_care_until
            batch = ids[done : min(done + self.size, with_care_until if with_care else len(ids))]
            try:
                changed = await self._commit(batch, with_care=with_care)
            except NotChangedError as refused:
                if not with_care:
                    with_care_until = done + len(batch)
                    continue
                if len(batch) > 1:
                    self.size = len(batch) // 2
                    continue
                await self._keep(batch[0], refused.why)
            else:
                self._account(batch, changed)
                self.size = next_size(self.size, time.monotonic() - began)
            done += len(batch)
        return True

    async def _commit(self, batch: Sequence[UUID], *, with_care: bool) -> Changed:
        async with self.ctx.transaction() as tx:
            async with bounded(tx, with_care=with_care):
                changed = await self.what.change(tx, batch, with_care)
            await self.ctx.progress(sum(changed.counts.values(), Counter[str]()), on=tx)
        return changed

    def _account(self, batch: Sequence[UUID], changed: Changed) -> None:
        for business, counts in changed.counts.items():
            self.swept.of_business.setdefault(business, Counter()).update(counts)
        self.swept.counts.update(sum(changed.counts.values(), Counter[str]()))
        self.swept.kept.update(changed.kept)
        if changed.rows < len(batch):
            self.complete = False
        if changed.rows < len(batch) or self.ctx.dry_run:
            self.seen.extend(batch)

    async def _keep(self, row: UUID, error: asyncpg.PostgresError) -> None:
        """Pass over one row: somebody uses what it takes, or the database refuses to change it."""
        if isinstance(error, _IN_USE):
            self.complete = False
            self.seen.append(row)
            return
        business = None
        if self.what.business_of is not None:
            async with self.ctx.connection() as connection:
                business = await connection.fetchval(self.what.business_of, row)
        self.swept.refused[row] = (business, _describe(error))
        refused = len(self.swept.refused)
        if refused > MOST_REFUSED or (refused > MOST_REFUSED_AT_FIRST and not self.swept.counts.total()):
            raise error
        log.error(
            "row.refused",
            change=self.what.name,
            id=str(row),
            business_id=str(business),
            error=self.swept.refused[row][1],
        )


def next_size(size: int, took_seconds: float) -> int:
    """Return how many rows go at once after a batch of `size` that took so long."""
    if took_seconds < SHORT_SECONDS:
        return min(size * 2, LARGEST)
    return max(size // 2, 1) if took_seconds > LONG_SECONDS else size


def _describe(error: asyncpg.PostgresError) -> str:
    """Name an error by its kind and its place: what a trigger of BON's says may hold a customer's name."""
    place = _PLACE.search(str(error.context or "")[:2000])
    where = (f"constraint {error.constraint_name}" if error.constraint_name else None) or (
        f"function {place[1]}" if place else None
    )
    return f"{type(error).__name__} ({error.sqlstate})" + (f" from {where}" if where else "")
