"""A pause of a job holds for every way a run can come to be, and says since when, by whom, why and until when."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from bon_scheduler.ledger import entries, pauses
from bon_scheduler.ledger.claims import Verdict
from bon_scheduler.ledger.entries import Request, TickVerdict
from bon_scheduler.ledger.workers import Worker, register_worker
from tests.attempting import claim_one, take_any
from tests.conftest import Connection
from tests.process import run_command, serve
from tests.waiting import until

DIGEST = "overdue-digest"
TOLD = '{"as_of": "2026-11-27"}'
ASK = f"select bon_scheduler.enqueue('{DIGEST}', '{TOLD}')"


async def pause(database_url: str, job: str, *more: str) -> str:
    """Pause a job as Dana; return what was said."""
    arguments = ("pause", job, "--reason", "a wrong template", *more)
    paused = await run_command(*arguments, DATABASE_URL=database_url, OPERATOR="Dana")
    assert paused.status == 0, paused.err
    return paused.out


async def state_of(connection: Connection, run_id: UUID | str) -> str:
    state: str = await connection.fetchval(
        "select state::text from bon_scheduler.runs where id = $1", UUID(str(run_id))
    )
    return state


async def test_a_paused_job_without_a_schedule_is_not_begun_until_it_is_resumed(
    connection: Connection, database_url: str
) -> None:
    """Asked for by a program, by a person, by a retry, or caused by another run: all wait, and another job's do not."""
    said = await pause(database_url, DIGEST)
    assert "whoever asks for it" in said
    assert "until then" not in " ".join(said.split())  # there is no instant that it could mean
    program = await connection.fetchval(ASK)
    retried = await connection.fetchval(ASK)
    await connection.execute("update bon_scheduler.runs set state = 'dead', attempt = 1 where id = $1", retried)
    again = await run_command("retry", str(retried), "--reason", "mended", DATABASE_URL=database_url)
    assert again.status == 0
    person = (await run_command("enqueue", DIGEST, "--payload", TOLD, DATABASE_URL=database_url)).out.strip()
    async with serve(DATABASE_URL=database_url):
        other = await connection.fetchval("select bon_scheduler.enqueue('session-cleanup')")

        async def succeeded(run_id: UUID | str) -> bool:
            return await state_of(connection, run_id) == "succeeded"

        await until(lambda: succeeded(other))
        # Whoever took the other would have taken these, which are older.
        assert {await state_of(connection, each) for each in (program, retried, person)} == {"queued"}
        shown = await run_command("show", str(program), DATABASE_URL=database_url)
        assert f"It waits because {DIGEST} is paused since" in shown.out
        assert "by Dana: a wrong template; until it is resumed" in shown.out
        resumed = await run_command("resume", DIGEST, "--reason", "mended", DATABASE_URL=database_url)
        assert resumed.status == 0
        for each in (program, retried, person):
            await until(lambda each=each: succeeded(each))  # type: ignore[misc]


async def test_run_once_of_a_paused_job_is_refused_with_why_and_a_dry_run_is_not(
    connection: Connection, database_url: str
) -> None:
    await pause(database_url, DIGEST)
    refused = await run_command("run-once", DIGEST, "--payload", TOLD, "--json", DATABASE_URL=database_url)
    assert (refused.status, refused.out) == (2, "")
    assert f'"{DIGEST}" is paused since ' in refused.err
    assert "by Dana: a wrong template" in refused.err
    assert f"resume {DIGEST} --reason" in refused.err
    assert await connection.fetchval("select count(*) from bon_scheduler.runs") == 0
    dry = await run_command("run-once", DIGEST, "--payload", TOLD, "--dry-run", DATABASE_URL=database_url)
    assert dry.status == 0


async def test_what_run_once_causes_of_a_paused_job_waits_and_is_named(
    connection: Connection, database_url: str
) -> None:
    await pause(database_url, DIGEST)
    ran = await run_command("run-once", "overdue-detection", DATABASE_URL=database_url)
    assert ran.status == 1
    assert f"Not done yet, because paused or without a handler here: {DIGEST}." in ran.out
    states = await connection.fetch("select job, state::text from bon_scheduler.runs order by enqueued_at")
    assert [tuple(row) for row in states] == [("overdue-detection", "succeeded"), (DIGEST, "queued")]


