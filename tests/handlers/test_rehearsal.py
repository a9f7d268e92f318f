"""A rehearsal: it counts what the night's runs find, changes nothing, and warns where one would be held."""

import importlib
import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import aiohttp
import pytest

from bon_scheduler import service
from bon_scheduler.config import Settings
from bon_scheduler.declared import schedules_of
from bon_scheduler.engine.run_once import RunReport
from bon_scheduler.ledger import Action, change_all, rehearsals
from handlers.draft_cleanup import draft_cleanup, stale_drafts
from handlers.overdue_detection import overdue_detection, unmarked_overdue
from handlers.overdue_digest import OverdueDigest, overdue_digest
from handlers.rehearsal import rehearsal
from handlers.session_cleanup import expired_sessions, session_cleanup
from tests import arrange
from tests.conftest import Connection, MakeSettings, RunJob
from tests.handlers.test_brake import drafts
from tests.process import run_command
from tests.waiting import until

EVENING = datetime(2026, 11, 22, 20, tzinfo=UTC)
"""22:00 in Israel."""
DRAFTS, SESSIONS, MARKING = (datetime(2026, 11, 23, hour, tzinfo=UTC) for hour in (1, 2, 4))
NIGHT = (draft_cleanup.name, session_cleanup.name, overdue_detection.name, overdue_digest.name)
ROWS = """
    select (select count(*) from public.invoices) as invoices, (select count(*) from public.sessions) as sessions,
           (select count(*) from public.invoices where is_overdue) as marked,
           (select count(*) from bon_scheduler.runs where job <> 'rehearsal') as runs
"""
WRITES = """
    select sum(n_tup_ins + n_tup_upd + n_tup_del)::int as changed, sum(n_dead_tup)::int as dead
      from pg_stat_user_tables where schemaname = 'public'
"""
SECOND = timedelta(seconds=1)


async def population(connection: Connection) -> None:
    """Rows on both sides of each boundary of the night, as far as the evening does not decide it."""
    business = await arrange.business(connection)
    await arrange.owner(connection, business, "owner@shop.example")
    user = await arrange.user(connection)
    stale = DRAFTS - timedelta(days=30)
    for updated in (stale - timedelta(days=9), stale - SECOND, stale, stale + SECOND):  # two of these
        await arrange.draft(connection, business, updated_at=updated)
    for expires in (EVENING, SESSIONS - SECOND, SESSIONS, SESSIONS + SECOND):  # two of these
        await arrange.session(connection, user, expires)
    for due in (date(2026, 11, 1), date(2026, 11, 22), date(2026, 11, 23)):  # due yesterday, by 06:00: two of these
        await arrange.invoice(connection, business, due_date=due)
    await arrange.invoice(connection, business, due_date=date(2026, 11, 1), status="paid")
    paused = await arrange.business(connection)
    await arrange.owner(connection, paused, "paused@shop.example")
    await arrange.draft(connection, paused)
    await arrange.invoice(connection, paused, due_date=date(2026, 11, 1))
    await connection.execute(
        "insert into bon_scheduler.business_pauses (business_id, by, reason) values ($1, 'dana', 'a dispute')", paused
    )


async def said(connection: Connection, report: RunReport) -> dict[str, Any]:
    return {row["job"]: row for row in await rehearsals.rehearsals_of(connection, report.run["run_id"])}


async def test_it_counts_what_the_nights_runs_do(run_job: RunJob, connection: Connection) -> None:
    await population(connection)
    rehearsed = await run_job(rehearsal, fire_time=EVENING)
    assert rehearsed.run["state"] == "succeeded"
    found = await said(connection, rehearsed)
    assert {job: (row["candidates"], row["of"]) for job, row in found.items()} == {
        draft_cleanup.name: (2, 5),
        session_cleanup.name: (2, 4),
        overdue_detection.name: (2, 4),
        overdue_digest.name: (1, 2),
    }
    assert [row["fire_time"] for row in found.values()] == [DRAFTS, SESSIONS, MARKING, MARKING]
    for job, fire_time in ((draft_cleanup, DRAFTS), (session_cleanup, SESSIONS)):
        assert (await run_job(job, fire_time=fire_time)).run["counts"]["deleted"] == 2
    marking = await run_job(overdue_detection, fire_time=MARKING)
    assert marking.run["counts"]["marked"] == 2
    (digest,) = [run for run in marking.caused if run["job"] == overdue_digest.name]
    assert digest["counts"]["deliveries"] == 1
    compared = await said(connection, rehearsed)
    assert {job: (row["candidates"], row["found"]) for job, row in compared.items()} == {
        job: (row["candidates"], row["candidates"]) for job, row in found.items()
    }
    assert compared[overdue_digest.name]["compared_with"] == digest["run_id"]


