"""
The database: connections, their codecs and time-outs, and the migrations of schema `bon_scheduler`.

Everything of ours and of PgQueuer's lives in that schema; nothing is ever created in `public`.
"""

import asyncio
import hashlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import orjson

from bon_scheduler.addresses import describe_database
from bon_scheduler.config import Settings
from bon_scheduler.jobs import Connection
from bon_scheduler.pooling import PooledConnection

# BEFORE PgQueuer is imported, otherwise it settles on the connection's search path.
os.environ["PGQUEUER_SCHEMA"] = "bon_scheduler"

from pgqueuer.adapters.persistence.qb import QueryBuilderEnvironment
from pgqueuer.adapters.persistence.queries import Queries

__all__ = [
    "TRANSIENT_ERRORS",
    "DatabaseUnavailableError",
    "Pool",
    "PoolerError",
    "SchemaBehindError",
    "connect",
    "explain_unavailable",
    "idle_limit_ms",
    "migrating",
    "migration_sql",
    "open_control_pool",
    "open_pool",
    "require_schema",
]

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

CONNECT_TIMEOUT_SECONDS = 10
SERVICE_CONNECT_SECONDS = 3
"""Of what connects again by itself: an attempt that a network swallows must not outlast the outage by more."""
CLOSE_TIMEOUT_SECONDS = 3
COMMAND_TIMEOUT_SECONDS = 900
"""Longer than any job's own deadline; calls of the ledger give a shorter one each."""
CONTROL_TIMEOUT_SECONDS = 20
CLIENT_CHECK_INTERVAL = "5s"
"""How often a server that works on a long statement looks whether the worker that asked is still there."""
KEEPALIVE = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
POOLED: Mapping[str, Any] = {"connection_class": PooledConnection, "statement_cache_size": 0}
UNSUPPORTED_STARTUP = "unsupported startup parameter"
MIGRATION_LOCK = int.from_bytes(hashlib.sha256(b"bon_scheduler").digest()[:8], "big", signed=True)

CREATE_HISTORY = """
    create schema if not exists bon_scheduler;
    create table if not exists bon_scheduler.migrations (
        version    integer primary key,
        name       text not null,
        applied_at timestamptz not null default now()
    );
"""
APPLIED_VERSIONS = "select version from bon_scheduler.migrations"
# $1 version: int, $2 name: text.
RECORD_MIGRATION = "insert into bon_scheduler.migrations (version, name) values ($1, $2)"
HAS_HISTORY = "select to_regclass('bon_scheduler.migrations') is not null"
NEWEST_VERSION = "select coalesce(max(version), 0) from bon_scheduler.migrations"
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
)
"""What a database that is restarting, away, full or failed over raises: worth the same call again."""
IN_OUR_SCHEMA = "set local search_path = bon_scheduler, pg_temp;\n"


class DatabaseUnavailableError(Exception):
    """The database cannot be reached or refuses us; the message says where and what to do."""


class PoolerError(Exception):
    """An address leads through a pooler that breaks what it is needed for; the message says the remedy."""


class SchemaBehindError(Exception):
    """Schema `bon_scheduler` is missing or older than this version needs."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file of `migrations/`."""

    version: int
    name: str
    sql: str


def _migrations() -> list[Migration]:
    files = resources.files("bon_scheduler").joinpath("migrations").iterdir()
    return sorted(
        (
            Migration(int(file.name[:4]), file.name.removesuffix(".sql")[5:], file.read_text("utf-8"))
            for file in files
            if file.name.endswith(".sql")
        ),
        key=lambda migration: migration.version,
    )


@contextmanager
def explain_unavailable(url: str) -> Iterator[None]:
    """Turn what asyncpg raises while connecting into DatabaseUnavailableError, without credentials."""
    try:
        yield
    except asyncpg.InvalidPasswordError as error:
        raise DatabaseUnavailableError(
            f"{describe_database(url)} refuses the user or password of DATABASE_URL. Check both."
        ) from error
    except asyncpg.InvalidCatalogNameError as error:
        raise DatabaseUnavailableError(
            f"{describe_database(url)} does not exist. Create it, or correct DATABASE_URL."
        ) from error
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        if UNSUPPORTED_STARTUP in str(error):
            raise PoolerError(
                f"{describe_database(url)} is behind a connection pooler (PgBouncer). Set DATABASE_LISTEN_URL to the "
                "server's own address as well; DATABASE_URL may then go through the pooler."
            ) from error
        what = type(error).__name__ if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        raise DatabaseUnavailableError(
            f"Cannot connect to {describe_database(url)}: {what.splitlines()[0]}. "
            "Is PostgreSQL running there, and does DATABASE_URL name it?"
        ) from error


async def _set_codecs(connection: Connection) -> None:
    for name in ("json", "jsonb"):
        await connection.set_type_codec(
            name, schema="pg_catalog", encoder=lambda v: orjson.dumps(v).decode(), decoder=_from_json
        )


def _from_json(text: str) -> object:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)  # jsonb takes numbers that no machine has, such as 1e400


