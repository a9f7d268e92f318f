"""
One attempt: claim the run, bind the log, call the handler within its deadline, record how it ended.

It must survive whatever a handler does: raise, hang, swallow its cancellation, return late, lose its run. A handler
runs in a task of its own; one that does not end when it is cancelled is abandoned, its transactions are cut, and
the attempt goes on without it. A handler's exception never leaves this module; only our own cancellation does.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import structlog
from pydantic import ValidationError
from structlog.contextvars import bound_contextvars

from bon_scheduler import attempts
from bon_scheduler.attempts import Claim, RunRef, Verdict
from bon_scheduler.clock import Clock
from bon_scheduler.context import AttemptContext
from bon_scheduler.db import TRANSIENT_ERRORS, Pool
from bon_scheduler.deadman import Deadman
from bon_scheduler.endings import Ending, invoke, judge
from bon_scheduler.jobs import AnyJob, Connection, Counts, Cron, LostRunError, Payload, Retry, explain_payload
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS, Origin
from bon_scheduler.log import describe_error, where_now
from bon_scheduler.metrics import Metrics
from bon_scheduler.timing import next_fire_time
from bon_scheduler.workers import Worker

__all__ = ["Delivery", "Runner"]

T = TypeVar("T")
Leave: TypeAlias = Callable[[Connection, RunRef], Awaitable[object]]
"""What becomes of a run whose attempt is cut short because its process stops."""
log = structlog.get_logger()
LONGEST_RECORDING_WAIT_SECONDS = 2.0
DEADLINE_GRACE_SECONDS = 5.0
"""How long a handler may take to end once it is cancelled: to roll back, or to save what cannot be undone."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A run that was brought to this worker, and its job."""

    run_id: UUID
    job: AnyJob


