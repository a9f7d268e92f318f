"""Why a database cannot be had: each reason has its sentence and its remedy, and only silence asks who is there."""

import asyncio
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
import trustme

from bon_scheduler.cli.check import Level, check_deployment
from bon_scheduler.clock import SystemClock
from bon_scheduler.database import DatabaseUnavailableError, connections
from bon_scheduler.demo.postgres import find_binaries, running_postgres
from tests.conftest import MakeSettings
from tests.pooler import answers, needs_pgbouncer, pgbouncer
from tests.process import run_command
from tests.strangers import PASSWORD, TlsServer, leaving_nothing_open, pretending
from tests.waiting import until

NOBODY = "Is PostgreSQL running there"


async def refusal(url: str) -> str:
    """Return what is said where a database cannot be had."""
    async with leaving_nothing_open():
        with pytest.raises(DatabaseUnavailableError) as caught:
            async with connections.connect(url):
                pass
    said = str(caught.value)
    assert PASSWORD not in said
    assert said.startswith("Cannot connect: the database ")
    assert said.count(". ") >= 1, "no remedy"
    return said


SAID_BY_A_SERVER = [
    (f"secret:{PASSWORD}x", "postgres", "", "refuses the user or the password of DATABASE_URL"),
    ("secret", "postgres", "", "asks for a password, and DATABASE_URL has none"),
    ("secret", "postgres", "?passfile=/nowhere", "refuses the user or the password of DATABASE_URL"),
    ("postgres", "nowhere", "", "does not exist. Create it, or correct DATABASE_URL."),
    ("ghost", "postgres", "", "there is none of that name, or it may not log in. Create it with LOGIN."),
    ("nologin", "postgres", "", "there is none of that name, or it may not log in"),
    ("outsider", "bon", "", "grant connect on database … to that role"),
    ("tight", "postgres", "", "takes no more connections"),
    ("postgres", "closed", "", "alter database … with allow_connections true"),
    ("unlisted", "postgres", "", "Add a line for them to pg_hba.conf"),
    ("encrypted", "postgres", "?sslmode=disable", "If it asks for encryption there, take sslmode=disable out"),
    ("certified", "postgres", "", "sslcert and sslkey"),
    ("postgres", "postgres", "?options=-c%20no_such=1", "refuses what the parameter options of DATABASE_URL sets"),
    ("postgres", "postgres", "?options=-c%20work_mem=x", "refuses what the parameter options of DATABASE_URL sets"),
]


@pytest.mark.parametrize(("user", "database", "more", "says"), SAID_BY_A_SERVER)
async def test_each_refusal_of_a_server_has_its_remedy(
    tls_server: TlsServer, user: str, database: str, more: str, says: str
) -> None:
    said = await refusal(tls_server.url(user, database=database, more=more))
    assert says in said
    assert f"the database {database} at {tls_server.outside}:{tls_server.port} " in said
    assert NOBODY not in said
    assert user.partition(":")[0] not in said.replace("postgres at", "").replace("PostgreSQL", "").replace(
        "postgresql", ""
    )


async def test_a_certificate_that_proves_nothing_is_said(tls_server: TlsServer, tmp_path: Path) -> None:
    other, root = tls_server.directory / "other.pem", tls_server.root
    url = tls_server.url("encrypted", more=f"?sslmode=verify-full&sslrootcert={other}")
    assert "shows a certificate that is not trusted (" in (said := await refusal(url))
    assert "Write sslrootcert with the file of the authority that signed it" in said
    url = tls_server.url("encrypted", host="127.0.0.1", more=f"?sslmode=verify-full&sslrootcert={root}")
    assert "shows a certificate of another name. Name the server in DATABASE_URL as" in await refusal(url)
    empty = tmp_path / "gone.pem"
    url = tls_server.url("encrypted", more=f"?sslmode=verify-full&sslrootcert={empty}")
    assert "parameter sslrootcert names a file that is of no use (No such file or directory)" in await refusal(url)


async def test_a_certificate_that_has_expired_is_said(outside: str, certificates: trustme.CA, tmp_path: Path) -> None:
    root = tmp_path / "root.pem"
    certificates.cert_pem.write_to_path(root)
    expired = certificates.issue_cert(outside, not_after=datetime.now(UTC) - timedelta(days=1))
    context = trustme_context(expired)
    async with pretending(outside, b"S", tls=context) as pretender:
        said = await refusal(pretender.url(f"?sslmode=verify-full&sslrootcert={root}"))
    assert "(certificate has expired)" in said
    assert NOBODY not in said


def trustme_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


async def test_tls_that_cannot_be_agreed_on_is_said(tls_server: TlsServer) -> None:
    url = tls_server.url("encrypted", more="?sslmode=require&ssl_min_protocol_version=TLSv1.3")
    admin = await asyncpg.connect(tls_server.url("postgres", host="127.0.0.1"))
    try:
        await admin.execute("alter system set ssl_max_protocol_version = 'TLSv1.2'")
        await admin.execute("select pg_reload_conf()")

        async def refuses() -> bool:
            try:
                other = await asyncpg.connect(url)
            except OSError:
                return True
            await other.close()
            return False

        await until(refuses)
        said = await refusal(url)
    finally:
        await admin.execute("alter system reset ssl_max_protocol_version")
        await admin.execute("select pg_reload_conf()")
        await admin.close()
    assert "cannot agree on TLS" in said
    assert NOBODY not in said


