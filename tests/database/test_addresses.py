"""What becomes of each parameter of a database's address: it does what it means, is of no effect, or is refused."""

import ctypes
import ctypes.util
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bon_scheduler import declared
from bon_scheduler.addresses import describe_database, parameters, read_database_address
from bon_scheduler.database import DatabaseUnavailableError, connections
from bon_scheduler.demo.postgres import PostgresUnavailableError, find_binaries
from bon_scheduler.environment import SettingsError
from tests.process import run_command
from tests.strangers import PASSWORD, TlsServer

CANARY = "S3c77tPW"
TAKEN = [
    # libpq's, used
    *("host=db.example", "port=5433", "dbname=bon", "user=bon", "password=x", "passfile=/x", "options=-cgeqo%3Doff"),
    *("connect_timeout=5", "connect_timeout=0", "connect_timeout=-1", "connect_timeout=300"),
    *("keepalives=0", "keepalives_idle=30", "keepalives_interval=5", "keepalives_count=3", "tcp_user_timeout=9000"),
    *("sslmode=disable", "sslmode=prefer", "sslmode=require", "sslrootcert=system"),
    *("ssl_min_protocol_version=TLSv1.3", "ssl_max_protocol_version=TLSv1.3", "sslnegotiation=postgres"),
    *("sslmode=require&sslnegotiation=direct", "sslcertmode=disable", "sslpassword=x"),
    *("target_session_attrs=read-write", "target_session_attrs=primary", "krbsrvname=postgres", "gsslib=gssapi"),
    # libpq's, of no effect
    *("application_name=x", "fallback_application_name=x", "client_encoding=UTF8", "channel_binding=prefer"),
    *("channel_binding=disable", "gssencmode=prefer", "gssencmode=disable", "gssdelegation=0", "sslsni=1"),
    *("sslcompression=0", "replication=false", "load_balance_hosts=random", "max_protocol_version=latest"),
    *("min_protocol_version=3.0", "sslcertmode=allow"),
    # other languages'
    *("schema=public", "pgbouncer=true", "connection_limit=5", "pool_timeout=10", "socket_timeout=5", "ssl=true"),
    *("sslaccept=strict", "sslaccept=accept_invalid_certs", "sslmode=no-verify", "sslmode=require&uselibpqcompat=true"),
    *("currentSchema=public", "prepareThreshold=0", "ApplicationName=x", "targetServerType=primary"),
    *("statement_cache_size=0", "pool_max_conns=4", "search_path=public", "prepared_statement_cache_size=0"),
    *("sslmode=", "unknown="),
]
REFUSED = {
    "sslmode=sometimes": "sslmode",
    "ssl=false": "ssl",
    "sslaccept=maybe": "sslaccept",
    "sslmode=require&sslrootcert=system": "sslrootcert",
    "sslmode=verify-full": "sslmode",
    "sslmode=verify-ca": "sslmode",
    "sslmode=verify-full&sslrootcert=/no/such/file": "sslrootcert",
    "sslmode=require&sslcert=/no/such/file": "sslcert",
    "sslnegotiation=direct&sslmode=prefer&host=localhost": "sslnegotiation",
    "sslnegotiation=never": "sslnegotiation",
    "sslcertmode=require": "sslcertmode",
    "sslsni=0": "sslsni",
    "ssl_min_protocol_version=SSLv3": "ssl_min_protocol_version",
    "ssl_max_protocol_version=9": "ssl_max_protocol_version",
    "channel_binding=require": "channel_binding",
    "channel_binding=require&sslmode=require": "channel_binding",
    "channel_binding=perhaps": "channel_binding",
    "require_auth=scram-sha-256": "require_auth",
    "requirepeer=postgres": "requirepeer",
    "gssencmode=require": "gssencmode",
    "gssdelegation=1": "gssdelegation",
    "gsslib=sspi": "gsslib",
    "hostaddr=10.0.0.1": "hostaddr",
    "service=bon": "service",
    "servicefile=/x": "servicefile",
    "connect_timeout=soon": "connect_timeout",
    "connect_timeout=1.5": "connect_timeout",
    "keepalives=yes": "keepalives",
    "keepalives_idle=99999": "keepalives_idle",
    "keepalives_interval=x": "keepalives_interval",
    "keepalives_count=128": "keepalives_count",
    "tcp_user_timeout=5s": "tcp_user_timeout",
    "target_session_attrs=standby": "target_session_attrs",
    "target_session_attrs=read-only": "target_session_attrs",
    "targetServerType=secondary": "targetServerType",
    "load_balance_hosts=maybe": "load_balance_hosts",
    "replication=database": "replication",
    "client_encoding=LATIN1": "client_encoding",
    "min_protocol_version=3.2": "min_protocol_version",
    "sslkeylogfile=/x": "sslkeylogfile",
    "scram_client_key=x": "scram_client_key",
    "oauth_issuer=https://x": "oauth_issuer",
    "schema=app": "schema",
    "currentSchema=app": "currentSchema",
    "sslfactory=org.postgresql.ssl.NonValidatingFactory": "sslfactory",
    "socketFactory=com.google.cloud.sql.postgres.SocketFactory": "socketFactory",
    "sslidentity=/x": "sslidentity",
    "no_such_parameter=1": "no_such_parameter",
    "SSLMODE=disable": "SSLMODE",
}


