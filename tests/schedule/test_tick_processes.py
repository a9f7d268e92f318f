"""
Ticks of real processes in real time, while processes, the database and clocks are hurt.

Each test is an experiment of some seconds on a fast schedule. At its end the audit, the ledger and plain
arithmetic must agree on every fire time: each is in exactly one row, what was missed says why and was made
good, no two attempts overlapped, nothing began early, and no effect was committed twice. The forms marked
`long` are the same experiments for minutes. Figures are printed: `pytest -rP` shows them.
"""

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from types import MappingProxyType
from typing import Any

import asyncpg
import pytest

from bon_scheduler import service
from bon_scheduler.database import DatabaseUnavailableError, connections
from bon_scheduler.demo.postgres import PostgresUnavailableError, find_binaries, running_postgres
from bon_scheduler.demo.sample import create_tables
from bon_scheduler.environment import load_settings
from tests.conftest import Connection
from tests.faketime import needs_faketime, running_from, wall_clock
from tests.process import Service, run_command, serve
from tests.waiting import until

pytestmark = pytest.mark.slow

JOB, DRAFTS, OVERDUE = "session-cleanup", "draft-cleanup", "overdue-detection"
NO_OTHERS = {
    "SCHEDULE_DRAFT_CLEANUP": "",
    "SCHEDULE_OVERDUE_DETECTION": "",
    "SCHEDULE_SHAAM_TOKEN_REFRESH": "",
    "LEASE_SECONDS": "2",
}
STEP_SECONDS = 2
FAST = {**NO_OTHERS, "SCHEDULE_SESSION_CLEANUP": f"*/{STEP_SECONDS} * * * * *"}
EARLY = timedelta(seconds=0.1)
MOST_LATE_SECONDS = 0.25
SUPERSEDED = "superseded by a later tick"

# Each run takes this long in its first transaction, so that it is often the one that is hurt, and leaves one row if its
# last one commits.
RUN_SECONDS = 0.4
WITNESS = f"""
    create table public.witness (at timestamptz not null default clock_timestamp());
    create function public.be_slow() returns trigger language plpgsql as $$
    begin
        if new.state = 'running' then
            perform pg_sleep({RUN_SECONDS});
        else
            insert into public.witness default values;
        end if;
        return null;
    end $$;
    create trigger be_slow after update of counts on bon_scheduler.runs for each row
        when (old.state = 'running' and new.state in ('running', 'succeeded', 'partial') and new.job = '{JOB}')
        execute function public.be_slow();
"""
SINCE = "select min(effective_from) from bon_scheduler.schedules where job = $1 and expression is not null"
# $1 job, $2 until: timestamptz.
ROWS = """
    select fire_time, state::text as state, reason, started_at
      from bon_scheduler.runs
     where job = $1 and origin = 'schedule' and fire_time <= $2
     order by fire_time
"""
# $1 until: timestamptz.
NONE_ACTIVE = """
    select not exists (select from bon_scheduler.runs
                        where fire_time <= $1 and state in ('queued', 'running', 'retrying'))
"""
# $1 job, $2 until: timestamptz. Whether every tick until then is recorded and has ended.
ALL_ENDED = """
    select j.last_tick > $2
           and not exists (select from bon_scheduler.runs r
                            where r.fire_time <= $2 and r.state in ('queued', 'running', 'retrying'))
      from bon_scheduler.jobs j
     where j.name = $1
"""
# $1 job. Attempts that lost their run are excepted: they commit nothing.
OVERLAPS = """
    with spans as (
        select a.run_id, a.attempt, a.started_at, coalesce(a.ended_at, 'infinity') as ended_at
          from bon_scheduler.attempts a
          join bon_scheduler.runs r on r.id = a.run_id
         where r.job = $1 and a.outcome is distinct from 'lost'
    )
    select count(*)
      from spans a
      join spans b on (a.run_id, a.attempt) < (b.run_id, b.attempt)
     where a.started_at < b.ended_at and b.started_at < a.ended_at
"""
STARTED_AFTER = "select count(*) from bon_scheduler.runs where started_at > $1"
# $1 process id.
IN_ITS_HANDLER = """
    select exists (select from bon_scheduler.attempts a
                     join bon_scheduler.workers w on w.id = a.worker
                    where w.pid = $1 and a.ended_at is null and a.started_at < clock_timestamp() - interval '0.05 s')
"""
SUCCEEDED = "select count(*) from bon_scheduler.runs where job = $1 and state = 'succeeded'"
NOW = "select clock_timestamp()"

