"""
A small world to hurt: one PostgreSQL server, two replicas of the service, each behind a proxy, and work for them.

After every fault `settle` waits until all work that was asked for has ended, and claims what must hold whatever
happened: no run lost, no effect doubled or missing, none without its run, no process stuck.
"""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import asyncpg
import orjson

from bon_scheduler import service
from bon_scheduler.database import connections
from bon_scheduler.environment import load_settings
from tests.chaos.cluster import Cluster, running_cluster
from tests.chaos.program import JOBS
from tests.chaos.proxy import Proxy
from tests.process import Service, serve
from tests.waiting import until

PROGRAM = ("tests.chaos.program",)
LEASE_SECONDS = 3.0
SHUTDOWN_SECONDS = 1.0
SETTLED_SECONDS = 45.0
MOST_TOLD = 30
START_TRIES = 10
"""As often as a platform would start it again."""
ASK_EVERY_SECONDS = 0.08
ENVIRONMENT = {
    "LEASE_SECONDS": str(LEASE_SECONDS),
    "SHUTDOWN_SECONDS": str(SHUTDOWN_SECONDS),
    "DATABASE_POOL_SIZE": "6",
    "WORKER_CONCURRENCY": "12",
}
CREATE = """
    create table account (id int primary key, paid bigint not null default 0);
    insert into account select generate_series(1, 1000);
    create table witness (run_id uuid not null, attempt int not null, step int not null);
    create index on witness (run_id);
    create table not_alone (run_id uuid not null)
"""
# $1 job, $2 payload, $3 priority.
ASK = "select bon_scheduler.enqueue($1, $2, priority => $3)"
FIRST = 10
"""The priority of a run that shows that work goes on: before what has piled up in an outage."""
UNFINISHED = "select count(*) from bon_scheduler.runs where state in ('queued', 'running', 'retrying')"
# $1 runs.
NOT_SUCCEEDED = "select count(*) from bon_scheduler.runs where id = any ($1) and state <> 'succeeded'"
# $1 runs that were acknowledged.
LOST = """
    select asked.id, r.state::text as state, r.error
      from unnest($1::uuid[]) as asked (id)
      left join bon_scheduler.runs r on r.id = asked.id
     where r.state is distinct from 'succeeded' and r.job is distinct from 'poison'
"""
DOUBLED = "select run_id, step, count(*) from witness group by run_id, step having count(*) > 1"
# What committed without its run, or a run that succeeded without all of its effects.
AT_ODDS = """
    select r.id, r.job, r.state::text as state, r.attempt, count(w.run_id) as effects
      from bon_scheduler.runs r
      full join witness w on w.run_id = r.id
     group by r.id
    having r.id is null
        or count(w.run_id) <> case when r.state = 'succeeded' then (r.payload->>'steps')::int else 0 end
"""
STUCK = (
    """
    select r.id, r.job, r.state::text as state, r.attempt, r.run_at, r.error, w.pid,
           clock_timestamp() - w.seen_at as silent, r.ready, r.concurrency_key
      from bon_scheduler.runs r
      left join bon_scheduler.workers w on w.id = r.worker
     where r.state in ('queued', 'running', 'retrying')
     order by r.enqueued_at
     limit 8
    """,
    "select pid, clock_timestamp() - seen_at as silent from bon_scheduler.workers",
    """
    select pid, state, wait_event_type, wait_event, pg_blocking_pids(pid) as blocked_by,
           clock_timestamp() - state_change as since, left(query, 80) as query
      from pg_stat_activity
     where datname = 'bon' and (state <> 'idle' or cardinality(pg_blocking_pids(pid)) > 0) and pid <> pg_backend_pid()
    """,
)
BOOKS = "select (select sum(paid) from account) as paid, (select count(*) from witness) as witnessed"
NEVER_ENDED = """
    select r.id, r.state::text as state, r.attempt as attempts, r.given_back, a.attempt, a.started_at, a.outcome
      from bon_scheduler.attempts a
      join bon_scheduler.runs r on r.id = a.run_id
     where a.ended_at is null
"""


