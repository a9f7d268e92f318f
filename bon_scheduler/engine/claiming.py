"""
The engine: claims runs from the ledger as there is room for them, and has them run.

One connection listens for wake-ups and claims; a lost wake-up costs a poll at most. It must survive whatever ends that
connection, or takes its LISTEN away: a new one is made at once, while the attempts go on. A claim whose answer is lost
is given back by the reconciliation pass.
"""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import TypeAlias

import asyncpg
import structlog

from bon_scheduler import ledger
from bon_scheduler.engine.runner import Runner
from bon_scheduler.jobs import AnyJob
from bon_scheduler.ledger import Claim, Claims, Demand, RunRef, Wanted
from bon_scheduler.log import describe_error

__all__ = ["CHANNEL", "Engine"]

Connect: TypeAlias = "Callable[[], AbstractAsyncContextManager[asyncpg.Connection[asyncpg.Record]]]"
Answered: TypeAlias = Callable[[], Awaitable[bool]]
"""Waits until the answers to what handlers have sent are recorded; whether there was any to wait for."""
log = structlog.get_logger()
CHANNEL = "bon_scheduler_runs"
"""Of the notifications that wake workers; see the SQL function `wake_workers`."""
POLL_SECONDS = 2.0
"""How long to sleep without a wake-up, and how soon the loss of LISTEN is noticed."""
LOOK_AT_CLOCK_SECONDS = 1.0
"""How often at most to look for runs whose instant has come."""
CLAIM_SECONDS = 6.0
"""A claim that takes longer has lost its server."""
EMPTY_PAUSE_SECONDS = 0.005
"""After a claim that found nothing, how long until the next."""
GATHER_SECONDS = 0.002
"""While runs wait, how long to let places gather before the next claim."""
WAITS_FOR_AN_INSTANT = frozenset({"retrying", "given_back"})
FAREWELL_SECONDS = 2.0
ANSWERED_SECONDS = 1.0
"""How long an attempt may take to end once its letter is answered."""
LONGEST_RECONNECT_WAIT_SECONDS = 1.5
RESERVE_SHARE = 4
"""One place in so many is kept for jobs of which nothing runs here, so that no job keeps another from starting."""
OLDEST_FIRST_EVERY = 8
"""Of so many claims one takes the oldest run of each job first, so that runs of a low priority move."""