async def test_a_claim_of_a_certain_run_says_that_its_job_is_paused(connection: Connection) -> None:
    worker = Worker()
    await register_worker(connection, worker)
    await pauses.pause_job(connection, DIGEST, by="dana", reason="x")
    run_id = await entries.enqueue(connection, Request(DIGEST, {}))
    assert run_id is not None
    assert (await claim_one(connection, run_id, worker)).verdict is Verdict.PAUSED
    other = await entries.enqueue(connection, Request("generate-pdf", {}))
    assert await take_any(connection, worker, DIGEST, "generate-pdf") == [other]
    await pauses.resume_job(connection, DIGEST, by="dana", reason="x")
    assert await take_any(connection, worker, DIGEST, "generate-pdf") == [run_id]


async def test_a_pause_with_an_end_ends_by_itself_and_may_be_followed_by_another(connection: Connection) -> None:
    worker, now = Worker(), datetime.now(UTC)
    await register_worker(connection, worker)
    assert await pauses.pause_job(connection, DIGEST, by="dana", reason="x", until=now + timedelta(hours=1))
    assert not await pauses.pause_job(connection, DIGEST, by="noa", reason="y")
    run_id = await entries.enqueue(connection, Request(DIGEST, {}))
    assert run_id is not None
    assert (await claim_one(connection, run_id, worker)).verdict is Verdict.PAUSED
    await connection.execute("update bon_scheduler.pauses set until = now() - interval '1 second'")
    assert await pauses.paused_jobs(connection) == {}
    assert not await pauses.resume_job(connection, DIGEST, by="dana", reason="x")
    assert (await claim_one(connection, run_id, worker)).verdict is Verdict.CLAIMED
    assert await pauses.pause_job(connection, DIGEST, by="noa", reason="y")
    assert (await pauses.paused_jobs(connection))[DIGEST].by == "noa"


@pytest.mark.parametrize(("late", "verdict"), [(-1, TickVerdict.PAUSED), (1, TickVerdict.RECORDED)])
async def test_a_tick_of_the_time_of_a_pause_is_recorded_as_paused_however_late_that_is(
    connection: Connection, late: int, verdict: TickVerdict
) -> None:
    end = datetime.now(UTC) - timedelta(minutes=10)
    tick, before = end + timedelta(minutes=late), end - timedelta(days=1)
    await connection.execute("update bon_scheduler.jobs set last_tick = $1 where name = 'draft-cleanup'", before)
    await pauses.pause_job(connection, "draft-cleanup", by="dana", reason="x", until=end)
    row = await connection.fetchrow(
        "select * from bon_scheduler.record_tick('draft-cleanup', $1, null, $2, null)", before, tick
    )
    assert row is not None
    assert row["verdict"] == verdict


async def test_a_pause_is_told_by_jobs_timeline_and_check_and_no_next_time_is_promised(database_url: str) -> None:
    said = await pause(database_url, "session-cleanup", "--until", "2h")
    assert "It ends" not in said
    assert "ends by itself at " in said
    await pause(database_url, "draft-cleanup")
    listed = (await run_command("jobs", "--json", DATABASE_URL=database_url)).document["jobs"]
    by_name = {row["job"]: row for row in listed}
    assert by_name["draft-cleanup"]["next_fire_times"] == []
    assert by_name["draft-cleanup"]["paused"]["until"] is None
    told = by_name["session-cleanup"]["paused"]
    assert (told["by"], told["reason"]) == ("Dana", "a wrong template")
    assert by_name["session-cleanup"]["next_fire_times"][0] > told["until"]
    shown = await run_command("jobs", DATABASE_URL=database_url)
    (line,) = [each for each in shown.out.splitlines() if each.startswith("session-cleanup  since ")]
    assert "by Dana: a wrong template; until 20" in line
    planned = await run_command("timeline", "--job", "draft-cleanup", "--days", "2", DATABASE_URL=database_url)
    assert planned.out.count("paused: not run unless resumed") == 2
    checked = (await run_command("check", "--json", DATABASE_URL=database_url)).document
    found = [each for each in checked["findings"] if each["name"] == "paused"]
    assert [each["level"] for each in found] == ["warning", "warning"]
    assert "job draft-cleanup since " in found[0]["what"]
    assert checked["grade"] == "warning"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pause", DIGEST, "--reason", "x", "--until", "2020-01-01"], "has passed"),
        (["pause", "--business", "1234", "--reason", "x", "--until", "2h"], "--until ends the pause of a job"),
        (["pause", DIGEST, "--reason", "x", "--until", "soon"], "is not an instant"),
    ],
)
async def test_a_wrong_end_is_status_2(database_url: str, arguments: list[str], says: str) -> None:
    refused = await run_command(*arguments, DATABASE_URL=database_url)
    assert (refused.status, says in refused.err) == (2, True), refused.err
