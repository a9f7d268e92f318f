"""Audit, timeline, pause and resume as an operator calls them."""

import json
import time
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from bon_scheduler import Cron
from bon_scheduler.cli import ticks
from bon_scheduler.clock import SystemClock
from bon_scheduler.config import Settings
from bon_scheduler.database.connections import Pool
from bon_scheduler.report import Report
from bon_scheduler.schedule.audit import Audit, AuditedTick, Verdict, audit_ticks, unaccounted
from tests.conftest import Connection
from tests.process import run_command
from tests.replicas import JOB, QUARTERS, Replica

QUARTER = timedelta(minutes=15)
NOW = datetime(2026, 11, 27, 6, 0, tzinfo=UTC)
INSERT_RUNS = """
    insert into bon_scheduler.runs (job, fire_time, origin, state, attempt, started_at, finished_at)
    select $1, fire_time, 'schedule', 'succeeded', 1, fire_time + interval '20 ms', fire_time + interval '1 s'
      from generate_series($2::timestamptz, $3::timestamptz, interval '15 min') as t (fire_time)
"""


async def month_of_quarters(pool: Pool, connection: Connection) -> datetime:
    """Make a month of ticks that all ran, until a minute ago; return its first instant."""
    now = datetime.now(UTC)
    begin = (now - timedelta(days=31)).replace(minute=1, second=0, microsecond=0)
    await (await Replica(pool, {JOB: QUARTERS}, begin).start()).look(begin)
    last = now.replace(minute=now.minute - now.minute % 15, second=0, microsecond=0)
    await connection.execute(INSERT_RUNS, JOB, begin + timedelta(minutes=14), last)
    await connection.execute("update bon_scheduler.jobs set last_tick = $1 where name = $2", last, JOB)
    return begin


async def test_a_month_of_quarter_hours_is_audited_in_under_a_second(pool: Pool, connection: Connection) -> None:
    begin = await month_of_quarters(pool, connection)
    started = time.perf_counter()
    found = await audit_ticks(connection, begin)
    seconds = time.perf_counter() - started
    assert len(found.ticks) in range(2972, 2982)
    assert found.sound
    assert seconds < 1


async def test_an_audit_of_a_sound_month_says_so_with_status_0(
    pool: Pool, connection: Connection, database_url: str
) -> None:
    await month_of_quarters(pool, connection)
    result = await run_command("audit", "--since", "31d", "--json", DATABASE_URL=database_url)
    document = result.document
    assert (result.status, document["sound"], document["gaps"], document["missed"]) == (0, True, [], [])
    assert document["ran"] == document["expected"]
    assert document["ticks"][0]["late_seconds"] == 0.02
    people = await run_command("audit", "--since", "31d", DATABASE_URL=database_url)
    assert "Every tick is accounted for." in people.out


async def test_an_audit_names_a_gap_with_status_1(pool: Pool, connection: Connection, database_url: str) -> None:
    begin = await month_of_quarters(pool, connection)
    lost = begin + timedelta(minutes=14) + 100 * QUARTER
    await connection.execute("delete from bon_scheduler.runs where fire_time = $1", lost)
    result = await run_command("audit", "--since", "31d", "--json", DATABASE_URL=database_url)
    assert result.status == 1
    assert [(gap["job"], datetime.fromisoformat(gap["fire_time"])) for gap in result.document["gaps"]] == [(JOB, lost)]


async def test_an_audit_lists_a_miss_with_its_reason_and_whether_it_was_made_good(
    pool: Pool, connection: Connection, database_url: str
) -> None:
    begin = await month_of_quarters(pool, connection)
    for tick, state in ((5, "missed"), (6, "dead")):
        await connection.execute(
            "update bon_scheduler.runs set state = $1::text::bon_scheduler.run_state, reason = 'beyond grace'"
            " where fire_time = $2",
            state,
            begin + timedelta(minutes=14) + tick * QUARTER,
        )
    result = await run_command("audit", "--since", "31d", "--json", DATABASE_URL=database_url)
    assert result.status == 0
    assert [(miss["reason"], miss["resolved"]) for miss in result.document["missed"]] == [("beyond grace", True)]
    assert len(result.document["dead"]) == 1


async def test_an_audit_lists_what_was_cancelled_and_how_to_run_again_what_is_dead(
    pool: Pool, connection: Connection, database_url: str
) -> None:
    begin = await month_of_quarters(pool, connection)
    changed = {
        state: await connection.fetchval(
            "update bon_scheduler.runs set state = $1::text::bon_scheduler.run_state, reason = 'wrong data'"
            " where fire_time = $2 returning id",
            state,
            begin + timedelta(minutes=14) + tick * QUARTER,
        )
        for tick, state in ((5, "cancelled"), (6, "dead"))
    }
    result = await run_command("audit", "--since", "31d", DATABASE_URL=database_url)
    assert result.status == 0
    assert [" cancelled " in line and "wrong data" in line for line in result.out.splitlines()].count(True) == 1
    assert "retry RUN_ID --reason …" in result.out
    assert f"Dead, the latest first: {changed['dead']}\n" in result.out