class Replica:
    """One process of the service behind a proxy of its own; `start` may be called again after its end."""

    def __init__(self, number: int, proxy: Proxy) -> None:
        self.number = number
        self.proxy = proxy
        self.service: Service | None = None
        self._stack = AsyncExitStack()

    @property
    def running(self) -> Service:
        assert self.service is not None, f"replica {self.number} is not running"
        return self.service

    @property
    def alive(self) -> bool:
        return self.service is not None and self.service.process.returncode is None

    def __str__(self) -> str:
        told = [
            f"{event.get('timestamp', '')[11:23]} {event['event']} {event.get('error') or event.get('where') or ''}"
            for event in self.running.events
            if event["event"] not in {"witness.phase", "run.started", "run.ended"} or event.get("outcome") == "lost"
        ]
        head = f"replica {self.number}, process {self.pid}, status {self.running.process.returncode}:"
        return "\n  ".join([head, *told[-MOST_TOLD:]])

    @property
    def pid(self) -> int:
        return self.running.process.pid

    @property
    def memory_bytes(self) -> int:
        resident_pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return resident_pages * 4096

    async def start(self) -> None:
        url = f"postgresql://postgres@127.0.0.1:{self.proxy.port}/bon"
        self.service = await self._stack.enter_async_context(serve(program=PROGRAM, DATABASE_URL=url, **ENVIRONMENT))

    async def end(self) -> None:
        """See to it that the process has ended."""
        await self._stack.aclose()
        self._stack = AsyncExitStack()

    async def answers(self, path: str) -> int:
        """Return the status that a probe gets; 0 for no answer."""
        url = f"http://127.0.0.1:{self.running.port}{path}"
        with suppress(aiohttp.ClientError, TimeoutError):
            async with aiohttp.ClientSession() as session, session.get(url, timeout=PROBE_LIMIT) as answer:
                return answer.status
        return 0


PROBE_LIMIT = aiohttp.ClientTimeout(total=5)


