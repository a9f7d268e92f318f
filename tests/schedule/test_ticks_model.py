"""
Random lives of several replicas: whatever happens to them, each expected tick is accounted for exactly once.

Replicas share a real database; each has believed clocks of its own, which may lag or lead by a minute, or be
hours behind. They are started, stopped, rung, kept from the database, upgraded and rolled back, while runs end
at random, jobs are paused and schedules change.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest

from bon_scheduler import CatchUp, Cron
from bon_scheduler.database.connections import Pool
from bon_scheduler.ledger import pauses
from bon_scheduler.ledger.entries import active_ticks, last_ticks
from bon_scheduler.schedule.audit import TICKS, Recorded, Verdict, judge
from bon_scheduler.schedule.schedules import read_histories
from tests.conftest import Connection
from tests.replicas import JOB, Replica

START = datetime(2026, 10, 24, 20, 0, 7, tzinfo=UTC)  # three hours before the clocks go back in Israel
EXPRESSIONS = ("*/15 * * * *", "*/10 * * * *", "0 * * * *", "30 1 * * *", "5,35 0-3 * * *", "*/7 * * * *")
STEPS = 60


class Life:
    """One random life, drawn from a seed that a failure names."""

    def __init__(self, pool: Pool, connection: Connection, seed: int) -> None:
        self.random = random.Random(seed)
        self.pool = pool
        self.connection = connection
        self.now = START
        self.replicas: list[Replica] = []
        self.cut_off: set[Replica] = set()
        self.lag: dict[Replica, timedelta] = {}
        self.versions = 0

    def draw_schedule(self) -> Cron | None:
        if self.random.random() < 0.1:
            return None
        grace = self.random.choice((timedelta(minutes=20), timedelta(hours=18)))
        return Cron(self.random.choice(EXPRESSIONS), self.random.choice(list(CatchUp)), grace)

    async def start(self) -> None:
        """Start a replica of a version that may be new, with a schedule of its own."""
        if len(self.replicas) == 5:
            return
        self.versions += self.random.choice((0, 0, 1))
        version = f"1.{self.versions - self.random.choice((0, 0, 0, 1))}"
        replica = await Replica(self.pool, {JOB: self.draw_schedule()}, self.now, version.replace("-", "")).start()
        self.replicas.append(replica)
        self.lag[replica] = timedelta(seconds=self.random.uniform(-60, 60))

    async def stop(self) -> None:
        if len(self.replicas) > 1:
            await self.replicas.pop(self.random.randrange(len(self.replicas))).stop()

    async def ring(self) -> None:
        """Ring some of them, twice and at once; those without a database do nothing."""
        some = self.random.sample(self.replicas, self.random.randint(1, len(self.replicas)))
        awake = [replica for replica in some if replica not in self.cut_off]
        await asyncio.gather(*(r.look(self.now + self.lag[r]) for r in awake for _ in range(2)))

    async def pass_time(self) -> None:
        self.now += timedelta(seconds=self.random.choice((1, 30, 300, 900, 3600, 9 * 3600)))
        await self.ring()

    async def step_a_clock(self) -> None:
        """Set one replica's believed time hours back (it is never believed ahead), or right again."""
        replica = self.random.choice(self.replicas)
        self.lag[replica] = self.random.choice((timedelta(0), timedelta(hours=-2), timedelta(seconds=-50)))

    async def lose_the_database(self) -> None:
        replica = self.random.choice(self.replicas)
        self.cut_off ^= {replica}

    async def end_runs(self) -> None:
        state = self.random.choice(("succeeded", "succeeded", "partial", "dead"))
        await self.connection.execute(
            "update bon_scheduler.runs set state = $1::text::bon_scheduler.run_state, finished_at = now()"
            " where state = 'queued'",
            state,
        )

    async def pause(self) -> None:
        await pauses.pause_job(self.connection, JOB, by="a test", reason="to see")

    async def resume(self) -> None:
        await pauses.resume_job(self.connection, JOB, by="a test", reason="seen")

    async def live(self) -> None:
        happenings: list[Callable[[], Awaitable[None]]] = [
            *[self.pass_time] * 8, *[self.end_runs] * 4, *[self.ring] * 3, self.start, self.start, self.stop,
            self.step_a_clock, self.lose_the_database, self.pause, self.resume,
        ]  # fmt: skip
        await self.start()
        await self.start()
        for _ in range(STEPS):
            await self.random.choice(happenings)()
        await self._come_to_rest()

    async def _come_to_rest(self) -> None:
        """One replica is left, its clock right, and runs end: everything owed is accounted for."""
        self.now += timedelta(minutes=2)
        last = self.replicas[0]
        for _ in range(2000):
            await self.connection.execute("update bon_scheduler.runs set state = 'succeeded' where state = 'queued'")
            await last.look(self.now)
            if not await self.connection.fetchval(
                "select exists (select from bon_scheduler.runs where state = 'queued')"
            ):
                return
        raise AssertionError("it never came to rest")


async def check(connection: Connection, until: datetime) -> Counter[str]:
    """Every expected tick is in the ledger once, nothing else is; return how many of each verdict."""
    rows = [dict(row) for row in await connection.fetch(TICKS, START - timedelta(days=1), until + timedelta(days=1))]
    assert len(rows) == len({row["fire_time"] for row in rows})
    histories = (await read_histories(connection)).periods
    recorded = Recorded(await last_ticks(connection, [JOB]), rows, await active_ticks(connection))
    found = judge(histories, recorded, START - timedelta(days=1), until)
    assert found.of(Verdict.GAP, Verdict.WAITING, Verdict.STUCK, Verdict.IN_PROGRESS) == []
    assert found.of(Verdict.UNEXPECTED) == []
    assert all(tick.reason for tick in found.of(Verdict.MISSED, Verdict.PAUSED))
    return Counter(tick.verdict for tick in found.ticks)


async def live_and_check(pool: Pool, connection: Connection, seed: int) -> Counter[str]:
    await connection.execute(
        "truncate bon_scheduler.runs, bon_scheduler.schedules, bon_scheduler.workers,"
        " bon_scheduler.pauses cascade; update bon_scheduler.jobs set last_tick = null"
    )
    life = Life(pool, connection, seed)
    try:
        await life.live()
        return await check(connection, life.now)
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


async def test_each_expected_tick_is_accounted_for_once_in_random_lives(pool: Pool, connection: Connection) -> None:
    verdicts: Counter[str] = Counter()
    for seed in range(25):
        verdicts += await live_and_check(pool, connection, seed)
    assert verdicts[Verdict.RAN] > 100
    assert verdicts[Verdict.MISSED] > 100
    assert verdicts[Verdict.PAUSED] > 10


@pytest.mark.long
@pytest.mark.timeout(1200)
async def test_each_expected_tick_is_accounted_for_once_in_many_random_lives(
    pool: Pool, connection: Connection
) -> None:
    for seed in range(1000, 1500):
        await live_and_check(pool, connection, seed)
