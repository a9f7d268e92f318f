"""
The composition root: everything is built here, in one stack, and nowhere else.

`machinery` is what any process needs that works on runs (`serve`, `run-once`); `serving` adds the
queue, the triggers and the health server. Nothing else imports health, and only `declared` imports handlers.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

import structlog

import health
from bon_scheduler import database, ledger
from bon_scheduler.clock import Clock, SystemClock
from bon_scheduler.config import Settings, ShaamMode
from bon_scheduler.database import TRANSIENT_ERRORS, Outage, Pool, Pools, require_endpoints, require_schema
from bon_scheduler.declared import JOBS, schedules_of
from bon_scheduler.engine import (
    Deadman,
    DryRunner,
    Engine,
    Heartbeat,
    Quarantine,
    Reconciler,
    Runner,
    RunnerParts,
    report_stood_aside,
)
from bon_scheduler.jobs import AnyJob, Connection, Cron
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS, Worker, register_worker, retire_worker
from bon_scheduler.log import describe_error
from bon_scheduler.mail import Mailer
from bon_scheduler.metrics import Metrics
from bon_scheduler.schedule import Clocks, Triggers
from bon_scheduler.shaam import Rotator, Shaam

__all__ = [
    "Machinery",
    "Serving",
    "dry_runner",
    "machinery",
    "prepare",
    "serving",
]

log = structlog.get_logger()
CONTROL_CONNECTIONS = 4
ANSWER_CONNECTIONS = 4
"""For what mail servers and the authority have answered."""
FAREWELL_SECONDS = 2.0
SERVICE_FAREWELL = timedelta(seconds=1)
"""A service has given its handlers SHUTDOWN_SECONDS before."""
PERSON_FAREWELL = timedelta(seconds=30)
"""Nobody sends a person's process a kill: what cannot be undone is saved first."""


@dataclass(frozen=True, slots=True)
class Machinery:
    """What works on runs in this process."""

    pool: Pool
    """For handlers."""
    control: Pool
    """For the ledger, ticks and probes, which busy handlers must not keep waiting."""
    jobs: Mapping[str, AnyJob]
    schedules: Mapping[str, Cron]
    worker: Worker
    heartbeat: Heartbeat
    quarantine: Quarantine
    reconciler: Reconciler
    runner: Runner
    metrics: Metrics
    mailer: Mailer
    rotator: Rotator | None
    stopping: asyncio.Event
    """Set once this process takes on nothing more."""

    @property
    def unanswered(self) -> int:
        """How many letters and tokens are on their way, whose answers must be recorded before this process ends."""
        return self.mailer.unanswered + (self.rotator.under_way if self.rotator else 0)

    def stop(self, left: timedelta) -> None:
        """Send nothing more for which `left` would not do, because this process ends then."""
        self.stopping.set()
        self.mailer.stop(left)


@dataclass(frozen=True, slots=True)
class Serving:
    """A service that is up: its machinery, what brings it runs, and the port its probes answer on."""

    machinery: Machinery
    engine: Engine
    port: int


async def prepare(settings: Settings, jobs: Sequence[AnyJob] = JOBS) -> list[str]:
    """Create or upgrade the schema and make the jobs known; return the migrations applied."""
    await require_endpoints(settings)  # BEFORE anything is locked, otherwise a pooler's server would keep the lock
    async with database.migrating(settings.listen_url) as (connection, applied):
        await ledger.register_jobs(connection, jobs, scheduled=schedules_of(settings, jobs))
        return applied


