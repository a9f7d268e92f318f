"""Triggers against the ledger, with a clock that is put where it hurts."""

import asyncio
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from bon_scheduler import CatchUp, Cron
from bon_scheduler.db import Pool
from bon_scheduler.metrics import Metrics
from bon_scheduler.triggers import Triggers
from tests.conftest import Connection, SetClock

FIRE = datetime(2026, 11, 23, 4, tzinfo=UTC)  # 06:00 in Israel
DAILY = {"overdue-detection": Cron("0 6 * * *", CatchUp.LATEST, timedelta(hours=18))}


def triggers(pool: Pool) -> Triggers:
    return Triggers(
        pool=pool, schedules=DAILY, zone=ZoneInfo("Asia/Jerusalem"), clock=SetClock(FIRE), metrics=Metrics()
    )


async def owe_since(connection: Connection, instant: datetime) -> None:
    await connection.execute("update bon_scheduler.jobs set last_tick = $1", instant)


async def ticks(connection: Connection) -> list[tuple[datetime, str]]:
    rows = await connection.fetch("select fire_time, state::text from bon_scheduler.runs order by fire_time")
    return [(row["fire_time"], row["state"]) for row in rows]


async def test_a_first_deployment_owes_nothing_from_the_past(pool: Pool, connection: Connection) -> None:
    assert await triggers(pool).record_due(datetime.now(UTC)) == 0
    assert await ticks(connection) == []


async def test_a_ring_that_is_early_by_a_hair_records_nothing_and_loses_nothing(
    pool: Pool, connection: Connection
) -> None:
    await owe_since(connection, FIRE - timedelta(days=1))
    early = triggers(pool)
    assert await early.record_due(FIRE - timedelta(microseconds=400)) == 0
    assert await early.record_due(FIRE) == 1
    assert await ticks(connection) == [(FIRE, "queued")]


async def test_a_tick_rung_twice_in_a_burst_and_by_many_is_recorded_once(pool: Pool, connection: Connection) -> None:
    await owe_since(connection, FIRE - timedelta(days=1))
    replicas = [triggers(pool) for _ in range(4)]
    recorded = await asyncio.gather(*(replica.record_due(FIRE) for replica in replicas for _ in range(5)))
    assert sum(recorded) == 1
    assert await ticks(connection) == [(FIRE, "queued")]


async def test_a_clock_set_back_does_not_run_a_tick_again(pool: Pool, connection: Connection) -> None:
    await owe_since(connection, FIRE - timedelta(days=1))
    replica = triggers(pool)
    await replica.record_due(FIRE + timedelta(seconds=1))
    await connection.execute("delete from bon_scheduler.runs")
    assert await replica.record_due(FIRE - timedelta(hours=2)) == 0
    assert await replica.record_due(FIRE + timedelta(minutes=5)) == 0


async def test_after_days_down_the_latest_runs_and_the_rest_is_recorded_as_missed(
    pool: Pool, connection: Connection
) -> None:
    await owe_since(connection, FIRE - timedelta(days=3))
    await triggers(pool).record_due(FIRE + timedelta(hours=1))
    days = [FIRE - timedelta(days=2), FIRE - timedelta(days=1), FIRE]
    assert await ticks(connection) == list(zip(days, ["missed", "missed", "queued"], strict=True))
