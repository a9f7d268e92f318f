"""Screens lead on: the next command filled in, one record a line when piped, a name for who did it, at 80 columns."""

import json
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest

from bon_scheduler.ledger.workers import Worker, register_worker
from bon_scheduler.report import Report
from tests import arrange
from tests.conftest import Connection
from tests.process import run_command, run_program, serve
from tests.terminal import at_terminal

ROOT = Path(__file__).parents[2]
MAKE = """
    insert into bon_scheduler.runs (job, state, ready, origin, attempt, payload, error, fire_time, finished_at)
    values ($1, $2::text::bon_scheduler.run_state, true, 'schedule', 1, $3, $4, $5, now())
    returning id
"""
LETTER = """
    insert into bon_scheduler.deliveries (kind, business_id, as_of, recipient_hash, state, message_id, run_id, attempt)
    values ('overdue-digest', $1, current_date, $2, $3, 'm', $4, 1)
    returning id
"""
OUTCOME = """
    insert into bon_scheduler.business_outcomes (run_id, business_id, outcome, counts, error)
    values ($1, $2, $3, $4, $5)
"""
FIRED = datetime(2026, 11, 26, 4, 0, tzinfo=UTC)


async def make(
    connection: Connection, state: str, job: str = "draft-cleanup", payload: object = None, error: str | None = None
) -> str:
    fired = FIRED + timedelta(microseconds=uuid4().int % 10**10)
    run_id = await connection.fetchval(MAKE, job, state, payload or {}, error, fired)
    return str(run_id)


@pytest.mark.parametrize(
    ("state", "command"),
    [
        ("dead", "retry {run} --reason …"),
        ("partial", "retry {run} --reason …"),
        ("held", "release {run} --reason …"),
        ("queued", "cancel {run} --reason …"),
        ("running", "cancel {run} --reason …"),
        ("cancelled", "retry {run} --reason …"),
        ("missed", "run-once draft-cleanup --fire-time 2026-11-26T0"),
    ],
)
async def test_show_ends_with_the_next_command_filled_in(
    connection: Connection, database_url: str, state: str, command: str
) -> None:
    run_id = await make(connection, state)
    shown = await run_command("show", "draft-cleanup", DATABASE_URL=database_url)
    assert f"run_id       {run_id}" in shown.out
    hint = f"{sys.executable} -m bon_scheduler {command.format(run=run_id[:8])}"
    assert any(hint in line for line in shown.out.splitlines()[-3:]), shown.out


async def test_a_run_behind_an_exclusive_one_says_what_it_waits_for(connection: Connection, database_url: str) -> None:
    first = await make(connection, "running")
    second = await make(connection, "queued")
    await connection.execute("update bon_scheduler.runs set concurrency_key = 'draft-cleanup'")
    shown = await run_command("show", second, DATABASE_URL=database_url)
    assert f"It waits for run {first[:8]}…, which must not run beside it" in shown.out
    assert f"show {first[:8]}" in shown.out
    document = (await run_command("show", second, "--json", DATABASE_URL=database_url)).document
    assert any(first[:8] in each for each in document["waits_for"])


async def test_one_command_says_what_recent_runs_did_for_a_business(connection: Connection, database_url: str) -> None:
    mine, other = await arrange.business(connection), await arrange.business(connection)
    marked = await make(connection, "succeeded", "overdue-detection")
    await connection.execute(OUTCOME, UUID(marked), mine, "done", {"marked": 3}, None)
    await connection.execute(OUTCOME, UUID(marked), other, "done", {"marked": 7}, None)
    sent = await make(connection, "partial", "send-overdue-digest", {"business_id": str(mine)})
    await connection.execute("update bon_scheduler.runs set business = $2 where id = $1", UUID(sent), str(mine))
    letter = str(await connection.fetchval(LETTER, mine, "hmac:a", "unknown", UUID(sent)))
    elsewhere = await make(connection, "succeeded", "send-overdue-digest", {"business_id": str(other)})
    await connection.execute(LETTER, other, "hmac:b", "sent", UUID(elsewhere))
    dead = await make(connection, "dead", "overdue-digest", error="no such column")
    listed = await run_command("runs", "--business", str(mine)[:8], DATABASE_URL=database_url)
    lines = {line.split()[0].rstrip("…"): line for line in listed.out.splitlines() if line}
    assert "done: marked 3" in lines[marked[:8]]
    assert f"unknown ({letter[:8]}…)" in lines[sent[:8]]
    assert "no such column" in lines[dead[:8]]
    assert elsewhere[:8] not in lines
    assert f"resend {letter[:8]} --reason" in listed.out
    document = (await run_command("runs", "--business", str(mine), "--json", DATABASE_URL=database_url)).document
    assert {row["run_id"] for row in document["runs"]} == {marked, sent}
    assert [row["run_id"] for row in document["stopped_for_all"]] == [dead]
    shown = await run_command("show", marked, "--business", str(mine), DATABASE_URL=database_url)
    assert ("marked 3" in shown.out, "marked 7" in shown.out) == (True, False)
    nothing = await run_command("show", elsewhere, "--business", str(mine), DATABASE_URL=database_url)
    assert f"This run did nothing for business {mine}." in nothing.out
    quiet = await run_command("runs", "--business", str(uuid4()), "--state", "running", DATABASE_URL=database_url)
    assert "did anything for business" in quiet.out
    assert "BON has no business" in quiet.out


