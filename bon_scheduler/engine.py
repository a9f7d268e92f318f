"""
PgQueuer behind a small protocol: it brings runs to this worker, and nothing else.

It must survive what ends PgQueuer's `run()`: any database error, a lost LISTEN connection, a
database that restarts. A supervisor builds a new incarnation at once, while the handlers of the
old one go on: they run in tasks of ours, and PgQueuer's entrypoints only wait for them.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar
from uuid import UUID

import asyncpg
import structlog

from bon_scheduler import db
from bon_scheduler.attempts import Claim, Verdict
from bon_scheduler.jobs import AnyJob
from bon_scheduler.log import describe_error
from bon_scheduler.runner import Delivery, Runner

# AFTER db, which names our schema to PgQueuer before its first import.
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver  # isort: skip
from pgqueuer.adapters.persistence.queries import Queries  # isort: skip
from pgqueuer.core.qm import QueueManager  # isort: skip
from pgqueuer.domain.errors import RetryRequested  # isort: skip
from pgqueuer.domain.models import Job as QueueRow  # isort: skip
from pgqueuer.ports.driver import NotifyCallback  # isort: skip

__all__ = ["Engine"]

T = TypeVar("T")
log = structlog.get_logger()
BUSY_WAIT = timedelta(seconds=1)
"""How long a run waits when another run of its job is active, or its row is locked."""
ROOM_WAIT_SECONDS = 1.0
"""How long a run waits here for attempts that an earlier incarnation brought, before another replica may have it."""
POLL = timedelta(seconds=5)
LOOK_SECONDS = 3.0
QUERY_LIMIT_SECONDS = 6.0
"""With LOOK_SECONDS, within how long the loss of LISTEN is noticed."""
FAREWELL_SECONDS = 2.0
LONGEST_REBUILD_WAIT_SECONDS = 1.5
LISTENS = "select exists (select from pg_listening_channels())"


class _WatchedDriver(AsyncpgDriver):
    """PgQueuer's driver over one connection; says when it listens, and when it is broken."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        super().__init__(connection)
        self.listening = asyncio.Event()
        self.broken = asyncio.Event()
        connection.add_termination_listener(lambda _: self.broken.set())

    async def fetch(self, query: str, *args: object) -> list[dict[str, object]]:
        return await self._watched(super().fetch(query, *args))

    async def execute(self, query: str, *args: object) -> str:
        return await self._watched(super().execute(query, *args))

    async def add_listener(self, channel: str, callback: NotifyCallback) -> None:
        await super().add_listener(channel, callback)
        self.listening.set()

    async def keep_listening(self) -> None:
        """Return when this connection no longer listens, whoever or whatever took that from it."""
        await self.listening.wait()
        while (await self.fetch(LISTENS))[0]["exists"]:  # noqa: ASYNC110 - nobody says when a LISTEN is gone
            await asyncio.sleep(LOOK_SECONDS)
        self.broken.set()

    async def _watched(self, query: Awaitable[T]) -> T:
        # PgQueuer by itself reports a failed query only once its last handler has ended.
        try:
            async with asyncio.timeout(QUERY_LIMIT_SECONDS):
                return await query
        except (*db.TRANSIENT_ERRORS, asyncpg.PostgresError):
            self.broken.set()
            raise


