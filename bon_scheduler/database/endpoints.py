"""
Whether DATABASE_URL and DATABASE_LISTEN_URL lead where they must, asked before anything is done through them.

What half works is refused: sessions that a pooler takes away, and two addresses that lead to two databases.
"""

from contextlib import AbstractAsyncContextManager
from datetime import timedelta

import asyncpg

from bon_scheduler.addresses import Protection, describe_database, read_database_address
from bon_scheduler.config import Settings
from bon_scheduler.database.connections import (
    CONTROL_TIMEOUT_SECONDS,
    Limits,
    connect,
    idle_limit_ms,
)
from bon_scheduler.database.pooling import keeps_sessions, same_database
from bon_scheduler.database.unavailable import PoolerError

__all__ = ["OtherDatabaseError", "protections", "require_endpoints", "require_same_database", "require_sessions"]


class OtherDatabaseError(Exception):
    """The two addresses lead to two databases; the message says which and the remedy."""


async def require_endpoints(settings: Settings) -> None:
    """Raise PoolerError or OtherDatabaseError unless both addresses lead where they must."""
    await require_sessions(settings)
    await require_same_database(settings)


def protections(settings: Settings) -> dict[str, Protection]:
    """Return by setting what the connections to its address are safe from, and the remedy where that is little."""
    urls = {"DATABASE_URL": settings.database_url, "DATABASE_LISTEN_URL": settings.database_listen_url}
    return {
        name: read_database_address(url.get_secret_value()).tls.protection
        for name, url in urls.items()
        if url is not None
    }


async def require_sessions(settings: Settings) -> None:
    """Raise PoolerError where LISTEN would hear nothing or limits be lost: behind a pooler."""
    url = settings.listen_url
    async with _probe(url, settings) as one:
        limit = await one.fetchval("select current_setting('idle_in_transaction_session_timeout')::interval")
        if limit == timedelta(milliseconds=idle_limit_ms(settings)):
            async with _probe(url) as other:
                if await keeps_sessions(one, other):
                    return
    name = "DATABASE_LISTEN_URL" if settings.database_listen_url else "DATABASE_URL"
    raise PoolerError(
        f"{name} leads to {describe_database(url)} through a connection pooler, where notifications or the limits of a "
        "session are lost. Set DATABASE_LISTEN_URL to the server's own address; DATABASE_URL may then go through the "
        "pooler."
    )


async def require_same_database(settings: Settings) -> None:
    """Raise OtherDatabaseError unless DATABASE_URL leads where DATABASE_LISTEN_URL does, if there is one."""
    if settings.database_listen_url is None:
        return
    url = settings.database_url.get_secret_value()
    async with _probe(settings.listen_url) as one, _probe(url) as other:
        if await same_database(one, other):
            return
    raise OtherDatabaseError(
        f"DATABASE_URL leads to {describe_database(url)}, where a lock is not seen that was taken through "
        f"DATABASE_LISTEN_URL, which leads to {describe_database(settings.listen_url)}. Have both lead to the same "
        "database of the same server, the primary."
    )


def _probe(
    url: str, settings: Settings | None = None
) -> AbstractAsyncContextManager["asyncpg.Connection[asyncpg.Record]"]:
    """Connect so that nothing stays on the server, whatever lies in between."""
    return connect(
        url,
        settings=settings,
        codecs=False,
        pooled=True,
        limits=Limits(None, CONTROL_TIMEOUT_SECONDS),
    )