async def test_unrelated_dead_runs_do_not_hide_those_of_a_business(connection: Connection, database_url: str) -> None:
    mine = await arrange.business(connection)
    sent = await make(connection, "succeeded", "send-overdue-digest")
    await connection.execute("update bon_scheduler.runs set business = $2 where id = $1", UUID(sent), str(mine))
    unrelated = [await make(connection, "dead", "draft-cleanup", error="no such column") for _ in range(25)]
    await make(connection, "held", "overdue-detection", error="too many")
    arguments = ("runs", "--business", str(mine))
    listed = await run_command(*arguments, DATABASE_URL=database_url)
    lines = listed.out.splitlines()
    assert lines[1].startswith(sent[:8])
    assert "more" not in lines[2]
    (apart,) = [line for line in lines if "draft-cleanup" in line]
    assert apart.split()[0] == f"{unrelated[-1][:8]}…"
    assert " dead   25 " in apart
    assert lines.index(apart) > 2
    document = (await run_command(*arguments, "--json", DATABASE_URL=database_url)).document
    assert ([row["run_id"] for row in document["runs"]], document["more"]) == ([sent], False)
    assert {row["job"]: row["alike"] for row in document["stopped_for_all"]} == {
        "draft-cleanup": 25,
        "overdue-detection": 1,
    }


@pytest.mark.parametrize(("count", "limit", "cut"), [(3, 2, True), (2, 2, False)])
async def test_a_list_that_a_limit_cuts_says_so(
    connection: Connection, database_url: str, count: int, limit: int, cut: bool
) -> None:
    mine = await arrange.business(connection)
    for _ in range(count):
        await make(connection, "succeeded")
    await connection.execute("update bon_scheduler.runs set business = $1", str(mine))
    for command in (["runs"], ["runs", "--business", str(mine)], ["runs", "--job", "draft-cleanup"]):
        told = (*command, "--limit", str(limit))
        listed = await run_command(*told, DATABASE_URL=database_url)
        assert ("These are the newest 2, and there are more. List them with a higher --limit" in listed.out) is cut
        document = (await run_command(*told, "--json", DATABASE_URL=database_url)).document
        assert (len(document["runs"]), document["more"]) == (limit, cut)


async def test_a_queue_longer_than_is_counted_is_told_as_longer(connection: Connection, database_url: str) -> None:
    query = "select bon_scheduler.enqueue('generate-pdf') from generate_series(1, 10001)"
    await connection.execute(query)
    await connection.execute("select bon_scheduler.enqueue('draft-cleanup') from generate_series(1, 1200)")
    listed = await run_command("jobs", DATABASE_URL=database_url)
    counts = {line.split()[0]: line for line in listed.out.splitlines() if line}
    assert " 10,000+ " in counts["generate-pdf"]
    assert " 1,200 " in counts["draft-cleanup"]


async def test_what_a_screen_names_only_some_of_is_counted(connection: Connection, database_url: str) -> None:
    business, run = await arrange.business(connection), await make(connection, "partial")
    for number in range(5):
        await connection.fetchval(LETTER, business, f"hmac:{number}", "unknown", UUID(run))
        caused = await make(connection, "dead", "send-overdue-digest")
        await connection.execute("update bon_scheduler.runs set caused_by = $2 where id = $1", UUID(caused), UUID(run))
    shown = await run_command("show", run, DATABASE_URL=database_url)
    assert "And 2 more letters that are unknown, listed above." in shown.out
    assert "And 2 more that it caused, listed above." in shown.out
    checked = await run_command("check", DATABASE_URL=database_url)
    assert re.search(r"5 of the last seven days .*, and 2 more ", checked.out)


