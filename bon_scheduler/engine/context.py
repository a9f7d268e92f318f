"""What a handler is given: its instants, its fenced transactions, and the way to ask for more runs."""

import time
import typing
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

from bon_scheduler import ledger
from bon_scheduler.database import Pool
from bon_scheduler.engine.awaited import require_awaited
from bon_scheduler.engine.mistakes import (
    MistakeError,
    require_counts,
    require_job,
    require_request,
    require_transaction,
)
from bon_scheduler.engine.timings import Timings
from bon_scheduler.jobs import (
    BusinessOutcome,
    Connection,
    Counts,
    Cron,
    Job,
    LostRunError,
    P,
    Rehearsed,
    Usual,
)
from bon_scheduler.ledger import Finished, Origin, Request, RunRef
from bon_scheduler.schedule import next_fire_time

__all__ = ["AttemptContext"]

T = TypeVar("T")


@dataclass(slots=True)
class AttemptContext:
    """One attempt's `JobContext`. `ended` is the run's state once a handler's `finish` has committed."""

    ref: RunRef
    job_name: str
    fire_time: datetime
    now: datetime
    next_fire_time: datetime | None
    replay: bool
    retried: bool
    released: bool
    zone: ZoneInfo
    pool: Pool
    resources: Mapping[type, object]
    schedules: Mapping[str, Cron] = field(default_factory=dict)
    ended: str | None = None
    why_undone: str | None = None
    """Why the run has not done what it is for, if the handler said so."""
    timings: Timings = field(default_factory=Timings)
    _open: set[Connection] = field(default_factory=set)
    _finished: dict[Connection, Finished] = field(default_factory=dict)
    _severed: bool = False

    @property
    def run_id(self) -> UUID:
        """The run this attempt belongs to."""
        return self.ref.run_id

    @property
    def attempt(self) -> int:
        """Which execution of the run this is, from 1."""
        return self.ref.attempt

    @property
    def dry_run(self) -> bool:
        """Whether everything is rolled back; see `dry`."""
        return False

    @property
    def business_date(self) -> date:
        """The Israeli calendar date of `fire_time`."""
        return self.fire_time.astimezone(self.zone).date()

    @property
    def today(self) -> date:
        """The Israeli calendar date of `now`."""
        return self.now.astimezone(self.zone).date()

    def get(self, kind: type[T]) -> T:
        """Return the service's one object of that type."""
        if kind not in self.resources:
            told = getattr(kind, "__name__", None) or f"something of type {type(kind).__name__}"
            there = ", ".join(sorted(each.__name__ for each in self.resources))
            raise MistakeError(f"ctx.get was asked for {told}, of which there is none here. There are: {there}.")
        return typing.cast("T", self.resources[kind])

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Borrow a connection without a fence."""
        asked_at = time.perf_counter()
        async with self.pool.acquire() as connection, self.timings.of(connection, asked_at):
            if self._severed:
                raise LostRunError(f"attempt {self.attempt} of run {self.run_id} was given up")
            self._open.add(connection)
            try:
                yield connection
            finally:
                self._open.discard(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Open a transaction whose commit is refused once another attempt owns the run."""
        async with self.connection() as connection:
            try:
                async with connection.transaction():
                    yield connection
                    require_awaited()
                    require_transaction(connection)
                    ended = self._finished.get(connection)
                    if ended is None or ended.may_be_undone:
                        # Last, just before the commit: nobody waits for the handler's work.
                        state = await ledger.fence(connection, self.ref, finished=ended is not None)
                    else:
                        state = ended.state  # `finish` has the run locked until the commit
            finally:
                self._finished.pop(connection, None)
            self.ended = state

    def sever(self) -> None:
        """Cut the connections of a handler that does not end, so that the server rolls back; lend no more."""
        self._severed = True
        for connection in list(self._open):
            connection.terminate()

    async def enqueue(self, job: Job[P], payload: P, *, on: Connection, dedupe_key: str | None = None) -> UUID | None:
        """Ask for a run caused by this one; None when the key is taken."""
        require_request(job, payload)
        return await ledger.enqueue(
            on,
            Request(
                job.name,
                payload.model_dump(mode="json"),
                dedupe_key,
                origin=Origin.RUN,
                asked_by=self.job_name,
                caused_by=self.run_id,
            ),
        )

    async def enqueue_many(
        self, job: Job[P], requests: Iterable[tuple[P, str]], *, on: Connection, priority: int = 0
    ) -> int:
        """Ask for a run for each (payload, dedupe key); return how many keys were new."""
        require_job(job)
        return await ledger.enqueue_many(
            on,
            job.name,
            _dumped(job, requests),
            priority=priority,
            asked_by=self.job_name,
            caused_by=self.run_id,
        )

    async def record(self, outcomes: Iterable[BusinessOutcome], *, on: Connection) -> None:
        """Record outcomes per business."""
        await ledger.record_outcomes(on, self.run_id, outcomes)

    async def usual(self, count: str, *, on: Connection, job: str | None = None) -> Usual:
        """Return what the count of that name was in the last runs of `job`, or of this one."""
        return await ledger.usual(on, job or self.job_name, count)

    def fires_next(self, job: str) -> datetime | None:
        """Return when that job's schedule fires next; None without a schedule."""
        cron = self.schedules.get(job)
        return next_fire_time(cron.expression, self.zone, self.now) if cron else None

    async def keep_rehearsal(self, rehearsed: Sequence[Rehearsed], *, on: Connection) -> None:
        """Keep what this run says of runs to come."""
        await ledger.keep_rehearsal(on, self.run_id, rehearsed)

    async def compare_with_rehearsal(self, candidates: int, *, on: Connection) -> int | None:
        """Keep what there is to do beside the last rehearsal's number; return that."""
        return await ledger.compare_with_rehearsal(on, self.job_name, self.run_id, candidates)

    async def record_changed(self, *, on: Connection) -> None:
        """Record for each business how many of its rows this run has changed."""
        await ledger.record_changed(on, self.run_id)

    async def progress(self, counts: Counts, *, on: Connection) -> Counts:
        """Add to what this run has done; return the counts of all its attempts."""
        return await ledger.add_progress(on, self.ref, counts)

    async def finish(self, counts: Counts, *, on: Connection, undone: bool | str = False) -> Counts:
        """End the run in the handler's last transaction; return the counts."""
        before = self._finished.get(on)
        if self.ended is not None or (before is not None and not before.may_be_undone):
            raise MistakeError("ctx.finish was called twice. Call it once, in the handler's last transaction.")
        if not on.is_in_transaction():
            raise MistakeError(
                "ctx.finish was called outside a transaction. Call it inside `async with ctx.transaction() as tx`, "
                "with on=tx."
            )
        require_counts(counts)
        self.why_undone = undone if isinstance(undone, str) else None
        self._finished[on] = await ledger.finish(on, self.ref, counts, undone=undone)
        return counts


def _dumped(job: Job[P], requests: Iterable[tuple[P, str]]) -> Iterator[tuple[Mapping[str, typing.Any], str]]:
    for payload, key in requests:
        require_request(job, payload)
        yield payload.model_dump(mode="json"), key