def read(url: str) -> None:
    declared.read_settings({"DATABASE_URL": url})


@pytest.mark.parametrize("more", TAKEN)
def test_a_parameter_is_taken(more: str) -> None:
    read(f"postgresql://bon:x@db.example/bon?{more}")


@pytest.mark.parametrize(("more", "name"), REFUSED.items())
def test_a_parameter_is_refused_by_name_and_never_by_value(more: str, name: str) -> None:
    value = more.rpartition("=")[2]
    with pytest.raises(SettingsError) as caught:
        read(f"postgresql://bon:{CANARY}@db.example/bon?{more}")
    (fault,) = str(caught.value).splitlines()[1:]
    assert fault.startswith("  - DATABASE_URL: ")
    assert f"parameter {name}" in fault
    assert CANARY not in fault
    assert "/no/such/file" not in fault
    if len(value) > 5 and value not in {"require", "direct", "system", "verify-full", "verify-ca"}:
        assert value not in fault


@pytest.mark.parametrize("name", sorted(parameters.REFUSED) + sorted({*parameters.ONE_OF_THESE, *parameters.NUMBERS}))
def test_no_fault_shows_a_value(name: str) -> None:
    with pytest.raises(ValueError, match=f"parameter {name} ") as caught:
        read_database_address(f"postgresql://bon@db.example/bon?{name}={CANARY}")
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["postgresql://bon:a@b?S3cret=tPW@db.example/bon", "postgresql://bon:a@b/x?S3c=1&S3d=tPW@db/bon"]
)
def test_a_piece_of_a_password_is_not_shown_as_a_parameters_name(url: str) -> None:
    with pytest.raises(ValueError, match=r"write # as %23|neither libpq's") as caught:
        read_database_address(url)
    assert "S3" not in str(caught.value)


def fault(url: str) -> str:
    try:
        read_database_address(url)
    except ValueError as error:
        return str(error)
    return ""


def _libpq() -> ctypes.CDLL | None:
    try:
        near = sorted((find_binaries().parent / "lib").rglob("libpq.so.5*"))
    except PostgresUnavailableError:
        near = []
    for path in [*map(str, near), ctypes.util.find_library("pq")]:
        try:
            return ctypes.CDLL(path) if path else None
        except OSError:
            continue
    return None


class Option(ctypes.Structure):
    """`PQconninfoOption` of libpq-fe.h."""

    _fields_ = (
        *((name, ctypes.c_char_p) for name in ("keyword", "envvar", "compiled", "val", "label", "dispchar")),
        ("dispsize", ctypes.c_int),
    )


def test_every_parameter_of_libpq_is_known() -> None:
    """Asked of libpq itself, the newest that is here."""
    library = _libpq()
    if library is None:
        pytest.skip("needs libpq: apt-get install libpq5")
    library.PQconndefaults.restype = ctypes.POINTER(Option)
    options = library.PQconndefaults()
    names: list[str] = []
    while options[len(names)].keyword:
        names.append(options[len(names)].keyword.decode())
    assert len(names) > 35
    assert [name for name in names if "neither libpq's" in fault(f"postgresql://bon@db.example/bon?{name}=1")] == []


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("  postgresql://bon@h/bon \n", "bon at h"),
        ("\ufeffpostgresql://bon@h/bon", "bon at h"),
        ("postgresql+asyncpg://bon@h/bon", "bon at h"),
        ("postgres+psycopg2://bon@h:7/bon", "bon at h:7"),
        ("postgresql://u:p@localhost/bon?host=/cloudsql/a:b:c", "bon at /cloudsql/a:b:c"),  # Prisma on Cloud SQL
        ("postgresql://u@h1/x?host=h2&dbname=bon&port=7", "bon at h2:7"),  # the parameters win, as in libpq
        ("postgresql:///bon?host=::1", "bon at [::1]"),
        ("postgresql://h1,h2/bon?port=1,2", "bon at h1:1, h2:2"),
        ("postgresql:///bon?port=7", "bon at the local socket:7"),
    ],
)
def test_an_address_leads_where_libpq_takes_it(url: str, says: str) -> None:
    assert describe_database(url) == f"the database {says}"
    read(url)


