"""Every command as a process: what it prints, and its exit status."""

import asyncio
import getpass
import json
import signal
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bon_scheduler.cli import asking
from bon_scheduler.clock import SystemClock
from bon_scheduler.database import connections
from bon_scheduler.database.migrations import NEEDED, require_schema
from bon_scheduler.demo.sample import create_tables, load_sample
from bon_scheduler.report import Report
from bon_scheduler.shaam.spool import Spool
from tests import tax
from tests.conftest import Connection, MakeSettings
from tests.process import run_command, run_program, serve
from tests.waiting import until

JOBS = ("overdue-detection", "draft-cleanup", "session-cleanup", "shaam-token-refresh")


async def load(connection: Connection, make_settings: MakeSettings) -> None:
    await load_sample(connection, now=datetime.now(UTC), zone=make_settings().bon_timezone, encrypt=lambda text: text)


async def test_migrate_then_a_job_works_on_a_database_that_holds_bons_tables(empty_database_url: str) -> None:
    async with connections.connect(empty_database_url) as connection:
        await create_tables(connection)
        relations = "select count(*) from pg_class c where c.relnamespace = 'public'::regnamespace"
        types = "select count(*) from pg_type t where t.typnamespace = 'public'::regnamespace"
        before = [await connection.fetchval(query) for query in (relations, types)]
        migrated = await run_command("migrate", "--json", DATABASE_URL=empty_database_url)
        assert (migrated.status, migrated.document["applied"][0]) == (0, "0010 ledger")
        ran = await run_command("run-once", "overdue-detection", "--json", DATABASE_URL=empty_database_url)
        assert (ran.status, ran.document["state"]) == (0, "succeeded")
        assert [await connection.fetchval(query) for query in (relations, types)] == before


async def test_migrate_from_several_replicas_at_once_is_safe(empty_database_url: str) -> None:
    results = await asyncio.gather(*(run_command("migrate", DATABASE_URL=empty_database_url) for _ in range(4)))
    assert [result.status for result in results] == [0, 0, 0, 0]
    assert sum("0010 ledger" in result.out for result in results) == 1


async def test_the_sql_that_migrate_prints_makes_the_same_schema(empty_database_url: str) -> None:
    printed = await run_command("migrate", "--sql")
    assert printed.status == 0
    async with connections.connect(empty_database_url) as connection:
        await connection.execute(printed.out)
        assert await require_schema(connection) == NEEDED
    again = await run_command("migrate", "--json", DATABASE_URL=empty_database_url)
    assert (again.status, again.document["applied"]) == (0, [])


async def test_run_once_reports_the_run_and_all_it_caused(
    database_url: str, connection: Connection, make_settings: MakeSettings
) -> None:
    await load(connection, make_settings)
    ran = await run_command("run-once", "overdue-detection", "--json", DATABASE_URL=database_url)
    assert ran.status == 0
    document = ran.document
    assert document["counts"] == {"marked": 43, "cleared": 6}
    assert set(document) == {
        "run_id", "job", "fire_time", "state", "dry_run", "attempt", "duration_ms", "counts", "businesses",
        "error", "caused",
    }  # fmt: skip
    jobs = [run["job"] for run in document["caused"]]
    assert (jobs[0], set(jobs[1:]), len(jobs)) == ("overdue-digest", {"send-overdue-digest"}, 13)
    assert {run["state"] for run in document["caused"]} == {"succeeded"}
    assert "@" not in ran.err


async def test_every_job_run_twice_changes_nothing_the_second_time(
    database_url: str, connection: Connection, make_settings: MakeSettings
) -> None:
    await load(connection, make_settings)
    # The same instant both times: on a busy machine more has expired by the second.
    instant = datetime.now(UTC).isoformat()

    async def run_each() -> None:
        for job in JOBS:
            ran = await run_command("run-once", job, "--fire-time", instant, DATABASE_URL=database_url)
            assert ran.status == 0, ran.err

    await run_each()
    before = await contents(connection)
    await run_each()
    assert await contents(connection) == before