async def test_what_is_to_come_is_judged_at_the_fire_time_and_not_by_the_databases_clock(
    run_job: RunJob, connection: Connection
) -> None:
    """What expires, grows stale or falls due between the evening and the night counts; what does after it does not."""
    evening = datetime.now(UTC)
    rehearsed = await run_job(rehearsal, fire_time=evening)
    at = {job: row["fire_time"] for job, row in (await said(connection, rehearsed)).items()}
    business, user = await arrange.business(connection), await arrange.user(connection)
    for side in (-SECOND, SECOND):
        stale = at[draft_cleanup.name] - timedelta(days=30) + side
        await arrange.draft(connection, business, updated_at=stale)
        await arrange.session(connection, user, at[session_cleanup.name] + side)
    day = at[overdue_detection.name].date()
    for due in (day - timedelta(days=1), day):
        await arrange.invoice(connection, business, due_date=due)
    again = await said(connection, await run_job(rehearsal, fire_time=evening))
    assert [again[job]["candidates"] for job in NIGHT[:3]] == [1, 1, 1]


async def test_what_the_brake_counts_goes_by_the_databases_clock_unless_it_is_a_rehearsal(
    connection: Connection,
) -> None:
    """A run whose fire time is ahead of the database counts what has come; only a rehearsal names another instant."""
    far = datetime.now(UTC) + timedelta(days=20)
    business, user = await arrange.business(connection), await arrange.user(connection)
    await arrange.draft(connection, business, updated_at=datetime.now(UTC) - timedelta(days=20))
    await arrange.session(connection, user, datetime.now(UTC) + timedelta(days=10))
    await arrange.invoice(connection, business, due_date=(datetime.now(UTC) + timedelta(days=10)).date())
    for now, number in ((None, 0), (far, 1)):
        found = (
            await stale_drafts(connection, far, now=now),
            await expired_sessions(connection, far, now=now),
            await unmarked_overdue(connection, far.date(), now=now),
        )
        assert [each.number for each in found] == [number] * 3


async def test_it_changes_no_row_and_leaves_none_dead(run_job: RunJob, connection: Connection) -> None:
    await population(connection)
    await connection.execute("select pg_stat_force_next_flush()")
    rows, writes = await connection.fetchrow(ROWS), await connection.fetchrow(WRITES)
    report = await run_job(rehearsal, fire_time=EVENING, BRAKE_MIN_ROWS="0", BRAKE_MAX_SHARE="0.1")
    await connection.execute("select pg_stat_force_next_flush()")
    assert report.run["counts"]["would_hold"] > 0
    assert (await connection.fetchrow(ROWS), await connection.fetchrow(WRITES)) == (rows, writes)


