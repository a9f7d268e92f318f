"""Off this machine nothing is said in the clear: not to a server that has no TLS, nor to whoever poses as one."""

import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trustme

from bon_scheduler import service
from bon_scheduler.addresses import TlsMode, read_database_address
from bon_scheduler.cli.check import check_deployment
from bon_scheduler.clock import SystemClock
from bon_scheduler.config import Settings
from bon_scheduler.database import DatabaseUnavailableError, connections
from bon_scheduler.ledger.workers import Worker
from tests.conftest import MakeSettings
from tests.process import run_command
from tests.strangers import CANCEL, PASSWORD, SSL_REQUEST, TlsServer, listened_to, pretending

MODES = [
    *(("127.0.0.1", "", "prefer"), ("localhost", "", "prefer"), ("[::1]", "", "prefer"), ("127.8.9.10", "", "prefer")),
    *(("", "", "prefer"), ("", "?host=/tmp", "prefer"), ("%2Frun", "", "prefer"), ("127.0.0.1,[::1]", "", "prefer")),
    ("db.example", "", "require"),
    ("db.example", "?sslmode=prefer", "require"),
    ("db.example", "?sslmode=allow", "require"),
    ("db.example", "?sslmode=disable", "disable"),
    ("127.0.0.1", "?sslmode=disable", "disable"),
    ("127.0.0.1", "?sslmode=require", "require"),
    ("127.0.0.1,db.example", "", "require"),  # one that is elsewhere is enough
    ("127.0.0.1", "?host=db.example", "require"),  # the parameter wins
    ("db.example", "?host=/cloudsql/a:b:c", "prefer"),
    ("localhost.", "", "require"),  # a name that the DNS may be asked for
    ("localhost.example", "", "require"),
    ("127.0.0.1.example", "", "require"),
    ("127.1", "", "require"),  # read as a number by some only
    ("0.0.0.0", "", "require"),
    ("10.0.0.1", "", "require"),
    ("[fd00::1]", "", "require"),
    ("[::ffff:10.0.0.1]", "", "require"),
    ("db.example", "?ssl=true", "require"),
    ("db.example", "?sslmode=no-verify", "require"),
    ("db.example", "?sslmode=require&uselibpqcompat=true", "require"),
    ("db.example", "?sslrootcert=system", "verify-full"),
    ("db.example", "?sslmode=require&sslaccept=strict", "verify-full"),
    ("db.example", "?sslaccept=accept_invalid_certs", "require"),
    ("db.example", "?sslmode=verify-full&sslrootcert=system&channel_binding=require", "verify-full"),
]


@pytest.mark.parametrize(("host", "more", "mode"), MODES)
def test_an_address_that_leads_elsewhere_is_encrypted_unless_it_says_disable(host: str, more: str, mode: str) -> None:
    assert read_database_address(f"postgresql://bon@{host}/bon{more}").tls.mode is TlsMode(mode)


@pytest.mark.parametrize(
    ("outside", "more", "mode"),
    [
        ("disable", "", "require"),
        ("prefer", "", "require"),
        ("verify-full", "", "verify-full"),
        ("verify-full", "?sslmode=require", "verify-ca"),  # the address wins, and libpq verifies where there is a root
        ("verify-full", "?sslmode=disable", "disable"),
    ],
)
def test_libpqs_variable_may_ask_for_more_and_never_for_less(
    monkeypatch: pytest.MonkeyPatch, outside: str, more: str, mode: str
) -> None:
    monkeypatch.setenv("PGSSLMODE", outside)
    if outside == "verify-full":
        monkeypatch.setenv("PGSSLROOTCERT", "/etc/root.pem")
    assert read_database_address(f"postgresql://bon@db.example/bon{more}").tls.mode is TlsMode(mode)


def test_a_host_that_only_libpqs_variable_names_is_elsewhere_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "db.example")
    address = read_database_address("postgresql:///bon")
    assert (address.tls.mode, str(address)) == (TlsMode.REQUIRE, "the database bon at db.example")


async def _connect(settings: Settings) -> None:
    async with connections.connect(settings.listen_url):
        pass


