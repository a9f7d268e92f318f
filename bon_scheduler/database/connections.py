"""
The database: connections, pools, their codecs and time-outs.

Everything of ours lives in schema `bon_scheduler`; nothing is ever created in `public`.
"""

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

import asyncpg

from bon_scheduler.addresses import DatabaseAddress, read_database_address
from bon_scheduler.config import Settings
from bon_scheduler.database import migrations, patience
from bon_scheduler.database.exact_json import UnreadableJsonError, read_json, write_json
from bon_scheduler.database.pooling import PooledConnection
from bon_scheduler.database.unavailable import CertificateFileError, explain_unavailable
from bon_scheduler.jobs import Connection

__all__ = [
    "TRANSIENT_ERRORS",
    "Limits",
    "Pool",
    "Pools",
    "connect",
    "connect_worker",
    "idle_limit_ms",
    "migrating",
    "open_control_pool",
    "open_pool",
]

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

CONNECT_TIMEOUT_SECONDS = 10
SERVICE_CONNECT_SECONDS = 3
"""Of what connects again by itself: an attempt that a network swallows must not outlast the outage by more."""
CLOSE_TIMEOUT_SECONDS = 3
COMMAND_TIMEOUT_SECONDS = 900
"""Of a connection that a command opens. In a pool, a handler's statement ends with its job's time-out alone."""
CONTROL_TIMEOUT_SECONDS = 20
CLIENT_CHECK_INTERVAL = "5s"
"""How often a server that works on a long statement looks whether the worker that asked is still there."""
KEEPALIVE = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
OURS: Mapping[str, str] = {  # as SET takes them
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "standard_conforming_strings": "on",
    "search_path": "public, pg_temp",
    "default_transaction_isolation": "'read committed'",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_session_timeout": "0",
    "row_security": "off",
}
"""
What each session of ours sets, whatever the role or the database says: how texts look that are read, where names lead,
which transactions it has, and no time-out but our own. `row_security` off makes hidden rows an error, instead of
"succeeded, 0".
"""
SET_OURS = "".join(f"set {name} to {value};" for name, value in OURS.items())
"""Said once a session has begun: a pooler refuses most of it as a parameter of the start."""
POOLED: Mapping[str, Any] = {"connection_class": PooledConnection, "statement_cache_size": 0}
MIGRATION_LOCK = int.from_bytes(hashlib.sha256(b"bon_scheduler").digest()[:8], "big", signed=True)

TRANSIENT_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the connection ended between two halves of a statement
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.TransactionRollbackError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.LockNotAvailableError,
)
"""What a database that is restarting, away, full or failed over raises: worth the same call again."""


# No parameters. Nothing is read: asyncpg learns these types, once for a connection, and not in the midst of a run.
KNOW_ARRAYS = """
    select array[]::uuid[], array[]::text[], array[]::name[], array[]::bool[], array[]::int[], array[]::bigint[],
           array[]::timestamptz[], array[]::bytea[], array[]::jsonb[], array[]::record[]
"""


class SessionConnection(asyncpg.Connection):
    """A connection whose session is set back to ours, not to what the role and the database say."""

    def get_reset_query(self) -> str:
        """Return what sets the session back."""
        return f"{super().get_reset_query()}\n{SET_OURS}"


class SessionlessConnection(asyncpg.Connection):
    """A connection whose users leave nothing in its session, so that nothing needs to be reset between them."""

    def get_reset_query(self) -> str:
        """Return nothing: a reset would cost each short call a second one."""
        return ""


async def _set_codecs(connection: Connection) -> None:
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, schema="pg_catalog", encoder=write_json, decoder=_from_json)
    await connection.fetch(KNOW_ARRAYS)


def _from_json(text: str) -> object:
    try:
        return read_json(text)
    except UnreadableJsonError:
        return text  # shown as it is: one row that no program can hold must not hide the others


