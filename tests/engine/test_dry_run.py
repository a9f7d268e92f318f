"""A dry run: the same counts as a real one, and nothing of it stays or leaves."""

import json
import os
import stat
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from bon_scheduler import BusinessOutcome, Counts, JobContext, NoPayload, Retry, job, service
from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from bon_scheduler.engine.run_once import Order
from bon_scheduler.jobs import AnyJob
from handlers.batches import FIRST, LARGEST
from tests import arrange
from tests.conftest import Connection, MakeSettings, RunJob
from tests.process import Finished, run_command, run_program
from tests.tax import KEY

# Everything that a run could change, as one text: BON's tables and the ledger, but for what the dry run says of itself.
SNAPSHOT = """
    select md5(coalesce(string_agg(t.line, E'\\n' order by t.line), '')) from (
        select i::text as line from invoices i union all select s::text from sessions s
        union all select b::text from business_shaam_credentials b
        union all select r::text from bon_scheduler.runs r where not r.dry_run
        union all select w::text from bon_scheduler.workers w
        union all select d::text from bon_scheduler.deliveries d union all select a::text from bon_scheduler.attempts a
        union all select o::text from bon_scheduler.business_outcomes o
        union all select g::text from bon_scheduler.mail_gate g union all select j::text from bon_scheduler.jobs j
        union all select s::text from bon_scheduler.schedules s
    ) t
"""
# The addresses a process connects to, one a line on standard error, then the program itself.
WATCHED = """
import runpy, sys
def watch(event, arguments):
    if event == "socket.connect":
        sys.stderr.write(f"CONNECT {arguments[1]}\\n")
sys.addaudithook(watch)
sys.argv[0] = "bon_scheduler"
runpy.run_module("bon_scheduler", run_name="__main__")
"""


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[SmtpSink]:
    async with smtp_sink(tmp_path / "sink") as listening:
        yield listening


@pytest.fixture
def environ(database_url: str, sink: SmtpSink) -> dict[str, str]:
    """A deployment that would send, refresh and ping, if it ran in earnest."""
    nowhere = f"http://127.0.0.1:{sink.port}"
    return {
        "DATABASE_URL": database_url,
        "SMTP_HOST": sink.host,
        "SMTP_PORT": str(sink.port),
        "SMTP_TLS": "none",
        "SHAAM_MODE": "sandbox",
        "SHAAM_TOKEN_URL": nowhere,
        "SHAAM_ENCRYPTION_KEY": KEY,
        "SHAAM_CLIENT_ID": "id",
        "SHAAM_CLIENT_SECRET": "secret",
        "DEADMAN_URL_OVERDUE_DETECTION": nowhere,
    }


async def load(connection: Connection) -> None:
    """Work for every job: two businesses that are owed something, a draft, sessions, a token that is due."""
    long_past = datetime.now(UTC) - timedelta(days=10)
    for n in range(2):
        business = await arrange.business(connection)
        owner = await arrange.owner(connection, business, f"owner{n}@shop.example")
        await arrange.invoice(connection, business, due_date=long_past.date())
        await arrange.item(connection, await arrange.draft(connection, business))
        await arrange.session(connection, owner, long_past)
        await connection.execute(
            "insert into business_shaam_credentials (business_id, encrypted_access_token, encrypted_refresh_token, "
            "token_expires_at) values ($1, 'a', 'r', now())",
            business,
        )


async def dry(job: str, *arguments: str, environ: dict[str, str]) -> Finished:
    return await run_command("run-once", job, "--dry-run", "--json", *arguments, **environ)


JOBS = {
    "overdue-detection": {"marked": 2, "cleared": 0},
    "draft-cleanup": {"deleted": 2, "items": 2, "kept": 0},
    "session-cleanup": {"deleted": 2},
}


@pytest.mark.parametrize("job", JOBS)
async def test_it_counts_what_a_real_run_then_does_and_changes_nothing(
    connection: Connection, environ: dict[str, str], sink: SmtpSink, job: str
) -> None:
    await load(connection)
    before = await connection.fetchval(SNAPSHOT)
    pretended = await dry(job, environ=environ)
    assert await connection.fetchval(SNAPSHOT) == before
    assert sink.messages == []
    assert (pretended.status, pretended.document["dry_run"], pretended.document["counts"]) == (0, True, JOBS[job])
    real = await run_command("run-once", job, "--json", **environ)
    assert real.document["counts"] == pretended.document["counts"]
    assert real.document["businesses"] == pretended.document["businesses"]
    assert counted(real.document) == counted(pretended.document)