@pytest.mark.parametrize(
    ("more", "says"),
    [("", "what answers is not PostgreSQL"), ("?sslmode=require", "If what answers is not PostgreSQL")],
)
async def test_what_is_not_postgresql_is_said_to_be_something_else(more: str, says: str) -> None:
    async with pretending("127.0.0.1", b"HTTP/1.1 400 Bad Request\r\n\r\n") as pretender:
        said = await refusal(pretender.url(more))
    assert says in said
    assert NOBODY not in said


@pytest.fixture
async def closing() -> AsyncIterator[int]:
    """The port of a server that ends each connection, as a proxy does whose server is away."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("more", ["", "?sslmode=disable", "?sslmode=require"])
async def test_a_connection_that_is_ended_without_a_word_is_not_silence(closing: int, more: str) -> None:
    said = await refusal(f"postgresql://bon:{PASSWORD}@127.0.0.1:{closing}/bon{more}")
    assert "the connection was ended without a word" in said
    assert NOBODY not in said


async def test_a_name_that_does_not_resolve_is_said() -> None:
    for name in ("no-such-host.invalid", "a" * 64):
        said = await refusal(f"postgresql://bon:{PASSWORD}@{name}/bon")
        assert "cannot be found: a host's name" in said
        assert NOBODY not in said


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def test_only_where_nothing_answered_is_asked_whether_postgresql_runs(silent: int) -> None:
    for where in ("127.0.0.1:1", "%2Fnowhere", "127.0.0.1:1,[::1]:1", f"127.0.0.1:{silent}"):
        assert NOBODY in await refusal(f"postgresql://bon:{PASSWORD}@{where}/bon?connect_timeout=1")


async def test_a_server_that_shuts_down_says_so() -> None:
    with running_postgres(find_binaries()) as url:
        session = await asyncpg.connect(url)
        try:
            directory = Path(await session.fetchval("show data_directory"))
            os.kill(int((directory / "postmaster.pid").read_text().split()[0]), signal.SIGTERM)

            async def refuses() -> bool:
                try:
                    other = await asyncpg.connect(url)
                except asyncpg.CannotConnectNowError:
                    return True
                await other.close()
                return False

            await until(refuses)
            said = await refusal(url)
        finally:
            session.terminate()
    assert "is starting up, shutting down or recovering. Try again in a moment" in said
    assert NOBODY not in said


@needs_pgbouncer
async def test_a_pooler_says_what_it_cannot_do(tmp_path: Path, database_url: str) -> None:
    target = urlsplit(database_url)
    with pgbouncer(tmp_path, database_url) as url:
        await answers(url)
        missing = url.replace(target.path, "/nowhere")
        with pytest.raises(DatabaseUnavailableError) as caught:
            async with connections.connect(missing):
                pass
    assert "does not exist" in str(caught.value)
    gone = database_url.replace(f":{target.port}/", ":1/")
    with pgbouncer(tmp_path, gone, more="query_wait_timeout = 1") as url:
        await answers(url)
        said = await refusal(url)
    assert "is behind a pooler that has no connection to the server to give" in said


async def test_check_gives_the_reason_and_its_remedy(make_settings: MakeSettings, tls_server: TlsServer) -> None:
    settings = make_settings(DATABASE_URL=tls_server.url("outsider", database="bon"))
    [found] = [each for each in await check_deployment(settings, SystemClock()) if each.level is Level.FAILURE]
    assert found.name == "database"
    assert found.what.endswith("does not admit the role of DATABASE_URL")
    assert found.remedy == "Have its owner run: grant connect on database … to that role."


async def test_a_command_prints_it_and_ends_with_status_1(tls_server: TlsServer) -> None:
    url = tls_server.url(f"secret:{PASSWORD}x")
    for command in (["jobs"], ["serve"], ["migrate"]):
        ended = await run_command(*command, DATABASE_URL=url, HEALTH_PORT="0")
        assert ended.status == 1
        assert "refuses the user or the password of DATABASE_URL" in " ".join(ended.err.split())
        assert PASSWORD not in ended.err
        assert NOBODY not in ended.err
        assert "Traceback" not in ended.err


async def test_the_setting_that_is_to_be_mended_is_named(tls_server: TlsServer, database_url: str) -> None:
    wrong = tls_server.url(f"secret:{PASSWORD}x")
    for name, other in (("DATABASE_URL", "DATABASE_LISTEN_URL"), ("DATABASE_LISTEN_URL", "DATABASE_URL")):
        ended = await run_command("migrate", **{name: wrong, other: database_url})
        assert f"the password of {name}. Check both." in " ".join(ended.err.split())
