"""
Poolers in transaction mode (PgBouncer): what still works behind one, and how one is recognised.

There a session is not a session: a named statement may be executed where nobody prepared it, settings go to
somebody else, and LISTEN hears nothing. So behind one no statement has a name (asyncpg then prepares and executes
in one go), each transaction sets its own limit, and whatever needs a session goes to DATABASE_LISTEN_URL.
"""

import asyncio
from typing import Literal, TypeAlias
from uuid import uuid4

import asyncpg
from asyncpg.transaction import Transaction

__all__ = ["PooledConnection", "keeps_sessions"]

Isolation: TypeAlias = Literal["read_committed", "read_uncommitted", "serializable", "repeatable_read"] | None
PROBE_SECONDS = 3.0


class _LimitedTransaction(Transaction):
    """A transaction that limits its own idleness, for want of a session that would."""

    def __init__(
        self, connection: "PooledConnection", isolation: Isolation, *, readonly: bool, deferrable: bool
    ) -> None:
        super().__init__(connection, isolation, readonly, deferrable)
        self._limited = connection

    async def start(self) -> None:
        await super().start()
        limit_ms = self._limited.idle_limit_ms
        await self._limited.execute(f"set local idle_in_transaction_session_timeout = {limit_ms:d}")


class PooledConnection(asyncpg.Connection):
    """A connection through a pooler in transaction mode."""

    idle_limit_ms = 0
    """How long a transaction may be idle before the server ends it; 0 for ever."""

    def transaction(
        self, *, isolation: Isolation = None, readonly: bool = False, deferrable: bool = False
    ) -> Transaction:
        """Make a transaction; see asyncpg."""
        return _LimitedTransaction(self, isolation, readonly=readonly, deferrable=deferrable)

    def get_reset_query(self) -> str:
        """Return nothing: what this session left behind is not on the server that would be asked."""
        return ""


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
