"""Triggers against the ledger, with clocks that are put where it hurts."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from bon_scheduler import CatchUp, Cron
from bon_scheduler.database.connections import Pool
from bon_scheduler.ledger import pauses
from bon_scheduler.schedule.audit import Verdict, audit_ticks
from bon_scheduler.schedule.clocks import Clocks
from bon_scheduler.schedule.schedules import IS_DECLARER
from tests.conftest import Connection, SetClock
from tests.replicas import JOB, QUARTERS, Replica

START = datetime(2026, 11, 23, 4, 0, 30, tzinfo=UTC)
FIRST = datetime(2026, 11, 23, 4, 15, tzinfo=UTC)
QUARTER = timedelta(minutes=15)


async def replica_of(pool: Pool, cron: Cron | None = QUARTERS, *, version: str = "1.0") -> Replica:
    """A replica that has declared its schedule at START."""
    replica = await Replica(pool, {JOB: cron}, START, version).start()
    await replica.look(START)
    return replica


async def ticks(connection: Connection) -> list[tuple[datetime, str]]:
    rows = await connection.fetch("select fire_time, state::text from bon_scheduler.runs order by fire_time")
    return [(row["fire_time"], row["state"]) for row in rows]


async def end_runs(connection: Connection) -> None:
    await connection.execute(
        "update bon_scheduler.runs set state = 'succeeded', finished_at = now() where state = 'queued'"
    )


async def expressions(connection: Connection) -> list[str | None]:
    rows = await connection.fetch("select expression from bon_scheduler.schedules order by effective_from")
    return [row["expression"] for row in rows]


async def test_a_first_deployment_owes_nothing_from_the_past(pool: Pool, connection: Connection) -> None:
    await replica_of(pool)
    assert await ticks(connection) == []


@pytest.mark.parametrize("off", [timedelta(days=-1), timedelta(0), timedelta(days=1)])
async def test_a_first_schedule_is_in_force_from_now_on_though_this_machines_clock_is_wrong(
    pool: Pool, connection: Connection, off: timedelta
) -> None:
    """A day behind, a day of ticks would be owed and mostly missed; a day ahead, none would come for a day."""
    replica = await Replica(pool, {JOB: QUARTERS}, START).start()
    replica.triggers._clocks = Clocks(SetClock(datetime.now(UTC) + off))
    await replica.triggers.make_pass()
    late = "select clock_timestamp() - effective_from from bon_scheduler.schedules"
    assert timedelta(0) <= await connection.fetchval(late) < timedelta(seconds=10)
    assert await ticks(connection) == []


async def test_a_first_schedule_that_a_clock_far_ahead_declared_is_in_force_once_the_clocks_agree(
    pool: Pool, connection: Connection
) -> None:
    """Otherwise it would not fire for as long as that, without a gap in any audit."""
    await replica_of(pool)
    ahead = "update bon_scheduler.{} set {} = now() + interval '30 days'"
    await connection.execute(ahead.format("schedules", "effective_from"))
    await connection.execute("update bon_scheduler.jobs set last_tick = effective_from from bon_scheduler.schedules")
    replica = await Replica(pool, {JOB: QUARTERS}, START).start()
    replica.triggers._clocks = Clocks(SetClock(datetime.now(UTC) + timedelta(days=20)))
    await replica.triggers.make_pass()  # these two do not agree: nobody knows which is right
    begins = "select effective_from - clock_timestamp() from bon_scheduler.schedules"
    assert await connection.fetchval(begins) > timedelta(days=29)
    replica.triggers._clocks = Clocks(SetClock(datetime.now(UTC)))
    await replica.triggers.make_pass()
    assert abs(await connection.fetchval(begins)) < timedelta(minutes=1)
    last = await connection.fetchval("select last_tick from bon_scheduler.jobs where name = $1", JOB)
    assert last == await connection.fetchval("select effective_from from bon_scheduler.schedules")


async def test_a_schedule_that_has_ticks_or_had_another_before_is_not_brought_back(
    pool: Pool, connection: Connection
) -> None:
    await replica_of(pool)
    await connection.execute(
        "update bon_scheduler.schedules set effective_from = now() + interval '30 days';"
        "insert into bon_scheduler.runs (job, origin, fire_time, state)"
        " select job, 'schedule', effective_from, 'missed' from bon_scheduler.schedules"
    )
    await connection.execute("update bon_scheduler.jobs set last_tick = effective_from from bon_scheduler.schedules")
    replica = await Replica(pool, {JOB: QUARTERS}, START).start()
    replica.triggers._clocks = Clocks(SetClock(datetime.now(UTC)))
    await replica.triggers.make_pass()
    begins = "select effective_from - clock_timestamp() from bon_scheduler.schedules"
    assert await connection.fetchval(begins) > timedelta(days=29)


@pytest.mark.parametrize(
    ("first", "second", "declares"),
    [
        (("1.9", 2), ("1.10", 1), 1),
        (("1.9", 1), ("1.9", 2), 1),
        (("1.9", 2), ("1.9", 1), 0),
        (("1.9", 1), ("1.9", 1), 0),
    ],
    ids=["the higher version", "then the later start", "whichever came first", "then the lower id"],
)
async def test_of_several_replicas_one_declares(
    connection: Connection, first: tuple[str, int], second: tuple[str, int], declares: int
) -> None:
    workers = [UUID(int=1), UUID(int=2)]
    insert = """
        insert into bon_scheduler.workers (id, host, pid, version, serves, started_at)
        values ($1, 'h', 1, $2, true, timestamptz '2026-01-01' + make_interval(hours => $3))
    """
    for worker, (version, hour) in zip(workers, (first, second), strict=True):
        await connection.execute(insert, worker, version, hour)
    found = [await connection.fetchval(IS_DECLARER, worker) for worker in workers]
    assert found == [declares == 0, declares == 1]


async def test_a_ring_that_is_early_by_a_hair_records_nothing_and_loses_nothing(
    pool: Pool, connection: Connection
) -> None:
    replica = await replica_of(pool)
    await replica.look(FIRST - timedelta(microseconds=400))
    assert await ticks(connection) == []
    await replica.look(FIRST)
    assert await ticks(connection) == [(FIRST, "queued")]


async def test_an_early_ring_is_followed_by_a_look_at_the_instant_itself(pool: Pool) -> None:
    replica = await replica_of(pool)
    replica.clocks.instant = FIRST - timedelta(milliseconds=400)
    assert await replica.triggers.make_pass() == pytest.approx(0.4)


async def test_a_tick_rung_twice_in_a_burst_and_by_many_is_recorded_once(pool: Pool, connection: Connection) -> None:
    replicas = [await replica_of(pool) for _ in range(3)]
    await asyncio.gather(*(replica.look(FIRST) for replica in replicas for _ in range(3)))
    assert await ticks(connection) == [(FIRST, "queued")]


async def test_a_clock_set_back_does_not_run_a_tick_again(pool: Pool, connection: Connection) -> None:
    replica = await replica_of(pool)
    await replica.look(FIRST + timedelta(seconds=1))
    await connection.execute("delete from bon_scheduler.runs")
    await replica.look(FIRST - timedelta(hours=2))
    await replica.look(FIRST + timedelta(minutes=5))
    assert await ticks(connection) == []


async def test_after_hours_down_the_latest_runs_and_the_rest_is_missed(pool: Pool, connection: Connection) -> None:
    replica = await replica_of(pool)
    await replica.look(FIRST + 3 * QUARTER)
    states = ["missed", "missed", "missed", "queued"]
    assert await ticks(connection) == [(FIRST + n * QUARTER, state) for n, state in enumerate(states)]


async def test_a_backlog_behind_a_long_run_coalesces_by_policy(pool: Pool, connection: Connection) -> None:
    replica = await replica_of(pool)
    for n in range(4):
        await replica.look(FIRST + n * QUARTER)
    assert await ticks(connection) == [
        (FIRST, "queued"),
        (FIRST + QUARTER, "missed"),
        (FIRST + 2 * QUARTER, "missed"),
    ]
    await end_runs(connection)
    await replica.look(FIRST + 3 * QUARTER)
    assert [state for _, state in await ticks(connection)] == ["succeeded", "missed", "missed", "queued"]


async def test_with_catch_up_all_each_tick_runs_one_after_the_other(pool: Pool, connection: Connection) -> None:
    replica = await replica_of(pool, Cron("*/15 * * * *", CatchUp.ALL, timedelta(hours=4)))
    for expected in (["queued"], ["succeeded", "queued"], ["succeeded", "succeeded", "queued"]):
        await replica.look(FIRST + 2 * QUARTER)
        assert [state for _, state in await ticks(connection)] == expected
        await end_runs(connection)


async def test_a_paused_jobs_ticks_are_recorded_and_run_again_after_it(pool: Pool, connection: Connection) -> None:
    replica = await replica_of(pool)
    await pauses.pause_job(connection, JOB, by="dana", reason="migration")
    await replica.look(FIRST)
    await pauses.resume_job(connection, JOB, by="dana", reason="done")
    await replica.look(FIRST + QUARTER)
    assert [state for _, state in await ticks(connection)] == ["paused", "queued"]
    actions = await connection.fetch(
        "select action, target, by, reason from bon_scheduler.operator_actions order by id"
    )
    assert [tuple(row) for row in actions] == [
        ("pause", JOB, "dana", "migration"),
        ("resume", JOB, "dana", "done"),
    ]


async def test_a_changed_schedule_counts_from_now_on(pool: Pool, connection: Connection) -> None:
    await (await replica_of(pool)).stop()
    changed = await Replica(pool, {JOB: Cron("*/10 * * * *", CatchUp.ALL, timedelta(hours=4))}, START).start()
    await changed.look(FIRST + timedelta(minutes=1))
    assert await ticks(connection) == [(FIRST, "queued")]
    await end_runs(connection)
    await changed.look(FIRST + timedelta(minutes=5))
    assert [fire for fire, _ in await ticks(connection)] == [FIRST, FIRST + timedelta(minutes=5)]


async def test_an_older_version_that_restarts_during_a_deploy_changes_nothing(
    pool: Pool, connection: Connection
) -> None:
    await replica_of(pool, version="1.0")
    await (await Replica(pool, {JOB: Cron("*/10 * * * *")}, START, "1.1").start()).look(START)
    older = await Replica(pool, {JOB: QUARTERS}, START, "1.0").start()
    await older.look(START + timedelta(minutes=1))
    assert await expressions(connection) == ["*/15 * * * *", "*/10 * * * *"]


async def test_a_schedule_declared_by_a_clock_that_lags_counts_from_the_last_tick_on(
    pool: Pool, connection: Connection
) -> None:
    """Otherwise it would demand fire times that are behind the last tick, which only moves forwards."""
    replica = await replica_of(pool, version="1.0")
    await replica.look(FIRST)
    lagging = await Replica(pool, {JOB: Cron("* * * * *")}, START, "1.1").start()
    await lagging.look(FIRST - timedelta(seconds=40))
    newest = "select max(effective_from) from bon_scheduler.schedules"
    assert await connection.fetchval(newest) == FIRST


async def test_versions_are_compared_as_numbers(pool: Pool, connection: Connection) -> None:
    await replica_of(pool, version="0.9.0")
    newer = await Replica(pool, {JOB: Cron("*/10 * * * *")}, START, "0.10.0rc1").start()
    await newer.look(START)
    await (await Replica(pool, {JOB: QUARTERS}, START, "0.9.0").start()).look(START)
    assert await expressions(connection) == ["*/15 * * * *", "*/10 * * * *"]


async def test_every_version_triggers_by_the_schedule_in_force(pool: Pool, connection: Connection) -> None:
    old = await replica_of(pool, version="1.0")
    new = await Replica(pool, {JOB: Cron("*/10 * * * *")}, START, "1.1").start()
    await new.look(START)
    await old.look(START + timedelta(minutes=10))
    assert await ticks(connection) == [(datetime(2026, 11, 23, 4, 10, tzinfo=UTC), "queued")]


async def test_after_a_rollback_the_older_version_declares_its_own(pool: Pool, connection: Connection) -> None:
    old = await replica_of(pool, version="1.0")
    new = await Replica(pool, {JOB: Cron("*/10 * * * *")}, START, "1.1").start()
    await new.look(START)
    await new.stop()
    await old.look(START + timedelta(minutes=1))
    assert await expressions(connection) == ["*/15 * * * *", "*/10 * * * *", "*/15 * * * *"]


async def test_a_schedule_that_is_taken_away_expects_nothing(pool: Pool, connection: Connection) -> None:
    await (await replica_of(pool)).stop()
    none = await Replica(pool, {JOB: None}, START).start()
    await none.look(START + timedelta(seconds=1))
    await none.look(FIRST + 9 * QUARTER)
    assert await ticks(connection) == []
    assert await expressions(connection) == ["*/15 * * * *", None]


async def test_the_newest_version_ends_the_schedule_of_a_job_that_it_does_not_have(
    pool: Pool, connection: Connection
) -> None:
    """It was removed, or renamed; an older version beside it does not bring it back, and a rollback does."""
    old = await replica_of(pool, version="1.0")
    new = await Replica(pool, {}, START, "1.1").start()
    await new.look(START + timedelta(seconds=1))
    await old.look(FIRST + 9 * QUARTER)
    assert await ticks(connection) == []
    assert await expressions(connection) == ["*/15 * * * *", None]
    await new.stop()
    await old.look(FIRST + 9 * QUARTER + timedelta(minutes=1))
    assert await expressions(connection) == ["*/15 * * * *", None, "*/15 * * * *"]


async def test_a_year_away_is_accounted_for_without_keeping_other_jobs_waiting(
    pool: Pool, connection: Connection
) -> None:
    other = "draft-cleanup"
    replica = await Replica(pool, {JOB: QUARTERS, other: Cron("0 3 * * *")}, START).start()
    await replica.look(START)
    replica.clocks.instant = START + timedelta(days=20)
    assert await replica.triggers.make_pass() == 0
    counts = await connection.fetch("select job, count(*) from bon_scheduler.runs group by job order by job")
    assert [tuple(row) for row in counts] == [(other, 20), (JOB, 500)]


async def test_counting_the_ticks_of_a_year_away_keeps_nothing_else_waiting(pool: Pool) -> None:
    replica = await replica_of(pool)
    replica.clocks.instant = START + timedelta(days=400)
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.01)
            longest = max(longest, time.perf_counter() - before)

    ticking = asyncio.create_task(tick())
    started = time.perf_counter()
    await replica.triggers.make_pass()
    took = time.perf_counter() - started
    ticking.cancel()
    assert longest < took / 3


async def test_a_database_that_comes_back_finds_its_ticks(pool: Pool, connection: Connection) -> None:
    replica = await replica_of(pool)
    await connection.execute("alter table bon_scheduler.jobs rename to jobs_away")
    with pytest.raises(Exception, match="does not exist"):
        await replica.look(FIRST)
    await connection.execute("alter table bon_scheduler.jobs_away rename to jobs")
    await replica.look(FIRST + timedelta(seconds=5))
    assert await ticks(connection) == [(FIRST, "queued")]


async def test_an_audit_names_each_tick_and_what_became_of_it(pool: Pool, connection: Connection) -> None:
    replica = await replica_of(pool)
    await replica.look(FIRST)
    await end_runs(connection)
    await connection.execute("update bon_scheduler.runs set started_at = fire_time + interval '90 s', attempt = 1")
    await replica.look(FIRST + 2 * QUARTER)
    await connection.execute("delete from bon_scheduler.runs where fire_time = $1", FIRST + QUARTER)
    found = await audit_ticks(connection, START)
    verdicts = [(tick.fire_time, tick.verdict) for tick in found.ticks][:3]
    assert verdicts == [
        (FIRST, Verdict.RAN),
        (FIRST + QUARTER, Verdict.GAP),
        (FIRST + 2 * QUARTER, Verdict.IN_PROGRESS),
    ]
    assert [tick.late for tick in found.late] == [timedelta(seconds=90)]
    assert not found.sound


async def test_a_miss_is_resolved_by_a_later_tick_that_ran(pool: Pool, connection: Connection) -> None:
    replica = await replica_of(pool)
    await replica.look(FIRST + QUARTER)
    before = await audit_ticks(connection, START)
    assert [tick.resolved for tick in before.of(Verdict.MISSED)] == [False]
    await end_runs(connection)
    after = await audit_ticks(connection, START)
    assert [tick.resolved for tick in after.of(Verdict.MISSED)] == [True]
