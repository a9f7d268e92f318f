"""A machine whose clock is wrong destroys nothing, and a run is judged by the instant it was asked for."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bon_scheduler import Counts, JobContext, NoPayload, Retry, job, service
from bon_scheduler.ledger import Origin, Request, enqueue
from bon_scheduler.schedule.clocks import ClockError, Clocks
from tests import arrange
from tests.conftest import Connection, MakeSettings, SetClock
from tests.faketime import needs_faketime, wall_clock
from tests.process import run_command
from tests.waiting import until

ROWS = "select (select count(*) from public.invoices) + (select count(*) from public.sessions)"
AHEAD, BEHIND = timedelta(days=40), -timedelta(days=40)


@needs_faketime
@pytest.mark.parametrize("off_by", [AHEAD, BEHIND, timedelta(minutes=2)], ids=["ahead", "behind", "two minutes"])
@pytest.mark.parametrize("arguments", [["draft-cleanup"], ["session-cleanup"], ["overdue-detection", "--dry-run"]])
@pytest.mark.samples(5)
async def test_a_persons_run_from_a_machine_with_a_wrong_clock_is_refused(
    connection: Connection, database_url: str, tmp_path: Path, arguments: list[str], off_by: timedelta
) -> None:
    await arrange.draft(connection, await arrange.business(connection), updated_at=datetime.now(UTC))
    await arrange.session(connection, await arrange.user(connection), datetime.now(UTC) + timedelta(days=1))
    with wall_clock(tmp_path, off_by) as clock:
        result = await run_command("run-once", *arguments, DATABASE_URL=database_url, **clock.environ)
    assert (result.status, "NTP" in result.err) == (1, True)
    assert await connection.fetchval(ROWS) == 2
    assert await connection.fetchval("select count(*) from bon_scheduler.runs") == 0


@needs_faketime
async def test_a_run_that_a_person_puts_off_is_due_by_the_databases_clock(
    connection: Connection, database_url: str, tmp_path: Path
) -> None:
    with wall_clock(tmp_path, AHEAD) as clock:
        result = await run_command(
            "enqueue", "session-cleanup", "--in", "1h", DATABASE_URL=database_url, **clock.environ
        )
    assert result.status == 0
    due = await connection.fetchval("select run_at - clock_timestamp() from bon_scheduler.runs")
    assert timedelta(minutes=59) < due <= timedelta(hours=1)


@pytest.mark.parametrize("off_by", [AHEAD, BEHIND], ids=["ahead", "behind"])
async def test_a_handler_is_told_the_time_that_is_believed(
    make_settings: MakeSettings, connection: Connection, off_by: timedelta
) -> None:
    seen: list[Mapping[str, datetime]] = []

    @job("a-test")
    async def look(ctx: JobContext, _: NoPayload) -> Counts:
        seen.append({"now": ctx.now, "fire_time": ctx.fire_time})
        return {}

    # The newest tick that is in the ledger says which of two clocks cannot be right, when that is the one behind.
    await connection.execute("update bon_scheduler.jobs set last_tick = now() where name = 'generate-pdf'")
    await service.prepare(make_settings(), jobs=[look])
    clocks = Clocks(SetClock(datetime.now(UTC) + off_by))
    async with service.serving(make_settings(), jobs=[look], clock=clocks):
        await connection.execute("select bon_scheduler.enqueue('a-test')")

        async def ran() -> bool:
            return bool(seen)

        await until(ran)
    for instant in seen[0].values():
        assert abs(instant - datetime.now(UTC)) < timedelta(minutes=1)


async def test_clocks_that_agree_are_no_reason_to_refuse(connection: Connection) -> None:
    now = await connection.fetchval("select clock_timestamp()")
    await Clocks(SetClock(now + timedelta(seconds=50))).require_agreement(connection)
    with pytest.raises(ClockError):
        await Clocks(SetClock(now + timedelta(seconds=70))).require_agreement(connection)


@pytest.mark.parametrize("origin", [Origin.PROGRAM, Origin.PERSON])
async def test_a_run_that_was_put_off_is_judged_by_that_instant_in_every_attempt(
    make_settings: MakeSettings, connection: Connection, origin: Origin
) -> None:
    seen: list[tuple[datetime, int]] = []

    @job("a-test", retry=Retry(attempts=3, delay=timedelta(seconds=0.1)))
    async def look(ctx: JobContext, _: NoPayload) -> Counts:
        seen.append((ctx.fire_time, ctx.attempt))
        if ctx.attempt < 3:
            raise RuntimeError("again")
        return {}

    await service.prepare(make_settings(), jobs=[look])
    asked = await connection.fetchval("select clock_timestamp() + interval '1.5 seconds'")
    await enqueue(connection, Request("a-test", {}, run_at=asked, origin=origin))
    async with service.serving(make_settings(), jobs=[look]):

        async def ended() -> bool:
            return len(seen) == 3

        await until(ended)
    assert seen == [(asked, 1), (asked, 2), (asked, 3)]


async def test_a_run_that_was_put_off_through_sql_is_judged_by_that_instant(connection: Connection) -> None:
    await connection.execute("select bon_scheduler.enqueue('generate-pdf', run_at => now() + interval '10 hours')")
    await connection.execute("select bon_scheduler.enqueue('generate-pdf', run_at => now() - interval '10 hours')")
    await connection.execute("select bon_scheduler.enqueue('generate-pdf')")
    rows = await connection.fetch("select asked_for = run_at as kept from bon_scheduler.runs order by enqueued_at")
    assert [row["kept"] for row in rows] == [True, None, None]