def counted(document: Any) -> list[tuple[str, str, str]]:
    """What a run caused, without the runs' ids."""
    return sorted((run["job"], run["state"], json.dumps(run["counts"])) for run in document["caused"])


async def test_a_token_refresh_tells_what_is_due_and_calls_nobody(
    connection: Connection, environ: dict[str, str]
) -> None:
    await load(connection)
    before = await connection.fetchval(SNAPSHOT)
    pretended = await dry("shaam-token-refresh", environ=environ)
    assert pretended.document["counts"]["due"] == 2
    assert await connection.fetchval(SNAPSHOT) == before


async def test_it_writes_one_row_that_says_so_and_that_nobody_can_retry(
    connection: Connection, environ: dict[str, str]
) -> None:
    await load(connection)
    document = (await dry("overdue-detection", environ=environ)).document
    (row,) = await connection.fetch("select id, dry_run, state::text, attempt, counts from bon_scheduler.runs")
    assert (str(row["id"]), row["dry_run"], row["state"]) == (document["run_id"], True, "succeeded")
    assert row["counts"] == document["counts"]
    await connection.execute("update bon_scheduler.runs set state = 'dead'")
    refused = await run_command("retry", document["run_id"], "--reason", "x", **environ)
    assert refused.status == 2
    assert "was a dry run" in refused.err
    none = await run_command("retry", "--dead", "--reason", "x", "--json", **environ)
    assert none.document["changed"] == 0


async def test_it_opens_nothing_but_the_database(
    connection: Connection, environ: dict[str, str], tmp_path: Path
) -> None:
    await load(connection)
    out = tmp_path / "letters"
    finished = await run_program(
        sys.executable, "-c", WATCHED, "run-once", "overdue-detection", "--dry-run", "--out", str(out), **environ
    )
    assert finished.status == 0, finished.err
    connected = {line for line in finished.err.splitlines() if line.startswith("CONNECT")}
    port = environ["DATABASE_URL"].rpartition(":")[2].partition("/")[0]
    assert connected
    assert [line for line in connected if port not in line] == []
    assert len(list(out.glob("*.eml"))) == 2
    assert f"2 letters are in {out}, as .html, .txt and .eml." in " ".join(finished.out.split())


async def test_the_watch_would_see_a_connection_to_the_mail_server(
    connection: Connection, environ: dict[str, str]
) -> None:
    await load(connection)
    finished = await run_program(sys.executable, "-c", WATCHED, "run-once", "overdue-detection", **environ)
    assert f"CONNECT ('127.0.0.1', {environ['SMTP_PORT']})" in finished.err


async def test_the_letters_are_written_as_files_that_name_nobody(
    connection: Connection, environ: dict[str, str], tmp_path: Path
) -> None:
    await load(connection)
    out = tmp_path / "some" / "where"
    await dry("overdue-detection", "--out", str(out), environ=environ)
    files = sorted(path.name for path in out.iterdir())
    assert [name.rpartition(".")[2] for name in files] == ["eml", "html", "txt"] * 2
    assert [name for name in files if "owner" in name] == []
    messages = [message_from_bytes(path.read_bytes(), policy=policy.default) for path in out.glob("*.eml")]
    assert sorted(str(message["To"]) for message in messages) == ["owner0@shop.example", "owner1@shop.example"]
    html = messages[0].get_body(preferencelist=("html",))
    assert html is not None
    assert 'dir="rtl"' in html.get_content()


async def test_only_who_asked_may_read_the_letters(
    connection: Connection, environ: dict[str, str], tmp_path: Path
) -> None:
    await load(connection)
    out = tmp_path / "some" / "where"
    await dry("overdue-detection", "--out", str(out), environ=environ)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (out, out.parent)} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o600}