async def contents(connection: Connection) -> dict[str, list[str]]:
    tables = [
        row[0]
        for row in await connection.fetch(
            "select c.relname from pg_class c where c.relnamespace = 'public'::regnamespace and c.relkind = 'r'"
        )
    ]
    assert len(tables) > 8
    return {
        table: [row[0] for row in await connection.fetch(f'select t::text from public."{table}" t order by 1')]
        for table in tables
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run-once", "overdue-detecton"], 'Did you mean "overdue-detection"?'),
        (["run-once", "overdue-detection", "--payload", "{bad"], "--payload is not JSON"),
        (["run-once", "overdue-detection", "--payload", "[1]"], "must be a JSON object, not list"),
        (["run-once", "overdue-detection", "--payload", '{"x": 1}'], "x: extra inputs are not permitted"),
        (["run-once", "overdue-detection", "--fire-time", "yesterday"], "Write it as 2026-11-23T06:00"),
        (["run-once", "overdue-detection", "--fire-time", "2999-01-01"], "is in the future"),
        (["run-once", "draft-cleanup", "--send"], "Leave it out"),
        (["enqueue", "no-such-job"], 'Unknown job "no-such-job"'),
        (["enqueue", "generate-pdf", "--in", "soon"], "90s, 10m, 2h, 7d, 1w"),
        (["runs", "--state", "gone"], "The states are: queued"),
        (["runs", "--job", "draft-clean"], 'Did you mean "draft-cleanup"?'),
        (["show", "7"], "is not a run's id"),
        (["show", "00000000-0000-0000-0000-000000000000"], "No run 0000"),
        (["no-such-command"], "No such command"),
    ],
)
@pytest.mark.samples(5)
async def test_a_wrong_call_is_a_paragraph_with_the_remedy_and_status_2(
    database_url: str, arguments: list[str], says: str
) -> None:
    result = await run_command(*arguments, DATABASE_URL=database_url)
    assert result.status == 2
    assert says in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


async def test_every_wrong_setting_is_named_at_once(tmp_path: Path) -> None:
    result = await run_command(
        "serve",
        DATABASE_URL="mysql://root:hunter2@db/bon",
        BON_TIMEZONE="Mars/Olympus",
        SCHEDULE_DRAFT_CLEANUP="61 * * * *",
        SCHEDULE_DRAFT_CLEAN="0 3 * * *",
        SMTP_PASSWORD_FILE=str(tmp_path / "missing"),
        SMTP_USERNAME="bon",
        SHAAM_MODE="sandbox",
        SHAAM_ENCRYPTION_KEY="abc",
        SHAAM_TOKEN_URL="http://example.com/token",
        SPOOL_DIR=str(tmp_path / "missing"),
        WORKER_CONCURRENCY="many",
    )
    assert result.status == 2
    for name in (
        "DATABASE_URL", "BON_TIMEZONE", "SCHEDULE_DRAFT_CLEANUP", "SCHEDULE_DRAFT_CLEAN", "SMTP_PASSWORD_FILE",
        "SHAAM_ENCRYPTION_KEY", "SHAAM_CLIENT_ID", "SHAAM_CLIENT_SECRET", "SHAAM_TOKEN_URL", "WORKER_CONCURRENCY",
        "SPOOL_DIR",
    ):  # fmt: skip
        assert f"- {name}: " in result.err, name
    assert "hunter2" not in result.err
    assert "abc" not in result.err


async def test_an_unreachable_database_is_a_paragraph_without_the_password_and_status_1() -> None:
    for command in (["jobs"], ["run-once", "draft-cleanup"], ["serve"], ["migrate"]):
        result = await run_command(*command, DATABASE_URL="postgresql://bon:hunter2@127.0.0.1:1/bon")
        assert result.status == 1
        assert "Is PostgreSQL running there" in result.err
        assert "hunter2" not in result.err
        assert "Traceback" not in result.err


