"""
A dry run: the same handler, with every transaction rolled back, to see what it would do.

It holds locks no longer than a real run, sends nothing, calls nobody and enqueues nothing: letters go to a
directory, if one is given, and what a handler asks for is worked out inline, after it. The only thing written
is one row of the ledger, when all has ended, marked `dry_run`. Nothing is opened but the database.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from uuid import UUID, uuid4

import structlog

from bon_scheduler import ledger
from bon_scheduler.clock import Clock
from bon_scheduler.config import Settings, ShaamMode
from bon_scheduler.database import Pool
from bon_scheduler.engine.awaited import require_awaited
from bon_scheduler.engine.context import AttemptContext
from bon_scheduler.engine.mistakes import explain, require_job, require_request, require_transaction
from bon_scheduler.engine.outcome import invoke
from bon_scheduler.engine.run_once import Order, RunReport
from bon_scheduler.files import write_private
from bon_scheduler.jobs import AnyJob, BusinessOutcome, Connection, Counts, Cron, HeldError, Job, P, Payload
from bon_scheduler.ledger import DryRun, Row, RunRef
from bon_scheduler.log import where
from bon_scheduler.mail import Delivery, Letter, Mailer, find_settled, read_key, recipient_hash, write
from bon_scheduler.schedule import next_fire_time

__all__ = ["DryRunner"]

log = structlog.get_logger()
SAMPLE = 20
"""Of how many businesses is told what would change."""


@dataclass(frozen=True, slots=True)
class DryMailer:
    """Stands in for `Mailer`: says what it would answer, and keeps each letter as files where a directory is given."""

    settings: Settings
    pool: Pool
    clock: Clock
    out: int | None
    kept: Counter[str]
    """How many letters were written to `out`, by kind."""

    async def deliver(self, letter: Letter, *, run_id: UUID, attempt: int) -> Delivery:
        """Return what would become of the letter if the server takes it."""
        del run_id, attempt
        key = await read_key(self.pool)
        if (settled := await find_settled(self.pool, letter, key)) is not None:
            return settled
        written = write(letter, self.settings, now=self.clock.now(), key=key)
        if written is None:
            return Delivery.REFUSED
        if self.out is not None:
            who = recipient_hash(key, letter.business_id, letter.recipient)[-8:]
            _keep(self.out, letter, who, written.content)
            self.kept[letter.kind] += 1
        return Delivery.LOGGED if self.settings.smtp_host is None else Delivery.SENT


def _keep(directory: int, letter: Letter, who: str, content: bytes) -> None:
    """Write a letter as .html, .txt and .eml, for its reader alone; its name holds no address."""
    name = f"{letter.kind}-{letter.as_of}-{letter.business_id}-{who}"
    write_private(directory, f"{name}.html", letter.html.encode())
    write_private(directory, f"{name}.txt", letter.text.encode())
    write_private(directory, f"{name}.eml", content)


MOST_CAUSES = 10
"""How long a chain of runs, each caused by the one before, is worked out: a real one may end by what was committed."""
ENDLESS = f"not worked out: {MOST_CAUSES} runs before it caused one another"


@dataclass(slots=True)
class DryContext(AttemptContext):
    """A handler's `JobContext` in a dry run: an attempt's, of which every transaction is rolled back."""

    asked_for: list[tuple[AnyJob, Payload]] = field(default_factory=list)
    outcomes: dict[UUID, BusinessOutcome] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    finished_with: Counts = field(default_factory=dict)
    """What the handler gave to `finish`."""

    @property
    def dry_run(self) -> bool:
        """Whether everything is rolled back."""
        return True

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Borrow a connection in a transaction that is rolled back, however it ends."""
        # By name: a dataclass with slots is another class than the one that `super()` knows.
        async with AttemptContext.connection(self) as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                yield connection
            finally:
                if not connection.is_closed():
                    await transaction.rollback()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Open a transaction that is rolled back; `record`, `finish` and the fence are tried in it as in a real one."""
        async with self.connection() as connection:
            await ledger.pretend(connection, self.ref, self.job_name)
            yield connection
            require_awaited()
            require_transaction(connection)
            finished = self._finished.pop(connection, None) is not None
            self.ended = await ledger.fence(connection, self.ref, finished=finished) or self.ended

    async def enqueue(self, job: Job[P], payload: P, *, on: Connection, dedupe_key: str | None = None) -> UUID | None:
        """Remember to work this out; nothing is enqueued."""
        del on, dedupe_key
        require_request(job, payload)
        self.asked_for.append((job, payload))
        return uuid4()

    async def enqueue_many(
        self, job: Job[P], requests: Iterable[tuple[P, str]], *, on: Connection, priority: int = 0
    ) -> int:
        """Remember to work these out."""
        del on, priority
        require_job(job)
        before = len(self.asked_for)
        for payload, _ in requests:
            require_request(job, payload)
            self.asked_for.append((job, payload))
        return len(self.asked_for) - before

    async def record(self, outcomes: Iterable[BusinessOutcome], *, on: Connection) -> None:
        """Record outcomes as a run would, and remember them for the report."""
        outcomes = list(outcomes)
        await AttemptContext.record(self, outcomes, on=on)
        self._remember(outcomes)

    async def finish(self, counts: Counts, *, on: Connection, undone: bool | str = False) -> Counts:
        """Try to end the run in the handler's last transaction, and remember the counts."""
        self.finished_with = await AttemptContext.finish(self, counts, on=on, undone=undone)
        return counts

    def _remember(self, outcomes: Iterable[BusinessOutcome]) -> None:
        for new in outcomes:
            before = self.outcomes.get(new.business_id)
            if before is not None:
                added = dict(Counter(before.counts) + Counter(new.counts))
                kept = new.outcome == "kept" and before.outcome == "done"
                new = BusinessOutcome(  # noqa: PLW2901 - the two together
                    new.business_id, "done" if kept else new.outcome, added, new.error
                )
            self.outcomes[new.business_id] = new

    async def record_changed(self, *, on: Connection) -> None:
        """Do nothing: `progress` has, in the transaction that changed the rows."""

    async def progress(self, counts: Counts, *, on: Connection) -> Counts:
        """Try to add to the run's counts and to record its changes, and remember them: all of it is rolled back."""
        await AttemptContext.progress(self, counts, on=on)
        await AttemptContext.record_changed(self, on=on)
        self._remember(await ledger.count_changed(on, self.run_id))
        self.done.update(counts)
        return dict(self.done)


