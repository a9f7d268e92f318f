"""
What liveness and readiness mean.

Liveness never asks the database: a restart would not mend it. Readiness does, and also says
whether the queue would bring a run here and whether this process is draining.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import structlog

from bon_scheduler import ledger, mail, schedule, shaam
from bon_scheduler.database import TRANSIENT_ERRORS, Pool, SchemaBehindError, existing_tables, name_of, require_schema
from bon_scheduler.engine import Engine, Heartbeat, Quarantine, Reconciler
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import Worker
from bon_scheduler.log import describe_error
from bon_scheduler.metrics import Metrics
from bon_scheduler.schedule import Triggers

__all__ = ["Probes"]

T = TypeVar("T")
log = structlog.get_logger()
DATABASE_LIMIT_SECONDS = 3.0
NO_TABLES = "none of BON's tables that its jobs need is"
FRESH_SECONDS = 2.0
"""For so long figures of the database are not asked for again, whoever scrapes."""


@dataclass(slots=True)
class Shared(Generic[T]):
    """One call at a time, whose result is everybody's who asks meanwhile, and for `fresh_seconds` after its end."""

    call: Callable[[], Coroutine[Any, Any, T]]
    fresh_seconds: float = 0.0
    _task: "asyncio.Task[T] | None" = None
    _ended: float = 0.0

    async def __call__(self) -> T:
        """Return the result, or raise what the call raised; who asks may leave, and the call goes on."""
        task = self._task
        if task is None or (task.done() and time.monotonic() >= self._ended + self.fresh_seconds):
            task = self._task = asyncio.create_task(self._timed())
        return await asyncio.shield(task)

    async def _timed(self) -> T:
        try:
            return await self.call()
        finally:
            self._ended = time.monotonic()