async def _pool(settings: Settings) -> None:
    async with connections.open_pool(settings):
        pass


async def _pooled(settings: Settings) -> None:
    both = settings.model_copy(update={"database_listen_url": settings.database_url})
    async with connections.open_pool(both):
        pass


async def _control_pool(settings: Settings) -> None:
    async with connections.open_control_pool(settings, 1, worker=Worker().id):
        pass


async def _worker(settings: Settings) -> None:
    async with connections.connect_worker(settings, Worker().id):
        pass


async def _migrating(settings: Settings) -> None:
    async with connections.migrating(settings.listen_url):
        pass


async def _preparing(settings: Settings) -> None:
    await service.prepare(settings)


WAYS = [_connect, _pool, _pooled, _control_pool, _worker, _migrating, _preparing]


@pytest.mark.parametrize("answer", [b"N", b"S", b"E", b"NS", b"SR", b"H"])
@pytest.mark.parametrize("way", WAYS)
async def test_a_server_that_refuses_tls_is_told_nothing(
    outside: str, make_settings: MakeSettings, way: Callable[[Settings], Awaitable[None]], answer: bytes
) -> None:
    async with pretending(outside, answer) as pretender:
        settings = make_settings(DATABASE_URL=pretender.url("?connect_timeout=1"))
        with pytest.raises(DatabaseUnavailableError) as caught:
            await way(settings)
    assert PASSWORD not in str(caught.value)
    assert pretender.heard[0] == SSL_REQUEST
    said = b"".join(pretender.heard[1:])
    assert said == b"" or (answer == b"S" and said[0] == 0x16), said  # the first byte of TLS
    assert b"bon" not in said


@pytest.mark.parametrize("command", [["migrate"], ["check"], ["jobs"], ["run-once", "draft-cleanup"], ["serve"]])
@pytest.mark.samples(3)
async def test_no_command_hands_its_password_to_a_server_without_tls(outside: str, command: list[str]) -> None:
    async with pretending(outside, b"N") as pretender:
        ended = await run_command(*command, DATABASE_URL=pretender.url(), HEALTH_PORT="0")
    assert ended.status == 1
    assert "offers no encryption" in " ".join((ended.err + ended.out).split())
    assert set(pretender.heard) == {SSL_REQUEST}
    assert PASSWORD not in ended.err + ended.out


async def test_an_address_that_says_so_goes_on_in_the_clear(outside: str) -> None:
    """What the tests above would see if a password were sent."""
    async with pretending(outside, b"N") as pretender:
        with pytest.raises(DatabaseUnavailableError):
            async with connections.connect(pretender.url("?sslmode=disable&connect_timeout=1")):
                pass
    assert PASSWORD.encode() in b"".join(pretender.heard)


@pytest.mark.parametrize("more", ["", "?sslmode=prefer", "?sslmode=require", "?ssl=true"])
async def test_a_server_with_tls_is_reached_from_outside(tls_server: TlsServer, more: str) -> None:
    async with connections.connect(tls_server.url("encrypted", more=more)) as connection:
        assert await connection.fetchval("select ssl from pg_stat_ssl where pid = pg_backend_pid()")


async def test_direct_begins_with_tls_and_says_where_a_server_is_too_old_for_it(tls_server: TlsServer) -> None:
    async with listened_to(tls_server.outside, tls_server.port) as relay:
        url = f"postgresql://encrypted@{relay.host}:{relay.port}/postgres?sslnegotiation=direct&sslmode=require"
        try:
            async with connections.connect(url) as connection:
                assert await connection.fetchval("select ssl from pg_stat_ssl where pid = pg_backend_pid()")
        except DatabaseUnavailableError as error:
            assert "before version 17" in str(error)  # noqa: PT017 - either is right, by the server's version
    assert relay.heard[0][0] == 0x16


async def test_certificates_prove_who_answers_and_who_asks(tls_server: TlsServer) -> None:
    ours = f"sslcert={tls_server.directory}/client.pem&sslkey={tls_server.directory}/client.key"
    more = f"?sslmode=verify-full&sslrootcert={tls_server.root}&{ours}"
    async with connections.connect(tls_server.url("certified", more=more)) as connection:
        assert await connection.fetchval("select current_user") == "certified"


