"""
Change many rows in batches: each commits by itself, blocks nobody for long, and one bad row stops no other.

A batch locks rows that nobody else is using and changes them. When BON's database refuses a change, the batch is
halved until the row that it refuses is alone; that row is kept as it is and reported for its business. A row that
somebody edits meanwhile is left to a later pass of the same run. What a batch did is recorded in its transaction, so
that an attempt that dies loses nothing and the next one goes on from there.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

import asyncpg
import structlog

from bon_scheduler import BusinessOutcome, JobContext
from bon_scheduler.jobs import ChangedRow, Connection

__all__ = ["Changed", "Sweep", "Swept", "sweep"]

log = structlog.get_logger()
FIRST, LARGEST = 1000, 5000
"""Rows of the first batch, and of any. A batch that takes long is followed by a smaller one, and the reverse."""
SHORT_SECONDS, LONG_SECONDS = 0.1, 0.3
PASSES = 3
PAUSE_SECONDS = 1.0
"""Between two passes, for those who are editing what was left."""
MOST_REFUSED = 100
"""Rows that are kept because the database refuses to change them, before the run gives up."""
MOST_REFUSED_AT_FIRST = 5
"""The same, while it has refused every row: then the fault is not a row's."""
WAIT_AT_MOST = "set local lock_timeout = '1s'"
"""A change waits for more than the rows it has locked, as in BON's triggers."""
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


class _NotChangedError(Exception):
    """The database refuses to change one of `rows`."""

    def __init__(self, rows: Sequence[asyncpg.Record], why: asyncpg.PostgresError) -> None:
        super().__init__(str(why))
        self.rows = rows
        self.why = why