async def test_a_missing_table_of_bons_is_said_with_the_remedy(database_url: str, connection: Connection) -> None:
    await connection.execute("drop table sessions")
    ran = await run_command("run-once", "session-cleanup", "--json", DATABASE_URL=database_url)
    assert (ran.status, ran.document["state"]) == (1, "dead")
    assert 'relation "public.sessions" does not exist' in ran.document["error"]
    assert "bon-scheduler check" in ran.document["error"]
    assert "Traceback" not in ran.err
    checked = await run_command("check", DATABASE_URL=database_url)
    assert checked.status == 1
    assert "table sessions is missing" in checked.out


async def test_a_missing_column_of_bons_is_named_by_check(database_url: str, connection: Connection) -> None:
    await connection.execute("alter table invoices drop column is_overdue cascade")
    checked = await run_command("check", "--json", DATABASE_URL=database_url)
    failures = [f["what"] for f in checked.document["findings"] if f["level"] == "failure"]
    assert (checked.status, failures) == (1, ["column invoices.is_overdue is missing"])


async def test_check_says_what_a_missing_spool_risks_and_what_waits_in_one(database_url: str, tmp_path: Path) -> None:
    environ = {"DATABASE_URL": database_url, **tax.environ("http://127.0.0.1:9/token")}

    async def finding(**more: str) -> tuple[str, str]:
        checked = await run_command("check", "--json", **environ, **more)
        (found,) = [f for f in checked.document["findings"] if f["name"] == "spool"]
        return found["level"], found["what"]

    level, what = await finding()
    assert level == "warning"
    assert "SPOOL_DIR is not set" in what
    assert "until their owners consent again" in what
    assert await finding(SPOOL_DIR=str(tmp_path)) == ("ok", "SPOOL_DIR can be written, and nothing waits in it")
    Spool(tmp_path, tax.CIPHER).write("some tokens")
    assert await finding(SPOOL_DIR=str(tmp_path)) == ("warning", "1 rotated tokens in SPOOL_DIR wait for the database")
    await asyncio.to_thread((tmp_path / "x.corrupt").write_text, "?")
    assert (await finding(SPOOL_DIR=str(tmp_path)))[0] == "failure"


async def test_enqueue_prints_the_id_or_says_who_holds_the_key(database_url: str) -> None:
    first = await run_command("enqueue", "generate-pdf", "--key", "pdf:7", "--json", DATABASE_URL=database_url)
    assert (first.status, first.document["duplicate"]) == (0, False)
    again = await run_command("enqueue", "generate-pdf", "--key", "pdf:7", DATABASE_URL=database_url)
    assert again.status == 0
    assert f'"pdf:7" is held by run {first.document["run_id"]}, which is queued' in again.err


async def test_runs_and_show_tell_what_happened(
    database_url: str, connection: Connection, make_settings: MakeSettings
) -> None:
    await load(connection, make_settings)
    await run_command("run-once", "draft-cleanup", DATABASE_URL=database_url)
    listed = (await run_command("runs", "--json", "--job", "draft-cleanup", DATABASE_URL=database_url)).document
    assert [set(run) for run in listed["runs"]] == [
        {"run_id", "job", "fire_time", "state", "attempt", "origin", "enqueued_at", "started_at", "finished_at",
         "counts", "error", "dry_run"}
    ]  # fmt: skip
    run_id = listed["runs"][0]["run_id"]
    shown = (await run_command("show", run_id, "--json", DATABASE_URL=database_url)).document
    assert [attempt["outcome"] for attempt in shown["attempts"]] == ["succeeded"]
    assert sum(business["counts"].get("deleted", 0) for business in shown["businesses"]) == 12
    people = await run_command("show", run_id, DATABASE_URL=database_url)
    assert "deleted 12, items 23, kept 4" in people.out