@dataclass(frozen=True, slots=True)
class DryRunner:
    """What dry runs of one process share."""

    pool: Pool
    settings: Settings
    clock: Clock
    schedules: Mapping[str, Cron]
    out: int | None
    """The opened directory where letters are kept as files; None: nowhere."""
    kept: Counter[str] = field(default_factory=Counter)
    """How many were, by kind."""

    async def run(self, order: Order) -> RunReport:
        """Do everything but keep it, then what it would cause; report as of a run that was real."""
        job, payload, fire_time = order.job, order.payload, order.fire_time
        started = self.clock.now()
        first = self._context(job, fire_time, released=order.released_for is not None)
        state, counts, error = await _attempt(job, first, payload)
        sample = _sampled(job, first, SAMPLE)
        caused: list[Row] = []
        waiting = deque((1, *asked_for) for asked_for in first.asked_for)
        while waiting:
            causes, job_asked_for, its_payload = waiting.popleft()
            if causes > MOST_CAUSES:
                caused.append(
                    {"run_id": None, "job": job_asked_for.name, "state": "queued", "counts": {}, "error": ENDLESS}
                )
                continue
            ctx = self._context(job_asked_for, self.clock.now())
            outcome = await _attempt(job_asked_for, ctx, its_payload)
            names = ("run_id", "job", "state", "counts", "error")
            caused.append(dict(zip(names, (None, job_asked_for.name, *outcome), strict=True)))
            sample += _sampled(job_asked_for, ctx, SAMPLE - len(sample))
            waiting.extend((causes + 1, *asked_for) for asked_for in ctx.asked_for)
        async with self.pool.acquire() as connection:
            await ledger.record_dry_run(
                connection,
                DryRun(
                    first.run_id,
                    job.name,
                    payload.model_dump(mode="json"),
                    fire_time,
                    order.asked_by,
                    state,
                    started,
                    counts,
                    error,
                ),
            )
            run = await ledger.find_run(connection, first.run_id)
        if run is None:
            raise LookupError(f"run {first.run_id} vanished from the ledger while it was being reported")
        return RunReport(run, _totals(first), caused, sample)

    def _context(self, job: AnyJob, fire_time: datetime, *, released: bool = False) -> DryContext:
        now, cron, zone = self.clock.now(), self.schedules.get(job.name), self.settings.bon_timezone
        mocking = self.settings.model_copy(update={"shaam_mode": ShaamMode.MOCK})
        return DryContext(
            ref=RunRef(uuid4(), 1, uuid4()),
            job_name=job.name,
            retried=False,
            released=released,
            fire_time=fire_time,
            now=now,
            next_fire_time=next_fire_time(cron.expression, zone, now) if cron else None,
            replay=True,
            zone=zone,
            pool=self.pool,
            schedules=self.schedules,
            resources={
                Settings: mocking,
                Mailer: DryMailer(self.settings, self.pool, self.clock, self.out, self.kept),
            },
        )


async def _attempt(job: AnyJob, ctx: DryContext, payload: Payload) -> tuple[str, Counts, str | None]:
    """Return the state, counts and error of one attempt."""
    try:
        async with asyncio.timeout(job.timeout.total_seconds()):
            counts = await invoke(job, ctx, payload)
    except HeldError as held:
        return "held", held.figures, str(held)
    except Exception as error:  # noqa: BLE001 - whatever a handler raises is what the dry run shows
        log.warning("dry_run.raised", job=job.name, error=explain(error, job), where=where(error))
        if ctx.ended is None:
            return "dead", {}, explain(error, job)
        counts = ctx.finished_with  # as of a run that was real: it has ended, whatever its handler does then
    undone = ctx.ended == "partial" or _totals(ctx)["failed"]
    return "partial" if undone else "succeeded", counts, ctx.why_undone


def _totals(ctx: DryContext) -> Row:
    failed = sum(outcome.outcome == "failed" for outcome in ctx.outcomes.values())
    return {"touched": len(ctx.outcomes), "failed": failed}


def _sampled(job: AnyJob, ctx: DryContext, most: int) -> list[Row]:
    return [
        {
            "job": job.name,
            "business_id": outcome.business_id,
            "outcome": outcome.outcome,
            "counts": dict(outcome.counts),
            "error": outcome.error,
        }
        for outcome in islice(ctx.outcomes.values(), most)
    ]