@dataclass(frozen=True, slots=True)
class Changed:
    """What one batch did."""

    counts: Mapping[UUID | None, Counter[str]]
    """By business; None: of rows that belong to none."""
    kept: Mapping[UUID, UUID | None] = field(default_factory=dict)
    """Rows that were looked at and stay candidates, and their businesses."""
    evidence: tuple[Literal["deleted", "marked", "cleared"], Sequence[ChangedRow]] | None = None
    """What was done to which rows, where the ledger is to keep it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """
    Which rows are changed, in which order, and how.

    `pick` takes $1 and $2, the key (text) and the id of the last row of the batch before; $3, ids to pass over: uuid[];
    $4, the size of the batch; then `arguments`. It returns `id`, `business_id` and `key` (text) in the order of key and
    id, and locks them with `skip locked`. `left` takes $1, ids to pass over, then `arguments`, and counts what `pick`
    could still find.
    """

    name: str
    pick: str
    left: str
    change: Callable[[Connection, Sequence[asyncpg.Record]], Awaitable[Changed]]
    arguments: tuple[Any, ...] = ()
    begin: str
    """The key that is before all others."""
    event: str | None = None
    """Logged with its counts for each business of a batch, once that has committed."""


@dataclass(slots=True)
class Swept:
    """What became of all rows."""

    counts: Counter[str] = field(default_factory=Counter)
    """Of this run, whichever attempt did it."""
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
        self.counts = self.counts | other.counts
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

    def shortfall(self) -> dict[str, int]:
        """Return how many rows were refused and left, as far as any were."""
        numbers = {"refused": len(self.refused), "left": self.left}
        return {name: number for name, number in numbers.items() if number}


async def sweep(ctx: JobContext, what: Sweep, *, within: timedelta) -> Swept:
    """Go through all rows, for `within` at most; raise what the database says when it is not about single rows."""
    swept = Swept()
    ends = time.monotonic() + within.total_seconds()
    for number in range(1 if ctx.dry_run else PASSES):
        if number:
            await asyncio.sleep(PAUSE_SECONDS)
        swept.in_time = await _pass(ctx, what, swept, ends)
        if ctx.dry_run:
            break
        async with ctx.connection() as connection:
            swept.left = await connection.fetchval(what.left, _passed_over(swept), *what.arguments)
        if not swept.left or not swept.in_time:
            break
    if swept.left:
        log.warning("rows.left", change=what.name, left=swept.left, why="in use" if swept.in_time else "time is over")
    return swept


def _outcomes(changed: Changed) -> list[BusinessOutcome]:
    return [
        BusinessOutcome(business, counts=dict(counts))
        for business, counts in changed.counts.items()
        if business is not None and counts.total()
    ]


def _log(what: Sweep, changed: Changed) -> None:
    if what.event is None:
        return
    kept = Counter(changed.kept.values())
    for business, counts in changed.counts.items():
        log.info(what.event, business_id=str(business), **counts, kept=kept[business])


def _passed_over(swept: Swept) -> list[UUID]:
    return [*swept.kept, *swept.refused]


async def _pass(ctx: JobContext, what: Sweep, swept: Swept, ends: float) -> bool:
    """Go through what is there now; return False when time was over before the end."""
    size, last = min(FIRST, LARGEST), (what.begin, UUID(int=0))
    over = _passed_over(swept)
    while time.monotonic() < ends:
        began = time.monotonic()
        try:
            async with ctx.transaction() as tx:
                rows = await tx.fetch(what.pick, *last, over, size, *what.arguments)
                changed = await _change(tx, what, rows)
                await ctx.record(_outcomes(changed), on=tx)
                if changed.evidence is not None:
                    await ctx.keep_rows(*changed.evidence, on=tx)
                total = await ctx.progress(sum(changed.counts.values(), Counter[str]()), on=tx)
        except _NotChangedError as refused:
            if len(refused.rows) > 1:
                size = len(refused.rows) // 2
                continue
            rows = list(refused.rows)
            _keep(what, swept, rows[0], refused.why)
        else:
            _log(what, changed)
            swept.counts = Counter(total)
            swept.kept.update(changed.kept)
            if len(rows) < size:
                return True
            size = _next_size(size, time.monotonic() - began)
        last = (rows[-1]["key"], rows[-1]["id"])
    return False


async def _change(tx: Connection, what: Sweep, rows: Sequence[asyncpg.Record]) -> Changed:
    if not rows:
        return Changed({})
    try:
        await tx.execute(WAIT_AT_MOST)
        changed = await what.change(tx, rows)
        await tx.execute(CHECK_ALL)
    except _NOT_A_ROWS:
        raise
    except asyncpg.PostgresError as error:
        raise _NotChangedError(rows, error) from error
    return changed


def _next_size(size: int, took_seconds: float) -> int:
    if took_seconds < SHORT_SECONDS:
        return min(size * 2, LARGEST)
    return max(size // 2, 1) if took_seconds > LONG_SECONDS else size


def _keep(what: Sweep, swept: Swept, row: asyncpg.Record, error: asyncpg.PostgresError) -> None:
    """Pass over one row: somebody uses what it takes, or the database refuses to change it."""
    if isinstance(error, _IN_USE):
        return
    swept.refused[row["id"]] = (row["business_id"], _describe(error))
    refused = len(swept.refused)
    if refused > MOST_REFUSED or (refused > MOST_REFUSED_AT_FIRST and not swept.counts.total()):
        raise error
    log.error(
        "row.refused",
        change=what.name,
        id=str(row["id"]),
        business_id=str(row["business_id"]),
        error=swept.refused[row["id"]][1],
    )


def _describe(error: asyncpg.PostgresError) -> str:
    """Name an error by its kind and its place: what a trigger of BON's says may hold a customer's name."""
    place = _PLACE.search(str(error.context or "")[:2000])
    where = (f"constraint {error.constraint_name}" if error.constraint_name else None) or (
        f"function {place[1]}" if place else None
    )
    return f"{type(error).__name__} ({error.sqlstate})" + (f" from {where}" if where else "")