@dataclass(frozen=True, slots=True)
class Probes:
    """Answers for one process."""

    pool: Pool
    """Handlers' pool, which is measured."""
    control: Pool
    """The pool that is asked."""
    engine: Engine
    triggers: Triggers
    heartbeat: Heartbeat
    quarantine: Quarantine
    reconciler: Reconciler
    metrics: Metrics
    worker: Worker
    sends_mail: bool
    """Whether there is a mail server to be up."""
    tables: frozenset[str] = frozenset()
    """Those of BON's that its jobs need: without any of them this is another database than BON's."""
    started: float = field(default_factory=time.monotonic)
    seen: set[str] = field(default_factory=set)
    """Which of `tables` were there when it was last asked; it is asked until one is."""
    failing: dict[str, str] = field(default_factory=dict)
    """Which metrics could not be brought up to date at the last scrape, and why."""
    refresh_metrics: Shared[None] = field(init=False)
    """Brings up to date what is read for a scrape; an unreachable database changes nothing."""
    check_database: Shared[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        """Have scrapes and probes share what they ask."""
        object.__setattr__(self, "refresh_metrics", Shared(self._refresh_metrics, FRESH_SECONDS))
        object.__setattr__(self, "check_database", Shared(self._check_database))

    def live(self) -> tuple[bool, dict[str, Any]]:
        """Report whether the loop turns (it does, to answer) and the supervised tasks live."""
        checks = {
            "engine": _up(self.engine.alive or self.engine.draining),
            "triggers": _up(self.triggers.alive or self.engine.draining),
            "heartbeat": _up(self.heartbeat.alive),
            "reconciler": _up(self.reconciler.alive),
        }
        return self._answer(checks)

    async def ready(self) -> tuple[bool, dict[str, Any]]:
        """Report whether this process may take work."""
        checks = {
            "database": await self.check_database(),
            "worker": _up(self.engine.connected),
            "place": _up(self.quarantine.reason is None) | {"reason": self.quarantine.reason},
            "draining": {"status": "down" if self.engine.draining else "up"},
            "schedules": _up(not self.triggers.unusable and not self.triggers.stuck)
            | {"unusable": dict(self.triggers.unusable), "stuck": dict(self.triggers.stuck)},
        }
        for name, check in checks.items():
            self.metrics.show_status(name, check["status"] == "up")
        return self._answer(checks)

    async def _refresh_metrics(self) -> None:
        self.metrics.check_status.labels("place").set(self.quarantine.reason is None)
        size, idle = self.pool.get_size(), self.pool.get_idle_size()
        self.metrics.pool_connections.labels("idle").set(idle)
        self.metrics.pool_connections.labels("used").set(size - idle)
        await self.ready()  # whose statuses are metrics as well
        asked: dict[str, Callable[[Connection], Awaitable[None]]] = {
            "queue": self._refresh_queue,
            "ticks": self._refresh_ticks,
            "rehearsals": self._refresh_rehearsals,
            "mail": self._refresh_mail,
            "shaam": self._refresh_shaam,
        }
        try:
            async with asyncio.timeout(DATABASE_LIMIT_SECONDS), self._control() as connection:
                while asked:
                    name = next(iter(asked))
                    await self._alone(name, asked[name], connection)
                    del asked[name]
        except TRANSIENT_ERRORS:
            # What is not known is absent: a figure of before the outage would be believed.
            for name in asked:
                self.metrics.forget(name)
                self.metrics.show_status(f"metrics-{name}", None)

    async def _alone(self, name: str, refresh: Callable[[Connection], Awaitable[None]], connection: Connection) -> None:
        """Refresh some metrics. What is wrong with them hides no other, the alert on it least of all."""
        try:
            await refresh(connection)
        except TRANSIENT_ERRORS:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are shown
            if self.failing.get(name) != (why := describe_error(error)):
                log.error("metrics.failed", metrics=name, error=why)  # noqa: TRY400
            self.failing[name] = why
            self.metrics.forget(name)
        else:
            self.failing.pop(name, None)
        self.metrics.show_status(f"metrics-{name}", name not in self.failing)

    async def _refresh_queue(self, connection: Connection) -> None:
        queue = await ledger.read_queue(connection)
        self.metrics.set_queue(queue.depths, queue.ages)

    async def _refresh_ticks(self, connection: Connection) -> None:
        for job, ticks in (await schedule.unaccounted(connection)).items():
            self.metrics.ticks_unaccounted.labels(job).set(ticks)

    async def _refresh_rehearsals(self, connection: Connection) -> None:
        for job, would_hold in (await ledger.would_hold(connection)).items():
            self.metrics.rehearsal_would_hold.labels(job).set(would_hold)

    async def _refresh_mail(self, connection: Connection) -> None:
        self.metrics.email_unknown.set(await mail.count_unknown(connection))
        if self.sends_mail:
            self.metrics.show_status("mail", (await mail.gate_state(connection)).closed_since is None)

    async def _refresh_shaam(self, connection: Connection) -> None:
        summary = await shaam.summarise(connection)
        self.metrics.shaam_min_ttl.set(summary.min_ttl_seconds)  # None, so absent, without any token
        self.metrics.shaam_needs_reauth.set(summary.needs_reauth)
        self.metrics.shaam_failing.set(summary.failing)
        self.metrics.consent_braked.set((await shaam.consent_brake(connection)).since is not None)

    async def watch_loop(self) -> None:
        """Measure, once a second, how late the event loop wakes a sleeper."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(1)
            self.metrics.loop_lag.observe(max(0.0, time.monotonic() - before - 1))

    def _control(self) -> AbstractAsyncContextManager[Connection]:
        """Borrow a connection; with a time-out, so that one which hangs is cut instead of waited for."""
        return self.control.acquire(timeout=DATABASE_LIMIT_SECONDS / 2)

    async def _check_database(self) -> dict[str, Any]:
        before = time.monotonic()
        try:
            async with asyncio.timeout(DATABASE_LIMIT_SECONDS), self._control() as connection:
                await require_schema(connection)
                if self.tables and not self.seen:
                    self.seen.update(await existing_tables(connection, self.tables))
                    if not self.seen:
                        return {"status": "down", "reason": f"{NO_TABLES} in database {await name_of(connection)}"}
        except SchemaBehindError as error:
            return {"status": "down", "reason": str(error)}
        except TRANSIENT_ERRORS as error:
            return {"status": "down", "reason": type(error).__name__}
        seconds = time.monotonic() - before
        self.metrics.check_duration.labels("database").observe(seconds)
        return {"status": "up", "latency_ms": round(seconds * 1000)}

    def _answer(self, checks: dict[str, dict[str, Any]]) -> tuple[bool, dict[str, Any]]:
        well = all(check["status"] == "up" for check in checks.values())
        return well, {
            "status": "healthy" if well else "unhealthy",
            "checks": checks,
            "uptime": round(time.monotonic() - self.started, 1),
            "version": self.worker.version,
        }


def _up(well: bool) -> dict[str, Any]:
    return {"status": "up" if well else "down"}
