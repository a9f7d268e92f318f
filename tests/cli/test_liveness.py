"""Is anything alive: what `check`, `jobs`, `runs` and `show` tell of workers, of work left undone, of settings."""

import signal
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from bon_scheduler import declared, service
from bon_scheduler.cli.check import check_deployment
from bon_scheduler.cli.checks.findings import Finding, Level
from bon_scheduler.clock import SystemClock
from bon_scheduler.ledger.alive import heartbeats
from bon_scheduler.ledger.workers import Worker, register_worker
from tests.conftest import Connection, MakeSettings
from tests.process import run_command, serve
from tests.waiting import until

DECLARE = """
    insert into bon_scheduler.schedules (job, effective_from, expression, timezone, catch_up, grace, declared_by)
    values ('draft-cleanup', $1, '0 3 * * *', 'Asia/Jerusalem', 'latest', '1 day', '0.1.0')
"""


async def look(make_settings: MakeSettings, name: str, **environ: str) -> list[Finding]:
    return [each for each in await check_deployment(make_settings(**environ), SystemClock()) if each.name == name]


async def test_a_service_that_was_killed_is_told_with_its_last_heartbeat(
    connection: Connection, database_url: str
) -> None:
    """By kill -9 in mid-run, nobody else being there."""
    async with serve(DATABASE_URL=database_url, LEASE_SECONDS="2") as service:
        run_id = await connection.fetchval("select bon_scheduler.enqueue('generate-pdf')")
        sound = await run_command("check", "--json", DATABASE_URL=database_url)
        named = {each["name"]: each for each in sound.document["findings"]}
        assert (sound.status, named["workers"]["level"], named["ticks"]["level"]) == (0, "ok", "ok")
        await service.stop(signal.SIGKILL)
        gone = service.process.pid

    async def silent() -> bool:
        query = "select seen_at < clock_timestamp() - lease from bon_scheduler.workers"
        return bool(await connection.fetchval(query))

    await until(silent, seconds=10)
    checked = await run_command("check", "--json", DATABASE_URL=database_url)
    document = checked.document
    (found,) = [each for each in document["findings"] if each["name"] == "workers"]
    assert (checked.status, document["sound"], document["grade"], found["level"]) == (1, False, "failure", "failure")
    assert f" ago, of process {gone} on " in found["what"]
    for command in (["jobs"], ["runs"], ["show", str(run_id)]):
        told = await run_command(*command, DATABASE_URL=database_url)
        assert "No `serve` is alive. The last heartbeat was " in told.out, command
        assert f" ago, of process {gone} on " in told.out
        assert "-m bon_scheduler serve" in told.out
    listed = await run_command("jobs", "--json", DATABASE_URL=database_url)
    assert (listed.document["serving"], listed.document["workers"][0]["pid"]) == (False, gone)


async def test_before_the_first_service_that_nobody_is_alive_is_a_warning(
    connection: Connection, make_settings: MakeSettings
) -> None:
    (found,) = await look(make_settings, "workers")
    assert (found.level, found.remedy) == (Level.WARNING, "Start one: bon-scheduler serve")
    await connection.execute(DECLARE, datetime.now(UTC))
    (after,) = await look(make_settings, "workers")
    assert after.level is Level.FAILURE


async def test_an_overdue_tick_is_a_failure(connection: Connection, make_settings: MakeSettings) -> None:
    begin = datetime.now(UTC) - timedelta(days=3)
    await connection.execute(DECLARE, begin)
    await connection.execute("update bon_scheduler.jobs set last_tick = $1 where name = 'draft-cleanup'", begin)
    (found,) = await look(make_settings, "ticks")
    assert (found.level, found.what) == (Level.FAILURE, "draft-cleanup: 3 ticks due for over a minute and not begun")
    await connection.execute("update bon_scheduler.jobs set last_tick = now() where name = 'draft-cleanup'")
    (mended,) = await look(make_settings, "ticks")
    assert mended.level is Level.OK


async def test_what_is_dead_held_or_without_a_handler_is_graded(
    connection: Connection, make_settings: MakeSettings
) -> None:
    (fine,) = await look(make_settings, "runs")
    assert fine.level is Level.OK
    await connection.execute("select bon_scheduler.enqueue('generate-pdf') from generate_series(1, 2)")
    for state in ("dead", "held"):
        run_id = await connection.fetchval("select bon_scheduler.enqueue('draft-cleanup')")
        await connection.execute(
            "update bon_scheduler.runs set state = $2::text::bon_scheduler.run_state where id = $1", run_id, state
        )
    found = {each.what: each for each in await look(make_settings, "runs")}
    assert {what: each.level for what, each in found.items()} == {
        "draft-cleanup: 1 dead run": Level.FAILURE,
        "draft-cleanup: 1 held run": Level.WARNING,
        "generate-pdf: 2 runs waiting, and no version here has its handler": Level.WARNING,
    }
    assert "retry --dead --job draft-cleanup" in (found["draft-cleanup: 1 dead run"].remedy or "")


