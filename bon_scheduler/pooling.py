"""
Poolers in transaction mode (PgBouncer): what still works behind one, and how one is recognised.

There a session is not a session: a statement that was prepared may be executed on another server, settings go
to somebody else, and LISTEN hears nothing. So behind one every statement runs in a transaction that sets its own
limits, and whatever needs a session goes to DATABASE_LISTEN_URL.
"""

# ruff: noqa: ANN401 - what asyncpg takes and gives is passed on as it comes

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import asyncpg
from asyncpg.transaction import Transaction

__all__ = ["PooledConnection", "keeps_sessions"]

PROBE_SECONDS = 3.0


class _LimitedTransaction(Transaction):
    """A transaction that limits its own idleness, for want of a session that would."""

    def __init__(self, connection: "PooledConnection", *options: Any) -> None:
        super().__init__(connection, *options)
        self._limited = connection

    async def start(self) -> None:
        await super().start()
        limit_ms = self._limited.idle_limit_ms
        await self._limited.execute(f"set local idle_in_transaction_session_timeout = {limit_ms:d}")


class PooledConnection(asyncpg.Connection):
    """A connection through a pooler in transaction mode: what it prepares it executes in the same transaction."""

    idle_limit_ms = 0
    """How long a transaction may be idle before the server ends it; 0 for ever."""

    def transaction(self, *, isolation: Any = None, readonly: bool = False, deferrable: bool = False) -> Transaction:
        """Make a transaction; see asyncpg."""
        return _LimitedTransaction(self, isolation, readonly, deferrable)

    async def fetch(self, *args: Any, **options: Any) -> Any:
        """Fetch rows; see asyncpg."""
        return await self._in_transaction(super().fetch, *args, **options)

    async def fetchrow(self, *args: Any, **options: Any) -> Any:
        """Fetch the first row; see asyncpg."""
        return await self._in_transaction(super().fetchrow, *args, **options)

    async def fetchval(self, *args: Any, **options: Any) -> Any:
        """Fetch one value; see asyncpg."""
        return await self._in_transaction(super().fetchval, *args, **options)

    async def executemany(self, *args: Any, **options: Any) -> Any:
        """Execute for each of many arguments; see asyncpg."""
        return await self._in_transaction(super().executemany, *args, **options)

    async def execute(self, query: str, *args: Any, **options: Any) -> Any:
        """Execute; see asyncpg. Without arguments nothing is prepared, and `begin` itself comes this way."""
        if not args:
            return await super().execute(query, **options)
        return await self._in_transaction(super().execute, query, *args, **options)

    def get_reset_query(self) -> str:
        """Return nothing: what this session left behind is not on the server that would be asked."""
        return ""

    async def _in_transaction(self, call: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
        if self.is_in_transaction():
            return await call(*args, **options)
        async with self.transaction():
            return await call(*args, **options)


async def keeps_sessions(
    listener: "asyncpg.Connection[asyncpg.Record]", other: "asyncpg.Connection[asyncpg.Record]"
) -> bool:
    """
    Say whether two connections to the same address are sessions of their own, so that LISTEN works.

    Asked of the thing itself: one listens, the other notifies. A server that answers with the process it named
    when the connection was made has nobody in between, and is not asked further.
    """
    if await listener.fetchval("select pg_backend_pid()") == listener.get_server_pid():
        return True
    heard = asyncio.Event()
    channel = f"bon_scheduler_{uuid4().hex}"
    await listener.add_listener(channel, lambda *_: heard.set())
    await other.execute(f"notify {channel}")
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await heard.wait()
    except TimeoutError:
        return False
    return True