async def test_a_link_or_a_file_that_waits_under_a_letters_name_is_replaced_not_written_to(
    connection: Connection, environ: dict[str, str], tmp_path: Path
) -> None:
    await load(connection)
    out, aim = tmp_path / "out", tmp_path / "aim"
    await dry("overdue-detection", "--out", str(out), environ=environ)
    first, second, *_ = names = sorted(out.iterdir())
    aim.write_text("somebody's")
    first.unlink()
    first.symlink_to(aim)
    second.unlink()
    second.hardlink_to(aim)
    again = await dry("overdue-detection", "--out", str(out), environ=environ)
    assert again.status == 0, again.err
    assert aim.read_text() == "somebody's"
    assert sorted(out.iterdir()) == names
    assert not first.is_symlink()
    assert {stat.S_IMODE(path.stat().st_mode) for path in names} == {0o600}


async def test_letters_are_not_written_where_others_may_write_or_a_link_leads(
    connection: Connection, environ: dict[str, str], tmp_path: Path
) -> None:
    await load(connection)
    for name, mode in {"all": 0o777, "sticky": 0o1777, "group": 0o770}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    refused = {"all": "may be written by others", "sticky": "may be written by others",
               "group": "may be written by others", "link": "Links are not followed", "file": "Not a directory",
               "fifo": "Not a directory"}  # fmt: skip
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir(0o755)
        os.chown(tmp_path / "theirs", 65534, 65534)
        refused["theirs"] = "belongs to another user"
    for name, why in refused.items():
        out = tmp_path / name
        finished = await run_command("run-once", "overdue-detection", "--dry-run", "--out", str(out), **environ)
        assert finished.status == 2, name
        assert why in finished.err, finished.err
        assert str(out) in finished.err
        assert not out.is_dir() or list(out.iterdir()) == []


async def test_letters_that_were_sent_before_are_counted_as_such(
    connection: Connection, environ: dict[str, str], tmp_path: Path
) -> None:
    await load(connection)
    await run_command("run-once", "overdue-detection", **environ)
    document = (await dry("overdue-detection", "--out", str(tmp_path / "x"), environ=environ)).document
    sendings = [run["counts"] for run in document["caused"] if run["job"] == "send-overdue-digest"]
    assert [(counts["sent"], counts["already_sent"]) for counts in sendings] == [(0, 1)] * 2
    assert list((tmp_path / "x").iterdir()) == []
    told = await run_command("run-once", "overdue-detection", "--dry-run", "--out", str(tmp_path / "x"), **environ)
    assert f"No letter was written to {tmp_path}/x: none would be sent (already_sent 2)." in told.out


async def test_it_goes_through_every_batch_though_none_is_kept(connection: Connection, environ: dict[str, str]) -> None:
    user = await arrange.user(connection)
    await connection.execute(
        "insert into sessions (id, user_id, last_accessed_at, expires_at) "
        "select gen_random_uuid(), $1, now(), now() - interval '1 day' from generate_series(1, $2)",
        user,
        FIRST + LARGEST,
    )
    counts = (await dry("session-cleanup", environ=environ | {"BRAKE_MIN_ROWS": "10000"})).document["counts"]
    assert counts == {"deleted": FIRST + LARGEST}


async def test_a_sample_says_what_would_change_for_businesses(connection: Connection, environ: dict[str, str]) -> None:
    await load(connection)
    sample = (await dry("draft-cleanup", environ=environ)).document["sample"]
    assert [(row["outcome"], row["counts"]) for row in sample] == [("done", {"deleted": 1, "items": 1})] * 2


async def test_a_failure_is_shown_and_is_nobodys_dead_run(connection: Connection, environ: dict[str, str]) -> None:
    await connection.execute("drop table sessions cascade")
    failed = await dry("session-cleanup", environ=environ)
    assert (failed.status, failed.document["state"]) == (1, "dead")
    assert "sessions" in failed.document["error"]
    jobs = (await run_command("jobs", "--json", **environ)).document["jobs"]
    (overview,) = [job for job in jobs if job["job"] == "session-cleanup"]
    assert (overview["dead"], overview["last_run_id"]) == (0, None)


async def test_a_real_run_is_not_kept_waiting_by_a_dry_one(connection: Connection, environ: dict[str, str]) -> None:
    await load(connection)
    await dry("overdue-detection", environ=environ)
    real = await run_command("run-once", "overdue-detection", "--json", **environ)
    assert (real.status, real.document["counts"]["marked"]) == (0, 2)


async def test_out_without_dry_run_is_refused(environ: dict[str, str], tmp_path: Path) -> None:
    refused = await run_command("run-once", "overdue-detection", "--out", str(tmp_path), **environ)
    assert refused.status == 2
    assert "--dry-run" in refused.err


