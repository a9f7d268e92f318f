"""
Rotation: one business's refresh token sent once, and its successor saved whatever happens.

A refresh token works once: from the moment the request is sent the old one may be spent, and the new one exists
only here. So an exchange runs in a task that no deadline and no shutdown reaches; it is claimed and the intent
committed BEFORE the request, saved before anything else, and kept in the spool where the database fails
(`unsaved`). Whoever finds an intent whose answer never came tries the old token once: if it is refused now, the
rotation was lost, and the owner is told the truth.

Only an answer about this business's grant asks its owner to consent again. The application's faults and the
network's flag nobody. No connection to the database is held while the authority is asked.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import TypeVar
from uuid import UUID, uuid4

import structlog

from bon_scheduler.clock import Clock, seconds_since_boot
from bon_scheduler.config import Settings
from bon_scheduler.database import TRANSIENT_ERRORS, Outage, Pools
from bon_scheduler.jobs import Retry
from bon_scheduler.log import describe_error
from bon_scheduler.metrics import Metrics
from bon_scheduler.shaam import consent, refreshes
from bon_scheduler.shaam.breaker import Breaker
from bon_scheduler.shaam.cipher import TokenCipher, UnreadableTokenError
from bon_scheduler.shaam.client import (
    ON_DEMAND_SLOTS,
    Ambiguous,
    Answer,
    Misconfigured,
    NeedsReauth,
    Refreshed,
    Shaam,
    Transient,
    name_of,
)
from bon_scheduler.shaam.consent import Asked
from bon_scheduler.shaam.limiter import Limiter
from bon_scheduler.shaam.ownership import SEVERAL_HOLD, Census, find_owner
from bon_scheduler.shaam.refreshes import (
    CALL_TIMEOUT_SECONDS,
    Claimed,
    Credential,
    End,
    Exchange,
    Rotated,
    State,
    Verdict,
)
from bon_scheduler.shaam.results import Count, Result, Tell, braked, not_called, superseded, waits
from bon_scheduler.shaam.spool import Spool
from bon_scheduler.shaam.standing import find_standing
from bon_scheduler.shaam.unsaved import UnsavedTokens, persist

__all__ = ["Rotator"]

T = TypeVar("T")
log = structlog.get_logger()
LEASE_BEYOND_ANSWER = timedelta(minutes=5)
"""Longer than a save is tried and an outage usually lasts: who holds a lease may have the answer in hand."""
PATIENCE_WITH_SPOOL = timedelta(hours=1)
"""How long the replica may stay away in whose spool the answer may lie, before the old token is tried."""
BACK_OFF = Retry(delay=timedelta(minutes=5), longest=timedelta(hours=4))
SAVE_WAITS_SECONDS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Longer in all than a restart of PostgreSQL takes."""
SPOOLED_SAVE_WAITS_SECONDS = (0.25,)
"""Where a spool is, a process that dies meanwhile is the greater risk."""
REFUSED = "not called: its new tokens are kept, and the database refuses them"
WAITS_BECAUSE = {
    Verdict.UNKNOWN: "its row changed while the ledger looked whose its token is",
    Verdict.WAITS: "an answer to an earlier request may lie in the spool of a replica that is not there",
}
COUNTED_AS: dict[State, Count] = {State.NEEDS_REAUTH: "needs_reauth", State.FAILED: "failed"}
LOOK_AGAIN_SECONDS = 0.1
JOIN_BEYOND_ANSWER_SECONDS = 15.0


