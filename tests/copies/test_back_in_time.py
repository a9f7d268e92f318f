"""A ledger that is restored from a backup under a running service: nothing goes out twice until a person adopts it."""

import signal
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bon_scheduler import service
from bon_scheduler.database import connections
from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from bon_scheduler.service import Serving
from tests import arrange
from tests.chaos.proxy import Proxy, in_front_of
from tests.copies.servers import Server, is_ready, prepare, program, server, settings, why_not
from tests.process import run_command
from tests.waiting import until

ASK = "select bon_scheduler.enqueue('overdue-detection')"
CUT = "select pg_terminate_backend(pid) from pg_stat_activity where datname = 'bon' and pid <> pg_backend_pid()"
DROP = "drop schema public cascade; drop schema bon_scheduler cascade"
EMPTY = """
    do $$ declare each record; begin
        for each in select oid::regclass as name from pg_class
                     where relkind = 'r' and relnamespace in ('public'::regnamespace, 'bon_scheduler'::regnamespace)
        loop
            execute format('truncate %s cascade', each.name);
        end loop;
    end $$
"""
MARK = "select mark from bon_scheduler.place"
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


class Backup:
    """A service with somebody to write to, a backup of its database, and what happened since."""

    def __init__(self, original: Server, proxy: Proxy, url: str, sink: SmtpSink, home: Path) -> None:
        self.original, self.proxy, self.url, self.sink, self.home = original, proxy, url, sink, home
        self.direct = original.url(database="bon")
        self.environ = {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none", **NO_TICKS}
        self.environ |= {"DEPLOYMENT": "production"}

    async def sent(self, letters: int) -> None:
        async def enough() -> bool:
            return len(self.sink.messages) >= letters

        await until(enough, seconds=30)

    async def marked(self) -> None:
        """Wait until the service has marked the ledger once more."""
        async with connections.connect(self.direct) as connection:
            before = await connection.fetchval(MARK)

            async def more() -> bool:
                return bool(await connection.fetchval(MARK) > before)

            await until(more, seconds=30)

    async def ask(self) -> None:
        async with connections.connect(self.direct) as connection:
            await connection.execute(ASK)


async def restore(backup: Backup, first: str, dump: bytes) -> None:
    """End all connections, and restore in one transaction, beside a service that connects again at once."""
    async with connections.connect(backup.direct) as connection:
        await connection.execute(CUT)
    given = f"{first};\nset session_replication_role = replica;\n".encode() + dump
    program("psql", "-q", "-1", "-v", "ON_ERROR_STOP=1", "-d", backup.direct, given=given)


RESTORES = [
    pytest.param(["-n", "public", "-n", "bon_scheduler"], DROP, id="new tables"),
    pytest.param(["--data-only"], EMPTY, id="the same tables"),
]


@pytest.fixture
async def backup(original: Server, sink: SmtpSink, tmp_path: Path) -> AsyncIterator[Backup]:
    async with connections.connect(original.url()) as connection:
        await connection.execute("create database bon")
    await prepare(original.url(database="bon"))
    async with connections.connect(original.url(database="bon")) as connection:
        business = await arrange.business(connection)
        await arrange.owner(connection, business, "owner@shop.example")
        await arrange.invoice(connection, business, due_date=datetime.now(UTC).date() - timedelta(days=2))
    async with in_front_of(original.url(database="bon")) as (proxy, url):
        yield Backup(original, proxy, url, sink, tmp_path)


async def require_no_second_letter(backup: Backup, serving: Serving) -> str:
    """Ask for the letters again in the restored ledger; return why the service sends none."""
    await backup.ask()

    async def noticed() -> str | None:
        return await why_not(serving)

    reason = await until(noticed, seconds=20)
    told = await run_command("run-once", "overdue-detection", DATABASE_URL=backup.url, **backup.environ)
    assert (told.status, "adopt --reason" in told.err) == (1, True), told.err
    assert len(backup.sink.messages) == 1
    return str(reason)


async def adopt(backup: Backup) -> None:
    adopted = await run_command("adopt", "--reason", "restored", DATABASE_URL=backup.url, DEPLOYMENT="production")
    assert adopted.status == 0, adopted.err


@pytest.mark.parametrize(("what", "first"), RESTORES)
@pytest.mark.samples(1)
async def test_letters_do_not_go_out_again_until_a_person_says_so(backup: Backup, what: list[str], first: str) -> None:
    async with service.serving(settings(backup.url, **backup.environ)) as serving:
        await until(lambda: is_ready(serving))
        await backup.marked()
        dump = program("pg_dump", "-d", backup.direct, *what)
        await backup.ask()
        await backup.sent(1)
        await backup.marked()
        await restore(backup, first, dump)
        reason = await require_no_second_letter(backup, serving)
        assert "restored from a dump" in reason or "went back in time" in reason
        await adopt(backup)
        await until(lambda: is_ready(serving), seconds=20)
        await backup.sent(2)  # it was the quarantine that kept it


async def test_files_that_were_put_back_are_noticed_by_a_running_service_and_then_by_all(backup: Backup) -> None:
    original = backup.original
    async with service.serving(settings(backup.url, **backup.environ)) as serving:
        await until(lambda: is_ready(serving))
        await backup.marked()
        original.stop(signal.SIGINT)
        copy = original.copied(backup.home / "backup")
        await start_again(backup)
        await until(lambda: is_ready(serving), seconds=30)
        await backup.ask()
        await backup.sent(1)
        await backup.marked()
        original.stop(signal.SIGINT)
        original.replaced_by(copy)
        await start_again(backup)
        assert "went back in time" in await require_no_second_letter(backup, serving)
        await adopt(backup)
        await until(lambda: is_ready(serving), seconds=20)
        await backup.sent(2)


async def start_again(backup: Backup) -> None:
    backup.original.start()
    backup.direct = backup.original.url(database="bon")
    backup.proxy.target_port = backup.original.port
    backup.proxy.reset()


@pytest.mark.slow
async def test_files_that_were_put_back_while_nobody_ran_are_noticed_by_what_the_spool_remembers(
    backup: Backup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bon_scheduler.engine.quarantine.LOST_AT_FAILOVER_SECONDS", 0.0)
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o700)
    backup.environ |= {"SPOOL_DIR": str(spool)}
    original = backup.original

    async def serve_and_mark() -> None:
        async with service.serving(settings(backup.url, **backup.environ)) as serving:
            await until(lambda: is_ready(serving))
            await backup.marked()
            await backup.marked()

    await serve_and_mark()
    original.stop(signal.SIGINT)
    copy = original.copied(backup.home / "backup")
    await start_again(backup)
    await serve_and_mark()
    original.stop(signal.SIGINT)
    original.replaced_by(copy)
    await start_again(backup)
    async with service.serving(settings(backup.url, **backup.environ)) as serving:
        assert "went back in time" in str(await why_not(serving))
        await adopt(backup)
        await until(lambda: is_ready(serving), seconds=20)
    await serve_and_mark()
