"""Retry and cancel as an operator calls them."""

import asyncio
import signal
import sys
from uuid import UUID

import pytest

from tests.conftest import Connection
from tests.process import QUIET, run_command, serve
from tests.waiting import until

DEAD = """
    insert into bon_scheduler.runs (job, origin, state, attempt, error, finished_at)
    values ($1, 'program', 'dead', 3, 'away', now())
    returning id
"""
NOBODY = "00000000-0000-0000-0000-000000000000"


async def dead_run(connection: Connection, job: str = "draft-cleanup") -> str:
    return str(await connection.fetchval(DEAD, job))


async def state_of(connection: Connection, run_id: str) -> str:
    query = "select state::text from bon_scheduler.runs where id = $1"
    return str(await connection.fetchval(query, UUID(run_id)))


async def test_dead_runs_are_retried_by_id_and_show_tells_who_did_it_and_why(
    connection: Connection, database_url: str
) -> None:
    first, second = await dead_run(connection), await dead_run(connection)
    environ = {"DATABASE_URL": database_url, "OPERATOR": "Dana L."}
    retried = await run_command("retry", first, second, first, "--reason", "disk is mended", "--json", **environ)
    assert retried.status == 0
    runs = sorted(retried.document.pop("runs"), key=lambda run: [first, second].index(run["run_id"]))
    assert runs == [{"run_id": run_id, "job": "draft-cleanup", "was": "dead"} for run_id in (first, second)]
    assert retried.document["changed"] == 2
    shown = await run_command("show", first, "--json", DATABASE_URL=database_url)
    (action,) = shown.document["actions"]
    assert (action["by"], action["action"], action["reason"]) == ("Dana L.", "retry", "disk is mended")
    people = await run_command("show", first, DATABASE_URL=database_url)
    assert "disk is mended" in people.out


async def test_all_dead_runs_of_one_job_are_retried(connection: Connection, database_url: str) -> None:
    mine, other = await dead_run(connection), await dead_run(connection, "session-cleanup")
    retried = await run_command(
        "retry", "--dead", "--job", "draft-cleanup", "--reason", "mended", DATABASE_URL=database_url
    )
    assert (retried.status, retried.out) == (0, "draft-cleanup: 1 run that was dead → queued.\n")
    assert [await state_of(connection, run_id) for run_id in (mine, other)] == ["queued", "dead"]
    everything = await run_command("retry", "--dead", "--reason", "mended", "--json", DATABASE_URL=database_url)
    assert [run["run_id"] for run in everything.document["runs"]] == [other]
    nothing = await run_command("retry", "--dead", "--reason", "mended", DATABASE_URL=database_url)
    assert (nothing.status, nothing.out) == (0, "There is no such run: nothing changed.\n")


async def test_a_runaway_queue_is_cancelled(connection: Connection, database_url: str) -> None:
    await connection.execute("select bon_scheduler.enqueue('generate-pdf') from generate_series(1, 1200)")
    cancelled = await run_command(
        "cancel", "--waiting", "--job", "generate-pdf", "--reason", "a loop in BON", DATABASE_URL=database_url
    )
    assert (cancelled.status, cancelled.out) == (0, "generate-pdf: 1,200 runs that were queued → cancelled.\n")
    assert await connection.fetchval("select count(*) from bon_scheduler.runs where state <> 'cancelled'") == 0


async def test_the_answer_says_when_what_is_running_will_stop(connection: Connection, database_url: str) -> None:
    run_id = str(await connection.fetchval("select bon_scheduler.enqueue('draft-cleanup')"))
    await connection.execute("update bon_scheduler.runs set state = 'running', attempt = 1")
    environ = {"DATABASE_URL": database_url, "LEASE_SECONDS": "8"}
    cancelled = await run_command("cancel", run_id, "--reason", "wrong day", "--json", **environ)
    assert (cancelled.status, cancelled.document["stops_within_seconds"]) == (0, 2)
    await connection.execute("update bon_scheduler.runs set state = 'running'")
    people = await run_command("cancel", run_id, "--reason", "wrong day", **environ)
    assert "its worker stops it within 2 s" in " ".join(people.out.split())


