"""A tick that waits for longer than its period, or behind a run that is not due, is accounted for by nobody: say so."""

from datetime import UTC, datetime, timedelta

import aiohttp
import pytest

from bon_scheduler import Cron, service
from bon_scheduler.database.connections import Pool
from bon_scheduler.schedule.audit import Verdict, audit_ticks
from bon_scheduler.schedule.timing import Period, overstays
from tests.conftest import Connection, MakeSettings
from tests.process import run_command
from tests.replicas import ISRAEL, JOB, QUARTERS, Replica
from tests.waiting import until

QUARTER = timedelta(minutes=15)
NOW = "clock_timestamp()"
# $1 state, $2 run_at relative to now: interval; ready unless it waits for that instant.
HOLD = f"""
    update bon_scheduler.runs
       set state = $1::text::bon_scheduler.run_state, run_at = {NOW} + $2::interval, ready = $2::interval is null
     where origin = 'schedule'
"""
HELD = {
    "a run due in ten years": ("queued", timedelta(days=3650)),
    "a run that is never due": ("queued", None),
    "a run that is tried again in a week": ("retrying", timedelta(days=7)),
    "a run that works": ("running", None),
}


async def replica_behind(pool: Pool, connection: Connection, how: str, *, since: timedelta) -> Replica:
    """A replica whose first tick, `since` ago, is active in that way, so that the next ones wait."""
    begin = datetime.now(UTC) - since
    replica = await Replica(pool, {JOB: QUARTERS}, begin).start()
    await replica.look(begin)
    await replica.look(begin + QUARTER)
    state, due = HELD[how]
    await connection.execute(HOLD, state, due)
    if how == "a run that is never due":
        await connection.execute("update bon_scheduler.runs set run_at = 'infinity', ready = false")
    return replica


@pytest.mark.parametrize("how", HELD)
async def test_ticks_behind_a_run_for_longer_than_their_period_are_named_and_counted(
    pool: Pool, connection: Connection, database_url: str, how: str
) -> None:
    replica = await replica_behind(pool, connection, how, since=timedelta(hours=2))
    await replica.look(datetime.now(UTC))
    assert list(replica.triggers.stuck) == [JOB]
    found = await audit_ticks(connection, datetime.now(UTC) - timedelta(hours=3))
    assert (found.sound, bool(found.of(Verdict.STUCK))) == (False, True)
    audited = await run_command("audit", "--since", "3h", DATABASE_URL=database_url)
    assert (audited.status, "stuck" in audited.out, "behind run" in audited.out) == (1, True, True)


@pytest.mark.parametrize(
    ("how", "stuck"),
    [
        ("a run due in ten years", True),
        ("a run that is never due", True),
        ("a run that is tried again in a week", True),
        ("a run that works", False),
    ],
)
async def test_a_tick_that_waits_within_its_period_is_stuck_only_behind_what_is_not_due_by_then(
    pool: Pool, connection: Connection, how: str, stuck: bool
) -> None:
    now = datetime.now(UTC)
    in_quarter = timedelta(minutes=now.minute % 15, seconds=now.second, microseconds=now.microsecond)
    replica = await replica_behind(pool, connection, how, since=in_quarter + QUARTER + timedelta(seconds=1))
    await replica.look(datetime.now(UTC))
    assert bool(replica.triggers.stuck) is stuck
    found = await audit_ticks(connection, datetime.now(UTC) - timedelta(hours=3))
    assert [bool(found.of(Verdict.STUCK)), found.sound] == [stuck, not stuck]


async def test_once_the_run_in_its_way_has_ended_it_is_forgotten(pool: Pool, connection: Connection) -> None:
    replica = await replica_behind(pool, connection, "a run due in ten years", since=timedelta(hours=2))
    await replica.look(datetime.now(UTC))
    await connection.execute("update bon_scheduler.runs set state = 'cancelled', finished_at = now()")
    await replica.look(datetime.now(UTC))
    assert dict(replica.triggers.stuck) == {}


async def test_a_replica_with_a_stuck_tick_is_not_ready_and_says_why(
    make_settings: MakeSettings, connection: Connection, pool: Pool
) -> None:
    await replica_behind(pool, connection, "a run due in ten years", since=timedelta(hours=2))
    async with (
        service.serving(make_settings()) as serving,
        aiohttp.ClientSession() as session,
    ):

        async def stuck() -> str:
            async with session.get(f"http://127.0.0.1:{serving.port}/readyz") as answer:
                document = await answer.json()
            why = str(document["checks"]["schedules"]["stuck"].get(JOB, ""))
            assert answer.status == 503 or not why
            return why

        await until(stuck)
        assert "show" in await stuck()


@pytest.mark.parametrize(
    ("cron", "after", "stays"),
    [
        (QUARTERS, timedelta(minutes=29, seconds=59), False),
        (QUARTERS, timedelta(minutes=30), True),
        (Cron("0 6 * * *"), timedelta(hours=47), False),
        (Cron("0 6 * * *"), timedelta(hours=48), True),
        (None, timedelta(hours=47), False),
        (None, timedelta(hours=48), True),
    ],
)
def test_a_tick_may_wait_for_a_period_and_no_longer(cron: Cron | None, after: timedelta, stays: bool) -> None:
    instant = datetime(2026, 11, 23, 4, tzinfo=UTC)
    history = [Period(instant - timedelta(days=9), cron, ISRAEL)]
    assert overstays(history, instant, instant + after, None) is stays
    assert overstays(history, instant, instant, instant + after) is stays