class Rotator:
    """Rotates tokens, for one process. Safe to use from many runs at once."""

    def __init__(
        self,
        *,
        settings: Settings,
        pools: Pools,
        shaam: Shaam,
        metrics: Metrics,
        clock: Clock,
        stopping: asyncio.Event,
    ) -> None:
        """Once it is `stopping` this process calls nobody more, so that what is under way ends in time."""
        self.stopping = stopping
        if settings.shaam_encryption_key is None:
            raise ValueError("tokens cannot be read without SHAAM_ENCRYPTION_KEY")
        self.cipher = TokenCipher(settings.shaam_encryption_key.get_secret_value())
        spool = None if settings.spool_dir is None else Spool(settings.spool_dir, self.cipher)
        self.breaker = Breaker()
        self._pool, self._answers = pools
        self.census = Census(self._pool, self.cipher)
        self.braked = False
        """Whether the brake on consent held when this process looked last."""
        self.unsaved = UnsavedTokens(self._answers, spool, clock)
        self._shaam = shaam
        self._metrics = metrics
        self._clock = clock
        self._spool_id = spool.id if spool else None
        self._save_waits = SPOOLED_SAVE_WAITS_SECONDS if spool else SAVE_WAITS_SECONDS
        self._answer_limit = timedelta(seconds=settings.shaam_timeout_seconds)
        self._lease = self._answer_limit + LEASE_BEYOND_ANSWER
        self._scheduled = Limiter(settings.shaam_concurrency)
        self._on_demand = Limiter(ON_DEMAND_SLOTS)
        # The loop keeps only weak references to tasks; these must end whoever is cancelled.
        self._under_way: set[asyncio.Task[Result]] = set()

    @asynccontextmanager
    async def running(self, outage: Outage | None = None) -> AsyncIterator["Rotator"]:
        """Rotate for the duration of the context. At its end every exchange that has begun is seen to its end."""
        async with self.unsaved.running(outage or Outage()):
            try:
                yield self
            finally:
                while self._under_way:
                    await asyncio.wait(self._under_way)

    @property
    def under_way(self) -> int:
        """How many exchanges have begun and are not at their end, so that a token may be spent by them."""
        return len(self._under_way)

    async def prepare(self) -> None:
        """
        Apply what is kept, and prove that a save could work: privileges, a writable server.

        BEFORE a token is spent; raises what the database raises.
        """
        await self.unsaved.recover()
        await self.unsaved.rehearse()
        async with self._pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
            self.braked = (await consent.consent_brake(connection)).since is not None

    async def rotate(self, credential: Credential, tell: Tell, *, on_demand: bool = False) -> Result:
        """Wait for a turn and exchange one business's token, once; cancelled, what was sent is seen to its end."""
        limiter = self._on_demand if on_demand else self._scheduled
        async with limiter:
            stopped = asyncio.Event()
            work = self._exchange(credential, tell, limiter, stopped)
            task = asyncio.create_task(work, name=f"exchange {credential.business_id}")
            self._under_way.add(task)
            task.add_done_callback(self._forget)
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                stopped.set()
                raise

    async def join(self, business_id: UUID, *, since: datetime) -> Result | None:
        """
        Wait for the exchange of this business that is under way, and return what came of it.

        None when there is nothing to join: nobody is at it, and it was not refreshed at or after `since`.
        """
        waited = False
        deadline = time.monotonic() + self._answer_limit.total_seconds() + JOIN_BEYOND_ANSWER_SECONDS
        while True:
            async with self._pool.acquire() as connection:
                standing = await find_standing(connection, business_id)
            if standing is None or (standing.state is State.SENDING and not standing.held):
                return None
            if not standing.held:
                break
            if time.monotonic() > deadline:
                return Result(business_id, "deferred", "failed", "another refresh of it does not come to its end")
            waited = True
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
        if standing.state is State.REFRESHED and (waited or standing.changed_at >= since):
            return Result(business_id, "joined", "kept")
        if not waited:
            return None
        return Result(business_id, COUNTED_AS.get(standing.state, "deferred"), "failed", standing.error)

    def _forget(self, task: asyncio.Task[Result]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The caller sees it as well, unless it was cancelled. Its text may quote a statement's values.
            log.error("token.failed", error=type(error).__name__)

    async def _exchange(self, credential: Credential, tell: Tell, limiter: Limiter, stopped: asyncio.Event) -> Result:
        business_id = credential.business_id
        if (reason := self._why_not(limiter)) is not None:
            return not_called(business_id, reason)
        if self.unsaved.holds(credential):
            return await self._report(business_id, "token.refused", REFUSED)
        try:
            token = self.cipher.decrypt(credential.stored)
        except UnreadableTokenError as error:
            return await self._report(business_id, "token.unreadable", f"the stored token is unreadable: {error}")
        exchange = Exchange(uuid4(), credential, self.cipher.fingerprint(token))
        began = seconds_since_boot()
        claimed = await self._prepare_to_send(exchange, tell)
        if isinstance(claimed, Result):
            return claimed
        async with limiter.request() as turn:
            # Frozen meanwhile, this process must not send: its lease may be another's soon.
            late = seconds_since_boot() - began > self._lease.total_seconds() / 2
            reason = (
                "its run was stopped" if late or stopped.is_set() else self._why_not(limiter) or self.breaker.admit()
            )
            answer = await self._send(token) if reason is None else None
            turn.refused = isinstance(answer, Misconfigured)
        if answer is None:
            await self._settle(exchange, End(state=State.DEFERRED, unspent=True))
            return not_called(business_id, reason or "this process has no file descriptor left")
        return await self._conclude(exchange, claimed, answer, tell)

    async def _send(self, token: str) -> Answer | None:
        """Send a token; None where nobody could be called, which says nothing of the authority."""
        started = time.perf_counter()
        try:
            answer = await self._shaam.refresh(token)
        except OSError:
            return None
        self._metrics.shaam_answered(name_of(answer), time.perf_counter() - started)
        self.breaker.note(answer)
        return answer

    def _why_not(self, limiter: Limiter) -> str | None:
        """Return why nobody may be called now; one business at a time may while the brake on consent holds."""
        if self.braked and limiter is self._scheduled:
            return "the brake on consent holds"
        if self.unsaved.waits():
            return "the ledger is quarantined"
        if self.stopping.is_set():
            return "this process is stopping"
        if self.unsaved.unsafe:
            # Neither the database nor a spool takes anything: one more call would risk one more token.
            return "another business's tokens could not be saved"
        return self.breaker.why_not()

    async def _prepare_to_send(self, exchange: Exchange, tell: Tell) -> Claimed | Result:
        """Commit the intent; a result says why the token is not to be sent."""
        business_id = exchange.credential.business_id
        try:
            claimed = await self._claim(exchange)
        except TRANSIENT_ERRORS as error:
            # The claim may have committed, and only its answer be lost.
            await self._settle(exchange, End(state=State.DEFERRED, unspent=True))
            text = f"not called: the database did not take the intent ({type(error).__name__})"
            return Result(business_id, "deferred", "failed", text)
        if isinstance(claimed, Verdict):
            return await self._explain(exchange, claimed, tell)
        return (await self._find_answer(exchange) if claimed.unanswered > 1 else None) or claimed

    async def _claim(self, exchange: Exchange) -> Claimed | Verdict:
        begun = self.census.begun
        claimed = await self._claim_once(exchange)
        if claimed is not Verdict.UNKNOWN:
            return claimed
        await self.census.take(after=begun)
        return await self._claim_once(exchange)

    async def _claim_once(self, exchange: Exchange) -> Claimed | Verdict:
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS), self._pool.acquire() as connection:
            return await refreshes.claim(
                connection, exchange, lease=self._lease, spool=self._spool_id, patience=PATIENCE_WITH_SPOOL
            )

    async def _find_answer(self, exchange: Exchange) -> Result | None:
        """Apply what is kept; a result says that the answer to the earlier request was there, or may be."""
        business_id = exchange.credential.business_id
        await self.unsaved.offer()
        # The claim is not given back in these two: another replica would send the token.
        if self.unsaved.holds(exchange.credential):
            return await self._report(business_id, "token.refused", REFUSED)
        if self.unsaved.blind:
            return waits(business_id, "an answer to an earlier request may lie in an unreadable file of SPOOL_DIR")
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS), self._pool.acquire() as connection:
            return None if await refreshes.is_claimed(connection, exchange) else superseded(business_id)

    async def _explain(self, exchange: Exchange, verdict: Verdict, tell: Tell) -> Result:
        """Turn a refused claim into that business's result; nobody was called."""
        business_id = exchange.credential.business_id
        match verdict:
            case Verdict.SUPERSEDED:
                return superseded(business_id)
            case Verdict.FOREIGN:
                return await self._refuse_foreign(exchange)
            case Verdict.BRAKED:
                return braked(business_id, "the authority calls its grant spent")
            case Verdict.HELD:
                return Result(business_id, "deferred", "kept", held=True)
            case Verdict.UNKNOWN | Verdict.WAITS:
                return waits(business_id, WAITS_BECAUSE[verdict])
            case Verdict.SPENT:
                text = "an earlier refresh spent this token, and something wrote it over its successor"
                return await self._ask_for_consent(exchange, text, tell)

    async def _conclude(self, exchange: Exchange, claimed: Claimed, answer: Answer, tell: Tell) -> Result:
        business_id = exchange.credential.business_id
        bound = log.bind(business_id=str(business_id))
        wait = BACK_OFF.wait(claimed.failures + 1)
        match answer:
            case Refreshed():
                return await self._save(exchange, answer)
            case NeedsReauth(reason):
                if claimed.unanswered > 1:
                    reason = f"the rotation was lost: the answer to an earlier request never came; now {reason}"
                return await self._ask_for_consent(exchange, reason, tell)
            case Transient(reason, silence, maybe_spent):
                bound.info("token.deferred", reason=reason, retry_after_seconds=silence and silence.total_seconds())
                end = End(state=State.DEFERRED, unspent=not maybe_spent, wait=wait, silence=silence, error=reason)
                await self._settle(exchange, end)
                return Result(business_id, "deferred", "failed", reason)
            case Ambiguous(reason, maybe_spent):
                bound.warning("token.ambiguous", reason=reason)
                await self._settle(exchange, End(state=State.FAILED, unspent=not maybe_spent, wait=wait, error=reason))
                return Result(business_id, "failed", "failed", reason)
            case Misconfigured(reason):
                bound.error("shaam.refused", reason=reason)
                await self._settle(exchange, End(state=State.DEFERRED, unspent=True, error=reason))
                return Result(business_id, "failed", "failed", reason, refused=True)

    async def _save(self, exchange: Exchange, tokens: Refreshed) -> Result:
        """Save rotated tokens, unless the row holds another refresh token by now."""
        business_id = exchange.credential.business_id
        rotated = Rotated(
            exchange.credential,
            exchange.fingerprint,
            self.cipher.fingerprint(tokens.refresh_token),
            # Sealed once, outside the retries: a repeated save must recognise its own.
            self.cipher.encrypt(tokens.access_token),
            self.cipher.encrypt(tokens.refresh_token),
            tokens.scope,
            tokens.expires_in,
            tokens.refresh_token_expires_in,
            self._clock.now(),
        )
        try:
            saved = await persist(lambda: self.unsaved.save(rotated), self._save_waits)
        except Exception as error:  # noqa: BLE001 - whatever it was, the tokens exist nowhere else
            if await self.unsaved.keep(rotated):
                return Result(business_id, "refreshed", "done")
            text = f"rotated but not saved yet ({type(error).__name__}): lost if this process ends before it is"
            return Result(business_id, "failed", "failed", text)
        if not saved:
            return superseded(business_id)
        log.debug("token.refreshed", business_id=str(business_id))
        return Result(business_id, "refreshed", "done")

    async def _ask_for_consent(self, exchange: Exchange, reason: str, tell: Tell) -> Result:
        """Flag the business, unless its owner consented, or another rotation was saved, meanwhile."""
        business_id = exchange.credential.business_id

        async def write() -> Asked:
            async with (
                asyncio.timeout(CALL_TIMEOUT_SECONDS),
                self._answers.acquire() as connection,
                connection.transaction(),
            ):
                return await consent.ask(connection, exchange, reason, tell)

        asked = await persist(write, SAVE_WAITS_SECONDS)
        self.braked = asked.braked
        match asked.state:
            case State.NEEDS_REAUTH:
                log.warning("token.needs_reauth", business_id=str(business_id), reason=reason)
                return Result(business_id, "needs_reauth", "failed", reason)
            case State.SPENT:
                return braked(business_id, reason)
            case _:
                return superseded(business_id)

    async def _refuse_foreign(self, exchange: Exchange) -> Result:
        """Leave a token alone that is not this business's: nobody's is spent, and nobody is flagged."""
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS), self._pool.acquire() as connection:
            owner = await find_owner(connection, exchange.fingerprint)
        text = SEVERAL_HOLD if owner is None else f"token.foreign: the stored token is business {owner}'s"
        return await self._report(exchange.credential.business_id, "token.foreign", text, "foreign")

    async def _report(self, business_id: UUID, event: str, text: str, count: Count = "failed") -> Result:
        """Report what a person must mend before the business can be called."""
        log.error(event, business_id=str(business_id), reason=text)
        async with self._pool.acquire() as connection:
            await refreshes.note(connection, business_id, State.FAILED, text)
        return Result(business_id, count, "failed", text)

    async def _settle(self, exchange: Exchange, end: End) -> None:
        """End an exchange that brought no tokens. Where the database fails, its lease runs out instead."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_SECONDS), self._answers.acquire() as connection:
                await refreshes.settle(connection, exchange, end)
        except TRANSIENT_ERRORS as trouble:
            log.warning("token.unsettled", error=describe_error(trouble))