async def test_system_means_the_authorities_that_this_machine_trusts(
    tls_server: TlsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tls_server.url("encrypted", more="?sslrootcert=system")
    with pytest.raises(DatabaseUnavailableError, match="not trusted"):
        async with connections.connect(url):
            pass
    monkeypatch.setenv("SSL_CERT_FILE", str(tls_server.root))
    async with connections.connect(url) as connection:
        assert await connection.fetchval("select ssl from pg_stat_ssl where pid = pg_backend_pid()")


async def test_a_request_to_cancel_is_encrypted_as_well(tls_server: TlsServer) -> None:
    """It holds the key by which anybody could cancel what the connection does."""
    async with listened_to(tls_server.outside, tls_server.port) as relay:
        url = f"postgresql://encrypted@{relay.host}:{relay.port}/postgres"
        async with connections.connect(url) as connection:
            with pytest.raises(TimeoutError):
                await connection.fetchval("select pg_sleep(20)", timeout=0.2)
            assert await connection.fetchval("select 1") == 1
        assert relay.heard == [SSL_REQUEST, SSL_REQUEST]
    async with listened_to("127.0.0.1", tls_server.port) as relay:  # what would be heard otherwise
        async with connections.connect(f"postgresql://postgres@127.0.0.1:{relay.port}/postgres?sslmode=disable") as one:
            with pytest.raises(TimeoutError):
                await one.fetchval("select pg_sleep(20)", timeout=0.2)
            assert await one.fetchval("select 1") == 1
        assert any(CANCEL in chunk for chunk in relay.heard)


async def test_a_certificate_that_is_renewed_is_used_by_the_next_connection(
    tls_server: TlsServer, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Kubernetes replaces the files of a service that runs for months."""
    root = tmp_path / "root.pem"
    root.write_bytes(tls_server.root.read_bytes())
    more = f"?sslmode=verify-ca&sslrootcert={root}"
    settings = make_settings(DATABASE_URL=tls_server.url("encrypted", more=more), DATABASE_POOL_SIZE="2")
    async with connections.open_pool(settings) as pool:
        await pool.fetchval("select 1")
        trustme.CA().cert_pem.write_to_path(root)
        await pool.expire_connections()
        with pytest.raises(ssl.SSLCertVerificationError):
            await pool.fetchval("select 1")
        root.write_bytes(tls_server.root.read_bytes())
        assert await pool.fetchval("select 1") == 1


EXPOSED = [
    ("?sslmode=disable", "not encrypted"),
    ("", "not verified"),
    ("?sslmode=require", "not verified"),
    ("?sslmode=no-verify", "not verified"),
]


@pytest.mark.parametrize(("more", "says"), EXPOSED)
async def test_check_says_what_is_not_protected_and_the_remedy(
    tls_server: TlsServer, make_settings: MakeSettings, more: str, says: str
) -> None:
    settings = make_settings(DATABASE_URL=tls_server.url("postgres", more=more))
    [found] = [one for one in await check_deployment(settings, SystemClock()) if one.name == "encryption"]
    assert (found.level, says in found.what) == ("warning", True)
    assert "sslmode=verify-full" in (found.remedy or "")


async def test_check_is_content_with_what_is_verified_or_stays_here(
    tls_server: TlsServer, make_settings: MakeSettings
) -> None:
    verified = tls_server.url("postgres", more=f"?sslmode=verify-full&sslrootcert={tls_server.root}")
    for url in (verified, tls_server.url("postgres", host="127.0.0.1")):
        found = await check_deployment(make_settings(DATABASE_URL=url), SystemClock())
        assert [one.level for one in found if one.name == "encryption"] == ["ok"]


async def test_one_warning_at_the_start_says_what_is_not_protected(outside: str) -> None:
    async with pretending(outside, b"N") as pretender:
        served = await run_command("serve", DATABASE_URL=pretender.url("?sslmode=require"), HEALTH_PORT="0")
    lines = [line for line in served.err.splitlines() if "database.exposed" in line]
    assert len(lines) == 1
    assert "not verified" in lines[0]
    assert PASSWORD not in served.err