@dataclass(slots=True)
class _UnderWay:
    """An attempt of this process: without `ref` while its claim is on the way."""

    ref: RunRef | None = None
    dropped: asyncio.Event = field(default_factory=asyncio.Event)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await what must not be cut short, however often this task is cancelled meanwhile."""
    task = asyncio.create_task(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    task.result()


class Runner:
    """
    Makes attempts for one worker; safe to call concurrently.

    `farewell` is how long a handler may take to end when this process is stopping.
    """

    def __init__(
        self,
        *,
        pool: Pool,
        control: Pool,
        worker: Worker,
        claims_at_once: int,
        resources: Mapping[type, object],
        schedules: Mapping[str, Cron],
        zone: ZoneInfo,
        clock: Clock,
        metrics: Metrics,
        deadman: Deadman,
        farewell: timedelta,
    ) -> None:
        self._pool = pool
        self._control = control
        self._worker = worker
        self._claims = asyncio.Semaphore(claims_at_once)
        self._resources = resources
        self._schedules = schedules
        self._zone = zone
        self._clock = clock
        self._metrics = metrics
        self._deadman = deadman
        self._farewell = farewell
        self._recordings: dict[UUID, asyncio.Task[Any]] = {}
        self._under_way: dict[UUID, _UnderWay] = {}
        self._abandoned: set[asyncio.Task[Counts]] = set()

    @property
    def under_way(self) -> dict[UUID, RunRef | None]:
        """The attempts of this process by run, until they are recorded; None for one whose claim is on the way."""
        return {run_id: attempt.ref for run_id, attempt in self._under_way.items()}

    @property
    def abandoned(self) -> int:
        """How many handlers were cancelled and have not ended since."""
        return len(self._abandoned)

    def drop(self, ref: RunRef) -> None:
        """Stop an attempt whose run is no longer its own: another took it over, or a person cancelled it."""
        attempt = self._under_way.get(ref.run_id)
        if attempt is not None and attempt.ref == ref:
            attempt.dropped.set()

    async def attempt(self, run: Delivery) -> Claim:
        """Claim the run and, if it is ours, make one attempt at it; return what the claim said."""
        claim: Claim | None = None
        try:
            # Few at once: one may wait for a lock, and ticks, recordings and probes must not wait with it.
            async with self._claims, self._control.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
                claim = await self.claim(connection, run, run.job.retry)
        except BaseException as error:
            # The claim may have committed and its connection been lost after: then the run is ours all the same.
            if claim is None or not isinstance(error, TRANSIENT_ERRORS):
                self._under_way.pop(run.run_id, None)
                raise
        await self.execute(run.job, claim, run.job.retry, leave=attempts.give_back)
        return claim

    async def claim(self, connection: Connection, run: Delivery, retry: Retry) -> Claim:
        """Take the run for this worker; jobs with a schedule are exclusive."""
        under_way = self._under_way[run.run_id] = _UnderWay()
        try:
            claim = await attempts.claim(
                connection,
                run.run_id,
                worker=self._worker.id,
                host=self._worker.host,
                allowed=retry.attempts,
                exclusive=run.job.schedule is not None,
            )
            under_way.ref = claim.ref
        finally:
            if under_way.ref is None:
                del self._under_way[run.run_id]
        return claim

    async def execute(self, job: AnyJob, claim: Claim, retry: Retry, *, leave: Leave) -> None:
        """Make the attempt that `claim` allows; do nothing when it allows none."""
        try:
            await self._execute(job, claim, retry, leave)
        finally:
            if claim.ref is not None:
                self._end(claim.ref.run_id)

    def _end(self, run_id: UUID) -> None:
        """Forget an attempt, but not before what happened to it is recorded."""
        recording = self._recordings.get(run_id)
        if recording is None:
            self._under_way.pop(run_id, None)
        else:
            recording.add_done_callback(lambda _: self._under_way.pop(run_id, None))

    async def _execute(self, job: AnyJob, claim: Claim, retry: Retry, leave: Leave) -> None:
        if claim.verdict is Verdict.EXHAUSTED:
            log.error("run.ended", job=job.name, outcome="dead", error="its worker died in every attempt")
            self._metrics.attempt_ended(job.name, "dead", 0.0, {}, self._clock.now())
            self._deadman.ended(job.name, "dead")
        if claim.ref is None:
            return
        ctx = self._context(job, claim, claim.ref)
        with bound_contextvars(
            job=job.name,
            run_id=str(ctx.run_id),
            attempt=ctx.attempt,
            fire_time=ctx.fire_time.isoformat(),
        ):
            started = time.perf_counter()
            log.info("run.started", origin=claim.origin)
            self._deadman.started(job.name)
            if claim.origin is Origin.SCHEDULE and ctx.attempt == 1:
                lateness = ctx.now - ctx.fire_time
                self._metrics.tick_lateness.labels(job.name).observe(max(0.0, lateness.total_seconds()))
            ending = await self._call(job, claim, ctx, retry, leave)
            state = await self._settle(ctx, ending)
            seconds = time.perf_counter() - started
            self._report(job, state, ending, seconds)

    async def settled(self) -> None:
        """Wait until everything that was being recorded is recorded."""
        while self._recordings:
            await asyncio.wait(set(self._recordings.values()))

    def _context(self, job: AnyJob, claim: Claim, ref: RunRef) -> AttemptContext:
        now = self._clock.now()
        cron = self._schedules.get(job.name)
        return AttemptContext(
            ref=ref,
            job_name=job.name,
            fire_time=claim.fire_time or claim.enqueued_at or now,
            now=now,
            next_fire_time=next_fire_time(cron.expression, self._zone, now) if cron else None,
            replay=claim.origin is Origin.PERSON and claim.fire_time is not None,
            zone=self._zone,
            pool=self._pool,
            resources=self._resources,
        )

    async def _call(self, job: AnyJob, claim: Claim, ctx: AttemptContext, retry: Retry, leave: Leave) -> Ending:
        try:
            payload: Payload = job.payload.model_validate(claim.payload)
        except ValidationError as error:
            return Ending("dead", error=explain_payload(job, error))
        handler = asyncio.create_task(invoke(job, ctx, payload), name=f"{job.name} {ctx.run_id}/{ctx.attempt}")
        try:
            stopped = await self._watch(job, ctx, handler)
        except asyncio.CancelledError:
            await _to_its_end(self._leave(ctx, handler, leave))
            raise
        number = ctx.attempt - claim.given_back
        wait = None if number >= retry.attempts else retry.wait(number)
        if stopped is not None and (not handler.done() or handler.cancelled() or handler.exception()):
            return replace(stopped, wait=wait)
        return judge(handler, wait)

    async def _watch(self, job: AnyJob, ctx: AttemptContext, handler: asyncio.Task[Counts]) -> Ending | None:
        """Wait for the handler, and stop it when its time is over or its run is lost; then say why."""
        dropped = asyncio.create_task(self._under_way[ctx.run_id].dropped.wait())
        try:
            seconds = job.timeout.total_seconds()
            await asyncio.wait({handler, dropped}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if handler.done():
                return None
            ending = (
                Ending("lost", error="another attempt owns the run")
                if dropped.done()
                else Ending("timed_out", error=f"timed out after {job.timeout}")
            )
            await self._stop(ctx, handler, DEADLINE_GRACE_SECONDS)
            return ending
        finally:
            dropped.cancel()

    async def _stop(self, ctx: AttemptContext, handler: asyncio.Task[Counts], grace_seconds: float) -> None:
        """Cancel a handler; abandon it, its transactions cut, when it has not ended after the grace."""
        handler.cancel()
        await asyncio.wait({handler}, timeout=grace_seconds)
        if handler.done():
            return
        ctx.sever()
        self._abandoned.add(handler)
        handler.add_done_callback(self._bury)
        log.error("handler.abandoned", grace_seconds=grace_seconds, where=where_now(handler))

    def _bury(self, handler: asyncio.Task[Counts]) -> None:
        self._abandoned.discard(handler)
        error = None if handler.cancelled() else handler.exception()
        log.warning("handler.ended_late", task=handler.get_name(), error=describe_error(error) if error else None)

    async def _leave(self, ctx: AttemptContext, handler: asyncio.Task[Counts], leave: Leave) -> None:
        """Stop the handler and let go of the run, because this process is stopping."""
        if not handler.done():
            await self._stop(ctx, handler, self._farewell.total_seconds())
        if ctx.ended is None:
            await self._record(ctx, lambda connection: leave(connection, ctx.ref))
        log.info("run.left" if ctx.ended is None else "run.ended", outcome=ctx.ended)

    async def _settle(self, ctx: AttemptContext, ending: Ending) -> str:
        """Record how the attempt ended; return the run's state, or how the run was lost."""
        if ctx.ended is not None:
            if ending.outcome != "succeeded":
                log.error("handler.raised_after_finish", error=ending.error)
            return ctx.ended
        try:
            return await self._settle_as(ctx, ending)
        except TRANSIENT_ERRORS:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the database refuses, it is not tried for ever
            log.error("attempt.unrecordable", outcome=ending.outcome, error=describe_error(error))  # noqa: TRY400
            why = f"how it ended ({ending.outcome}) cannot be recorded: {type(error).__name__}"
            return await self._settle_as(ctx, Ending("dead", error=why))

    async def _settle_as(self, ctx: AttemptContext, ending: Ending) -> str:
        try:
            if ending.outcome == "succeeded":
                return await self._record(ctx, lambda c: attempts.finish(c, ctx.ref, ending.counts))
            error, wait = ending.error or "", ending.wait
            if ending.outcome == "given_back":
                if await self._record(ctx, lambda c: attempts.give_back(c, ctx.ref, wait=wait, why=error)):
                    return ending.outcome
            elif ending.outcome != "lost":
                return await self._record(
                    ctx, lambda c: attempts.fail(c, ctx.ref, outcome=ending.outcome, error=error, wait=wait)
                )
        except LostRunError:
            pass
        outcome = await self._record(ctx, lambda c: attempts.lose(c, ctx.ref, "another attempt owns the run"))
        if outcome == ending.outcome and outcome not in {"succeeded", "lost"}:
            # The first try at recording a failure took effect, and only its answer was lost.
            return outcome if outcome == "given_back" else "dead" if ending.wait is None else "retrying"
        if outcome == "lost":
            self._metrics.fenced.labels(ctx.job_name).inc()
        return outcome

    async def _record(self, ctx: AttemptContext, write: Callable[[Connection], Awaitable[T]]) -> T:
        """Write to the ledger through outages and cancellation: what happened must be known."""
        task = asyncio.create_task(self._write(write))
        self._recordings[ctx.run_id] = task
        task.add_done_callback(lambda _: self._recordings.pop(ctx.run_id, None))
        return await asyncio.shield(task)

    async def _write(self, write: Callable[[Connection], Awaitable[T]]) -> T:
        wait = 0.1
        while True:
            try:
                async with self._control.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
                    return await write(connection)
            except TRANSIENT_ERRORS as error:
                if self._control.is_closing():
                    raise
                log.warning("ledger.unreachable", error=describe_error(error), retry_in_seconds=wait)
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
            wait = min(wait * 2, LONGEST_RECORDING_WAIT_SECONDS)

    def _report(self, job: AnyJob, state: str, ending: Ending, seconds: float) -> None:
        retry_in = round(ending.wait.total_seconds(), 1) if ending.wait else None
        if state == "given_back":
            # Not a warning for each: whoever knows what is lacking says it once.
            log.info("run.given_back", error=ending.error, retry_in_seconds=retry_in)
            return
        fields = {"outcome": state, "duration_ms": round(seconds * 1000), "counts": dict(ending.counts)}
        if state in {"succeeded", "partial", "cancelled"}:
            log.info("run.ended", **fields)
        else:
            level = log.error if state == "dead" else log.warning
            level("run.ended", **fields, error=ending.error, retry_in_seconds=retry_in)
        self._metrics.attempt_ended(job.name, state, seconds, ending.counts, self._clock.now())
        self._deadman.ended(job.name, state)