@job("too-much")
async def too_much(ctx: JobContext, _: NoPayload) -> Counts:
    """Ends its run with what no ledger takes."""
    async with ctx.transaction() as tx:
        return await ctx.finish({"deleted": 2**70}, on=tx)


@job("nobodys")
async def nobodys(ctx: JobContext, _: NoPayload) -> Counts:
    """Records what the ledger refuses."""
    async with ctx.transaction() as tx:
        await ctx.record([BusinessOutcome(uuid4(), "no-such-outcome")], on=tx)  # type: ignore[arg-type]
        return await ctx.finish({}, on=tx)


@pytest.mark.parametrize("each", [too_much, nobodys], ids=lambda each: each.name)
async def test_what_the_ledger_would_refuse_of_a_run_it_refuses_of_a_dry_run(
    make_settings: MakeSettings, connection: Connection, run_job: RunJob, each: AnyJob
) -> None:
    settings = make_settings()
    real = await run_job(each, jobs=[each])
    async with service.dry_runner(settings) as dry_runner:
        dry = await dry_runner.run(Order(job=each, payload=NoPayload(), fire_time=datetime.now(UTC), asked_by="a test"))
    assert (dry.run["state"], real.run["state"]) == ("dead", "dead")
    assert dry.run["error"].split(":")[0] == real.run["error"].split(":")[0]
    assert await connection.fetchval("select count(*) from bon_scheduler.runs where state = 'running'") == 0


@job("returns-nothing")
async def returns_nothing(ctx: JobContext, _: NoPayload) -> Counts:
    """Ends its run, and forgets to return what with."""
    async with ctx.transaction() as tx:
        await ctx.finish({"deleted": 2}, on=tx)
    return None  # type: ignore[return-value]


@job("raises-then")
async def raises_then(ctx: JobContext, _: NoPayload) -> Counts:
    """Ends its run, and fails at something after."""
    async with ctx.transaction() as tx:
        await ctx.finish({"deleted": 2}, on=tx)
    raise ValueError("afterwards")


@job("leaves-some")
async def leaves_some(ctx: JobContext, _: NoPayload) -> Counts:
    """Says that it has left something undone."""
    async with ctx.transaction() as tx:
        return await ctx.finish({"deleted": 2}, on=tx, undone="the rest is tomorrow's")


@job("ends-a-generator", retry=Retry(attempts=1))
async def ends_a_generator(_ctx: JobContext, _: NoPayload) -> Counts:
    """Raises what is no Exception."""
    raise GeneratorExit("of a library")


@pytest.mark.parametrize(
    "each", [returns_nothing, raises_then, leaves_some, ends_a_generator], ids=lambda each: each.name
)
async def test_it_ends_as_a_real_run_does(make_settings: MakeSettings, run_job: RunJob, each: AnyJob) -> None:
    settings = make_settings()
    real = (await run_job(each, jobs=[each])).run
    async with service.dry_runner(settings) as dry_runner:
        order = Order(job=each, payload=NoPayload(), fire_time=datetime.now(UTC), asked_by="a test")
        dry = (await dry_runner.run(order)).run
    ended = ("state", "counts", "error")
    assert [dry[name] for name in ended] == [real[name] for name in ended]


@job("next-page")
async def next_page(ctx: JobContext, _: NoPayload) -> Counts:
    """Asks for its next run, as one does that goes on while there is more."""
    async with ctx.transaction() as tx:
        await ctx.enqueue(next_page, NoPayload(), on=tx)
        return await ctx.finish({}, on=tx)


async def test_a_job_that_asks_for_itself_is_worked_out_for_a_while_and_the_rest_is_said_to_be_left(
    make_settings: MakeSettings, connection: Connection
) -> None:
    await connection.execute("insert into bon_scheduler.jobs (name) values ('next-page')")
    async with service.dry_runner(make_settings()) as dry_runner:
        order = Order(job=next_page, payload=NoPayload(), fire_time=datetime.now(UTC), asked_by="a test")
        report = await dry_runner.run(order)
    assert [run["state"] for run in report.caused] == ["succeeded"] * 10 + ["queued"]
    assert report.caused[-1]["error"] == "not worked out: 10 runs before it caused one another"
