"""
One attempt: claim the run, bind the log, call the handler within its deadline, record how it ended.

It must survive whatever a handler does: raise, hang, swallow its cancellation's cause, return late,
lose its run. A handler's exception never leaves this module; only our own cancellation does.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import asyncpg
import structlog
from pydantic import ValidationError
from structlog.contextvars import bound_contextvars

from bon_scheduler import attempts
from bon_scheduler.attempts import Claim, RunRef, Verdict
from bon_scheduler.clock import Clock
from bon_scheduler.context import AttemptContext
from bon_scheduler.db import TRANSIENT_ERRORS, Pool
from bon_scheduler.deadman import Deadman
from bon_scheduler.jobs import (
    AnyJob,
    Connection,
    Counts,
    Cron,
    LostRunError,
    NeverRetryError,
    Payload,
    Retry,
    RetryLaterError,
)
from bon_scheduler.ledger import Origin
from bon_scheduler.log import describe_error, where
from bon_scheduler.metrics import Metrics
from bon_scheduler.timing import next_fire_time
from bon_scheduler.workers import Worker

__all__ = ["Delivery", "Runner", "explain_payload"]

T = TypeVar("T")
log = structlog.get_logger()
LONGEST_RECORDING_WAIT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """A run that was brought to this worker, and its job."""

    run_id: UUID
    job: AnyJob


@dataclass(frozen=True, slots=True)
class _Ending:
    """How an attempt ended: its outcome, and what the run becomes."""

    outcome: str
    counts: Counts = field(default_factory=dict)
    error: str | None = None
    wait: timedelta | None = None


def explain_payload(job: AnyJob, error: ValidationError) -> str:
    """Say which fields of a payload are wrong, without their values."""
    faults = "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'payload'}: {item['msg'][:1].lower()}{item['msg'][1:]}"
        for item in error.errors(include_url=False, include_input=False, include_context=False)
    )
    known = ", ".join(job.payload.model_fields) or "no fields"
    return f'The payload of "{job.name}" is not usable: {faults}. It takes: {known}.'


def _explain(error: BaseException) -> str:
    text = describe_error(error)
    if isinstance(error, asyncpg.UndefinedTableError | asyncpg.UndefinedColumnError):
        return f"{text}. See what BON's database lacks with: python -m bon_scheduler check"
    return text


class Runner:
    """Makes attempts for one worker; safe to call concurrently."""

    def __init__(
        self,
        *,
        pool: Pool,
        worker: Worker,
        resources: Mapping[type, object],
        schedules: Mapping[str, Cron],
        zone: ZoneInfo,
        lease: timedelta,
        clock: Clock,
        metrics: Metrics,
        deadman: Deadman,
    ) -> None:
        self._pool = pool
        self._worker = worker
        self._resources = resources
        self._schedules = schedules
        self._zone = zone
        self._lease = lease
        self._clock = clock
        self._metrics = metrics
        self._deadman = deadman
        self._recordings: set[asyncio.Task[object]] = set()

    async def attempt(self, run: Delivery) -> Claim:
        """Claim the run and, if it is ours, make one attempt at it; return what the claim said."""
        async with self._pool.acquire() as connection:
            claim = await self.claim(connection, run, run.job.retry)
        await self.execute(run.job, claim, run.job.retry)
        return claim

    async def claim(self, connection: Connection, run: Delivery, retry: Retry) -> Claim:
        """Take the run for this worker; jobs with a schedule are exclusive."""
        return await attempts.claim(
            connection,
            run.run_id,
            worker=self._worker.id,
            host=self._worker.host,
            lease=self._lease,
            allowed=retry.attempts,
            exclusive=run.job.schedule is not None,
        )

    async def execute(self, job: AnyJob, claim: Claim, retry: Retry) -> None:
        """Make the attempt that `claim` allows; do nothing when it allows none."""
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
            ending = await self._call(job, claim, ctx, retry)
            state = await self._settle(ctx, ending)
            seconds = time.perf_counter() - started
            self._report(job, state, ending, seconds)

    async def settled(self) -> None:
        """Wait until everything that was being recorded is recorded."""
        while self._recordings:
            await asyncio.wait(set(self._recordings))

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

    async def _call(self, job: AnyJob, claim: Claim, ctx: AttemptContext, retry: Retry) -> _Ending:
        try:
            payload: Payload = job.payload.model_validate(claim.payload)
        except ValidationError as error:
            return _Ending("dead", error=explain_payload(job, error))
        last = ctx.attempt - claim.given_back >= retry.attempts
        deadline = asyncio.timeout(job.timeout.total_seconds())
        try:
            async with deadline:
                counts = await job.handler(ctx, payload)
            return _Ending("succeeded", counts)
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) and task.cancelling():
                await self._stop(ctx)
                raise
            ending = _Ending("failed", error=describe_error(error))
        except LostRunError as error:
            return _Ending("lost", error=str(error))
        except NeverRetryError as error:
            return _Ending("dead", error=describe_error(error))
        except RetryLaterError as error:
            ending = _Ending("failed", error=describe_error(error), wait=error.after)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a handler never stops the service
            timed_out = isinstance(error, TimeoutError) and deadline.expired()
            text = f"timed out after {job.timeout}" if timed_out else _explain(error)
            log.warning("handler.raised", error=text, where=where(error))
            ending = _Ending("timed_out" if timed_out else "failed", error=text)
        wait = None if last else ending.wait or retry.wait(ctx.attempt)
        return replace(ending, wait=wait)

    async def _stop(self, ctx: AttemptContext) -> None:
        """Give the run back, because this process is stopping."""
        if ctx.ended is None:
            await self._record(lambda connection: attempts.give_back(connection, ctx.ref))
        log.info("run.given_back" if ctx.ended is None else "run.ended", outcome=ctx.ended)

    async def _settle(self, ctx: AttemptContext, ending: _Ending) -> str:
        """Record how the attempt ended; return the run's state."""
        if ctx.ended is not None:
            if ending.outcome != "succeeded":
                log.error("handler.raised_after_finish", error=ending.error)
            return ctx.ended
        try:
            if ending.outcome == "succeeded":
                return await self._record(lambda c: attempts.finish(c, ctx.ref, ending.counts))
            if ending.outcome != "lost":
                error, wait = ending.error or "", ending.wait
                return await self._record(
                    lambda c: attempts.fail(c, ctx.ref, outcome=ending.outcome, error=error, wait=wait)
                )
        except LostRunError:
            pass
        await self._record(lambda c: attempts.attempt_lost(c, ctx.ref, "another attempt owns the run"))
        self._metrics.fenced.labels(ctx.job_name).inc()
        return "lost"

    async def _record(self, write: Callable[[Connection], Awaitable[T]]) -> T:
        """Write to the ledger through outages and cancellation: what happened must be known."""
        task = asyncio.create_task(self._write(write))
        self._recordings.add(task)
        task.add_done_callback(self._recordings.discard)
        return await asyncio.shield(task)

    async def _write(self, write: Callable[[Connection], Awaitable[T]]) -> T:
        wait = 0.1
        while True:
            try:
                async with self._pool.acquire() as connection:
                    return await write(connection)
            except TRANSIENT_ERRORS as error:
                if self._pool.is_closing():
                    raise
                log.warning("ledger.unreachable", error=describe_error(error), retry_in_seconds=wait)
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
            wait = min(wait * 2, LONGEST_RECORDING_WAIT_SECONDS)

    def _report(self, job: AnyJob, state: str, ending: _Ending, seconds: float) -> None:
        fields = {"outcome": state, "duration_ms": round(seconds * 1000), "counts": dict(ending.counts)}
        if state in {"succeeded", "partial"}:
            log.info("run.ended", **fields)
        else:
            retry_in = round(ending.wait.total_seconds(), 1) if ending.wait else None
            level = log.error if state == "dead" else log.warning
            level("run.ended", **fields, error=ending.error, retry_in_seconds=retry_in)
        self._metrics.attempt_ended(job.name, state, seconds, ending.counts, self._clock.now())
        self._deadman.ended(job.name, state)