async def test_each_count_is_taken_in_a_transaction_that_may_not_write(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement that changes something is refused by the server, and told as a job that could not be counted."""
    module = importlib.import_module("handlers.session_cleanup")
    monkeypatch.setattr(module, "COUNT_EXPIRED", "delete from public.sessions where $1 <= $2::timestamptz returning 1")
    await population(connection)
    report = await run_job(rehearsal, fire_time=EVENING)
    assert (report.run["state"], report.run["counts"]["unknown"]) == ("partial", 1)
    assert await connection.fetchval("select count(*) from public.sessions") == 4


async def test_it_warns_now_where_the_brake_would_trip_and_the_run_is_held_for_the_same_reason(
    run_job: RunJob, connection: Connection, logged: Callable[[], str]
) -> None:
    await drafts(connection, 6, 1)
    rehearsed = await run_job(rehearsal, fire_time=EVENING, BRAKE_MIN_ROWS="4")
    assert (rehearsed.run["state"], rehearsed.run["counts"]["would_hold"]) == ("succeeded", 1)
    reason = (await said(connection, rehearsed))[draft_cleanup.name]["reason"]
    assert "first run: 6 of 7 drafts are older than 30 days" in reason
    assert "run-once draft-cleanup --release-brake" in reason
    (warned,) = [e for e in map(json.loads, logged().splitlines()) if e["event"] == "rehearsal.would_hold"]
    assert (warned["level"], warned["of"], warned["reason"]) == ("warning", draft_cleanup.name, reason)
    assert await connection.fetchval("select count(*) from public.invoices") == 7
    held = await run_job(draft_cleanup, fire_time=DRAFTS, BRAKE_MIN_ROWS="4")
    assert held.run["state"] == "held"
    assert held.run["reason"].partition(". ")[0] == reason.partition(". ")[0]
    (said_of_it,) = await rehearsals.rehearsals_of(connection, held.run["run_id"])
    assert (said_of_it["candidates"], said_of_it["found"]) == (6, 6)


async def test_what_is_usual_is_that_of_each_job(run_job: RunJob, connection: Connection) -> None:
    past = "insert into bon_scheduler.runs (job, origin, state, counts) values ($1, 'person', 'succeeded', $2)"
    for job, counts in (("draft-cleanup", {"deleted": 1}), ("session-cleanup", {"deleted": 90})):
        await connection.execute(past, job, counts)
    await drafts(connection, 11, 40)
    found = await said(connection, await run_job(rehearsal, fire_time=EVENING, BRAKE_MIN_ROWS="4"))
    assert {job: row["usual"] for job, row in found.items()} == dict(zip(NIGHT, (1, 90, None, None), strict=True))
    assert "the median of the last run is 1" in found["draft-cleanup"]["reason"]


@pytest.mark.parametrize(("more", "level"), [(0, "info"), (100, "info"), (101, "warning")])
async def test_a_night_that_differs_much_from_its_rehearsal_is_a_warning(
    run_job: RunJob, connection: Connection, logged: Callable[[], str], more: int, level: str
) -> None:
    user = await arrange.user(connection)
    await arrange.session(connection, user, arrange.LONG_AGO)
    rehearsed = await run_job(rehearsal, fire_time=EVENING)
    for _ in range(more):
        await arrange.session(connection, user, arrange.LONG_AGO)
    first = await run_job(session_cleanup, fire_time=SESSIONS)
    await run_job(session_cleanup, fire_time=SESSIONS)  # the second has nothing left to do, and is no news
    events = [e for e in map(json.loads, logged().splitlines()) if e["event"] == "rehearsal.compared"]
    assert [(e["level"], e["rehearsed"], e["candidates"]) for e in events] == [(level, 1, more + 1)]
    row = (await said(connection, rehearsed))[session_cleanup.name]
    assert (row["found"], row["compared_with"]) == (more + 1, first.run["run_id"])


@pytest.mark.parametrize(
    "change",
    [
        "rehearsed_at = rehearsed_at - interval '25 hours'",  # of another night
        "fire_time = now() + interval '1 hour'",  # a person's run of the evening is not tonight's
    ],
)
async def test_a_run_is_compared_only_with_the_rehearsal_of_its_night(
    run_job: RunJob, connection: Connection, change: str
) -> None:
    await run_job(rehearsal, fire_time=EVENING)
    await connection.execute(f"update bon_scheduler.rehearsals set {change}")
    report = await run_job(session_cleanup, fire_time=SESSIONS)
    assert await rehearsals.rehearsals_of(connection, report.run["run_id"]) == []


async def test_a_dry_run_is_no_nights_run(connection: Connection, run_job: RunJob, database_url: str) -> None:
    await run_job(rehearsal, fire_time=EVENING)
    dry = await run_command("run-once", "session-cleanup", "--dry-run", "--json", DATABASE_URL=database_url)
    assert (dry.status, dry.document["state"], "rehearsal.compared" in dry.err) == (0, "succeeded", False)
    assert await connection.fetchval("select count(*) from bon_scheduler.rehearsals where found is not null") == 0


async def test_a_job_without_a_schedule_or_paused_is_left_out(run_job: RunJob, connection: Connection) -> None:
    await connection.execute(
        "insert into bon_scheduler.pauses (job, by, reason) values ('overdue-detection', 'd', 'r')"
    )
    report = await run_job(rehearsal, fire_time=EVENING, SCHEDULE_SESSION_CLEANUP="")
    assert list(await said(connection, report)) == [draft_cleanup.name]
    assert report.run["counts"] == {"draft-cleanup": 0, "would_hold": 0, "paused": 2}


async def test_what_one_job_may_not_read_hides_no_other(
    run_job: RunJob, connection: Connection, logged: Callable[[], str]
) -> None:
    await population(connection)
    await connection.execute("alter table public.sessions rename to sessions_of_yore")
    report = await run_job(rehearsal, fire_time=EVENING)
    assert (report.run["state"], report.run["counts"]["unknown"]) == ("partial", 1)
    assert set(await said(connection, report)) == {*NIGHT} - {session_cleanup.name}
    assert '"rehearsal.failed"' in logged()


async def test_the_command_says_it_in_a_table_of_80_columns_with_status_3(
    connection: Connection, database_url: str
) -> None:
    await drafts(connection, 6, 1)
    environ = {"DATABASE_URL": database_url, "BRAKE_MIN_ROWS": "4"}
    told = await run_command("rehearse", **environ, COLUMNS="80")
    assert told.status == 3
    table = told.out.splitlines()[:5]
    assert table[0].split() == ["job", "at", "candidates", "of", "usual", "verdict"]
    assert max(map(len, table)) <= 80
    assert [line.split()[0] for line in table[1:]] == [*NIGHT]
    assert "draft-cleanup would be held: first run: 6 of 7 drafts" in told.out
    document = (await run_command("rehearse", "--json", **environ)).document
    (held,) = [each for each in document["jobs"] if each["verdict"] == "would be held"]
    assert (document["would_hold"], document["state"]) == (True, "succeeded")
    assert (held["job"], held["candidates"], held["of"], held["usual"]) == ("draft-cleanup", 6, 7, None)
    calm = await run_command("rehearse", DATABASE_URL=database_url)
    assert (calm.status, "would be held" in calm.out) == (0, False)


async def test_show_has_the_two_side_by_side(run_job: RunJob, connection: Connection, database_url: str) -> None:
    await drafts(connection, 3, 4)
    rehearsed = await run_job(rehearsal, fire_time=EVENING)
    await drafts(connection, 2, 0)
    ran = await run_job(draft_cleanup, fire_time=DRAFTS)
    for run in (rehearsed, ran):
        document = (await run_command("show", str(run.run["run_id"]), "--json", DATABASE_URL=database_url)).document
        (row,) = [each for each in document["rehearsals"] if each["job"] == "draft-cleanup"]
        assert (row["candidates"], row["found"], row["compared_with"]) == (3, 5, str(ran.run["run_id"]))
        shown = await run_command("show", str(run.run["run_id"]), DATABASE_URL=database_url)
        assert "Rehearsed" in shown.out


async def test_the_metric_is_1_from_the_rehearsal_until_the_run(
    run_job: RunJob, connection: Connection, make_settings: MakeSettings
) -> None:
    await drafts(connection, 6, 1)
    await run_job(rehearsal, fire_time=EVENING, BRAKE_MIN_ROWS="4")
    settings = make_settings(**{f"SCHEDULE_{job.upper().replace('-', '_')}": "" for job in (*NIGHT[:3], "rehearsal")})
    async with service.serving(settings) as serving, aiohttp.ClientSession() as session:

        async def shown(job: str, value: str) -> bool:
            async with session.get(f"http://127.0.0.1:{serving.port}/metrics") as answer:
                return f'bon_rehearsal_would_hold{{job_name="{job}"}} {value}' in await answer.text()

        await until(lambda: shown("draft-cleanup", "1.0"))
        await until(lambda: shown("session-cleanup", "0.0"))
        held = await run_job(draft_cleanup, fire_time=DRAFTS, BRAKE_MIN_ROWS="4")
        assert held.run["state"] == "held"
        await until(lambda: shown("draft-cleanup", "0.0"))


async def test_a_digest_that_is_held_is_compared_once_it_is_released(run_job: RunJob, connection: Connection) -> None:
    """Its transaction is rolled back where it is held, and the comparison with it."""
    await population(connection)
    rehearsed = await run_job(rehearsal, fire_time=EVENING, BRAKE_MIN_ROWS="0")
    payload = OverdueDigest(as_of=MARKING.date())
    held = await run_job(overdue_digest, payload, fire_time=MARKING, BRAKE_MIN_ROWS="0", BRAKE_MAX_SHARE="0.1")
    assert held.run["state"] == "held"
    await change_all(connection, Action.RELEASE, [held.run["run_id"]], by="dana", reason="right")
    await connection.execute("delete from bon_scheduler.runs where id = $1", held.run["run_id"])
    sent = await run_job(overdue_digest, payload, fire_time=MARKING)
    assert (await said(connection, rehearsed))[overdue_digest.name]["compared_with"] == sent.run["run_id"]


def test_it_fires_at_22_by_itself(settings: Settings) -> None:
    cron = schedules_of(settings)["rehearsal"]
    assert (cron.expression, cron.catch_up, cron.grace) == ("0 22 * * *", "latest", timedelta(hours=2))
