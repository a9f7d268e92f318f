"""
One attempt: bind the log, call the handler within its deadline, record how it ended.

It must survive whatever a handler does: raise, hang, swallow its cancellation, return late, lose its run. A handler
runs in a task of its own; one that does not end when it is cancelled is abandoned, its transactions are cut, and
the attempt goes on without it. A handler's exception never leaves this module; only our own cancellation does.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import structlog
from pydantic import ValidationError
from structlog.contextvars import bound_contextvars

from bon_scheduler import ledger
from bon_scheduler.database import TRANSIENT_ERRORS
from bon_scheduler.engine.attempt import Attempt, Leave, returned, to_its_end
from bon_scheduler.engine.context import AttemptContext
from bon_scheduler.engine.mistakes import waits_at
from bon_scheduler.engine.outcome import Outcome, invoke, judge
from bon_scheduler.engine.parts import RunnerParts
from bon_scheduler.engine.recorder import Recorder
from bon_scheduler.jobs import AnyJob, Connection, Counts, LostRunError, Payload, Retry, explain_payload
from bon_scheduler.ledger import (
    CALL_TIMEOUT_SECONDS,
    Claim,
    Claimant,
    Foreground,
    NewRun,
    Origin,
    Released,
    RunRef,
    UnreadableRunError,
)
from bon_scheduler.log import describe_error, where_now
from bon_scheduler.schedule import next_fire_time

__all__ = ["Runner"]

log = structlog.get_logger()
TOLERANCE = timedelta(days=1)
"""By how much the clock of whoever asked may be ahead of this one; the door judges by the minute."""
UNTIL_NEWER_TAKES_IT = timedelta(seconds=5)
DEADLINE_GRACE_SECONDS = 5.0
"""How long a handler may take to end once it is cancelled: to roll back, or to save what cannot be undone."""


class Runner:
    """
    Makes attempts for one worker; safe to call concurrently.

    Whoever claims holds `claiming`
    until the answer is registered, so that nobody takes a run for one that this process knows nothing of.
    """

    def __init__(self, parts: RunnerParts) -> None:
        self.claiming = asyncio.Lock()
        self.worker = parts.worker
        self._parts = parts
        self._recorder = Recorder(parts.control, parts.worker.outage)
        self._under_way: dict[RunRef, asyncio.Future[None]] = {}
        self._unrecorded: set[RunRef] = set()
        self._abandoned: set[asyncio.Task[Counts]] = set()

    @property
    def letters_apart(self) -> timedelta | None:
        """The time between two letters of all replicas; None while letters are only logged."""
        return self._parts.gate.apart if self._parts.gate else None

    @property
    def quarantined(self) -> str | None:
        """Why nothing may be taken from this ledger; None: it may."""
        return self._parts.quarantine.reason

    @property
    def seen(self) -> int:
        """The highest mark of the ledger that this process knows."""
        return self._parts.quarantine.seen

    @property
    def under_way(self) -> frozenset[RunRef]:
        """
        The attempts of this process, from the answer to their claim until they are recorded. Two may be of one run:
        a person cancelled and retried it, or another worker released it, and the first does not know yet.
        """
        return frozenset(self._under_way)

    @property
    def unrecorded(self) -> frozenset[RunRef]:
        """The attempts whose end could not be recorded, so that their runs may still be this worker's."""
        return frozenset(self._unrecorded)

    def forget_unrecorded(self, refs: Iterable[RunRef]) -> None:
        """Forget attempts whose runs this worker has let go of."""
        self._unrecorded.difference_update(refs)

    @property
    def abandoned(self) -> int:
        """How many handlers were cancelled and have not ended since."""
        return len(self._abandoned)

    def register(self, taken: Iterable[Claim]) -> None:
        """Note the runs of a claim, under `claiming`; `execute` follows for each."""
        loop = asyncio.get_running_loop()
        for claim in taken:
            self._under_way[claim.ref] = loop.create_future()

    def forget(self, ref: RunRef) -> None:
        """Undo `register`, of a claim that did not come to pass."""
        self._under_way.pop(ref, None)

    def drop(self, ref: RunRef) -> None:
        """Stop an attempt whose run is no longer its own: another took it over, or a person cancelled it."""
        dropped = self._under_way.get(ref)
        if dropped is not None and not dropped.done():
            dropped.set_result(None)

    async def claim_one(self, connection: Connection, run_id: UUID, job: AnyJob) -> Foreground:
        """Take a certain run for this worker."""
        return await self._claim_certain(
            ledger.claim_one(connection, run_id, sends_mail=job.sends_mail, by=self._claimant())
        )

    async def claim_new(self, connection: Connection, wanted: NewRun) -> Foreground:
        """Ask for a run and take it for this worker, or do neither."""
        return await self._claim_certain(ledger.claim_new(connection, wanted, by=self._claimant()))

    def _claimant(self) -> Claimant:
        self._parts.quarantine.refuse()
        return Claimant(self.worker.id, self.worker.host, self.letters_apart, self.seen)

    async def _claim_certain(self, asking: Awaitable[Foreground]) -> Foreground:
        async with self.claiming:
            answer = await asking
            if answer.claim is not None:
                self.register([answer.claim])
        return answer

    async def execute(
        self,
        job: AnyJob,
        claim: Claim,
        retry: Retry,
        *,
        leave: Leave = ledger.give_back,
        handled: Callable[[], None] = lambda: None,
    ) -> str:
        """
        Make the attempt that `claim` allows; return what became of it: the run's state, `given_back` or `lost`.

        `handled` is called once, when its handler has ended.
        """
        run_id = claim.ref.run_id
        if self._parts.gate is not None and claim.mail_slot is not None:
            self._parts.gate.admit(run_id, claim.mail_slot)
        try:
            return await self._execute(job, claim, retry, leave, handled)
        except Exception:
            self._unrecorded.add(claim.ref)
            raise
        finally:
            # Not before what happened to it is recorded.
            if (pending := self._recorder.pending(claim.ref)) is None:
                self.forget(claim.ref)
            else:
                pending.add_done_callback(lambda _: self.forget(claim.ref))
            if self._parts.gate is not None and claim.mail_slot is not None:
                await self._parts.gate.dismiss(run_id)

    async def give_back(self, taken: Iterable[Claim]) -> None:
        """Give back runs whose attempts have not begun, and the places of their letters."""
        for claim in taken:
            await self._recorder.write(claim.ref, partial(ledger.give_back, ref=claim.ref))
            self.forget(claim.ref)
            if self._parts.gate is not None and claim.mail_slot is not None:
                self._parts.gate.admit(claim.ref.run_id, claim.mail_slot)
                await self._parts.gate.dismiss(claim.ref.run_id)

    def report_released(self, run: Released) -> None:
        """Report a run that a dead worker had, and that this process has released."""
        if run.state != "dead":
            log.warning("run.rescued", job=run.job, run_id=str(run.run_id), attempt=run.attempt)
            self._parts.metrics.rescued.labels(run.job).inc()
            return
        error = "its worker died in every attempt"
        log.error("run.ended", job=run.job, run_id=str(run.run_id), attempt=run.attempt, outcome="dead", error=error)
        self._parts.metrics.attempt_ended(run.job, "dead", 0.0, {})
        self._parts.deadman.ended(run.job, "dead")

    async def _execute(self, job: AnyJob, claim: Claim, retry: Retry, leave: Leave, handled: Callable[[], None]) -> str:
        with bound_contextvars(job=job.name, run_id=str(claim.ref.run_id), attempt=claim.ref.attempt):
            started = time.perf_counter()
            ctx = self._context(job, claim)
            attempt = Attempt(job, claim, retry, leave, ctx, started)
            with bound_contextvars(fire_time=ctx.fire_time.isoformat()):
                log.info("run.started", origin=claim.origin)
                self._parts.deadman.started(job.name)
                if claim.origin is Origin.SCHEDULE and ctx.attempt == 1:
                    lateness = ctx.now - ctx.fire_time
                    self._parts.metrics.tick_lateness.labels(job.name).observe(max(0.0, lateness.total_seconds()))
                try:
                    outcome = await self._call(attempt)
                finally:
                    handled()
                    ctx.timings.report()
                state = await self._settle(ctx, outcome)
                self._report(attempt, state, outcome)
                return state

    async def settled(self) -> None:
        """Wait until everything that was being recorded is recorded."""
        await self._recorder.settled()

    def _context(self, job: AnyJob, claim: Claim) -> AttemptContext:
        now = self._parts.clock.now()
        cron = self._parts.schedules.get(job.name)
        return AttemptContext(
            ref=claim.ref,
            job_name=job.name,
            fire_time=_readable_fire_time(claim) or now,
            now=now,
            next_fire_time=next_fire_time(cron.expression, self._parts.zone, now) if cron else None,
            replay=claim.origin is Origin.PERSON and claim.fire_time_text is not None,
            retried=claim.retried,
            released=claim.released,
            zone=self._parts.zone,
            pool=self._parts.pool,
            resources=self._parts.resources,
            schedules=self._parts.schedules,
        )

    async def _call(self, attempt: Attempt) -> Outcome:
        job, claim, ctx = attempt.job, attempt.claim, attempt.ctx
        try:
            fire_time = claim.fire_time
            named = claim.fire_time_text is not None and claim.origin is not Origin.SCHEDULE
            if named and fire_time > ctx.now + TOLERANCE:
                return Outcome("dead", error=f"its fire time {fire_time.isoformat()} has not come")
            payload: Payload = job.payload.model_validate(claim.payload)
        except ValidationError as error:
            return await self._refuse(explain_payload(job, error))
        except UnreadableRunError as error:
            return Outcome("dead", error=str(error))
        handler = asyncio.create_task(invoke(job, ctx, payload), name=f"{job.name} {ctx.run_id}/{ctx.attempt}")
        try:
            stopped = await self._watch(job, ctx, handler)
        except asyncio.CancelledError:
            await to_its_end(self._leave(attempt, handler))
            raise
        wait = attempt.wait
        if stopped is not None and (not handler.done() or handler.cancelled() or handler.exception()):
            return replace(stopped, wait=wait)
        return judge(job, handler, wait)

    async def _refuse(self, why: str) -> Outcome:
        """Return what becomes of a run whose payload this version does not know: a newer one may, where it lives."""
        try:
            async with self._parts.control.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
                newer = await ledger.newer_serves(connection, self.worker.version)
        except TRANSIENT_ERRORS:
            newer = True  # nobody knows
        if newer:
            return Outcome("given_back", error=f"{why} A newer version may take it.", wait=UNTIL_NEWER_TAKES_IT)
        return Outcome("dead", error=why)

    async def _watch(self, job: AnyJob, ctx: AttemptContext, handler: asyncio.Task[Counts]) -> Outcome | None:
        """Wait for the handler, and stop it when its time is over or its run is lost; then say why."""
        dropped = self._under_way[ctx.ref]
        either: set[asyncio.Future[Any]] = {handler, dropped}
        await asyncio.wait(either, timeout=job.timeout.total_seconds(), return_when=asyncio.FIRST_COMPLETED)
        if handler.done():
            return None
        place = waits_at(job, handler)
        outcome = (
            Outcome("lost", error="another attempt owns the run")
            if dropped.done()
            else Outcome("timed_out", error=f"timed out after {job.timeout}{f', waiting at {place}' if place else ''}")
        )
        await self._stop(ctx, handler, DEADLINE_GRACE_SECONDS)
        return outcome

    async def _stop(self, ctx: AttemptContext, handler: asyncio.Task[Counts], grace_seconds: float) -> None:
        """Cancel a handler; abandon it, its transactions cut, when it has not ended after the grace."""
        handler.cancel()
        await asyncio.wait({handler}, timeout=grace_seconds)
        if handler.done():
            return
        ctx.sever()
        self._abandoned.add(handler)
        handler.add_done_callback(self._end_late)
        log.error("handler.abandoned", grace_seconds=grace_seconds, where=where_now(handler))

    def _end_late(self, handler: asyncio.Task[Counts]) -> None:
        self._abandoned.discard(handler)
        error = None if handler.cancelled() else handler.exception()
        log.warning("handler.ended_late", task=handler.get_name(), error=describe_error(error) if error else None)

    async def _leave(self, attempt: Attempt, handler: asyncio.Task[Counts]) -> None:
        """Stop the handler and let go of the run, because this process is stopping; end a run that has ended."""
        ctx, ended = attempt.ctx, handler.done()
        if not ended:
            await self._stop(ctx, handler, self._parts.farewell.total_seconds())
        if ended or returned(handler) or ctx.ended is not None:
            # What it did is not done once more.
            outcome = judge(attempt.job, handler, attempt.wait) if ended or returned(handler) else Outcome("succeeded")
            self._report(attempt, await self._settle(ctx, outcome), outcome)
            return
        await self._recorder.write(ctx.ref, lambda connection: attempt.leave(connection, ctx.ref))
        log.info("run.left")

    async def _settle(self, ctx: AttemptContext, outcome: Outcome) -> str:
        """Record how the attempt ended; return the run's state, or how the run was lost."""
        if ctx.ended is not None:
            if outcome.name != "succeeded":
                log.error("handler.raised_after_finish", error=outcome.error)
            return ctx.ended
        try:
            return await self._settle_as(ctx, outcome)
        except TRANSIENT_ERRORS:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the database refuses, it is not tried for ever
            log.error("attempt.unrecordable", outcome=outcome.name, error=describe_error(error))  # noqa: TRY400
            why = f"how it ended ({outcome.name}) cannot be recorded: {type(error).__name__}"
            return await self._settle_as(ctx, Outcome("dead", error=why))

    async def _settle_as(self, ctx: AttemptContext, outcome: Outcome) -> str:
        try:
            if outcome.name == "succeeded":
                return await self._recorder.finish(ctx.ref, outcome.counts)
            error, wait = outcome.error or "", outcome.wait
            if outcome.name == "given_back":
                give_back = partial(ledger.give_back, ref=ctx.ref, wait=wait, why=error)
                if await self._recorder.write(ctx.ref, give_back):
                    return outcome.name
            elif outcome.name == "held":
                hold = partial(ledger.hold, ref=ctx.ref, reason=error, figures=outcome.counts)
                return await self._recorder.write(ctx.ref, hold)
            elif outcome.name != "lost":
                fail = partial(ledger.fail, ref=ctx.ref, outcome=outcome.name, error=error, wait=wait)
                return await self._recorder.write(ctx.ref, fail)
        except LostRunError:
            pass
        lose = partial(ledger.lose, ref=ctx.ref, error="another attempt owns the run")
        recorded = await self._recorder.write(ctx.ref, lose)
        if recorded == outcome.name and recorded not in {"succeeded", "lost"}:
            # The first try at recording a failure took effect, and only its answer was lost.
            return recorded if recorded in {"given_back", "held"} else "dead" if outcome.wait is None else "retrying"
        if recorded == "lost":
            self._parts.metrics.fenced.labels(ctx.job_name).inc()
        return recorded

    def _report(self, attempt: Attempt, state: str, outcome: Outcome) -> None:
        job, seconds = attempt.job, time.perf_counter() - attempt.started
        why_undone = attempt.ctx.why_undone
        retry_in = round(outcome.wait.total_seconds(), 1) if outcome.wait else None
        if state == "given_back":
            # Not a warning for each: whoever knows what is lacking says it once.
            log.info("run.given_back", error=outcome.error, retry_in_seconds=retry_in)
            return
        fields = {"outcome": state, "duration_ms": round(seconds * 1000), "counts": dict(outcome.counts)}
        idle = state == "partial" and why_undone is not None
        if idle:
            log.warning("run.ended", **fields, error=why_undone)
        elif state in {"succeeded", "partial", "cancelled"}:
            log.info("run.ended", **fields)
        else:
            level = log.error if state in {"dead", "held"} else log.warning
            level("run.ended", **fields, error=outcome.error, retry_in_seconds=retry_in)
        self._parts.metrics.attempt_ended(job.name, state, seconds, outcome.counts)
        if state in {"succeeded", "partial"} and not idle:
            self._parts.metrics.succeeded(job.name, self._parts.clock.now())
        # One that has not done what it is for has not succeeded, and has not failed: the alarm rings when it is due.
        if not idle:
            self._parts.deadman.ended(job.name, state)


def _readable_fire_time(claim: Claim) -> datetime | None:
    try:
        return claim.fire_time
    except UnreadableRunError:
        return None  # `_call` ends the run