async def _prepare_session(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    await connection.execute(SET_OURS)
    await _set_codecs(connection)


def _watch_peer(connection: "asyncpg.Connection[asyncpg.Record]", address: DatabaseAddress) -> None:
    """Have the system find out, within half a minute or as the address says, that a server is gone without a word."""
    transport = connection._transport  # type: ignore[attr-defined] # noqa: SLF001 - asyncpg has no door to its socket
    peer = transport.get_extra_info("socket")
    if peer.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    for name, value in {**KEEPALIVE, **address.keepalive}.items():
        option = getattr(socket, name, None)  # not every system knows each
        if option is not None and (value > 0 or name == "SO_KEEPALIVE"):
            peer.setsockopt(socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP, option, value)


async def _dial(
    address: DatabaseAddress,
    *_: object,
    **options: Any,  # noqa: ANN401 - asyncpg's, passed on
) -> "asyncpg.Connection[asyncpg.Record]":
    """Connect to an address, whatever asyncpg's pool thinks where that is: every connection of ours is made here."""
    try:
        arguments = address.arguments()  # each time: certificates are renewed while the service runs
    except ValueError as error:
        raise CertificateFileError(str(error)) from None
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(**arguments, **options)
    _watch_peer(connection, address)
    return connection


def _options(
    address: DatabaseAddress, *, command_seconds: float | None, session: Mapping[str, str] | None = None
) -> dict[str, Any]:
    told = {"options": address.options} if address.options else {}
    ours = {"application_name": "bon_scheduler", "TimeZone": "UTC", **(session or {})}
    return {
        "timeout": address.connect_seconds or SERVICE_CONNECT_SECONDS,
        "command_timeout": command_seconds,
        "server_settings": told | ours,
    }


def _session(settings: Settings, worker: UUID | None = None) -> dict[str, str]:
    """Return what a session of ours sets, or behind a pooler, where it would stay on the server, a transaction."""
    return {
        # By this name a successor ends the connections of a worker that is taken for dead: see `cut_off`.
        "application_name": f"bon_scheduler {worker}" if worker else "bon_scheduler",
        "idle_in_transaction_session_timeout": str(idle_limit_ms(settings)),
        "client_connection_check_interval": CLIENT_CHECK_INTERVAL,
    }


def idle_limit_ms(settings: Settings) -> int:
    """Shorter than the lease: a frozen worker must neither block its successor nor hold BON's rows."""
    return int(settings.lease_seconds * 1000 * 2 / 3)


@asynccontextmanager
async def open_pool(settings: Settings, *, worker: UUID | None = None) -> AsyncIterator[Pool]:
    """
    Open a pool of DATABASE_POOL_SIZE on DATABASE_URL, in a worker's name; raises DatabaseUnavailableError.

    With DATABASE_LISTEN_URL set, DATABASE_URL is taken to lead through a pooler in transaction mode.
    """
    session = _session(settings, worker)
    address = read_database_address(settings.database_url.get_secret_value())
    if settings.database_listen_url is None:
        options = _options(address, command_seconds=None, session=session)
        options |= {"connection_class": SessionConnection, "init": _prepare_session}
    else:
        options = _options(address, command_seconds=None)
        options |= {**POOLED, "init": _prepare_pooled(session)}
    async with _pool(address, settings.database_pool_size, options) as pool:
        yield pool


def _prepare_pooled(session: Mapping[str, str]) -> Callable[[PooledConnection], Awaitable[None]]:
    async def prepare(connection: PooledConnection) -> None:
        quoted = {name: f"'{value}'" for name, value in session.items()}
        settings = {name: value for name, value in OURS.items() if not name.startswith("default_")} | quoted
        connection.opening = "".join(f"set local {name} to {value};" for name, value in settings.items())
        await _set_codecs(connection)

    return prepare


@asynccontextmanager
async def open_control_pool(settings: Settings, size: int, *, worker: UUID) -> AsyncIterator[Pool]:
    """Open a pool for a worker's short calls on the server's own address, each limited in time."""
    address = read_database_address(settings.listen_url)
    options = _options(address, command_seconds=CONTROL_TIMEOUT_SECONDS, session=_session(settings, worker))
    options |= {"connection_class": SessionlessConnection, "init": _prepare_session}
    async with _pool(address, size, options) as pool:
        yield pool


@asynccontextmanager
async def _pool(address: DatabaseAddress, size: int, options: Mapping[str, Any]) -> AsyncIterator[Pool]:
    with explain_unavailable(address):
        pool = await asyncpg.create_pool(connect=partial(_dial, address), min_size=1, max_size=size, **options)
    try:
        yield pool
    finally:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                await pool.close()
        except TimeoutError:
            # A handler that will not end keeps its connection: its transaction is rolled back.
            pool.terminate()


class Pools(NamedTuple):
    """Where a worker's effects go."""

    work: Pool
    """For handlers, who may keep all of it busy."""
    answers: Pool
    """For what the world outside has done already, which must not wait for handlers."""


class Limits(NamedTuple):
    """How many seconds a connection may take to be made, and each of its statements."""

    connect_seconds: float | None
    """None: as long as the address says with `connect_timeout`, else CONNECT_TIMEOUT_SECONDS."""
    command_seconds: float


PATIENT = Limits(None, COMMAND_TIMEOUT_SECONDS)


@asynccontextmanager
async def connect(
    url: str,
    *,
    settings: Settings | None = None,
    session: Mapping[str, str] | None = None,
    codecs: bool = True,
    pooled: bool = False,
    limits: Limits = PATIENT,
) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """
    Open one connection of its own; raises DatabaseUnavailableError.

    `codecs=False` leaves JSON as text; `pooled` leaves nothing on a server that may be a
    pooler's; with `settings` transactions are limited as in a pool, and `session` says what else is set.
    """
    address = read_database_address(url)
    listens = settings is not None and settings.database_listen_url is not None and url == settings.listen_url
    with explain_unavailable(address, "DATABASE_LISTEN_URL" if listens else "DATABASE_URL"):
        session = session or (_session(settings) if settings else None)
        options = _options(address, command_seconds=limits.command_seconds, session=session)
        seconds = limits.connect_seconds or address.connect_seconds or CONNECT_TIMEOUT_SECONDS
        options |= {"timeout": seconds, **(POOLED if pooled else {})}
        connection = await _dial(address, **options)
    try:
        if not pooled:
            await connection.execute(SET_OURS)
        if codecs:
            await _set_codecs(connection)
        yield connection
    except BaseException:
        # Cut, not closed: a server that does not answer would not answer a farewell either.
        connection.terminate()
        raise
    await connection.close(timeout=CLOSE_TIMEOUT_SECONDS)


def connect_worker(
    settings: Settings, worker: UUID
) -> AbstractAsyncContextManager["asyncpg.Connection[asyncpg.Record]"]:
    """Open a worker's own connection to the server itself, for what needs a session; each call is limited in time."""
    said = read_database_address(settings.listen_url).connect_seconds
    return connect(
        settings.listen_url,
        session=_session(settings, worker),
        codecs=False,
        limits=Limits(said or SERVICE_CONNECT_SECONDS, CONTROL_TIMEOUT_SECONDS),
    )


@asynccontextmanager
async def migrating(url: str) -> AsyncIterator[tuple[Connection, list[str]]]:
    """
    Create or upgrade the schema, then yield the connection and the names of what was applied.

    One advisory lock is held until the block ends, so that several replicas may do this at once. Raises
    MigrationBlockedError where others hold it, or the tables, for minutes.
    """
    async with connect(url) as connection, patience.holding(connection, MIGRATION_LOCK):
        yield connection, await patience.once_tables_are_free(connection, migrations.apply)