@pytest.mark.parametrize("since", ["7d", "2026-11-23", "2026-11-23T06:00", "2026-11-23T06:00:00Z"])
async def test_an_audit_takes_a_span_or_an_instant(database_url: str, since: str) -> None:
    result = await run_command("audit", "--since", since, DATABASE_URL=database_url)
    assert (result.status, "No tick was expected" in result.out) == (0, True)


async def test_a_timeline_marks_the_gap_and_the_fold(database_url: str) -> None:
    spring = await run_command(
        "timeline", "--from", "2026-03-26T12:00", "--days", "1", "--json", DATABASE_URL=database_url
    )
    assert spring.document["transitions"] == [{"at": "2026-03-27T00:00:00+00:00", "change_minutes": 60.0}]
    autumn = await run_command(
        "timeline", "--from", "2026-10-24T12:00", "--days", "1", "--job", "shaam-token-refresh",
        DATABASE_URL=database_url,
    )  # fmt: skip
    assert "a fold" in autumn.out
    lines = [line for line in autumn.out.splitlines() if "of two" in line]
    assert ["01:00–01:45+03:00" in lines[0], "every 15 min (4); the first of two" in lines[0]] == [True, True]
    assert ["01:00–01:45+02:00" in lines[1], "every 15 min (4); the second of two" in lines[1]] == [True, True]
    assert len(lines) == 2


async def test_a_timeline_needs_no_database() -> None:
    result = await run_command("timeline", "--days", "1", DATABASE_URL="postgresql://bon@127.0.0.1:1/bon")
    assert result.status == 0
    assert "overdue-detection" in result.out
    assert "These are this shell's schedules" in result.out


async def test_a_job_is_paused_and_resumed_with_a_reason_that_jobs_shows(database_url: str) -> None:
    paused = await run_command("pause", JOB, "--reason", "migration of sessions", DATABASE_URL=database_url)
    assert (paused.status, f"{JOB} is paused." in paused.out) == (0, True)
    again = await run_command("pause", JOB, "--reason", "again", "--json", DATABASE_URL=database_url)
    assert again.document == {"job": JOB, "paused": True, "changed": False}
    listed = json.loads((await run_command("jobs", "--json", DATABASE_URL=database_url)).out)["jobs"]
    (job,) = [row for row in listed if row["job"] == JOB]
    assert job["paused"]["reason"] == "migration of sessions"
    resumed = await run_command("resume", JOB, "--reason", "done", "--json", DATABASE_URL=database_url)
    assert resumed.document == {"job": JOB, "paused": False, "changed": True}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pause", JOB], "Missing option '--reason'"),
        (["pause", JOB, "--reason", " "], "--reason is empty"),
        (["pause", "no-such-job", "--reason", "x"], 'Unknown job "no-such-job"'),
        (["audit", "--since", "ages"], "is not an instant"),
        (["timeline", "--days", "0"], "Give 1 to 3660"),
        (["timeline", "--job", "overdue-digest"], "has no schedule"),
    ],
)
async def test_a_wrong_call_is_status_2_with_the_remedy(database_url: str, arguments: list[str], says: str) -> None:
    result = await run_command(*arguments, DATABASE_URL=database_url)
    assert result.status == 2
    assert says in result.err


async def test_unaccounted_ticks_show_in_the_metrics_gauge(pool: Pool, connection: Connection) -> None:
    begin = datetime.now(UTC) - timedelta(hours=1)
    await (await Replica(pool, {JOB: Cron("* * * * *")}, begin).start()).look(begin)
    owed = await unaccounted(connection)
    assert owed[JOB] in range(58, 61)


async def test_what_an_audit_lists_only_some_of_begins_with_gaps_and_is_counted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late = [
        AuditedTick("a-test", NOW - n * QUARTER, Verdict.RAN, started_at=NOW - n * QUARTER + timedelta(minutes=5))
        for n in range(60, 5, -1)
    ]
    dead = [AuditedTick("a-test", NOW - n * QUARTER, Verdict.DEAD, run_id=uuid4()) for n in range(5, 0, -1)]
    found = Audit(NOW - timedelta(days=1), NOW, [*late, *dead, AuditedTick("a-test", NOW, Verdict.GAP)])

    async def audited(*_: object) -> Audit:
        return found

    monkeypatch.setattr(ticks, "audit_ticks", audited)
    assert await ticks.audit(settings, Report(as_json=False), SystemClock(), since="1d") == 1
    lines = capsys.readouterr().out.splitlines()
    (gap,) = [number for number, line in enumerate(lines) if " gap " in line]
    assert gap < min(number for number, line in enumerate(lines) if " late " in line and "a-test" in line)
    assert "and 11 more; all of them with --json" in lines
    assert ", and 2 more: " in lines[-1]
    assert lines[-1].endswith("runs --state dead")
