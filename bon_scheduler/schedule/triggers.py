"""
Triggers: whatever wakes us, the question is which fire times are due and not in the ledger.

They must survive an alarm clock that rings early, late, in bursts or never (aiocron's callback only sets an
event, and each pass re-anchors it); any one clock that is wrong (`clocks`); being stopped for longer than
several ticks; a database that is away; other replicas doing the same; another version beside this one. So a
pass is the same whatever woke it: read the believed time, the schedule history and each job's last tick, plan
what is due, and account for it one statement a tick.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from zoneinfo import ZoneInfo

import aiocron
import structlog

from bon_scheduler import ledger
from bon_scheduler.database import TRANSIENT_ERRORS, Pool
from bon_scheduler.jobs import Connection, Cron
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS, TickVerdict, Worker
from bon_scheduler.log import describe_error
from bon_scheduler.metrics import Metrics
from bon_scheduler.schedule import schedules
from bon_scheduler.schedule.clocks import Clocks
from bon_scheduler.schedule.timing import Period, Tick, next_fire_time, overstays, plan

__all__ = ["Triggers"]

log = structlog.get_logger()
PASS_SECONDS = 15.0
AFTER_FAILURE_SECONDS = 1.0
NOT_ALLOWED_SECONDS = 2.0
LOOK_AT_CLOCKS_SECONDS = 1.0
NOTICED_STEP_SECONDS = 1.0
WAITING_SECONDS = 0.5
"""How soon to look again at a tick that waits for the one before it."""
MOST_TICKS_A_PASS = 500
"""Of one job, so that a long absence does not keep the other jobs waiting."""


async def _always() -> bool:
    return True


class Triggers:
    """The schedules of this process: what it declares, by job, and the passes that account for ticks."""

    def __init__(
        self,
        *,
        pool: Pool,
        declared: Mapping[str, Cron | None],
        zone: ZoneInfo,
        clocks: Clocks,
        worker: Worker,
        metrics: Metrics,
    ) -> None:
        self._pool = pool
        self._declared = declared
        self._zone = zone
        self._clocks = clocks
        self._worker = worker
        self._metrics = metrics
        self._loop: asyncio.Task[None] | None = None
        self._drift = clocks.drift()
        self._unusable: dict[str, str] = {}
        self._stuck: dict[str, str] = {}

    @property
    def unusable(self) -> Mapping[str, str]:
        """Why the ticks of some jobs cannot be accounted for here, by job, as of the last pass."""
        return self._unusable

    @property
    def stuck(self) -> Mapping[str, str]:
        """Which run keeps a tick waiting for longer than a period, by job, as of the last pass."""
        return self._stuck

    @property
    def alive(self) -> bool:
        """Whether somebody would notice the next fire time."""
        return self._loop is not None and not self._loop.done()

    @asynccontextmanager
    async def running(self, *, allowed: Callable[[], Awaitable[bool]] = _always) -> AsyncIterator["Triggers"]:
        """Account for due fire times for the duration of the context, while that is `allowed`."""
        self._loop = asyncio.create_task(self._wake_and_account(allowed), name="triggers")
        try:
            yield self
        finally:
            self._loop.cancel()
            await asyncio.wait([self._loop])

    async def _wake_and_account(self, allowed: Callable[[], Awaitable[bool]]) -> None:
        rang = asyncio.Event()

        async def ring() -> None:
            rang.set()

        own = [cron.expression for cron in self._declared.values() if cron is not None]
        alarms = [aiocron.Cron(expression, ring, tz=self._zone) for expression in own]
        try:
            while True:
                for alarm in alarms:
                    alarm.start()  # anchors anew: aiocron samples the clocks once and never again
                try:
                    seconds = await self.make_pass() if await allowed() else NOT_ALLOWED_SECONDS
                    self._worker.outage.answered("triggers")
                except Exception as error:  # noqa: BLE001 - whatever failed, the ticks stay owed: look again
                    self._worker.outage.failed("triggers", error)
                    seconds = AFTER_FAILURE_SECONDS
                await self._wait(rang, seconds)
        finally:
            for alarm in alarms:
                alarm.stop()

    async def _wait(self, rang: asyncio.Event, seconds: float) -> None:
        """Wait until it rings, the seconds have passed, or the wall clock was set."""
        deadline = asyncio.get_running_loop().time() + seconds
        while (left := deadline - asyncio.get_running_loop().time()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, LOOK_AT_CLOCKS_SECONDS)):
                    await rang.wait()
            # Also when it rang, otherwise a step just before a ring would go unreported.
            if self._was_set() or rang.is_set():
                rang.clear()
                return

    def _was_set(self) -> bool:
        """Whether the wall clock was set since this was last asked; reported once."""
        before, self._drift = self._drift, self._clocks.drift()
        stepped = self._drift - before
        if abs(stepped) <= NOTICED_STEP_SECONDS:
            return False
        log.warning("clock.stepped", seconds=round(stepped))
        return True

    async def make_pass(self) -> float:
        """Declare what is not yet declared, account for all that is due; return the seconds to the next look."""
        async with self._pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
            now = await self._clocks.read(connection)
            histories = await schedules.read_histories(connection)
            changed = await schedules.declare(
                connection,
                schedules.Declaration(self._declared, self._zone, self._worker.id, self._worker.version),
                histories,
                now=now,
                first=self._clocks.database,
            )
            moved = self._clocks.all_agree and await schedules.bring_back(connection, histories, now)
            if changed or moved:
                histories = await schedules.read_histories(connection)
            last_ticks = await ledger.last_ticks(connection, list(histories.periods))
            wait, unusable = PASS_SECONDS, dict(histories.unusable)
            for job, last in last_ticks.items():
                try:
                    wait = min(wait, await self._account(connection, job, histories.periods[job], last, now))
                except TRANSIENT_ERRORS:
                    raise
                except Exception as error:  # noqa: BLE001 - whatever is wrong with one job, the others' ticks go on
                    unusable[job] = f"its ticks cannot be recorded: {describe_error(error)}"
        self._report_unusable(unusable)
        self._stuck = {job: why for job, why in self._stuck.items() if job in last_ticks}
        return wait

    def _report_unusable(self, unusable: Mapping[str, str]) -> None:
        """Remember which jobs' ticks this process cannot account for; log each once."""
        for job, why in unusable.items():
            if self._unusable.get(job) != why:
                log.error("schedule.unusable", job=job, error=why)
        for job in self._unusable.keys() - unusable.keys():
            log.info("schedule.usable", job=job)
        self._unusable = dict(unusable)

    async def _account(
        self, connection: Connection, job: str, history: Sequence[Period], last: datetime, now: datetime
    ) -> float:
        """Account for one job's due fire times; return the seconds until it is to be looked at again."""
        # In a thread: after a long absence it counts for a second, and everything else would stand still.
        ticks = await asyncio.to_thread(plan, history, last, now)
        for done, tick in enumerate(ticks):
            if done == MOST_TICKS_A_PASS:
                return 0
            verdict = await ledger.record_tick(
                connection,
                job,
                previous=last,
                in_force=history[-1].effective_from,
                fire_time=tick.fire_time,
                missed=tick.missed,
            )
            if verdict is TickVerdict.STALE:
                return 0  # another replica was first, or declared a schedule: look anew
            if verdict is TickVerdict.WAITS:
                await self._look_whether_stuck(connection, job, history, tick.fire_time, now)
                return WAITING_SECONDS
            last = tick.fire_time
            self._report(job, tick, verdict, now)
        self._stuck.pop(job, None)
        return self._until_next(job, history, now)

    async def _look_whether_stuck(
        self, connection: Connection, job: str, history: Sequence[Period], instant: datetime, now: datetime
    ) -> None:
        """Remember that the run before a waiting tick keeps it for longer than a period; log it once."""
        active = (await ledger.active_ticks(connection)).get(job)
        if active is None or not overstays(history, min(instant, active.fire_time), now, active.due):
            self._stuck.pop(job, None)
            return
        why = f"its tick waits behind run {active.run_id}; see it with: bon-scheduler show {active.run_id}"
        if self._stuck.get(job) != why:
            log.error("tick.stuck", job=job, fire_time=instant.isoformat(), behind=str(active.run_id))
        self._stuck[job] = why

    def _until_next(self, job: str, history: Sequence[Period], now: datetime) -> float:
        """Return the seconds until the job fires next: a ring that came early must not be the last."""
        period = history[-1]
        if period.cron is None:
            return PASS_SECONDS
        upcoming = next_fire_time(period.cron.expression, period.zone, max(now, period.effective_from))
        self._metrics.next_fire.labels(job).set(upcoming.timestamp())
        return (upcoming - now).total_seconds()

    def _report(self, job: str, tick: Tick, verdict: TickVerdict, now: datetime) -> None:
        fields = {"job": job, "fire_time": tick.fire_time.isoformat()}
        late = round((now - tick.fire_time).total_seconds(), 3)
        if verdict is TickVerdict.RECORDED:
            log.info("tick.recorded", **fields, late_seconds=late)
        elif verdict is TickVerdict.PAUSED:
            log.info("tick.paused", **fields, late_seconds=late)
        else:
            log.warning("tick.missed", **fields, reason=tick.missed, late_seconds=late)
            self._metrics.ticks_missed.labels(job).inc()