Demand = Callable[[datetime, datetime], Sequence[datetime]]
"""The fire times in (after, until] that a schedule demands, computed without any cron library."""


def long(*values: Any) -> Any:
    """Parameters of the form that takes minutes."""
    return pytest.param(*values, marks=[pytest.mark.long, pytest.mark.timeout(600)])


def every(seconds: int) -> Demand:
    def demanded(after: datetime, until: datetime) -> list[datetime]:
        begin = int(after.timestamp()) // seconds * seconds
        instants = (datetime.fromtimestamp(n, UTC) for n in range(begin, int(until.timestamp()) + 1, seconds))
        return [instant for instant in instants if after < instant <= until]

    return demanded


def only(*instants: str) -> Demand:
    named = [utc(text) for text in instants]
    return lambda after, until: [instant for instant in named if after < instant <= until]


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of a job's ticks, once everything agreed on it."""

    expected: int
    missed: int
    late_seconds: list[float]

    def percentile(self, n: int) -> float:
        return quantiles(self.late_seconds, n=100, method="inclusive")[n - 1]


async def ended(connection: Connection, job: str = JOB) -> datetime:
    """Wait until every tick up to now is recorded and has ended; return now, by the database."""
    end: datetime = await connection.fetchval(NOW)

    async def accounted() -> bool:
        return bool(await connection.fetchval(ALL_ENDED, job, end))

    await until(accounted, seconds=60)
    return end


async def judge(
    connection: Connection,
    url: str,
    end: datetime,
    demands: Mapping[str, Demand] = MappingProxyType({JOB: every(STEP_SECONDS)}),
    *,
    early: timedelta = EARLY,
) -> dict[str, Judgement]:
    """Claim what holds after every experiment, of these jobs' fire times until `end`. All replicas have ended."""
    since = await connection.fetchval("select min(effective_from) from bon_scheduler.schedules")
    audit = await run_command("audit", "--since", since.isoformat(), "--json", DATABASE_URL=url)
    assert audit.status == (0 if audit.document["sound"] else 1)
    judgements = {}
    for job, demand in demands.items():
        found = _Found(audit.document, job, end)
        rows = await connection.fetch(ROWS, job, end)
        judgements[job] = _judge(job, list(demand(await connection.fetchval(SINCE, job), end)), rows, found, early)
        assert await connection.fetchval(OVERLAPS, job) == 0
    # As many handlers committed as runs succeeded: no effect is there twice.
    assert await connection.fetchval("select count(*) from witness") == await connection.fetchval(SUCCEEDED, JOB)
    return judgements


@dataclass(frozen=True, slots=True)
class _Found:
    """What `audit --json` lists of a job until an instant."""

    document: Mapping[str, Any]
    job: str
    end: datetime

    def of(self, kind: str) -> list[dict[str, Any]]:
        ticks = [tick for tick in self.document[kind] if tick["job"] == self.job]
        return [tick for tick in ticks if fire_time(tick) <= self.end]