async def test_jobs_lists_the_next_fire_times_and_what_waits(database_url: str) -> None:
    await run_command("enqueue", "generate-pdf", DATABASE_URL=database_url)
    listed = {
        row["job"]: row for row in (await run_command("jobs", "--json", DATABASE_URL=database_url)).document["jobs"]
    }
    assert listed["generate-pdf"]["waiting"] == 1
    assert len(listed["draft-cleanup"]["next_fire_times"]) == 3
    assert listed["overdue-digest"]["next_fire_times"] == []


async def test_serve_works_until_sigterm_and_exits_0(database_url: str, connection: Connection) -> None:
    async with serve(DATABASE_URL=database_url) as running:
        run_id = await connection.fetchval("select bon_scheduler.enqueue('session-cleanup')")

        async def ended() -> bool:
            query = "select state = 'succeeded' from bon_scheduler.runs where id = $1"
            return bool(await connection.fetchval(query, run_id))

        await until(ended)
        before = time.monotonic()
        assert await running.stop(signal.SIGTERM) == 0
        assert time.monotonic() - before < 10
    assert running.saw("service.stopped")
    assert await connection.fetchval("select count(*) from bon_scheduler.workers") == 0


async def test_a_port_that_is_taken_is_said_with_its_setting_and_status_2(database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = await run_command("serve", DATABASE_URL=database_url, HEALTH_HOST="127.0.0.1", HEALTH_PORT=port)
    assert (result.status, result.out) == (2, "")
    assert f"HEALTH_PORT {port}: Address already in use" in result.err


async def test_a_job_that_runs_elsewhere_is_said_with_status_4(database_url: str, connection: Connection) -> None:
    await connection.execute(
        "insert into sessions (id, user_id, last_accessed_at, expires_at)"
        " select gen_random_uuid(), u.id, now(), now() - interval '1 day' from users u"
    )
    async with serve(DATABASE_URL=database_url), connections.connect(database_url) as other:
        blocker = connection.transaction()
        await blocker.start()
        await connection.execute("lock table sessions in access exclusive mode")
        try:
            await other.execute("select bon_scheduler.enqueue('session-cleanup')")

            async def running() -> bool:
                query = "select exists (select from bon_scheduler.runs where state = 'running')"
                return bool(await other.fetchval(query))

            await until(running)
            result = await run_command("run-once", "session-cleanup", DATABASE_URL=database_url)
            assert result.status == 4
            assert "is already running on" in result.err
        finally:
            await blocker.rollback()


async def test_a_container_whose_user_has_no_name_may_ask(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nameless() -> str:
        raise OSError("No username set in the environment")

    monkeypatch.setattr(getpass, "getuser", nameless)
    report = Report(as_json=False)
    told = asking.Enqueue(name="generate-pdf", payload="{}", key=None, after=None, priority=0)
    await asking.enqueue(make_settings(), report, SystemClock(), told)
    assert await connection.fetchval("select asked_by from bon_scheduler.runs") == f"somebody on {socket.gethostname()}"


async def test_an_error_before_settings_are_read_is_a_paragraph_too() -> None:
    program = f"{sys.executable} -m bon_scheduler"
    full = await run_program("sh", "-c", f"{program} migrate --sql > /dev/full")
    assert (full.status, full.err.count("\n")) == (1, 1), full.err
    assert "OSError: No space left on device" in full.err


async def test_a_terminal_without_the_characters_gets_escapes(database_url: str) -> None:
    shown = await run_command("jobs", DATABASE_URL=database_url, PYTHONIOENCODING="ascii")
    assert (shown.status, "\\u2014" in shown.out) == (0, True), shown.err


async def test_no_secret_is_part_of_what_a_command_prints(database_url: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t-value\n")
    result = await run_command(
        "check",
        "--json",
        DATABASE_URL=database_url,
        SMTP_USERNAME="bon",
        SMTP_PASSWORD_FILE=str(secret),
        LOG_LEVEL="debug",
    )
    assert result.status == 0
    assert "s3cr3t-value" not in result.out + result.err
    assert json.loads(result.out)["sound"]