async def test_nothing_is_changed_unless_all_can_be(connection: Connection, database_url: str) -> None:
    run_id = await dead_run(connection)
    for command in ("retry", "cancel"):
        refused = await run_command(command, run_id, NOBODY, "--reason", "x", "--json", DATABASE_URL=database_url)
        assert (refused.status, refused.out) == (2, "")
        assert f"No run {NOBODY}" in refused.err
        assert "Traceback" not in refused.err
    assert await state_of(connection, run_id) == "dead"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["retry", NOBODY], "Missing option '--reason'"),
        (["cancel", NOBODY], "Missing option '--reason'"),
        (["retry", NOBODY, "--reason", " "], "--reason is empty"),
        (["retry", "7", NOBODY, "x", "--reason", "x"], '"7" is not a run\'s id'),
        (["retry", "7", NOBODY, "x", "--reason", "x"], '"x" is not a run\'s id'),
        (["retry", "ffff", "--reason", "x"], 'No run\'s id begins with "ffff"'),
        (["cancel", "f" * 36, "--reason", "x"], "is not a run's id"),
        (["cancel", "7", "--reason", "x"], '"7" is not a run\'s id'),
        (["retry", "--reason", "x"], "either RUN_ID… or --dead"),
        (["retry", NOBODY, "--dead", "--reason", "x"], "either RUN_ID… or --dead"),
        (["retry", NOBODY, "--job", "draft-cleanup", "--reason", "x"], "--job narrows --dead"),
        (["retry", "--dead", "--job", "draft-clean", "--reason", "x"], 'Did you mean "draft-cleanup"?'),
        (["cancel", "--reason", "x"], "either RUN_ID… or --waiting --job JOB"),
        (["cancel", NOBODY, "--waiting", "--reason", "x"], "either RUN_ID… or --waiting --job JOB"),
        (["cancel", "--waiting", "--reason", "x"], "--waiting and --job JOB go together"),
        (["cancel", NOBODY, "--job", "draft-cleanup", "--reason", "x"], "--waiting and --job JOB go together"),
        (["cancel", "--waiting", "--job", "draft-clean", "--reason", "x"], 'Did you mean "draft-cleanup"?'),
    ],
)
@pytest.mark.samples(5)
async def test_a_wrong_call_is_status_2_with_the_remedy(database_url: str, arguments: list[str], says: str) -> None:
    result = await run_command(*arguments, DATABASE_URL=database_url)
    assert result.status == 2
    assert says in result.err
    assert result.out == ""


async def test_a_dead_run_is_mended_and_retried_while_the_service_lives(
    connection: Connection, database_url: str
) -> None:
    await connection.execute("alter table sessions rename to hidden")
    failed = await run_command("run-once", "session-cleanup", "--json", DATABASE_URL=database_url)
    assert (failed.status, failed.document["state"]) == (1, "dead")
    run_id = failed.document["run_id"]
    await connection.execute("alter table hidden rename to sessions")
    listed = await run_command("jobs", DATABASE_URL=database_url)
    assert "retry RUN_ID --reason" in listed.out
    async with serve(DATABASE_URL=database_url):
        retried = await run_command("retry", run_id, "--reason", "the table is back", DATABASE_URL=database_url)
        assert retried.status == 0

        async def succeeded() -> bool:
            return await state_of(connection, run_id) == "succeeded"

        await until(succeeded)
    shown = (await run_command("show", run_id, "--json", DATABASE_URL=database_url)).document
    assert [attempt["outcome"] for attempt in shown["attempts"]] == ["failed", "succeeded"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_run_once_that_is_interrupted_is_cancelled_and_audited(
    connection: Connection, database_url: str, number: signal.Signals
) -> None:
    """Nobody else goes on with it."""
    blocker = connection.transaction()
    await blocker.start()
    await connection.execute("lock table sessions in access exclusive mode")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bon_scheduler", "run-once", "session-cleanup",
        env={**QUIET, "DATABASE_URL": database_url}, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        # As from a terminal, also where the tests run in the background: there Ctrl-C is ignored, and is inherited so.
        preexec_fn=lambda: (signal.signal(signal.SIGINT, signal.SIG_DFL), signal.signal(signal.SIGHUP, signal.SIG_DFL)),
    )  # fmt: skip
    try:

        async def running() -> bool:
            query = (
                "select exists (select from pg_locks l join pg_database d on d.oid = l.database"
                " where not l.granted and l.locktype = 'relation' and d.datname = current_database())"
            )
            return bool(await connection.fetchval(query))

        await until(running)
        process.send_signal(number)
        async with asyncio.timeout(20):
            out, _ = await process.communicate()
        assert process.returncode == 130
        assert "Interrupted. Run " in out.decode()
        assert " of session-cleanup is cancelled. It committed no counts." in out.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await blocker.rollback()
    row = await connection.fetchrow("select state::text, reason from bon_scheduler.runs")
    assert row is not None
    assert tuple(row) == ("cancelled", "interrupted")
    assert await connection.fetchval("select action from bon_scheduler.operator_actions") == "cancel"