def fire_time(tick: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(tick["fire_time"])


def _judge(
    job: str, demanded: Sequence[datetime], rows: Sequence[asyncpg.Record], found: _Found, early: timedelta
) -> Judgement:
    ran = [row for row in rows if row["state"] == "succeeded"]
    missed = [row for row in rows if row["state"] == "missed"]
    lates = [tick["late_seconds"] for tick in found.of("ticks") if "late_seconds" in tick]
    say(
        f"{job}: {len(demanded)} expected, {len(ran)} ran, {len(missed)} missed, at most {max(lates, default=0)} s late"
    )

    assert [row["fire_time"] for row in rows] == demanded
    assert [fire_time(tick) for tick in found.of("ticks")] == demanded
    assert found.of("gaps") == found.of("unexpected") == []
    assert len(ran) + len(missed) == len(demanded)
    assert all(row["reason"] for row in missed)
    assert all(tick["resolved"] for tick in found.of("missed"))
    assert [row["fire_time"] for row in ran if row["started_at"] < row["fire_time"] - early] == []
    return Judgement(len(demanded), len(missed), lates)


async def live_and_die(environ: Mapping[str, str], source: random.Random, ends: float, over: asyncio.Event) -> int:
    """Be a replica that is killed and started again at random, until the loop's time `ends`; return how often."""
    kills = 0
    loop = asyncio.get_running_loop()
    while True:
        async with serve(**environ) as replica:
            seconds = source.uniform(0.5, 4)
            if source.random() < 0.5:  # at a tick, or in the middle of the run that it starts
                until_tick = STEP_SECONDS - (time.time() + seconds) % STEP_SECONDS
                seconds += until_tick + source.uniform(-0.05, RUN_SECONDS + 0.1)
            if loop.time() + seconds > ends:
                await over.wait()
                assert await replica.stop() == 0
                return kills
            await asyncio.sleep(seconds)
            await replica.stop(signal.SIGKILL)
            kills += 1
        await asyncio.sleep(source.uniform(0, 2))


@pytest.mark.parametrize("seconds", [14, long(120)])
async def test_replicas_killed_at_random_instants_account_for_every_tick(
    connection: Connection, database_url: str, seconds: int
) -> None:
    await connection.execute(WITNESS)
    seed = int(os.environ.get("TICKS_SEED", random.SystemRandom().randrange(10**6)))
    say(f"TICKS_SEED={seed}")
    environ = {**FAST, "DATABASE_URL": database_url}
    ends, over = asyncio.get_running_loop().time() + seconds, asyncio.Event()
    async with asyncio.TaskGroup() as group:
        replicas = [group.create_task(live_and_die(environ, random.Random(seed + n), ends, over)) for n in range(2)]
        await asyncio.sleep(seconds)
        end = await ended(connection)
        over.set()
    say(f"killed {sum(replica.result() for replica in replicas)} times")
    assert sum(replica.result() for replica in replicas) >= 2
    await judge(connection, database_url, end)


async def freeze_in_its_handler(connection: Connection, replica: Service) -> None:
    async def in_its_handler() -> bool:
        return bool(await connection.fetchval(IN_ITS_HANDLER, replica.process.pid))

    await until(in_its_handler, seconds=30)
    replica.process.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize("seconds", [6, long(40)])
async def test_a_replica_frozen_in_the_middle_of_a_run_takes_nothing_and_gives_nothing_twice(
    connection: Connection, database_url: str, seconds: int
) -> None:
    await connection.execute(WITNESS)
    environ = {**FAST, "DATABASE_URL": database_url}
    async with serve(**environ) as frozen, serve(**environ) as working:
        await freeze_in_its_handler(connection, frozen)
        begin = await connection.fetchval(NOW)
        await asyncio.sleep(seconds)
        assert await connection.fetchval(STARTED_AFTER, begin) > 0  # by the other one alone
        frozen.process.send_signal(signal.SIGCONT)
        await asyncio.sleep(STEP_SECONDS)
        end = await ended(connection)
        assert [await frozen.stop(), await working.stop()] == [0, 0]
    await judge(connection, database_url, end)
    assert await connection.fetchval("select count(*) from bon_scheduler.attempts where outcome = 'lost'") > 0


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_of_the_ticks_while_all_were_frozen_the_latest_runs_and_the_rest_is_superseded(
    connection: Connection, database_url: str
) -> None:
    await connection.execute(WITNESS)
    environ = {**FAST, "DATABASE_URL": database_url}

    async def idle_between_ticks() -> bool:
        idle = await connection.fetchval(NONE_ACTIVE, await connection.fetchval(NOW))
        return bool(idle) and 1 < time.time() % STEP_SECONDS < 1.5

    async with serve(**environ) as one, serve(**environ) as other:
        for frozen_seconds in (20, 90, 6):
            await ended(connection)
            await until(idle_between_ticks)
            for replica in (one, other):
                replica.process.send_signal(signal.SIGSTOP)
            begin = await connection.fetchval(NOW)
            await asyncio.sleep(frozen_seconds)
            end = await connection.fetchval(NOW)
            for replica in (one, other):
                replica.process.send_signal(signal.SIGCONT)
            await ended(connection)
            slept = [row for row in await connection.fetch(ROWS, JOB, end) if row["fire_time"] > begin]
            assert [row["fire_time"] for row in slept] == every(STEP_SECONDS)(begin, end)
            assert {(row["state"], row["reason"]) for row in slept[:-1]} == {("missed", SUPERSEDED)}
            assert slept[-1]["state"] == "succeeded"
        end = await ended(connection)
        assert [await one.stop(), await other.stop()] == [0, 0]
    await judge(connection, database_url, end)


def binaries() -> Path:
    """The PostgreSQL for a server of one's own: the one the other tests use, where that is not a container's."""
    try:
        return find_binaries("system" if os.environ.get("TEST_POSTGRES") == "system" else "any")
    except PostgresUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def private_url() -> Iterator[str]:
    """A server that may be hurt; it keeps what it has confirmed, as a real one does."""
    with running_postgres(binaries(), settings={"synchronous_commit": "on"}) as url:
        yield url


async def prepare(url: str) -> None:
    async with connections.connect(url) as connection:
        await create_tables(connection)
        await service.prepare(load_settings({"DATABASE_URL": url}))
        await connection.execute(WITNESS)


async def end_all_sessions(url: str) -> None:
    async with connections.connect(url) as connection:
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where backend_type = 'client backend' and pid <> pg_backend_pid()"
        )