@asynccontextmanager
async def machinery(
    settings: Settings,
    *,
    jobs: Sequence[AnyJob] = JOBS,
    clock: Clock | None = None,
    serves: bool = False,
) -> AsyncIterator[Machinery]:
    """
    Run a worker for the duration of the context; one that `serves` also makes its jobs known.

    Raises QuarantinedError where the ledger is a copy; one that `serves` waits instead until a person adopts it.
    `clock` is what handlers, letters and tokens go by; None: what the machine's and the database's are believed to say.
    """
    clock = clock or Clocks(SystemClock())
    lease = timedelta(seconds=settings.lease_seconds)
    schedules = schedules_of(settings, jobs)
    takes = sorted(job.name for job in jobs) if serves else ()
    worker = Worker(serves=serves, lease=lease, settings=settings.readable(), jobs=takes)
    metrics = Metrics([job.name for job in jobs], version=worker.version)
    await require_endpoints(settings)
    async with AsyncExitStack() as stack:
        pools, control = await stack.enter_async_context(_connected(settings, worker))
        async with control.acquire() as connection:
            await require_schema(connection)
            if isinstance(clock, Clocks):
                await clock.read(connection)
            await ledger.register_jobs(connection, jobs, scheduled=schedules, anew=serves)
            if serves:
                await _introduce(connection, settings, metrics)
        looking = Quarantine(settings, control, serves=serves).watching(worker.outage)
        quarantine = await stack.enter_async_context(looking)
        await stack.enter_async_context(_registered(control, worker))
        heartbeat = await stack.enter_async_context(Heartbeat(url=settings.listen_url, worker=worker).running())
        outside = await stack.enter_async_context(_outside(settings, pools, metrics, clock, quarantine, worker.outage))
        runner = Runner(
            RunnerParts(
                pool=pools.work,
                control=control,
                worker=worker,
                resources=outside.by_type,
                gate=outside.mailer.gate if settings.smtp_host is not None else None,
                schedules=schedules,
                zone=settings.bon_timezone,
                clock=clock,
                metrics=metrics,
                deadman=outside.deadman,
                quarantine=quarantine,
                farewell=SERVICE_FAREWELL if serves else PERSON_FAREWELL,
            )
        )
        reconciler = await stack.enter_async_context(Reconciler(pool=control, runner=runner, worker=worker).running())
        told = (pools.work, control, {job.name: job for job in jobs}, schedules, worker)
        made = (heartbeat, quarantine, reconciler, runner, metrics)
        yield Machinery(*told, *made, mailer=outside.mailer, rotator=outside.rotator, stopping=outside.stopping)


@dataclass(frozen=True, slots=True)
class _Outside:
    """What calls somebody outside, and what handlers get by type."""

    mailer: Mailer
    rotator: Rotator | None
    deadman: Deadman
    by_type: Mapping[type, object]
    stopping: asyncio.Event


@asynccontextmanager
async def _outside(
    settings: Settings, pools: Pools, metrics: Metrics, clock: Clock, quarantine: Quarantine, outage: Outage
) -> AsyncIterator[_Outside]:
    stopping = asyncio.Event()
    async with (
        Mailer(settings, pools, observe=metrics.letter_tried, clock=clock) as mailer,
        Shaam(settings) as shaam,
        Deadman.watching(settings.deadman_urls, silent=lambda: quarantine.reason is not None) as deadman,
        AsyncExitStack() as stack,
    ):
        mailer.require_permission = quarantine.require
        by_type: dict[type, object] = {Settings: settings, Shaam: shaam, Mailer: mailer}
        rotator = None
        if settings.shaam_mode is not ShaamMode.MOCK:
            rotator = by_type[Rotator] = Rotator(
                settings=settings, pools=pools, shaam=shaam, metrics=metrics, clock=clock, stopping=stopping
            )
            rotator.unsaved.waits = lambda: quarantine.reason is not None
            await stack.enter_async_context(rotator.running(outage))
        yield _Outside(mailer, rotator, deadman, by_type, stopping)


@asynccontextmanager
async def _connected(settings: Settings, worker: Worker) -> AsyncIterator[tuple[Pools, Pool]]:
    """Open handlers' and answers' pools, and the one of the ledger, ticks and probes."""
    async with (
        database.open_pool(settings, worker=worker.id) as pool,
        database.open_control_pool(settings, ANSWER_CONNECTIONS, worker=worker.id) as answers,
        database.open_control_pool(settings, CONTROL_CONNECTIONS, worker=worker.id) as control,
    ):
        yield Pools(pool, answers), control


async def _introduce(connection: Connection, settings: Settings, metrics: Metrics) -> None:
    """Log what keeps this service from its work, and take from the ledger when each job last succeeded."""
    await _report_unusable(connection)
    await report_stood_aside(connection, settings)
    for name, succeeded_at in (await ledger.last_successes(connection)).items():
        metrics.succeeded(name, succeeded_at)