def test_more_ports_than_hosts_are_refused() -> None:
    with pytest.raises(ValueError, match="names more or fewer ports than hosts"):
        read_database_address("postgresql://h1,h2/bon?port=1,2,3")


@pytest.mark.parametrize(
    "rest", ["bon:S3c%00x@h/bon", "bon@h/bon%00", "bon:S3c%ff@h/bon", "bon@a..b/bon", "bon@h%00x/bon", "bon@h x/bon"]
)
def test_what_no_server_could_be_told_is_refused(rest: str) -> None:
    said = fault(f"postgresql://{rest}")
    assert said
    assert "S3c" not in said


@given(st.text(max_size=40), st.text(max_size=20), st.text(max_size=20))
@settings(max_examples=300, deadline=None)
def test_an_address_is_taken_or_refused_and_never_more(rest: str, name: str, value: str) -> None:
    """Whatever is written there: no other error, and no part of the login in what messages name."""
    for url in (
        f"postgresql://{rest}",
        f"postgresql://u:{CANARY}@h/bon?{name}={value}",
        f"postgresql://h/{rest}?host={value}",
    ):
        try:
            named = str(read_database_address(url))
        except ValueError as error:
            named = str(error)
        assert CANARY not in named


async def test_a_refused_parameter_is_status_2() -> None:
    ended = await run_command("serve", DATABASE_URL=f"postgresql://bon:{CANARY}@127.0.0.1/bon?hostaddr=10.0.0.1")
    assert ended.status == 2
    assert "DATABASE_URL: parameter hostaddr is not used" in ended.err
    assert CANARY not in ended.err


async def test_what_is_of_no_effect_disturbs_nothing(database_url: str) -> None:
    """A server refuses what it does not know: none of it reaches one."""
    more = "&".join([f"{name}=x" for name in parameters.IGNORED] + ["schema=public", "gssencmode=prefer"])
    async with connections.connect(f"{database_url}?{more}") as connection:
        assert await connection.fetchval("show application_name") == "bon_scheduler"
        assert await connection.fetchval("show statement_timeout") == "0"


async def test_options_reach_the_server_and_a_plus_is_a_plus(database_url: str) -> None:
    async with connections.connect(
        f"{database_url}?options=-c%20my.x%3Da+b%20-c%20statement_timeout%3D1000"
    ) as connection:
        assert await connection.fetchval("show my.x") == "a+b"
        assert await connection.fetchval("show statement_timeout") == "0"  # what is ours stays ours


async def test_keepalives_are_the_sockets(database_url: str) -> None:
    more = "?keepalives_idle=77&keepalives_interval=6&keepalives_count=2&tcp_user_timeout=12345"
    async with connections.connect(database_url + more) as connection:
        peer = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        assert [peer.getsockopt(socket.IPPROTO_TCP, one) for one in options] == [77, 6, 2, 12345]
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    async with connections.connect(database_url + "?keepalives=0") as connection:
        peer = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def test_connect_timeout_is_kept(silent: int) -> None:
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailableError, match="does not answer in time"):
        async with connections.connect(f"postgresql://bon@127.0.0.1:{silent}/bon?connect_timeout=1"):
            pass
    assert 0.9 < time.monotonic() - began < 5


async def test_a_passfile_and_a_password_among_the_parameters_log_in(tls_server: TlsServer, tmp_path: Path) -> None:
    passfile = tmp_path / "pgpass"
    passfile.write_text(f"*:*:*:secret:{PASSWORD}\n")
    passfile.chmod(0o600)
    for more in (f"passfile={passfile}", f"password={PASSWORD}"):
        async with connections.connect(tls_server.url("secret", more=f"?{more}")) as connection:
            assert await connection.fetchval("select current_user") == "secret"
