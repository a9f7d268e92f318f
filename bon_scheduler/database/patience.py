"""
How `migrate` waits: it says for whom, lets go so that others pass, and gives up after minutes.

Two locks may keep it waiting. One advisory lock, which anybody may hold, is for one `migrate` at a time. The tables'
own are held by whatever reads or writes them, for hours by `pg_dump`; and whoever comes behind a waiting migration
waits with it, each `enqueue` of BON first of all. So a migration waits for a table for half a second only, then leaves
the queue and tries again later.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import asyncpg
import structlog

from bon_scheduler.jobs import Connection

__all__ = ["LOCK_TIMEOUT", "MigrationBlockedError", "holding", "once_tables_are_free"]

T = TypeVar("T")
log = structlog.get_logger()
LOCK_TIMEOUT = "500ms"
"""How long each statement of a migration may wait for a table, and BON behind it."""
PAUSE_SECONDS = 2.0
"""Between two tries, for those who waited behind the first."""
LOOK_SECONDS = 0.25
SAY_AFTER_SECONDS, SAY_AGAIN_SECONDS = 1.0, 30.0
PATIENCE = timedelta(minutes=5)
"""For tables."""
PATIENCE_WITH_ANOTHER = timedelta(minutes=10)
"""For another `migrate`, which has its own."""
MOST_NAMED = 3
# $1 the lock's key: bigint.
HOLDERS_OF_LOCK = """
    select a.pid, a.application_name, a.backend_start as since, null as tables
      from pg_locks l
      join pg_stat_activity a on a.pid = l.pid
     where l.locktype = 'advisory' and l.granted and l.objsubid = 1
       and l.database = (select oid from pg_database where datname = current_database())
       and l.classid = (($1::bigint >> 32) & 4294967295)::oid and l.objid = ($1::bigint & 4294967295)::oid
"""
# No parameters. The longest first.
HOLDERS_OF_TABLES = """
    select a.pid, a.application_name, a.xact_start as since, string_agg(distinct c.relname, ', ') as tables
      from pg_locks l
      join pg_class c on c.oid = l.relation
      join pg_stat_activity a on a.pid = l.pid
     where l.locktype = 'relation' and l.granted and l.pid <> pg_backend_pid() and c.relkind = 'r'
       and l.database = (select oid from pg_database where datname = current_database())
       and c.relnamespace = to_regnamespace('bon_scheduler')
     group by a.pid, a.application_name, a.xact_start
     order by a.xact_start
"""


class MigrationBlockedError(Exception):
    """Others held a lock that a migration needs for longer than it waits. Nothing was changed."""


@dataclass(slots=True)
class _Wait:
    """One wait: what for, how long at most, and how to find out who holds it."""

    what: str
    patience: timedelta
    holders: Callable[[], Awaitable[list[asyncpg.Record]]]
    began: float = field(default_factory=time.monotonic)
    _say_at: float = SAY_AFTER_SECONDS

    async def go_on(self) -> None:
        """Say now and then who is in the way; raise MigrationBlockedError once patience has ended."""
        waited = time.monotonic() - self.began
        if waited < min(self._say_at, self.patience.total_seconds()):
            return
        found = await self.holders()
        told = "; ".join(_describe(each) for each in found[:MOST_NAMED]) or "nobody any more"
        if waited >= self.patience.total_seconds():
            raise MigrationBlockedError(
                f"migrate waited {waited:.0f} s for {self.what}, held by {told}. Nothing was changed. Let them end, or "
                "end one that may be ended with: select pg_terminate_backend(PID); then run migrate again."
            )
        self._say_at = waited + SAY_AGAIN_SECONDS
        log.warning("migrate.waiting", waits_for=self.what, held_by=told, waited_seconds=round(waited, 1))


def _describe(holder: asyncpg.Record) -> str:
    """Name a session: what it runs is not told, it may hold anything."""
    since = f" since {holder['since']:%Y-%m-%d %H:%M:%S} UTC" if holder["since"] else ""
    tables = f" ({holder['tables']})" if holder["tables"] else ""
    return f'process {holder["pid"]} "{holder["application_name"] or ""}"{since}{tables}'


@asynccontextmanager
async def holding(
    connection: Connection, key: int, *, patience: timedelta = PATIENCE_WITH_ANOTHER
) -> AsyncIterator[None]:
    """Hold an advisory lock of the session for the duration of the context; raises MigrationBlockedError."""
    wait = _Wait("its turn after another migrate", patience, lambda: connection.fetch(HOLDERS_OF_LOCK, key))
    while not await connection.fetchval("select pg_try_advisory_lock($1)", key):
        await wait.go_on()
        await asyncio.sleep(LOOK_SECONDS)
    try:
        yield
    finally:
        await connection.execute("select pg_advisory_unlock($1)", key)


async def once_tables_are_free(
    connection: Connection, migrate: Callable[[Connection], Awaitable[T]], *, patience: timedelta = PATIENCE
) -> T:
    """
    Call what migrates in a transaction with LOCK_TIMEOUT until it is given its locks; return what it returned.

    Raises MigrationBlockedError.
    """
    wait = _Wait("tables of schema bon_scheduler", patience, lambda: connection.fetch(HOLDERS_OF_TABLES))
    while True:
        try:
            return await migrate(connection)
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            await wait.go_on()
            await asyncio.sleep(PAUSE_SECONDS)