async def live(connection: Connection, jobs: Sequence[str]) -> Worker:
    """A living `serve` that takes runs of these jobs."""
    worker = Worker(serves=True, version="0.0.9", lease=timedelta(minutes=10), jobs=jobs)
    await register_worker(connection, worker)
    return worker


async def test_a_job_that_no_living_worker_handles_is_named_by_every_screen(
    connection: Connection, database_url: str
) -> None:
    """A `serve` of a version that lacks the job lives; this shell's version has it."""
    worker = await live(connection, ["session-cleanup"])
    run = str(await connection.fetchval("select bon_scheduler.enqueue('draft-cleanup')"))
    why = f"no living worker handles it (0.0.9 on {worker.host})"
    checked = (await run_command("check", "--json", DATABASE_URL=database_url)).document
    (found,) = [each for each in checked["findings"] if each["name"] == "runs"]
    assert (found["level"], found["what"]) == ("warning", f"draft-cleanup: 1 run waiting, and {why}")
    shown = await run_command("show", run, DATABASE_URL=database_url)
    assert f"It waits because {why}" in shown.out
    for command in (["jobs"], ["runs"]):
        assert f"draft-cleanup: {why}. Its runs wait" in (await run_command(*command, DATABASE_URL=database_url)).out
    listed = (await run_command("jobs", "--json", DATABASE_URL=database_url)).document["jobs"]
    handled = {row["job"]: row["handled"] for row in listed}
    assert (handled["draft-cleanup"], handled["session-cleanup"]) == (False, True)
    document = (await run_command("runs", "--json", DATABASE_URL=database_url)).document
    assert document["unhandled"] == ["draft-cleanup"]


async def test_what_a_living_worker_handles_is_no_fault_though_this_version_lacks_it(
    connection: Connection, database_url: str, make_settings: MakeSettings
) -> None:
    await live(connection, [*(job.name for job in declared.JOBS), "generate-pdf"])
    run = str(await connection.fetchval("select bon_scheduler.enqueue('generate-pdf')"))
    (found,) = await look(make_settings, "runs")
    assert found.level is Level.OK
    for command in (["jobs"], ["runs"], ["show", run]):
        out = (await run_command(*command, DATABASE_URL=database_url)).out
        assert ("handle" in out) is False, (command, out)
    listed = (await run_command("jobs", "--json", DATABASE_URL=database_url)).document["jobs"]
    (job,) = [row for row in listed if row["job"] == "generate-pdf"]
    assert (job["handled"], job["summary"]) == (True, "the service has its handler, this version has not")


async def test_of_a_worker_that_does_not_say_what_it_handles_nothing_bad_is_said(
    connection: Connection, make_settings: MakeSettings
) -> None:
    """As one of the version before, beside which the schema was upgraded."""
    await live(connection, [])
    await connection.execute("update bon_scheduler.workers set jobs = null")
    await connection.execute("select bon_scheduler.enqueue('draft-cleanup')")
    (found,) = await look(make_settings, "runs")
    assert found.level is Level.OK


async def test_a_service_says_which_jobs_it_handles_and_a_run_in_the_foreground_none(
    connection: Connection, make_settings: MakeSettings
) -> None:
    async with service.machinery(make_settings(), serves=True):
        (beat,) = await heartbeats(connection)
        assert beat.jobs == sorted(job.name for job in declared.JOBS)
    async with service.machinery(make_settings()):
        (beat,) = await heartbeats(connection)
        assert (beat.serves, beat.jobs) == (False, [])


async def test_commands_tell_the_services_schedules_and_settings_and_where_this_shell_differs(
    database_url: str,
) -> None:
    environ = {"SCHEDULE_SESSION_CLEANUP": "15 5 * * *", "EMAIL_LANGUAGE": "en"}
    async with serve(DATABASE_URL=database_url, **environ) as service:
        listed = (await run_command("jobs", "--json", DATABASE_URL=database_url)).document
        (job,) = [row for row in listed["jobs"] if row["job"] == "session-cleanup"]
        assert job["schedule"] == "15 5 * * *"
        said = (
            'session-cleanup: the service has "15 5 * * *" in Asia/Jerusalem, this shell "0 4 * * *" in Asia/Jerusalem.'
        )
        assert listed["differences"] == [said]
        planned = await run_command("timeline", "--days", "1", "--job", "session-cleanup", DATABASE_URL=database_url)
        assert " 05:15+0" in planned.out
        assert said in planned.out
        checked = (await run_command("check", "--json", DATABASE_URL=database_url)).document
        (found,) = [each for each in checked["findings"] if each["name"] == "service's settings"]
        assert found["level"] == "warning"
        assert said.rstrip(".") in found["what"]
        assert "EMAIL_LANGUAGE: the service has en, this shell he" in found["what"]
        same = (await run_command("check", "--json", DATABASE_URL=database_url, **environ)).document
        (found,) = [each for each in same["findings"] if each["name"] == "service's settings"]
        assert found["level"] == "ok", found
        assert await service.stop() == 0
    alone = await run_command("timeline", "--days", "1", "--job", "session-cleanup", DATABASE_URL=database_url)
    assert " 04:00+0" in alone.out
    assert "No `serve` is alive" in alone.out