async def _report_unusable(connection: Connection) -> None:
    """Log what BON's tables lack, what the role may not do in them, and which hide rows. Jobs that need them fail."""
    if missing := await database.missing_columns(connection):
        tables = sorted({row["table_name"] for row in missing if row["no_table"]})
        columns = [f"{row['table_name']}.{row['column_name']}" for row in missing if not row["no_table"]]
        where = await database.name_of(connection)
        log.warning("tables.missing", database=where, tables=tables, columns=columns, remedy="See: bon-scheduler check")
    for refusal in await database.refusals(connection):
        log.error("privilege.missing", may_not=refusal.what, needed_by=refusal.users, remedy=refusal.grant)
    for table in await database.hidden_tables(connection):
        log.error("rows.hidden", table=table, remedy="See: bon-scheduler check")


@asynccontextmanager
async def dry_runner(
    settings: Settings, *, clock: Clock | None = None, out: int | None = None
) -> AsyncIterator[DryRunner]:
    """Make dry runs for the duration of the context: nothing is opened but the database, and this is no worker."""
    await require_endpoints(settings)
    async with database.open_pool(settings) as pool:
        async with pool.acquire() as connection:
            await require_schema(connection)
            # A job that no `serve` has made known yet is tried out first of all.
            await ledger.register_jobs(connection, JOBS, scheduled=schedules_of(settings), anew=False)
        yield DryRunner(pool, settings, clock or SystemClock(), schedules_of(settings), out)


@asynccontextmanager
async def _registered(pool: Pool, worker: Worker) -> AsyncIterator[None]:
    """Stand in the list of workers for the duration of the context."""
    async with pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
        await register_worker(connection, worker)
    try:
        yield
    finally:
        try:
            async with asyncio.timeout(FAREWELL_SECONDS), pool.acquire(timeout=FAREWELL_SECONDS) as connection:
                await retire_worker(connection, worker.id)
        except TRANSIENT_ERRORS as error:
            log.warning("worker.not_retired", error=describe_error(error))


@asynccontextmanager
async def serving(
    settings: Settings, *, jobs: Sequence[AnyJob] = JOBS, clock: Clock | None = None
) -> AsyncIterator[Serving]:
    """
    Run the service for the duration of the context.

    Left in the opposite order: triggers stop, attempts drain while readiness says so, probes and pool close.
    """
    clocks, drain = Clocks(clock or SystemClock()), timedelta(seconds=settings.shutdown_seconds)
    for name, found in database.protections(settings).items():
        if found.remedy:
            log.warning("database.exposed", setting=name, what=found.what, remedy=found.remedy)
    async with machinery(settings, jobs=jobs, clock=clock or clocks, serves=True) as parts:
        engine = Engine(
            connect=lambda: database.connect_worker(settings, parts.worker.id),
            jobs=parts.jobs,
            runner=parts.runner,
            concurrency=settings.worker_concurrency,
        )
        triggers = Triggers(
            pool=parts.control,
            declared={job.name: parts.schedules.get(job.name) for job in jobs},
            zone=settings.bon_timezone,
            clocks=clocks,
            worker=parts.worker,
            metrics=parts.metrics,
        )
        probes = health.Probes(
            pool=parts.pool,
            control=parts.control,
            engine=engine,
            triggers=triggers,
            heartbeat=parts.heartbeat,
            quarantine=parts.quarantine,
            reconciler=parts.reconciler,
            metrics=parts.metrics,
            worker=parts.worker,
            sends_mail=settings.smtp_host is not None,
            tables=database.tables_of(parts.jobs),
        )
        async with (
            health.answering(probes, settings) as port,
            engine.running(drain=drain, answered=parts.mailer.answered),
            triggers.running(allowed=parts.quarantine.allows),
        ):
            log.info("service.started", port=port, version=parts.worker.version, jobs=sorted(parts.jobs))
            yield Serving(parts, engine, port)
            parts.stop(drain)
            log.info("service.stopping", attempts=engine.active)
    log.info("service.stopped")