async def _prepare(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    _watch_peer(connection)
    await _set_codecs(connection)


def _watch_peer(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Have the system find out, within half a minute, that a server is gone without a word."""
    transport = connection._transport  # type: ignore[attr-defined] # noqa: SLF001 - asyncpg has no door to its socket
    peer = transport.get_extra_info("socket")
    if peer.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    for name, value in KEEPALIVE.items():
        if (option := getattr(socket, name, None)) is not None:  # not every system knows each
            peer.setsockopt(socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP, option, value)


def _options(*, command_seconds: float, session: Mapping[str, str] | None = None) -> dict[str, Any]:
    return {
        "timeout": SERVICE_CONNECT_SECONDS,
        "command_timeout": command_seconds,
        "server_settings": {"application_name": "bon_scheduler", "TimeZone": "UTC", **(session or {})},
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
    if settings.database_listen_url is None:
        options = _options(command_seconds=COMMAND_TIMEOUT_SECONDS, session=session)
    else:
        options = {**_options(command_seconds=COMMAND_TIMEOUT_SECONDS), **POOLED, "init": _prepare_pooled(session)}
    async with _pool(settings.database_url.get_secret_value(), settings.database_pool_size, options) as pool:
        yield pool


def _prepare_pooled(session: Mapping[str, str]) -> Callable[[PooledConnection], Awaitable[None]]:
    async def prepare(connection: PooledConnection) -> None:
        connection.opening = "".join(f"set local {name} = '{value}';" for name, value in session.items())
        await _prepare(connection)

    return prepare


@asynccontextmanager
async def open_control_pool(settings: Settings, size: int, *, worker: UUID) -> AsyncIterator[Pool]:
    """Open a pool for a worker's short calls on the server's own address, each limited in time."""
    options = _options(command_seconds=CONTROL_TIMEOUT_SECONDS, session=_session(settings, worker))
    async with _pool(settings.listen_url, size, options) as pool:
        yield pool


@asynccontextmanager
async def _pool(url: str, size: int, options: Mapping[str, Any]) -> AsyncIterator[Pool]:
    with explain_unavailable(url):
        pool = await asyncpg.create_pool(url, **{"min_size": 1, "max_size": size, "init": _prepare, **options})
    try:
        yield pool
    finally:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                await pool.close()
        except TimeoutError:
            # A handler that will not end keeps its connection: its transaction is rolled back.
            pool.terminate()


@asynccontextmanager
async def connect(
    url: str,
    *,
    settings: Settings | None = None,
    codecs: bool = True,
    pooled: bool = False,
    connect_seconds: float = CONNECT_TIMEOUT_SECONDS,
    command_seconds: float = COMMAND_TIMEOUT_SECONDS,
) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """
    Open one connection of its own; raises DatabaseUnavailableError.

    `codecs=False` leaves JSON as text, as PgQueuer expects it; `pooled` leaves nothing on a server that may be a
    pooler's; with `settings` transactions are limited as in a pool.
    """
    with explain_unavailable(url):
        options = _options(command_seconds=command_seconds, session=_session(settings) if settings else None)
        options |= {"timeout": connect_seconds, **(POOLED if pooled else {})}
        connection = await asyncpg.connect(url, **options)
    try:
        _watch_peer(connection)
        if codecs:
            await _set_codecs(connection)
        yield connection
    except BaseException:
        # Cut, not closed: a server that does not answer would not answer a farewell either.
        connection.terminate()
        raise
    await connection.close(timeout=CLOSE_TIMEOUT_SECONDS)


@asynccontextmanager
async def migrating(url: str) -> AsyncIterator[tuple[Connection, list[str]]]:
    """
    Create or upgrade the schema, then yield the connection and the names of what was applied.

    One advisory lock is held until the block ends, so that several replicas may do this at once.
    """
    async with connect(url) as connection:
        await connection.execute("select pg_advisory_lock($1)", MIGRATION_LOCK)
        try:
            await connection.execute(CREATE_HISTORY)
            await _install_queue(connection)
            yield connection, await _apply_migrations(connection)
        finally:
            await connection.execute("select pg_advisory_unlock($1)", MIGRATION_LOCK)


async def _install_queue(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    queries = Queries.from_asyncpg_connection(connection)
    if await queries.schema_is_installed():
        await queries.upgrade()
    else:
        await queries.install(create_schema=False)


async def _apply_migrations(connection: Connection) -> list[str]:
    applied = {row["version"] for row in await connection.fetch(APPLIED_VERSIONS)}
    pending = [migration for migration in _migrations() if migration.version not in applied]
    for migration in pending:
        async with connection.transaction():
            await connection.execute(IN_OUR_SCHEMA + migration.sql)
            await connection.execute(RECORD_MIGRATION, migration.version, migration.name)
    return [f"{migration.version:04} {migration.name}" for migration in pending]


def migration_sql() -> str:
    """Return what a first `migrate` would execute, for people who apply SQL by hand."""
    parts = [CREATE_HISTORY, QueryBuilderEnvironment().build_install_query(create_schema=False)]
    for migration in _migrations():
        parts.append(f"-- migration {migration.version:04} {migration.name}\nbegin;\n{IN_OUR_SCHEMA}")
        parts.append(migration.sql)
        record = RECORD_MIGRATION.replace("$1", str(migration.version)).replace("$2", f"'{migration.name}'")
        parts.append(f"{record};\ncommit;\n")
    return "\n".join(parts)


async def require_schema(connection: Connection) -> int:
    """Return the schema's version; raise SchemaBehindError when it is less than this version needs."""
    needed = _migrations()[-1].version
    version = await connection.fetchval(NEWEST_VERSION) if await connection.fetchval(HAS_HISTORY) else 0
    if version < needed:
        state = "is missing" if not version else f"is at version {version}"
        raise SchemaBehindError(
            f"Schema bon_scheduler {state}; this version needs {needed}. Run: python -m bon_scheduler migrate"
        )
    return int(version)
