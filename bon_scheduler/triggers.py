"""
Triggers: whatever wakes us, the question is which fire times are due and not in the ledger.

aiocron's callback only sets an event. It is an alarm clock that may ring early, late, in bursts or
never, so a pass every 15 s does the same, and each pass re-anchors it. Each due fire time is
recorded by one statement that also moves the job's last tick forwards, so that it is recorded once
however many replicas notice it.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from zoneinfo import ZoneInfo

import aiocron
import structlog

from bon_scheduler import ledger
from bon_scheduler.clock import Clock
from bon_scheduler.db import TRANSIENT_ERRORS, Pool
from bon_scheduler.jobs import Cron
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS
from bon_scheduler.log import describe_error
from bon_scheduler.metrics import Metrics
from bon_scheduler.timing import Tick, next_fire_time, plan

__all__ = ["Triggers"]

log = structlog.get_logger()
PASS_SECONDS = 15.0


class Triggers:
    """The schedules of this process: by job name, in one zone."""

    def __init__(
        self, *, pool: Pool, schedules: Mapping[str, Cron], zone: ZoneInfo, clock: Clock, metrics: Metrics
    ) -> None:
        self._pool = pool
        self._schedules = schedules
        self._zone = zone
        self._clock = clock
        self._metrics = metrics
        self._loop: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether somebody would notice the next fire time."""
        return self._loop is not None and not self._loop.done()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Triggers"]:
        """Record due fire times inside the block."""
        self._loop = asyncio.create_task(self._wake_and_record(), name="triggers")
        try:
            yield self
        finally:
            self._loop.cancel()
            await asyncio.wait([self._loop])

    async def _wake_and_record(self) -> None:
        rang = asyncio.Event()

        async def ring() -> None:
            rang.set()

        alarms = [aiocron.Cron(cron.expression, ring, tz=self._zone) for cron in self._schedules.values()]
        try:
            while True:
                for alarm in alarms:
                    alarm.start()  # anchors anew: aiocron samples the clocks once and never again
                try:
                    await self.record_due(self._clock.now())
                except TRANSIENT_ERRORS as error:
                    log.warning("triggers.unrecorded", error=describe_error(error))
                await self._wait_for(rang)
        finally:
            for alarm in alarms:
                alarm.stop()

    async def _wait_for(self, rang: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(PASS_SECONDS):
                await rang.wait()
        except TimeoutError:
            return
        finally:
            rang.clear()

    async def record_due(self, now: datetime) -> int:
        """Record every fire time due at `now` (UTC, aware); return how many this replica recorded."""
        recorded = 0
        async with self._pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
            last_ticks = await ledger.last_ticks(connection, list(self._schedules))
            for job, last in last_ticks.items():
                cron = self._schedules[job]
                for tick in plan(cron, self._zone, last, now):
                    run_id = await ledger.advance_tick(connection, job, tick.fire_time, missed=tick.missed)
                    if run_id is not None:
                        recorded += 1
                        self._report(job, tick, now)
        for job, cron in self._schedules.items():
            upcoming = next_fire_time(cron.expression, self._zone, now)
            self._metrics.next_fire.labels(job).set(upcoming.timestamp())
        return recorded

    def _report(self, job: str, tick: Tick, now: datetime) -> None:
        fields = {"job": job, "fire_time": tick.fire_time.isoformat()}
        late = round((now - tick.fire_time).total_seconds(), 3)
        if tick.missed:
            log.warning("tick.missed", **fields, reason=tick.missed, late_seconds=late)
        else:
            log.info("tick.recorded", **fields, late_seconds=late)
