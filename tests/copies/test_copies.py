"""A copy of the ledger, however it is made, touches nobody until a person adopts it; what is no copy goes on."""

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bon_scheduler import service
from bon_scheduler.database import connections
from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from bon_scheduler.service import Serving
from tests import arrange
from tests.chaos.proxy import in_front_of
from tests.conftest import Connection
from tests.copies.servers import Server, is_ready, prepare, program, server, settings, why_not
from tests.process import run_command
from tests.waiting import until

TICKS = "select count(*) from bon_scheduler.runs where origin = 'schedule' and job = 'session-cleanup'"
STATES = "select state::text from bon_scheduler.runs where job = 'overdue-detection'"
MARKED = "select count(*) from public.invoices where is_overdue"
SILENT_WORKER = "insert into bon_scheduler.workers (id, host, pid, version) values (gen_random_uuid(), 'there', 1, '0')"
IS_SILENT_WORKER_ALIVE = "select last_word is not null from bon_scheduler.workers where host = 'there'"
ASK = "select bon_scheduler.enqueue('overdue-detection')"
EACH_SECOND = {"SCHEDULE_SESSION_CLEANUP": "* * * * * *"}
NO_TICKS = {
    f"SCHEDULE_{job}": "" for job in ("OVERDUE_DETECTION", "DRAFT_CLEANUP", "SESSION_CLEANUP", "SHAAM_TOKEN_REFRESH")
}


@pytest.fixture
def original(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "original") as running:
        yield running


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[SmtpSink]:
    (tmp_path / "letters").mkdir()
    async with smtp_sink(tmp_path / "letters") as listening:
        yield listening