async def test_piped_one_record_is_one_line_and_no_line_has_padding(connection: Connection, database_url: str) -> None:
    run_id = await make(connection, "dead", error="the first line\nand a second " + "that is long " * 40)
    await make(connection, "succeeded")
    listed = await run_command("runs", DATABASE_URL=database_url)
    lines = [line for line in listed.out.splitlines() if "draft-cleanup" in line]
    assert len(lines) == 2
    (mine,) = [line for line in lines if line.startswith(run_id[:8])]
    assert "the first line and a second that is long" in mine
    assert mine.endswith("that is long")
    assert all(line == line.rstrip() for line in listed.out.splitlines())


async def test_a_dry_run_is_not_said_to_be_not_begun(connection: Connection, database_url: str) -> None:
    assert (await run_command("run-once", "session-cleanup", "--dry-run", DATABASE_URL=database_url)).status == 0
    run_id = await connection.fetchval("select id from bon_scheduler.runs where dry_run")
    shown = await run_command("show", str(run_id), DATABASE_URL=database_url)
    assert "A dry run has no attempts" in shown.out
    assert "Nobody has begun it." not in shown.out
    waiting = await make(connection, "queued")
    assert "Nobody has begun it." in (await run_command("show", waiting, DATABASE_URL=database_url)).out


async def test_a_payload_is_json(connection: Connection, database_url: str) -> None:
    payload = {"on": True, "none": None, "name": "דנה", "many": 10**30}
    await make(connection, "succeeded", payload=payload)
    shown = await run_command("show", "draft-cleanup", DATABASE_URL=database_url)
    (line,) = [each for each in shown.out.splitlines() if each.startswith("payload")]
    assert json.loads(line.removeprefix("payload").strip()) == payload


async def test_instants_carry_the_offset_everywhere_and_json_is_utc(connection: Connection, database_url: str) -> None:
    run_id = await make(connection, "succeeded")
    shown = await run_command("show", run_id, DATABASE_URL=database_url, BON_TIMEZONE="America/New_York")
    assert "2026-11-2" in shown.out
    assert "-05:00 (" in shown.out
    assert "UTC" not in shown.out
    document = (await run_command("show", run_id, "--json", DATABASE_URL=database_url)).document
    assert document["fire_time"].endswith("+00:00")


def test_instants_and_commands_in_texts_are_as_they_are_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bon_scheduler.calling.as_started", lambda: "python3 dev.py")
    report = Report(as_json=False)
    report.say("held since 2026-07-01 04:00 UTC: bon-scheduler release 12 --reason …")
    report.table(["a"], [["at 2026-11-27 04:00:00 UTC; bon-scheduler: no; 9999-12-31 23:00 UTC"]])
    out = capsys.readouterr().out
    assert "held since 2026-07-01 07:00+03:00: python3 dev.py release 12 --reason …" in out
    assert "at 2026-11-27 06:00:00+02:00; bon-scheduler: no; 9999-12-31 23:00 UTC" in out


