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
from bon_scheduler.database import TRANSIENT_ERRORS, Pool, require_endpoints, require_schema
from bon_scheduler.declared import JOBS, schedules_of
from bon_scheduler.engine import Deadman, DryRunner, Engine, Heartbeat, Reconciler, Runner, RunnerParts
from bon_scheduler.jobs import AnyJob, Cron
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
    reconciler: Reconciler
    runner: Runner
    metrics: Metrics
    stopping: asyncio.Event
    """Set once this process takes on nothing more."""


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

    `clock` is what handlers, letters and tokens go by; None: what the machine's and the database's are believed to say.
    """
    clock = clock or Clocks(SystemClock())
    lease = timedelta(seconds=settings.lease_seconds)
    schedules, metrics, worker = schedules_of(settings, jobs), Metrics(), Worker(serves=serves, lease=lease)
    stopping = asyncio.Event()
    await require_endpoints(settings)
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(database.open_pool(settings, worker=worker.id))
        control_pool = database.open_control_pool(settings, CONTROL_CONNECTIONS, worker=worker.id)
        control = await stack.enter_async_context(control_pool)
        async with control.acquire() as connection:
            await require_schema(connection)
            if isinstance(clock, Clocks):
                await clock.read(connection)
            await ledger.register_jobs(connection, jobs, scheduled=schedules, anew=serves)
        if serves:
            await _report_unusable(pool)
        await stack.enter_async_context(_registered(control, worker))
        beating = Heartbeat(url=settings.listen_url, worker=worker).running()
        heartbeat = await stack.enter_async_context(beating)
        resources = await stack.enter_async_context(_resources(settings, pool, metrics, clock, stopping))
        mailer = resources[Mailer]
        runner = Runner(
            RunnerParts(
                pool=pool,
                control=control,
                worker=worker,
                resources=resources,
                gate=mailer.gate if isinstance(mailer, Mailer) and settings.smtp_host is not None else None,
                schedules=schedules,
                zone=settings.bon_timezone,
                clock=clock,
                metrics=metrics,
                deadman=await stack.enter_async_context(Deadman.watching(settings.deadman_urls)),
                farewell=SERVICE_FAREWELL if serves else PERSON_FAREWELL,
            )
        )
        reconciler = await stack.enter_async_context(Reconciler(pool=control, runner=runner, worker=worker).running())
        by_name = {job.name: job for job in jobs}
        yield Machinery(pool, control, by_name, schedules, worker, heartbeat, reconciler, runner, metrics, stopping)


async def _report_unusable(pool: Pool) -> None:
    """Log what the role may not do in BON's tables, and which hide rows. Jobs that need them fail, others go on."""
    async with pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
        for refusal in await database.refusals(connection):
            log.error("privilege.missing", may_not=refusal.what, needed_by=refusal.users, remedy=refusal.grant)
        for table in await database.hidden_tables(connection):
            log.error("rows.hidden", table=table, remedy="See: python -m bon_scheduler check")


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
async def _resources(
    settings: Settings, pool: Pool, metrics: Metrics, clock: Clock, stopping: asyncio.Event
) -> AsyncIterator[Mapping[type, object]]:
    """Build what handlers get by type."""
    async with AsyncExitStack() as stack:
        shaam = await stack.enter_async_context(Shaam(settings))
        mailer = await stack.enter_async_context(Mailer(settings, pool, observe=metrics.letter_tried, clock=clock))
        resources: dict[type, object] = {Settings: settings, Shaam: shaam, Mailer: mailer}
        if settings.shaam_mode is not ShaamMode.MOCK and settings.shaam_encryption_key is not None:
            rotator = Rotator(
                settings=settings,
                pool=pool,
                shaam=shaam,
                metrics=metrics,
                clock=clock,
                stopping=stopping,
            )
            resources[Rotator] = await stack.enter_async_context(rotator.running())
        yield resources


@asynccontextmanager
async def serving(
    settings: Settings, *, jobs: Sequence[AnyJob] = JOBS, clock: Clock | None = None
) -> AsyncIterator[Serving]:
    """
    Run the service for the duration of the context.

    Left in the opposite order: triggers stop, attempts drain while readiness says so, probes and pool close.
    """
    clocks = Clocks(clock or SystemClock())
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
            reconciler=parts.reconciler,
            metrics=parts.metrics,
            worker=parts.worker,
        )
        async with (
            health.answering(probes, settings) as port,
            engine.running(drain=timedelta(seconds=settings.shutdown_seconds)),
            triggers.running(),
        ):
            log.info("service.started", port=port, version=parts.worker.version, jobs=sorted(parts.jobs))
            yield Serving(parts, engine, port)
            parts.stopping.set()
            log.info("service.stopping", attempts=engine.active)
    log.info("service.stopped")