def mail(sink: SmtpSink) -> dict[str, str]:
    return {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none"}


async def owe(connection: Connection) -> None:
    """Make a business with an owner to write to, who is owed an invoice since yesterday."""
    business = await arrange.business(connection)
    await arrange.owner(connection, business, "owner@shop.example")
    await arrange.invoice(connection, business, due_date=datetime.now(UTC).date() - timedelta(days=2))


async def live(url: str, **environ: str) -> None:
    """Have the ledger live at that address: serve there once."""
    async with service.serving(settings(url, **NO_TICKS, **environ)) as serving:
        await until(lambda: is_ready(serving))


async def make_original(running: Server, **environ: str) -> str:
    """Make the database `bon`, with somebody to write to, and have the ledger live there; return its address."""
    async with connections.connect(running.url()) as connection:
        await connection.execute("create database bon")
    url = running.url(database="bon")
    await prepare(url)
    async with connections.connect(url) as connection:
        await owe(connection)
    await live(url, **environ)
    return url


@asynccontextmanager
async def quarantined(url: str, **environ: str) -> AsyncIterator[tuple[Serving, str]]:
    """Serve at an address, and require that the place is found wrong; yield why."""
    async with service.serving(settings(url, **{**NO_TICKS, **environ})) as serving:
        reason = await why_not(serving)
        assert reason is not None
        assert "bon-scheduler adopt --reason" in reason
        yield serving, reason


async def adopt(url: str, **environ: str) -> str:
    adopted = await run_command("adopt", "--reason", "a test", DATABASE_URL=url, **environ)
    assert adopted.status == 0, adopted.err
    return adopted.out


async def test_a_copy_touches_nobody_shows_everything_and_goes_on_once_adopted(
    original: Server, sink: SmtpSink
) -> None:
    await make_original(original)
    async with connections.connect(original.url()) as connection:
        await connection.execute("create database copy template bon")
    url = original.url(database="copy")
    async with connections.connect(url) as connection:
        await connection.execute(ASK)
        await connection.execute(SILENT_WORKER)
        async with quarantined(url, **mail(sink), **EACH_SECOND) as (serving, reason):
            assert "lives in another database" in reason
            told = await run_command("run-once", "overdue-detection", DATABASE_URL=url, **mail(sink))
            assert (told.status, "adopt --reason" in told.err) == (1, True)
            for shows in (["jobs"], ["runs"], ["audit"], ["run-once", "overdue-detection", "--dry-run"]):
                assert (await run_command(*shows, DATABASE_URL=url, **mail(sink))).status == 0, shows
            checked = await run_command("check", "--json", DATABASE_URL=url, **mail(sink))
            [found] = [each for each in checked.document["findings"] if each["name"] == "place"]
            assert (checked.status, found["level"]) == (1, "failure")
            assert "another database" in found["what"]
            assert "adopt" in found["remedy"]
            assert await connection.fetchval(TICKS) == 0
            assert await connection.fetchval(IS_SILENT_WORKER_ALIVE)  # it is the original's, and lives there
            assert {row["state"] for row in await connection.fetch(STATES)} == {"queued", "succeeded"}  # the dry run
            assert await connection.fetchval(MARKED) == 0
            assert sink.messages == []
            assert "It lives here from now on" in await adopt(url)
            await until(lambda: is_ready(serving), seconds=8)

            async def sent() -> bool:
                return len(sink.messages) == 1 and await connection.fetchval(TICKS) > 0

            await until(sent)
        done = await connection.fetchrow("select action, target, reason from bon_scheduler.operator_actions")
        assert tuple(done or ()) == ("adopt", "place", "a test")
    again = await run_command("adopt", "--reason", "again", DATABASE_URL=url)
    assert (again.status, "nothing is quarantined" in again.err) == (2, True)


async def test_a_dump_on_another_server_is_quarantined_under_whatever_name(original: Server, tmp_path: Path) -> None:
    url = await make_original(original, DEPLOYMENT="production")
    dump = program("pg_dump", "-d", url)
    with server(tmp_path / "other") as other:
        async with connections.connect(other.url()) as connection:
            await connection.execute("create database bon")
        copy = other.url(database="bon")
        program("psql", "-q", "-v", "ON_ERROR_STOP=1", "-d", copy, given=dump)
        for name in ({}, {"DEPLOYMENT": "production"}, {"DEPLOYMENT": "mine"}):
            async with quarantined(copy, **name) as (_, reason):
                assert "lives on another server" in reason
        await adopt(copy, DEPLOYMENT="mine")
        await live(copy, DEPLOYMENT="mine")
    await live(url, DEPLOYMENT="production")  # the original knows nothing of it


async def test_a_physical_copy_at_another_address_is_quarantined_and_a_restarted_server_is_not(
    original: Server, tmp_path: Path
) -> None:
    async with in_front_of(await make_original(original)) as (proxy, url):
        await live(url)
        original.stop(signal.SIGINT)
        copied = original.copied(tmp_path / "copy")
        original.start()
        proxy.target_port = original.port
        await live(url)
        with server(tmp_path / "copy", of=copied):
            async with quarantined(copied.url(database="bon")) as (_, reason):
                assert f"127.0.0.1:{proxy.port}" in reason
                assert f"come to 127.0.0.1:{copied.port}" in reason


async def test_a_server_that_moves_is_known_by_the_deployment_and_a_copy_is_not(
    original: Server, tmp_path: Path
) -> None:
    production = {"DEPLOYMENT": "production"}
    await make_original(original, **production)
    original.stop(signal.SIGINT)
    moved = original.copied(tmp_path / "moved")
    with server(tmp_path / "moved", of=moved):
        url = moved.url(database="bon")
        for other in ({}, {"DEPLOYMENT": "development"}):
            async with quarantined(url, **other) as (_, reason), connections.connect(url) as connection:
                assert 'is of DEPLOYMENT "production"' in reason
                await connection.execute(ASK)
                refused = await run_command("run-once", "session-cleanup", DATABASE_URL=url, **other)
                assert (refused.status, 'is of DEPLOYMENT "production"' in refused.err) == (1, True)
                assert {row["state"] for row in await connection.fetch(STATES)} == {"queued"}
        await live(url, **production)


async def test_a_server_is_the_same_under_another_name_or_behind_a_pooler(original: Server) -> None:
    url = await make_original(original)
    await live(url.replace("127.0.0.1", "localhost"))
    async with in_front_of(url) as (proxy, behind):
        await live(behind)
        original.stop(signal.SIGINT)
        original.start()
        proxy.target_port = original.port
        await live(behind)  # a way that was remembered
        await live(f"postgresql://postgres@localhost:1,127.0.0.1:{proxy.port}/bon")  # one of several hosts is
        original.stop(signal.SIGINT)
        original.start()
        async with quarantined(original.url(database="bon")) as (_, reason):
            assert "where another server runs" in reason  # it may be a copy, for all that anybody can tell


async def test_a_promoted_replica_is_no_copy(original: Server, tmp_path: Path) -> None:
    async with in_front_of(await make_original(original)) as (proxy, url):
        await live(url)
        replica = original.replica(tmp_path / "replica")
        with server(tmp_path / "replica", of=replica):
            async with service.serving(settings(url, **NO_TICKS)) as serving:
                await until(lambda: is_ready(serving))
                original.stop(signal.SIGQUIT)
                async with connections.connect(replica.url()) as connection:
                    await connection.execute("select pg_promote()")
                proxy.target_port = replica.port
                proxy.reset()
                await until(lambda: is_ready(serving), seconds=30)
                # It goes on, and is not only not told of.
                async with connections.connect(url) as connection:
                    run = await connection.fetchval("select bon_scheduler.enqueue('session-cleanup')")

                    async def done() -> bool:
                        state = "select state = 'succeeded' from bon_scheduler.runs where id = $1"
                        return bool(await connection.fetchval(state, run))

                    await until(done, seconds=30)
            await live(url)  # nor for a process that begins now
            await live(f"postgresql://postgres@127.0.0.1:{proxy.port},127.0.0.1:{replica.port}/bon")


async def test_a_deployment_gets_its_name_while_replicas_without_one_still_run(original: Server) -> None:
    url = await make_original(original)
    async with (
        service.serving(settings(url, **NO_TICKS)) as old,
        service.serving(settings(url, **NO_TICKS, DEPLOYMENT="production")) as new,
        connections.connect(url) as connection,
    ):
        await until(lambda: is_ready(new))

        async def marked_by_both() -> bool:
            named = "select deployment = 'production' and mark >= 6 from bon_scheduler.place"
            return bool(await connection.fetchval(named))

        await until(marked_by_both, seconds=30)
        assert await why_not(old) is None
    async with quarantined(url) as (_, reason):
        assert 'of DEPLOYMENT "production", which is not set here' in reason


async def test_migrating_remembers_nothing_and_neither_does_a_persons_run(original: Server) -> None:
    async with connections.connect(original.url()) as connection:
        await connection.execute("create database bon")
    url = original.url(database="bon")
    await prepare(url)
    assert (await run_command("run-once", "session-cleanup", DATABASE_URL=url)).status == 0
    async with connections.connect(url) as connection:
        assert await connection.fetchval("select count(*) from bon_scheduler.place") == 0
        await live(url)
        assert await connection.fetchval("select count(*) from bon_scheduler.place") == 1
