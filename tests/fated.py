"""
Replicas that rotate tokens, and die where a test says: between any two steps they take, as `kill -9` would.

A step is a statement, a commit, a request, a file. A replica that has died takes none any more, so that nothing
its code does on the way out has an effect. What is under test is the real code on a real PostgreSQL, against the
real simulator over HTTP; only the doors it goes through are watched.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import orjson

from bon_scheduler.clock import SystemClock
from bon_scheduler.config import Settings
from bon_scheduler.database.connections import Pool, Pools
from bon_scheduler.engine.context import AttemptContext
from bon_scheduler.jobs import AnyJob, Counts, Payload
from bon_scheduler.ledger import entries as ledger
from bon_scheduler.ledger.entries import Request
from bon_scheduler.ledger.workers import Worker, register_worker
from bon_scheduler.metrics import Metrics
from bon_scheduler.shaam.client import Ambiguous, Answer, Refreshed, Shaam, Transient
from bon_scheduler.shaam.rotation import Rotator
from bon_scheduler.shaam.spool import ENTRY, HALF, Spool
from handlers.shaam_token_refresh import shaam_token_refresh
from tests.attempting import hold
from tests.tax import CIPHER

T = TypeVar("T")


class Crash(BaseException):
    """The process is no more."""


@dataclass(slots=True)
class Fate:
    """When a replica dies, and when its database and its disk fail it; steps are counted from when it was set."""

    crash_at: int | None = None
    outage: range = field(default_factory=lambda: range(0))
    answers_are_lost: bool = False
    """In the outage: statements take effect, and only their answers are lost."""
    disk_full: bool = False
    steps: int = 0
    dead: bool = False

    def step(self) -> None:
        if not self.dead:
            self.steps += 1
            self.dead = self.steps == self.crash_at
        if self.dead:
            raise Crash

    async def statement(self, execute: Callable[[], Awaitable[T]]) -> T:
        self.step()
        away = self.steps in self.outage
        if away and not self.answers_are_lost:
            raise ConnectionResetError
        value = await execute()
        if away:
            raise ConnectionResetError
        self.step()
        return value


class FatedConnection:
    def __init__(self, connection: Any, fate: Fate) -> None:
        self._connection = connection
        self._fate = fate

    def is_closed(self) -> bool:
        return bool(self._connection.is_closed())

    def is_in_transaction(self) -> bool:
        return bool(self._connection.is_in_transaction())

    def query_logger(self, callback: Any) -> Any:
        return self._connection.query_logger(callback)

    async def fetchval(self, *args: Any, **options: Any) -> Any:
        return await self._fate.statement(lambda: self._connection.fetchval(*args, **options))

    async def fetchrow(self, *args: Any, **options: Any) -> Any:
        return await self._fate.statement(lambda: self._connection.fetchrow(*args, **options))

    async def fetch(self, *args: Any, **options: Any) -> Any:
        return await self._fate.statement(lambda: self._connection.fetch(*args, **options))

    async def execute(self, *args: Any, **options: Any) -> Any:
        return await self._fate.statement(lambda: self._connection.execute(*args, **options))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        transaction = self._connection.transaction()
        await transaction.start()
        try:
            yield
        except BaseException:
            await transaction.rollback()
            raise
        try:
            self._fate.step()
        except Crash:
            await transaction.rollback()
            raise
        await self._fate.statement(transaction.commit)


class FatedPool:
    def __init__(self, pool: Pool, fate: Fate) -> None:
        self._pool = pool
        self._fate = fate

    @asynccontextmanager
    async def acquire(self, **_: Any) -> AsyncIterator[FatedConnection]:
        self._fate.step()
        async with self._pool.acquire() as connection:
            yield FatedConnection(connection, self._fate)


@dataclass(slots=True)
class Sendings:
    """Every sending of a token, by all replicas."""

    sent: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    """Those that did not spend the token, as far as anybody knows: each may be followed by another."""
    unanswered: Counter[str] = field(default_factory=Counter)
    """Those whose answer was lost, so that the token may have been spent."""
    under_way: Counter[str] = field(default_factory=Counter)
    overlapped: set[str] = field(default_factory=set)
    """Tokens that two replicas were sending at once."""

    def lose(self, token: str) -> None:
        """Account for an answer that nobody has."""
        self.again[token] += 1
        self.unanswered[token] += 1


class FatedShaam(Shaam):
    def __init__(self, settings: Settings, fate: Fate, sendings: Sendings) -> None:
        super().__init__(settings)
        self._fate = fate
        self._sendings = sendings
        self.answers: dict[str, str] = {}
        """By the token that was sent, the one that this process was given for it."""

    async def refresh(self, refresh_token: str) -> Answer:
        self._fate.step()
        sendings = self._sendings
        sendings.sent[refresh_token] += 1
        sendings.under_way[refresh_token] += 1
        if sendings.under_way[refresh_token] > 1:
            sendings.overlapped.add(refresh_token)
        try:
            answer = await super().refresh(refresh_token)
            self._fate.step()
        except BaseException:
            sendings.lose(refresh_token)
            raise
        finally:
            sendings.under_way[refresh_token] -= 1
        match answer:
            case Refreshed():
                self.answers[refresh_token] = answer.refresh_token
            case Transient(maybe_spent=True) | Ambiguous(maybe_spent=True):
                sendings.lose(refresh_token)
            case _:  # it was not spent; or refused for good, so that another sending harms nothing
                sendings.again[refresh_token] += 1
        return answer


class FatedSpool(Spool):
    def __init__(self, directory: Path, fate: Fate, unreadable: Collection[Path]) -> None:
        super().__init__(directory, CIPHER)
        self._fate = fate
        self._unreadable = unreadable

    def _open(self, path: Path) -> str | None:
        if path in self._unreadable:  # a file's permissions would not stop root
            raise PermissionError(13, "Permission denied")
        return super()._open(path)

    def write(self, text: str) -> None:
        self._fate.step()
        if self._fate.disk_full:
            raise OSError(28, "No space left on device")
        before = set(self._directory.iterdir())
        super().write(text)
        try:
            self._fate.step()
        except Crash:
            # Half of the time it had died just before the file was renamed.
            (entry,) = set(self._directory.iterdir()) - before
            if self._fate.steps % 2:
                entry.rename(entry.with_name(f".{entry.name.removesuffix(ENTRY)}{HALF}"))
            raise

    def remove(self, path: Path) -> None:
        self._fate.step()
        super().remove(path)
        self._fate.step()


@dataclass(slots=True)
class Replica:
    """One process, and its successors on the same spool."""

    pool: Pool
    settings: Settings
    sendings: Sendings
    seconds: Callable[[], float]
    spool: Path | None
    fate: Fate = field(default_factory=Fate)
    worker: Worker = field(default_factory=Worker)
    unreadable: set[Path] = field(default_factory=set)
    """Files of the spool that this process may not read."""
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _shaam: FatedShaam | None = None
    _rotator: Rotator | None = None

    @property
    def answers(self) -> dict[str, str]:
        """By the token that was sent, the one that the present process was given for it."""
        return self._shaam.answers if self._shaam is not None else {}

    async def start(self) -> None:
        self.fate, self._stack = Fate(), AsyncExitStack()
        self._shaam = await self._stack.enter_async_context(FatedShaam(self.settings, self.fate, self.sendings))
        self._rotator = Rotator(
            settings=self.settings,
            pools=Pools(*[cast("Pool", FatedPool(self.pool, self.fate))] * 2),
            shaam=self._shaam,
            metrics=Metrics(),
            clock=SystemClock(),
            stopping=asyncio.Event(),
        )
        self._rotator.breaker.seconds = self.seconds
        if self.spool is not None:
            spool = FatedSpool(self.spool, self.fate, self.unreadable)
            self._rotator.unsaved._spool, self._rotator._spool_id = spool, spool.id
        await self._stack.enter_async_context(self._rotator.running())

    async def stop(self) -> None:
        """End the process, in good order unless it is dead."""
        with suppress(Crash):
            await self._stack.aclose()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def run(
        self, payload: Payload, *, fire_time: datetime, job: AnyJob = shaam_token_refresh
    ) -> Counts | BaseException:
        """Make one attempt at a run; return its counts, or what ended it."""
        fate = self.fate
        request = Request(job.name, payload.model_dump(mode="json"), fire_time=fire_time)
        async with self.pool.acquire() as connection:
            await register_worker(connection, self.worker)
            run_id = await ledger.enqueue(connection, request)
            assert run_id is not None
            # Whatever runs beside it: this process and others may be at one business at once.
            await connection.execute("update bon_scheduler.runs set concurrency_key = null where id = $1", run_id)
            ref = await hold(connection, run_id, self.worker)
        assert self._shaam is not None
        assert self._rotator is not None
        ctx = AttemptContext(
            ref=ref,
            job_name=job.name,
            fire_time=fire_time,
            now=fire_time,
            next_fire_time=fire_time + timedelta(minutes=15),
            replay=False,
            retried=False,
            released=False,
            zone=self.settings.bon_timezone,
            pool=cast("Pool", FatedPool(self.pool, fate)),
            resources={Settings: self.settings, Shaam: self._shaam, Rotator: self._rotator},
        )
        try:
            return await job.handler(ctx, payload)
        except (Exception, Crash) as error:  # noqa: BLE001 - whatever ended it, the next run goes on from there
            return error

    async def offer(self) -> None:
        """Offer what this process keeps to the database."""
        assert self._rotator is not None
        await self._rotator.unsaved.offer()

    def kept(self) -> set[str]:
        """The refresh tokens in the spool, opened."""
        if self.spool is None:
            return set()
        entries = Spool(self.spool, CIPHER).entries()
        return {CIPHER.decrypt(orjson.loads(text)["refresh"]) for _, text in entries}