class Engine:
    """Delivers runs of `jobs` to `runner`, at most `concurrency` at a time."""

    def __init__(
        self, *, url: str, jobs: Mapping[str, AnyJob], runner: Runner, concurrency: int, lease: timedelta
    ) -> None:
        self._url = url
        self._jobs = jobs
        self._runner = runner
        self._concurrency = concurrency
        self._lease = lease
        self._attempts: dict[UUID, asyncio.Task[Claim]] = {}
        self._room = asyncio.Semaphore(concurrency)
        self._stopping = asyncio.Event()
        self._driver: _WatchedDriver | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether the queue would bring a run to this worker now."""
        driver = self._driver
        return driver is not None and driver.listening.is_set() and not driver.broken.is_set()

    @property
    def draining(self) -> bool:
        """Whether this worker takes no more runs."""
        return self._stopping.is_set()

    @property
    def alive(self) -> bool:
        """Whether the supervisor lives; it outlives every fault, or this process is of no use."""
        return self._supervisor is not None and not self._supervisor.done()

    @property
    def active(self) -> int:
        """How many attempts are under way."""
        return len(self._attempts)

    @asynccontextmanager
    async def running(self, *, drain: timedelta) -> AsyncIterator["Engine"]:
        """
        Work inside the block. At its end take no more, let attempts finish for up to `drain`,
        then cancel them and give their runs back.
        """
        self._supervisor = asyncio.create_task(self._supervise(), name="engine")
        try:
            yield self
        finally:
            self._stopping.set()
            await self._drain(drain)
            await asyncio.wait([self._supervisor], timeout=FAREWELL_SECONDS)
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor], timeout=FAREWELL_SECONDS)

    async def _drain(self, patience: timedelta) -> None:
        if self._attempts:
            log.info("engine.draining", attempts=self.active, seconds=patience.total_seconds())
            await asyncio.wait(set(self._attempts.values()), timeout=patience.total_seconds())
        late = set(self._attempts.values())
        for task in late:
            task.cancel()
        if late:
            log.warning("engine.cancelled", attempts=len(late))
            await asyncio.wait(late, timeout=FAREWELL_SECONDS)
        await asyncio.wait([asyncio.create_task(self._runner.settled())], timeout=FAREWELL_SECONDS)

    async def _supervise(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                await self._incarnate()
                failures = 0
            except Exception as error:  # noqa: BLE001 - whatever ended PgQueuer, a new one is built
                wait = min(0.1 * 2**failures, LONGEST_REBUILD_WAIT_SECONDS) * random.uniform(0.5, 1.0)  # noqa: S311
                log.warning("engine.rebuilding", error=describe_error(error), wait_seconds=round(wait, 2))
                failures = 0 if self._driver and self._driver.listening.is_set() else min(failures + 1, 10)
                self._driver = None
                await _first_of(self._stopping.wait(), asyncio.sleep(wait))

    async def _incarnate(self) -> None:
        """Be one PgQueuer until it breaks or we stop."""
        async with db.connect(self._url, codecs=False, connect_seconds=db.SERVICE_CONNECT_SECONDS) as connection:
            driver = self._driver = _WatchedDriver(connection)
            manager = QueueManager(Queries(driver))
            over = asyncio.Event()
            for name in self._jobs:
                manager.entrypoint(name, accepts_context=False)(partial(self._deliver, over))
            running = asyncio.create_task(
                manager.run(
                    dequeue_timeout=POLL,
                    batch_size=self._concurrency // 2,
                    max_concurrent_tasks=self._concurrency,
                    heartbeat_timeout=self._lease,
                    shutdown_on_listener_failure=True,
                )
            )
            await _first_of(
                asyncio.shield(running), driver.keep_listening(), driver.broken.wait(), self._stopping.wait()
            )
            over.set()
            manager.shutdown.set()
            if driver.broken.is_set():
                connection.terminate()  # otherwise PgQueuer would wait for answers on it
            await asyncio.wait([running], timeout=FAREWELL_SECONDS)
            running.cancel()
            await asyncio.wait([running], timeout=FAREWELL_SECONDS)
            if running.done() and not running.cancelled() and (error := running.exception()):
                raise error
            if driver.broken.is_set():
                raise ConnectionError("the queue's connection was lost")

    async def _deliver(self, over: asyncio.Event, row: QueueRow) -> None:
        """PgQueuer's entrypoint: start the attempt in a task of ours, and wait for it or for our end."""
        run = Delivery(UUID((row.payload or b"").decode()), self._jobs[row.entrypoint])
        task = self._attempts.get(run.run_id) or await self._begin(run)
        await _first_of(asyncio.shield(task), over.wait())
        ended = task.done() and not task.cancelled() and task.exception() is None
        if ended and task.result().verdict in {Verdict.BUSY, Verdict.LOCKED}:
            raise RetryRequested(delay=BUSY_WAIT, reason="another run of this job is active")

    async def _begin(self, run: Delivery) -> asyncio.Task[Claim]:
        """Start an attempt once there is room: attempts outlive the incarnation that brought them."""
        try:
            async with asyncio.timeout(ROOM_WAIT_SECONDS):
                await self._room.acquire()
        except TimeoutError:
            raise RetryRequested(delay=timedelta(0), reason="this worker has no room") from None
        if self._stopping.is_set() or run.run_id in self._attempts:
            self._room.release()
            raise RetryRequested(delay=timedelta(0), reason="this worker is stopping, or has begun the run")
        task = asyncio.create_task(self._runner.attempt(run), name=f"attempt {run.job.name} {run.run_id}")
        self._attempts[run.run_id] = task
        task.add_done_callback(partial(self._forget, run))
        return task

    def _forget(self, run: Delivery, task: asyncio.Task[Claim]) -> None:
        del self._attempts[run.run_id]
        self._room.release()
        if not task.cancelled() and (error := task.exception()):
            # The run stays as the ledger has it; the reconciliation pass delivers it again.
            log.error("attempt.unrecorded", job=run.job.name, run_id=str(run.run_id), error=describe_error(error))


async def _first_of(*awaitables: Awaitable[object]) -> None:
    """Wait until the first of these ends, and cancel the waiting for the others."""
    waiting = {asyncio.ensure_future(awaitable) for awaitable in awaitables}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