class Engine:
    """Claims runs of `jobs` for `runner`, at most `concurrency` at a time. `connect` opens its connection."""

    def __init__(self, *, connect: Connect, jobs: Mapping[str, AnyJob], runner: Runner, concurrency: int) -> None:
        self._connect = connect
        self._jobs = jobs
        self._runner = runner
        self._concurrency = concurrency
        self._reserve = min(-(-concurrency // RESERVE_SHARE), concurrency - 1, len(jobs) - 1)
        self._attempts: dict[RunRef, asyncio.Task[str]] = {}
        self._backlog = False
        self._handling: dict[RunRef, str] = {}
        self._numbers = itertools.count(1)
        self._look_at_clock_at = 0.0
        self._awake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether a run would be claimed by this worker now."""
        return self._connection is not None and not self._connection.is_closed()

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

    @property
    def _room(self) -> int:
        """How many handlers may begin."""
        return self._concurrency - len(self._handling)

    @asynccontextmanager
    async def running(self, *, drain: timedelta, answered: Answered) -> AsyncIterator["Engine"]:
        """
        Work for the duration of the context. At its end take no more, let attempts finish for up to `drain` and until
        what they have sent is `answered`, then cancel them and give their runs back.
        """
        self._supervisor = asyncio.create_task(self._supervise(), name="engine")
        try:
            yield self
        finally:
            self._stopping.set()
            self._awake.set()
            await asyncio.wait([self._supervisor], timeout=FAREWELL_SECONDS)
            self._supervisor.cancel()
            await self._drain(drain, answered)
            await asyncio.wait([self._supervisor], timeout=FAREWELL_SECONDS)

    async def _drain(self, patience: timedelta, answered: Answered) -> None:
        if self._attempts:
            log.info("engine.draining", attempts=self.active, seconds=patience.total_seconds())
            await asyncio.wait(set(self._attempts.values()), timeout=patience.total_seconds())
        late = set(self._attempts.values())
        if late and await answered():  # otherwise whoever takes such a run would find its letter `unknown`
            await asyncio.wait(late, timeout=ANSWERED_SECONDS)
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
                await self._work()
            except Exception as error:  # noqa: BLE001 - whatever ended the connection, a new one is made
                wait = min(0.1 * 2**failures, LONGEST_RECONNECT_WAIT_SECONDS) * random.uniform(0.5, 1.0)  # noqa: S311
                self._runner.worker.outage.failed("engine", error)
                failures = 0 if self._connection is not None else min(failures + 1, 10)
                self._connection = None
                await _within(wait, self._stopping)

    async def _work(self) -> None:
        """Claim and run until the connection breaks or this worker stops."""
        async with self._connect() as connection:
            connection.add_termination_listener(lambda _: self._awake.set())
            await connection.add_listener(CHANNEL, lambda *_: self._awake.set())
            self._look_at_clock_at = 0.0
            while not self._stopping.is_set():
                # BEFORE the claim, otherwise what comes while it is on the way would be overlooked.
                self._awake.clear()
                if connection.is_closed():
                    raise ConnectionError("the engine's connection was lost")
                wait = await self._claim(connection)
                self._connection = connection
                self._runner.worker.outage.answered("engine")
                await _within(wait, self._awake)
                if self._backlog and self._room < self._concurrency / 2:
                    await asyncio.sleep(GATHER_SECONDS)

    async def _claim(self, connection: "asyncpg.Connection[asyncpg.Record]") -> float:
        """Claim what there is room for and begin it; return the seconds after which to look again unless woken."""
        room = self._room
        if room <= 0 or self._runner.quarantined is not None:
            return POLL_SECONDS  # a handler that ends wakes us
        now = asyncio.get_running_loop().time()
        look_at_clock = now >= self._look_at_clock_at
        try:
            async with self._runner.claiming, asyncio.timeout(CLAIM_SECONDS):
                answer = await self._ask(connection, room, look_at_clock)
                self._runner.register(answer.taken)
        except (asyncpg.LockNotAvailableError, asyncpg.UniqueViolationError) as error:
            log.info("claim.repeated", error=describe_error(error))
            return random.uniform(0.02, 0.1)  # noqa: S311 - jitter, not a secret
        if answer.taken:
            took = round((asyncio.get_running_loop().time() - now) * 1000, 1)
            jobs = dict(Counter(each.job for each in answer.taken))
            log.debug("runs.claimed", room=room, claimed=len(answer.taken), jobs=jobs, took_ms=took)
        if self._stopping.is_set():
            await self._runner.give_back(answer.taken)
            return 0
        for each in answer.taken:
            self._begin(each)
        self._backlog = bool(answer.taken)
        if not answer.listens:
            raise ConnectionError("the engine's connection does not listen any more")
        wait = POLL_SECONDS if answer.wait_seconds is None else min(answer.wait_seconds, POLL_SECONDS)
        if look_at_clock:
            self._look_at_clock_at = now + min(wait, LOOK_AT_CLOCK_SECONDS)
        if not answer.taken:
            # However many wake-ups come, they cost no more than this.
            await asyncio.sleep(EMPTY_PAUSE_SECONDS)
        return wait

    async def _ask(self, connection: "asyncpg.Connection[asyncpg.Record]", room: int, look_at_clock: bool) -> Claims:
        wanted, here = [], Counter(self._handling.values())
        for name, job in self._jobs.items():
            active = here[name]
            mine = room if job.at_once_here is None else min(room, job.at_once_here - active)
            wanted.append(Wanted(name, mine, active, job.at_once, job.sends_mail))
        return await ledger.claim(
            connection,
            Demand(
                worker=self._runner.worker.id,
                host=self._runner.worker.host,
                room=room,
                reserve=self._reserve,
                wanted=wanted,
                letters_apart=self._runner.letters_apart,
                look_at_clock=look_at_clock,
                oldest_first=next(self._numbers) % OLDEST_FIRST_EVERY == 0,
                seen=self._runner.seen,
            ),
        )

    def _begin(self, taken: Claim) -> None:
        job = self._jobs[taken.job]
        attempt = self._runner.execute(job, taken, job.retry, handled=partial(self._leave_room, taken))
        task = asyncio.create_task(attempt, name=f"attempt {job.name} {taken.ref.run_id}")
        self._attempts[taken.ref] = task
        self._handling[taken.ref] = job.name
        task.add_done_callback(partial(self._end, taken))

    def _leave_room(self, taken: Claim) -> None:
        """Free the place of a handler that has ended: recording how it ended needs none."""
        self._handling.pop(taken.ref, None)
        self._awake.set()

    def _end(self, taken: Claim, task: "asyncio.Task[str]") -> None:
        del self._attempts[taken.ref]
        self._leave_room(taken)  # what must not run beside it may run now
        if task.cancelled():
            return
        if error := task.exception():
            # The run stays as the ledger has it; the reconciliation pass gives it back.
            log.error("attempt.unrecorded", job=taken.job, run_id=str(taken.ref.run_id), error=describe_error(error))
        elif task.result() in WAITS_FOR_AN_INSTANT:
            self._look_at_clock_at = 0.0


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Wait for the event, at most for so long."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