async def crash(url: str) -> None:
    """Kill one server process of ours: PostgreSQL then ends all others and recovers from its log."""
    async with connections.connect(url) as connection:
        os.kill(await connection.fetchval("select pg_backend_pid()"), signal.SIGKILL)


async def answers(url: str) -> bool:
    try:
        async with connections.connect(url):
            return True
    except DatabaseUnavailableError:
        return False


@pytest.mark.parametrize("rounds", [1, long(12)])
async def test_a_database_that_restarts_and_crashes_loses_no_tick_and_doubles_none(
    private_url: str, rounds: int
) -> None:
    await prepare(private_url)
    environ = {**FAST, "DATABASE_URL": private_url}
    source = random.Random(rounds)
    async with serve(**environ) as one, serve(**environ) as other:
        for hurt in [end_all_sessions, crash] * rounds:
            await asyncio.sleep(source.uniform(1, 5) if rounds > 1 else 2)
            await hurt(private_url)
            await until(lambda: answers(private_url))
        async with connections.connect(private_url) as connection:
            await asyncio.sleep(STEP_SECONDS)
            end = await ended(connection)
            assert [await one.stop(), await other.stop()] == [0, 0]
            await judge(connection, private_url, end)


@needs_faketime
@pytest.mark.parametrize(
    ("hours_off", "seconds", "beside_a_right_one"),
    [
        ([24, 0, 2, -2], 2.5, False),
        long([24, 0], 45, False),
        long([0, 2, -2, 0], 25, False),
        long([0, 2, -2, 0], 25, True),
    ],
)
async def test_a_wall_clock_that_is_wrong_from_the_start_or_set_later_changes_no_tick(
    connection: Connection,
    database_url: str,
    tmp_path: Path,
    hours_off: Sequence[int],
    seconds: float,
    beside_a_right_one: bool,
) -> None:
    await connection.execute(WITNESS)
    environ = {**FAST, "DATABASE_URL": database_url}
    async with AsyncExitStack() as stack:
        clock = stack.enter_context(wall_clock(tmp_path, timedelta(hours=hours_off[0])))
        wrong = await stack.enter_async_context(serve(**environ, **clock.environ))
        replicas = [wrong, *([await stack.enter_async_context(serve(**environ))] if beside_a_right_one else [])]
        for hours in hours_off[1:]:
            await asyncio.sleep(seconds)
            clock.set(timedelta(hours=hours))
        await asyncio.sleep(seconds)
        end = await ended(connection)
        assert {await replica.stop() for replica in replicas} == {0}
    judgement = (await judge(connection, database_url, end))[JOB]
    assert judgement.missed == 0
    assert max(judgement.late_seconds) < STEP_SECONDS
    steps = [later - earlier for earlier, later in pairwise(hours_off)]
    assert [round(line["seconds"] / 3600) for line in wrong.of("clock.stepped")] == steps
    assert wrong.saw("clock.disagreed")


@dataclass(frozen=True, slots=True)
class Night:
    """A span in which Israel's clocks change, how fast it passes, and how many ticks of each job it has."""

    begin: str
    end: str
    speed: int
    at_half_past_one: Sequence[str] = ()
    at_half_past_two: Sequence[str] = ()
    quarters: int = 1


@dataclass(frozen=True, slots=True)
class World:
    """A night, and a server in it; whatever is started with `environ` is in it too."""

    night: Night
    url: str
    environ: Mapping[str, str]