class World:
    """See the module; `asked` is every run whose asking was acknowledged."""

    def __init__(self, cluster: Cluster, replicas: list[Replica], rng: random.Random) -> None:
        self.cluster = cluster
        self.replicas = replicas
        self.rng = rng
        self.asked: list[UUID] = []
        self.events: list[dict[str, Any]] = []
        self._direct: asyncpg.Connection[asyncpg.Record] | None = None
        self._direct_lock = asyncio.Lock()
        self._feeders: asyncpg.Connection[asyncpg.Record] | None = None
        self._asking = asyncio.Lock()
        self._feeding = asyncio.Event()
        self._feeder: asyncio.Task[None] | None = None

    # Asking

    @asynccontextmanager
    async def direct(self) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
        """Have a connection past the proxies to oneself; raises what asyncpg raises while the server is away."""
        async with self._direct_lock:
            if self._direct is None or self._direct.is_closed():
                self._direct = await asyncpg.connect(
                    self.cluster.url(database="bon"),
                    timeout=5,
                    command_timeout=10,
                    # A fault of ours is not to hit us.
                    server_settings={"default_transaction_read_only": "off"},
                )
            yield self._direct

    async def fetch(self, query: str, *arguments: object) -> "list[asyncpg.Record]":
        async with self.direct() as connection:
            return list(await connection.fetch(query, *arguments))

    async def value(self, query: str, *arguments: object) -> Any:
        async with self.direct() as connection:
            return await connection.fetchval(query, *arguments)

    async def execute(self, *statements: str) -> None:
        async with self.direct() as connection:
            for statement in statements:
                await connection.execute(statement)

    async def ask(self, job: str, *, priority: int = 0, **payload: int) -> UUID:
        """Ask for a run on an account of its choice."""
        body = {"account": self.rng.randint(1, 1000), "steps": 1, **payload}
        run_id: UUID = await self.value(ASK, job, orjson.dumps(body).decode(), priority)
        self.asked.append(run_id)
        return run_id

    async def _feed(self) -> None:
        while True:
            await self._feeding.wait()
            async with self._asking:
                if self._feeding.is_set():
                    await self._ask_for_something()
            await asyncio.sleep(self.rng.uniform(0, 2 * ASK_EVERY_SECONDS))

    async def _ask_for_something(self) -> None:
        steps = self.rng.random() < 0.2
        span = self.rng.choice([0, 0, 20, 100, 400])
        job, body = ("pay-in-steps", {"steps": 3, "open": span // 2}) if steps else ("pay", {"steps": 1, "open": span})
        body |= {"account": self.rng.randint(1, 1000), "before": span // 2, "after": span // 2}
        connection = self._feeders
        try:
            if connection is None or connection.is_closed():
                connection = await asyncpg.connect(self.cluster.url(database="bon"), timeout=2, command_timeout=5)
            self.asked.append(await connection.fetchval(ASK, job, orjson.dumps(body).decode(), 0))
        except (*connections.TRANSIENT_ERRORS, asyncpg.PostgresError):
            if connection is not None:
                connection.terminate()
            connection = None
        self._feeders = connection

    @asynccontextmanager
    async def fed(self) -> AsyncIterator[None]:
        """Have work asked for all the time, but while the world settles."""
        self._feeder = asyncio.create_task(self._feed())
        self._feeding.set()
        try:
            yield
        finally:
            self._feeder.cancel()
            await asyncio.wait([self._feeder])
            if self._feeders is not None:
                await self._feeders.close()

    # Looking

    async def holder(self, run_id: UUID, phase: str) -> Replica:
        """Wait until a replica's handler is in a phase of a run; return the replica."""

        async def look() -> Replica | None:
            for replica in self.replicas:
                for event in reversed(replica.running.events[-2000:]):
                    if event.get("phase") == phase and event.get("run_id") == str(run_id):
                        return replica
            return None

        found = await until(look, seconds=20)
        assert found is not None
        return found

    async def next_started(self, run_id: UUID, attempt: int) -> None:
        """Wait until a later attempt of a run has started."""

        async def look() -> bool:
            return bool(await self.value("select attempt > $2 from bon_scheduler.runs where id = $1", run_id, attempt))

        await until(look, seconds=30)

    async def succeeded(self, *run_ids: UUID) -> None:
        """Wait until all of these runs have succeeded."""

        async def look() -> bool:
            return int(await self.value(NOT_SUCCEEDED, run_ids)) == 0

        await self._until(look, seconds=30)

    async def attempt_of(self, run_id: UUID) -> int:
        return int(await self.value("select attempt from bon_scheduler.runs where id = $1", run_id))

    async def working(self) -> float:
        """Wait until every replica says it is ready and a new run has succeeded; return the seconds that took."""
        before = time.monotonic()
        await asyncio.gather(*(self._until_ready(replica) for replica in self.replicas if replica.alive))
        await self.succeeded(await self.ask("pay", priority=FIRST))
        return time.monotonic() - before

    async def _until_ready(self, replica: Replica) -> None:
        async def ready() -> bool:
            return await replica.answers("/readyz") == 200

        await until(ready, seconds=30)

    async def _until(self, look: Callable[[], Awaitable[bool]], *, seconds: float) -> None:
        """Wait until no work is left, or say what is, who should be at it and what stands in its way."""
        try:
            await until(look, seconds=seconds)
        except TimeoutError:
            for replica in self.replicas:
                replica.running.process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(0.5)
            rows = [row for query in STUCK for row in await self.fetch(query)]
            found = "\n".join(str(dict(row)) for row in rows)
            found += "".join(f"\n{replica}" for replica in self.replicas)
            raise AssertionError(f"Work has not ended after {seconds:g} s:\n{found}") from None

    # Afterwards

    async def revive(self) -> None:
        """Start those replicas again that have ended."""
        await asyncio.gather(*(self._revive(replica) for replica in self.replicas if not replica.alive))

    async def _revive(self, replica: Replica) -> None:
        if replica.service is not None:
            self.events += [event for event in replica.service.events if event["event"] != "witness.phase"]
        for tries_left in reversed(range(START_TRIES)):
            await replica.end()
            try:
                await replica.start()
            except AssertionError:  # it ended at once, as it does where the database does not answer
                if not tries_left:
                    raise
            else:
                return

    async def settle(self) -> None:
        """Let all work end, and claim what must hold."""
        self._feeding.clear()
        async with self._asking:  # what was being asked for just now is asked for
            pass
        await self.revive()

        async def ended() -> bool:
            return int(await self.value(UNFINISHED)) == 0

        await self._until(ended, seconds=SETTLED_SECONDS)
        assert [dict(row) for row in await self.fetch(LOST, self.asked)] == []
        assert [dict(row) for row in await self.fetch(DOUBLED)] == []
        assert [dict(row) for row in await self.fetch(AT_ODDS)] == []
        [books] = await self.fetch(BOOKS)
        assert books["paid"] == books["witnessed"]
        assert [dict(row) for row in await self.fetch(NEVER_ENDED)] == []
        for replica in self.replicas:
            assert await replica.answers("/livez") == 200
            await self._until_ready(replica)
        self._feeding.set()

    def logged(self, event: str, **fields: object) -> int:
        """Count the events of that name, with these fields, of all processes so far."""
        everything = [*self.events, *(event for replica in self.replicas for event in replica.running.events)]
        return sum(line["event"] == event and fields.items() <= line.items() for line in everything)


@asynccontextmanager
async def world(rng: random.Random) -> AsyncIterator[World]:
    """Make a world and feed it; at the end every process must leave when asked."""
    with running_cluster() as cluster:
        admin = await asyncpg.connect(cluster.url())
        await admin.execute("create database bon")
        await admin.close()
        await service.prepare(load_settings({"DATABASE_URL": cluster.url(database="bon")}), jobs=JOBS)
        async with AsyncExitStack() as stack:
            proxies = [await stack.enter_async_context(Proxy(cluster.port, rng).listening()) for _ in range(2)]
            replicas = [Replica(number, proxy) for number, proxy in enumerate(proxies, 1)]
            made = World(cluster, replicas, rng)
            await made.execute(CREATE)
            for replica in replicas:
                stack.push_async_callback(replica.end)
            await asyncio.gather(*(replica.start() for replica in replicas))
            async with made.fed():
                yield made
            statuses = await asyncio.gather(*(replica.running.stop() for replica in replicas))
            assert statuses == [0, 0]
