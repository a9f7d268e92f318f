"""
Tokens that were rotated and that the database did not take.

It must not lose one while the database or the spool can be written. So it writes them to the spool, in memory
only where there is none or it fails too, and offers them to the database every other second, at start and before
each run, until it commits. Nothing fences that: the compare-and-set on the token that was sent guards it.

Each entry is offered on its own. One that the database refuses, while it would save others, stays where it is, is
reported, and holds up nobody but its own business, whose spent token must not be sent again meanwhile.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
import orjson
import structlog

from bon_scheduler.clock import Clock
from bon_scheduler.database import TRANSIENT_ERRORS, Outage, Pool
from bon_scheduler.shaam import refreshes
from bon_scheduler.shaam.refreshes import CALL_TIMEOUT_SECONDS, Credential, Rotated
from bon_scheduler.shaam.spool import Spool

__all__ = ["UnsavedTokens", "persist"]

T = TypeVar("T")
log = structlog.get_logger()
OFFER_SECONDS = 2.0
LAST_OFFER_SECONDS = 5.0
FEW = 3
"""So many entries in memory that are refused may be odd; more are a database that refuses whoever asks."""


class UnsavedTokens:
    """Keeps what was rotated, for one process."""

    def __init__(self, pool: Pool, spool: Spool | None, clock: Clock) -> None:
        self._pool = pool
        self._spool = spool
        self._clock = clock
        self._in_memory: dict[Credential, Rotated] = {}
        self._refused: dict[Credential, Rotated] = {}
        self._one_at_a_time = asyncio.Lock()
        self.waits: Callable[[], bool] = lambda: False
        """Whether the ledger is quarantined: then the spool is left alone and nobody is called."""
        self._outage = Outage()

    @property
    def unsafe(self) -> bool:
        """Whether tokens are kept that nothing but this process remembers, and others may have to be soon."""
        return len(self._in_memory) > FEW or any(credential not in self._refused for credential in self._in_memory)

    @property
    def blind(self) -> bool:
        """Whether the spool has entries that could not be read at the last look."""
        return self._spool is not None and self._spool.blind

    def holds(self, credential: Credential) -> bool:
        """Return whether the answer to this token is kept, and the database refuses it."""
        return credential in self._refused

    @asynccontextmanager
    async def running(self, outage: Outage) -> AsyncIterator["UnsavedTokens"]:
        """Apply what an earlier process has left, then offer what is kept until the block ends, and once more then."""
        self._outage = outage
        try:
            await self.recover()
        except Exception as error:  # noqa: BLE001 - nothing is lost by it: it is offered again below
            self._outage.failed("unsaved", error)
        offering = asyncio.create_task(self._offer_again(), name="unsaved")
        try:
            yield self
        finally:
            offering.cancel()
            await asyncio.wait([offering])
            await self._offer_last()

    async def save(self, rotated: Rotated) -> bool:
        """Save in a transaction of its own; False when the row holds another token by now."""
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS), self._pool.acquire() as connection:
            try:
                return await refreshes.save(connection, rotated, self._clock.now())
            except asyncpg.DataError as error:
                # What was said beside the tokens is not worth losing them.
                log.warning(
                    "token.trimmed", business_id=str(rotated.credential.business_id), error=type(error).__name__
                )
                bare = replace(rotated, scope=None, refresh_expires_in=None)
                return await refreshes.save(connection, bare, self._clock.now())

    async def rehearse(self) -> None:
        """Prove that a save could work: privileges, a writable server. Raises what the database raises."""
        nobody = Credential(uuid4(), "")
        await self.save(Rotated(nobody, b"", b"", "", "", None, timedelta(0), None, self._clock.now()))

    async def keep(self, rotated: Rotated) -> bool:
        """Keep what the database did not take; True when it would survive this process."""
        if self._spool is not None:
            try:
                await asyncio.to_thread(self._spool.write, _as_text(rotated))
            except Exception as error:  # noqa: BLE001 - whatever failed, memory is left
                log.critical("spool.failed", error=type(error).__name__, reason=getattr(error, "strerror", None))
            else:
                log.error("token.spooled", business_id=str(rotated.credential.business_id))
                return True
        self._in_memory[rotated.credential] = rotated
        log.critical("token.unsaved", business_id=str(rotated.credential.business_id))
        return False

    async def recover(self) -> None:
        """Apply all that is kept; then whoever asks may try the tokens again whose answers are not here."""
        await self.offer()
        if self._spool is not None and not self._spool.blind and not self.waits():
            here = [rotated.fingerprint for rotated in self._refused.values()]
            async with self._pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
                await refreshes.release_abandoned(connection, self._spool.id, here)

    async def offer(self) -> None:
        """Offer all that is kept to the database; raises what that raises whoever asks."""
        async with self._one_at_a_time:
            refused = set()
            for credential, rotated in list(self._in_memory.items()):
                if await self._save_late(rotated, "memory"):
                    del self._in_memory[credential]
                else:
                    refused.add(credential)
            if self._spool is not None and not self.waits():
                refused |= await self._empty(self._spool)
            self._refused = {credential: self._refused[credential] for credential in refused}

    async def _empty(self, spool: Spool) -> set[Credential]:
        """Save what is in the spool; return what had to stay."""
        refused = set()
        for path, text in await asyncio.to_thread(lambda: list(spool.entries())):
            try:
                rotated = _from_text(text)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with this one, the others are not
                await asyncio.to_thread(spool.put_aside, path, f"not what this version writes ({type(error).__name__})")
                continue
            if await self._save_late(rotated, path.name):
                # AFTER the commit, otherwise a crash in between would lose it.
                await asyncio.to_thread(spool.remove, path)
            else:
                refused.add(rotated.credential)
        return refused

    async def _save_late(self, rotated: Rotated, place: str) -> bool:
        """Save an entry, or find that it is not wanted any more; False when the database refuses this one alone."""
        credential = rotated.credential
        try:
            saved = await self.save(rotated)
        except TRANSIENT_ERRORS:
            raise
        except Exception as error:  # noqa: BLE001 - whatever is wrong with this one, the others are not
            if credential not in self._refused:
                await self.rehearse()  # raises where it is not this one that is at fault
                self._refused[credential] = rotated
                log.critical(
                    "token.refused", business_id=str(credential.business_id), kept_in=place, error=type(error).__name__
                )
            return False
        log.warning("token.saved_late" if saved else "token.superseded", business_id=str(credential.business_id))
        return True

    async def _offer_again(self) -> None:
        while True:
            await asyncio.sleep(OFFER_SECONDS)
            try:
                await self.offer()
                self._outage.answered("unsaved")
            except Exception as error:  # noqa: BLE001 - whatever failed, what is kept must be offered again
                self._outage.failed("unsaved", error)

    async def _offer_last(self) -> None:
        try:
            async with asyncio.timeout(LAST_OFFER_SECONDS):
                await self.offer()
        except Exception as error:  # noqa: BLE001 - whatever failed, it must be said what is lost by it
            self._outage.failed("unsaved", error)
        for credential in self._in_memory:
            log.critical("token.lost", business_id=str(credential.business_id))


async def persist(write: Callable[[], Awaitable[T]], waits_seconds: tuple[float, ...]) -> T:
    """Write what the authority has already done, again while the database does not take it."""
    for wait_seconds in waits_seconds:
        try:
            return await write()
        # Any refusal by the database is tried again: the tokens exist nowhere else.
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            if not isinstance(error, TRANSIENT_ERRORS):  # an outage is reported once, not by each token
                log.warning("token.save_failed", error=type(error).__name__, retry_in_seconds=wait_seconds)
        await asyncio.sleep(wait_seconds)
    return await write()


def _as_text(rotated: Rotated) -> str:
    credential = rotated.credential
    document = asdict(rotated) | {
        "credential": {"business_id": str(credential.business_id), "stored": credential.stored},
        "fingerprint": rotated.fingerprint.hex(),
        "successor": rotated.successor.hex(),
        "expires_in": rotated.expires_in.total_seconds(),
        "refresh_expires_in": _seconds(rotated.refresh_expires_in),
    }
    return orjson.dumps(document).decode()


def _from_text(text: str) -> Rotated:
    document: dict[str, Any] = orjson.loads(text)
    refresh_seconds = document["refresh_expires_in"]
    return Rotated(
        **document
        | {
            "credential": Credential(UUID(document["credential"]["business_id"]), document["credential"]["stored"]),
            "fingerprint": bytes.fromhex(document["fingerprint"]),
            "successor": bytes.fromhex(document["successor"]),
            "expires_in": timedelta(seconds=document["expires_in"]),
            "refresh_expires_in": None if refresh_seconds is None else timedelta(seconds=refresh_seconds),
            "received_at": datetime.fromisoformat(document["received_at"]),
        }
    )


def _seconds(duration: timedelta | None) -> float | None:
    return None if duration is None else duration.total_seconds()