@pytest.fixture
def worlds(request: pytest.FixtureRequest) -> Iterator[list[World]]:
    """Servers that live in other times, all at once."""
    with ExitStack() as stack:
        yield [
            World(night, stack.enter_context(running_postgres(binaries(), environ=faked)), faked)
            for night in request.param
            for faked in [stack.enter_context(running_from(utc(night.begin), speed=night.speed))]
        ]


SPRING = "2026-03-27T00:00"
"""02:00 becomes 03:00, at which 02:30 is made good."""
FIRST_HALF_PAST_ONE = "2026-10-24T22:30"
SECOND_HALF_PAST_ONE = "2026-10-24T23:30"
LAST_HALF_PAST_TWO = "2026-10-25T00:30"


@needs_faketime
@pytest.mark.parametrize(
    "worlds",
    [
        [
            Night("2026-03-26T23:59:20", "2026-03-27T00:00:10", 5, at_half_past_two=[SPRING]),
            Night("2026-10-24T23:29:20", "2026-10-24T23:30:10", 5),
        ],
        long([Night("2026-10-24T22:29:20", "2026-10-24T22:30:10", 5, at_half_past_one=[FIRST_HALF_PAST_ONE])]),
        long([Night("2026-03-26T23:58", "2026-03-27T00:18", 60, at_half_past_two=[SPRING], quarters=2)]),
        long(
            [
                Night(
                    "2026-10-24T21:58",
                    "2026-10-25T00:33",
                    60,
                    at_half_past_one=[FIRST_HALF_PAST_ONE],
                    at_half_past_two=[LAST_HALF_PAST_TWO],
                    quarters=11,
                )
            ]
        ),
    ],
    ids=["moments", "first-half-past-one", "all-of-spring", "all-of-autumn"],
    indirect=True,
)
async def test_nights_that_change_the_clocks_fire_what_they_should(worlds: Sequence[World]) -> None:
    await asyncio.gather(*(spend(world) for world in worlds))


async def spend(world: World) -> None:
    await prepare(world.url)
    night, end = world.night, utc(world.night.end)
    environ = {
        **NO_OTHERS,
        "SCHEDULE_OVERDUE_DETECTION": "30 1 * * *",
        "SCHEDULE_DRAFT_CLEANUP": "30 2 * * *",
        "SCHEDULE_SESSION_CLEANUP": "*/15 * * * *",
        "LEASE_SECONDS": str(15 * night.speed),  # leases run out as fast as the night does
        "DATABASE_URL": world.url,
    }
    demands = {OVERDUE: only(*night.at_half_past_one), DRAFTS: only(*night.at_half_past_two), JOB: every(15 * 60)}
    async with serve(**environ, **world.environ) as replica, connections.connect(world.url) as connection:

        async def over() -> bool:
            return await connection.fetchval(NOW) >= end and await connection.fetchval(NONE_ACTIVE, end) is True

        await until(over, seconds=(end - utc(night.begin)).total_seconds() / night.speed + 30)
        assert await replica.stop() == 0
        found = await judge(connection, world.url, end, demands, early=EARLY * night.speed)
    assert {job: (judgement.expected, judgement.missed) for job, judgement in found.items()} == {
        OVERDUE: (len(night.at_half_past_one), 0),
        DRAFTS: (len(night.at_half_past_two), 0),
        JOB: (night.quarters, 0),
    }


@pytest.mark.parametrize(("count", "percent"), [(20, 90), long(240, 99)])
async def test_at_rest_a_tick_begins_within_a_quarter_second(
    connection: Connection, database_url: str, count: int, percent: int
) -> None:
    """Of twenty, beside other tests, one in ten may be later; only the long form is at rest."""
    await connection.execute(WITNESS.replace(f"pg_sleep({RUN_SECONDS})", "pg_sleep(0)"))
    environ = {**NO_OTHERS, "SCHEDULE_SESSION_CLEANUP": "* * * * * *", "DATABASE_URL": database_url}
    async with serve(**environ) as one, serve(**environ) as other:
        await asyncio.sleep(count)
        end = await ended(connection)
        assert [await one.stop(), await other.stop()] == [0, 0]
    judgement = (await judge(connection, database_url, end, {JOB: every(1)}))[JOB]
    p50, p99 = judgement.percentile(50), judgement.percentile(99)
    say(f"late: p50 {p50:.3f} s, p99 {p99:.3f} s")
    assert judgement.expected >= count
    assert judgement.missed == 0
    assert judgement.percentile(percent) <= MOST_LATE_SECONDS