async def test_hints_name_the_command_as_it_was_started(database_url: str, tmp_path: Path) -> None:
    environ = {"DATABASE_URL": database_url}
    clone = await run_program(sys.executable, "dev.py", "show", "0000", **environ)
    assert f"List runs with: {Path(sys.executable).name} dev.py runs" in clone.err
    script = tmp_path / "bon-scheduler"
    script.write_text(f"#!{sys.executable}\nfrom bon_scheduler.cli.app import main\nmain()\n")
    script.chmod(0o755)
    environ |= {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    installed = await run_program("bon-scheduler", "show", "0000", **environ)
    assert "List runs with: bon-scheduler runs" in installed.err
    stated = await run_program("bon-scheduler", "retry", "--help", **environ)
    assert "Usage: bon-scheduler retry" in stated.out


async def test_standard_output_of_enqueue_is_an_id_or_nothing(database_url: str) -> None:
    first = await run_command("enqueue", "generate-pdf", "--key", "a", DATABASE_URL=database_url)
    assert str(UUID(first.out.strip())) == first.out.strip()
    again = await run_command("enqueue", "generate-pdf", "--key", "a", DATABASE_URL=database_url)
    assert (again.status, again.out) == (0, "")
    assert first.out.strip() in again.err


async def test_enqueue_says_what_the_run_waits_for(connection: Connection, database_url: str) -> None:
    async def told(job: str) -> str:
        asked = await run_command("enqueue", job, DATABASE_URL=database_url, BON_TIMEZONE="UTC")
        assert str(UUID(asked.out.strip())) == asked.out.strip()
        return " ".join(asked.err.split())

    assert "The run waits: No `serve` is alive" in await told("session-cleanup")
    assert "The run waits: no version here has its handler." in await told("generate-pdf")
    older = Worker(serves=True, version="0.0.9", lease=timedelta(minutes=10), jobs=["session-cleanup"])
    await register_worker(connection, older)
    assert await told("session-cleanup") == ""
    assert "The run waits: no living worker handles it (0.0.9 on " in await told("draft-cleanup")
    await run_command("pause", "session-cleanup", "--reason", "a test", DATABASE_URL=database_url, OPERATOR="Dana Levi")
    paused = await told("session-cleanup")
    assert re.search(r"The run waits: session-cleanup is paused since \S+ \S+ by Dana Levi: a test;", paused)


async def test_run_once_at_a_terminal_shows_the_table_and_the_log_with_v_alone(database_url: str) -> None:
    status, quiet = await at_terminal("run-once", "session-cleanup", DATABASE_URL=database_url)
    assert status == 0
    assert "session-cleanup  succeeded  1     deleted 0" in quiet
    assert "run.ended" not in quiet
    status, loud = await at_terminal("run-once", "session-cleanup", "-v", DATABASE_URL=database_url)
    assert status == 0
    assert "run.ended" in loud


async def test_80_columns_hold_every_screen_and_a_command_stays_whole(
    connection: Connection, database_url: str
) -> None:
    run_id = await make(connection, "dead", error="the mail server said no " * 10)
    await make(connection, "held", "overdue-detection")
    assert (await run_command("pause", "draft-cleanup", "--reason", "x " * 60, DATABASE_URL=database_url)).status == 0
    shown = ""
    for command in (["jobs"], ["runs"], ["timeline", "--days", "2"], ["check"], ["show", run_id]):
        _, shown = await at_terminal(*command, DATABASE_URL=database_url)
        wide = [line for line in shown.splitlines() if len(line) > 80]
        # Longer is only a command, on a line of its own, which the terminal breaks and a copy does not.
        assert all(line.startswith(f"  {sys.executable} -m bon_scheduler ") for line in wide), (command, wide)
    assert f" -m bon_scheduler retry {run_id[:8]} --reason …" in shown


async def test_who_did_it_is_a_name(connection: Connection, database_url: str) -> None:
    await run_command("enqueue", "generate-pdf", DATABASE_URL=database_url, OPERATOR="Dana Levi")
    await run_command("enqueue", "generate-pdf", DATABASE_URL=database_url, USER="noa", LOGNAME="noa")
    asked = await connection.fetch("select asked_by from bon_scheduler.runs order by enqueued_at")
    assert [row["asked_by"] for row in asked] == ["Dana Levi", "noa"]


async def test_the_timeline_is_folded_and_lists_what_is_not_even(database_url: str) -> None:
    environ = {"DATABASE_URL": database_url, "SCHEDULE_SESSION_CLEANUP": "0 1,2,9,11,23 * * *"}
    planned = await run_command("timeline", "--from", "2026-11-27T00:00", "--days", "1", **environ)
    assert "Fri 2026-11-27 00:15–23:45+02:00" in planned.out
    assert "every 15 min (95)" in planned.out
    assert planned.out.count("session-cleanup") == 5


async def test_while_a_service_is_alive_no_screen_says_otherwise(database_url: str) -> None:
    async with serve(DATABASE_URL=database_url):
        for command in (["jobs"], ["runs"], ["timeline"]):
            assert "is alive" not in (await run_command(*command, DATABASE_URL=database_url)).out


async def test_show_says_before_when_a_run_that_was_put_off_is_not_begun(
    connection: Connection, database_url: str
) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    run_id = await connection.fetchval("select bon_scheduler.enqueue('session-cleanup', run_at => $1)", tomorrow)
    shown = await run_command("show", str(run_id), DATABASE_URL=database_url)
    here = tomorrow.astimezone(ZoneInfo("Asia/Jerusalem"))
    assert f"It is not to begin before {here:%Y-%m-%d %H:%M:%S}" in shown.out
