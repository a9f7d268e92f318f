"""
Poolers in transaction mode (PgBouncer): what still works behind one, and how one is recognised.

There a session is not a session: a named statement may be executed where nobody prepared it, LISTEN hears nothing,
and what one client sets stays on a server that then serves another, BON's API among them. So behind one no statement
has a name, whatever is set ends with its transaction, and whatever needs a session goes to DATABASE_LISTEN_URL.
"""

import asyncio
import os
from uuid import uuid4

import asyncpg

__all__ = ["PooledConnection", "keeps_sessions", "same_database"]

PROBE_SECONDS = 3.0
# $1 key of an advisory lock: bigint, not negative.
SEES_LOCK = """
    select exists (select from pg_locks l
                     join pg_database d on d.oid = l.database
                    where d.datname = current_database()
                      and l.locktype = 'advisory'
                      and l.granted
                      and (l.classid::bigint << 32 | l.objid::bigint) = $1)
"""


class PooledConnection(asyncpg.Connection):
    """
    A connection through a pooler in transaction mode, to be opened with `statement_cache_size=0`.

    It leaves nothing on the server that it borrows, whatever interrupts it.
    """

    opening = ""
    """What each transaction sets for itself, for want of a session that would: `set local …;` statements."""
    _unsettled = False

    async def execute(
        self,
        query: str,
        *args: object,
        timeout: float | None = None,  # noqa: ASYNC109 - asyncpg's signature
    ) -> str:
        """Execute; see asyncpg. With its BEGIN goes what the transaction sets."""
        # In one message: a process that is frozen between two would hold a server without a name or a limit.
        if self.opening and not args and not query.startswith("BEGIN") and not self.is_in_transaction():
            async with self.transaction():
                return await super().execute(query, timeout=timeout)
        if query.startswith("BEGIN"):
            await self._settle()
            # What the session's defaults are, another client may have said.
            plain = "set transaction isolation level read committed, read write;" if query == "BEGIN;" else ""
            query += plain + self.opening
        return await super().execute(query, *args, timeout=timeout)

    async def _settle(self) -> None:
        # A plan that was asked for holds a transaction open, with its snapshot: BEGIN would go on with that one.
        if self._unsettled:
            await super().execute("select")
            self._unsettled = False

    def get_reset_query(self) -> str:
        """Return nothing: what this session left behind is not on the server that would be asked."""
        # But for a statement whose plan was asked for and which was never executed, as when an argument is of a wrong
        # type: its server waits for the rest and keeps its table locked, until it is sent anything.
        unsettled, self._unsettled = self._unsettled, False
        return "select" if unsettled else ""

    async def _do_execute(self, *args: object, **options: object) -> object:
        if self.opening and not self.is_in_transaction():
            # What another client or the database set holds outside of a transaction as well.
            async with self.transaction():
                return await self._do_execute(*args, **options)
        try:
            return await super()._do_execute(*args, **options)  # type: ignore[misc]
        except BaseException:
            self._unsettled = True
            raise

    async def _get_statement(self, *args: object, **options: object) -> object:
        # A cursor would name its statement, and two processes choose the same names.
        return await super()._get_statement(*args, **{**options, "named": False})  # type: ignore[misc]

    async def _introspect_types(self, *args: object) -> object:
        # asyncpg sets `jit` for the session meanwhile. Rolled back, that ends where it began. It asks between the plan
        # of a statement and its execution.
        self._unsettled = True
        transaction = self.transaction()
        await transaction.start()
        try:
            return await super()._introspect_types(*args)  # type: ignore[misc]
        finally:
            await transaction.rollback()


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

    def hear(*_: object) -> None:
        heard.set()

    await listener.add_listener(channel, hear)
    await other.execute(f"notify {channel}")
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await heard.wait()
    except TimeoutError:
        return False
    finally:
        # A pooler's server would go on listening; the one used last is usually the one it gives next.
        await listener.remove_listener(channel, hear)
    return True


async def same_database(one: "asyncpg.Connection[asyncpg.Record]", other: "asyncpg.Connection[asyncpg.Record]") -> bool:
    """
    Say whether two connections, maybe through poolers, lead to the same database of the same server.

    Asked of the thing itself: a lock taken through one is seen through the other. Anybody may look at locks, and
    a replica, or a copy with the same names and identifiers, does not have it.
    """
    key = int.from_bytes(os.urandom(8), "big") >> 1
    # The lock ends with its transaction, whatever lies in between. In one message, and with a limit of its own: some
    # databases end a transaction that is idle for a moment.
    limit = f"set local idle_in_transaction_session_timeout to '{PROBE_SECONDS * 10:.0f}s'"
    await one.execute(f"begin; {limit}; select pg_advisory_xact_lock({key})")
    try:
        return bool(await other.fetchval(SEES_LOCK, key))
    finally:
        await one.execute("rollback")
