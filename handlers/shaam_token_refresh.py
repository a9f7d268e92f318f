"""
Refresh every business's SHAAM tokens before they expire, each quarter of an hour.

A refresh token works once: from the moment the request is sent, the old one may be spent and
the new one exists only here. So a business's exchange is seen to its end, whatever cancels the
run; its save waits for nothing else; and it is a compare-and-set on the token that was sent, so
that a consent or a rotation that came meanwhile is never overwritten by an older token.

Only the authority's `invalid_grant` about this very token asks the owner to consent again. The
application's faults and the network's flag nobody, otherwise one outage would lock out every
business. Businesses never wait for one another, and no connection to the database is held while
the authority is asked.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, TypeAlias, TypeVar
from uuid import UUID

import asyncpg
import structlog

from bon_scheduler.config import Settings, ShaamMode
from bon_scheduler.jobs import (
    BusinessOutcome,
    CatchUp,
    Connection,
    Counts,
    Cron,
    JobContext,
    NeverRetryError,
    NoPayload,
    Retry,
    job,
)
from bon_scheduler.shaam import (
    Ambiguous,
    Misconfigured,
    NeedsReauth,
    Refreshed,
    Shaam,
    TokenCipher,
    Transient,
    UnreadableTokenError,
)

__all__ = ["shaam_token_refresh"]

# $1 horizon: timestamptz. No index on token_expires_at: one row a business, read once a run.
DUE = """
    select c.business_id, c.encrypted_refresh_token
      from business_shaam_credentials c
      join businesses b on b.id = c.business_id
     where c.token_expires_at < $1
       and c.needs_reauth = false
       and b.is_active = true
       and b.deleted_at is null
     order by c.token_expires_at, c.business_id
"""

# $1 business_id: uuid, $2 the refresh token that was sent, $3 the new access token, $4 the new refresh
# token (each as stored), $5 expires_in: interval, $6 scope: text or null. Index: unique (business_id).
# It also matches $4, so that a save whose reply was lost on the way is known again when it is repeated.
SAVE_TOKENS = """
    update business_shaam_credentials
       set encrypted_access_token = $3,
           encrypted_refresh_token = $4,
           token_expires_at = now() + $5::interval,
           scope = coalesce($6, scope),
           needs_reauth = false,
           updated_at = now()
     where business_id = $1
       and encrypted_refresh_token in ($2, $4)
    returning business_id
"""

# $1 business_id: uuid, $2 the refresh token that was refused, as stored. Index: unique (business_id).
ASK_FOR_CONSENT = """
    update business_shaam_credentials
       set needs_reauth = true, updated_at = now()
     where business_id = $1
       and encrypted_refresh_token = $2
    returning business_id
"""

LOOK_AHEAD = timedelta(minutes=5)
SAVE_TIMEOUT_SECONDS = 10.0
SAVE_RETRIES = 6
FIRST_SAVE_WAIT_SECONDS = 0.25
"""Doubled each time: 16 seconds in all, longer than a restart of PostgreSQL takes."""

COUNTS = ("refreshed", "needs_reauth", "deferred", "failed")
Count: TypeAlias = Literal["refreshed", "needs_reauth", "deferred", "failed"]

T = TypeVar("T")
log = structlog.get_logger()


@job(
    "shaam-token-refresh",
    schedule=Cron("*/15 * * * *", catch_up=CatchUp.LATEST, grace=timedelta(minutes=15)),
    retry=Retry(attempts=2, delay=timedelta(seconds=30)),
    timeout=timedelta(minutes=12),
)
async def shaam_token_refresh(ctx: JobContext, _: NoPayload) -> Counts:
    """Refresh every SHAAM token that is, or before the next run will be, within 5 minutes of expiry."""
    async with ctx.connection() as connection:
        due = [_Credential(*row) for row in await connection.fetch(DUE, _horizon(ctx))]
    if ctx.get(Settings).shaam_mode is ShaamMode.MOCK:
        log.info("shaam.mocked", due=len(due))
        results: list[_Result] = []
    else:
        results = await _refresh_all(ctx, due)
    tally: Counter[str] = Counter(result.count for result in results)
    counts = {"due": len(due), **{name: tally[name] for name in COUNTS}}
    async with ctx.transaction() as tx:
        await ctx.record(_outcomes(results), on=tx)
        return await ctx.finish(counts, on=tx)


def _horizon(ctx: JobContext) -> datetime:
    """Return the expiry before which a token is due (BON's contract, "Decision (look-ahead)")."""
    return max(ctx.fire_time, ctx.next_fire_time or ctx.now) + LOOK_AHEAD


@dataclass(frozen=True, slots=True)
class _Credential:
    """A business's refresh token, as stored: never opened before its turn has come."""

    business_id: UUID
    stored: str


@dataclass(frozen=True, slots=True)
class _Result:
    """What became of one business: where it is counted, and what is recorded for it."""

    business_id: UUID
    count: Count
    outcome: Literal["done", "kept", "failed"]
    error: str | None = None


def _outcomes(results: Iterable[_Result]) -> list[BusinessOutcome]:
    return [BusinessOutcome(r.business_id, r.outcome, {r.count: 1}, r.error) for r in results]


async def _refresh_all(ctx: JobContext, due: list[_Credential]) -> list[_Result]:
    """
    Refresh each business that is due, `SHAAM_CONCURRENCY` at a time.

    Raises NeverRetryError where the application is at fault, after recording what was refreshed.
    """
    cipher = ctx.get(TokenCipher)
    if due and not any(_is_readable(cipher, credential) for credential in due):
        # One row alone cannot be told from a wrong key either; raising is the loud way, and flags nobody.
        log.error("shaam.key_wrong", due=len(due))
        raise NeverRetryError(
            f"None of the {len(due)} stored tokens that are due can be decrypted; nobody was called "
            "or flagged. SHAAM_ENCRYPTION_KEY must be the key BON encrypts with."
        )
    if due:
        await _rehearse_save(ctx)
    exchange = _Exchange(ctx, cipher)
    answers = await asyncio.gather(*(exchange.run(credential) for credential in due), return_exceptions=True)
    results = [
        _failure(credential, answer) if isinstance(answer, BaseException) else answer
        for credential, answer in zip(due, answers, strict=True)
    ]
    called = [result for result in results if result is not None]
    if exchange.refused is not None:
        # What was rotated before the refusal is recorded; the rest waits for a person to mend the settings.
        async with ctx.transaction() as tx:
            await ctx.record(_outcomes(called), on=tx)
        refreshed = sum(result.count == "refreshed" for result in called)
        raise NeverRetryError(
            f"The authority refuses the application: {exchange.refused.reason}. Refreshed {refreshed} of "
            f"{len(due)}, left {len(due) - len(called)} for later, flagged nobody for it. "
            "Check SHAAM_CLIENT_ID, SHAAM_CLIENT_SECRET, SHAAM_TOKEN_URL and where this machine calls from."
        )
    return called


async def _rehearse_save(ctx: JobContext) -> None:
    """Prove BEFORE a token is spent that its successor could be saved: privileges, a writable server."""
    nobody = ctx.run_id  # no business has a run's id
    async with ctx.connection() as connection:
        await connection.execute(SAVE_TOKENS, nobody, "", "", "", timedelta(0), None)


def _is_readable(cipher: TokenCipher, credential: _Credential) -> bool:
    try:
        cipher.decrypt(credential.stored)
    except UnreadableTokenError:
        return False
    return True


def _failure(credential: _Credential, error: BaseException) -> _Result:
    """Turn an exception into that business's failure; its text may quote a statement's values."""
    log.error("token.failed", business_id=str(credential.business_id), error=type(error).__name__)
    return _Result(credential.business_id, "failed", "failed", type(error).__name__)


class _Exchange:
    """One run's exchanges with the authority; `refused` once it has turned the application away."""

    def __init__(self, ctx: JobContext, cipher: TokenCipher) -> None:
        self._ctx = ctx
        self._shaam = ctx.get(Shaam)
        self._cipher = cipher
        self._slots = asyncio.Semaphore(ctx.get(Settings).shaam_concurrency)
        self.refused: Misconfigured | None = None
        self._token_lost = False

    async def run(self, credential: _Credential) -> _Result | None:
        """Wait for a turn and refresh one business; None once the application is refused."""
        async with self._slots:
            if self.refused is not None:
                return None
            if self._token_lost:
                # The database takes nothing: one more call would spend one more token for nothing.
                text = "not called: another business's tokens could not be saved"
                return _Result(credential.business_id, "deferred", "failed", text)
            # From here the token may be spent: a deadline or a shutdown waits for the save.
            return await _to_its_end(self._refresh(credential))

    async def _refresh(self, credential: _Credential) -> _Result | None:
        business_id = credential.business_id
        bound = log.bind(business_id=str(business_id))
        try:
            refresh_token = self._cipher.decrypt(credential.stored)
        except UnreadableTokenError as error:
            bound.error("token.unreadable", reason=str(error))
            return _Result(business_id, "failed", "failed", f"the stored token is unreadable: {error}")
        match await self._shaam.refresh(refresh_token):
            case Refreshed() as tokens:
                return await self._save(credential, tokens)
            case NeedsReauth(reason):
                return await self._ask_for_consent(credential, reason)
            case Transient(reason, retry_after):
                seconds = retry_after.total_seconds() if retry_after else None
                bound.info("token.deferred", reason=reason, retry_after_seconds=seconds)
                return _Result(business_id, "deferred", "failed", reason)
            case Ambiguous(reason):
                bound.warning("token.ambiguous", reason=reason)
                return _Result(business_id, "failed", "failed", reason)
            case Misconfigured() as refused:
                if self.refused is None:
                    bound.error("shaam.refused", reason=refused.reason)
                self.refused = refused
                return None

    async def _save(self, credential: _Credential, tokens: Refreshed) -> _Result:
        """Save rotated tokens, unless the row holds another refresh token by now."""
        business_id = credential.business_id
        # Sealed once, outside the retries: a repeated save must recognise its own.
        access, refresh = (self._cipher.encrypt(t) for t in (tokens.access_token, tokens.refresh_token))
        try:
            saved = await _persist(
                self._ctx,
                lambda connection: connection.fetchval(
                    SAVE_TOKENS,
                    business_id,
                    credential.stored,
                    access,
                    refresh,
                    tokens.expires_in,
                    tokens.scope,
                ),
            )
        except Exception as error:  # noqa: BLE001 - whatever it was, the new tokens are gone: somebody must know
            self._token_lost = True
            log.critical("token.lost", business_id=str(business_id), error=type(error).__name__)
            text = f"rotated but not saved ({type(error).__name__}): its owner may have to consent again"
            return _Result(business_id, "failed", "failed", text)
        if saved is None:
            return _superseded(credential)
        log.debug("token.refreshed", business_id=str(business_id))
        return _Result(business_id, "refreshed", "done")

    async def _ask_for_consent(self, credential: _Credential, reason: str) -> _Result:
        """Flag the business, unless its owner consented, or another rotation was saved, meanwhile."""
        business_id = credential.business_id
        flagged = await _persist(
            self._ctx,
            lambda connection: connection.fetchval(ASK_FOR_CONSENT, business_id, credential.stored),
        )
        if flagged is None:
            return _superseded(credential)
        log.warning("token.needs_reauth", business_id=str(business_id), reason=reason)
        return _Result(business_id, "needs_reauth", "failed", reason)


def _superseded(credential: _Credential) -> _Result:
    """Keep what came into the row meanwhile: it is newer. The next run looks at it again."""
    log.info("token.superseded", business_id=str(credential.business_id))
    return _Result(credential.business_id, "deferred", "kept")


async def _persist(ctx: JobContext, write: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
    """Write what the authority has already done, outside the fence, through a short outage."""
    wait = FIRST_SAVE_WAIT_SECONDS
    for _ in range(SAVE_RETRIES):
        try:
            return await _write(ctx, write)
        # Any refusal by the database is tried again: the tokens exist nowhere else.
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            log.warning("token.save_failed", error=type(error).__name__, retry_in_seconds=wait)
        await asyncio.sleep(wait)
        wait *= 2
    return await _write(ctx, write)


async def _write(ctx: JobContext, write: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
    async with asyncio.timeout(SAVE_TIMEOUT_SECONDS), ctx.connection() as connection:
        return await write(connection)


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """
    Run `work` in a task of its own that our cancellation does not reach, and wait for it.

    A cancellation is raised after `work` has ended. It is bounded: by SHAAM_TIMEOUT_SECONDS, and
    by how long a save is tried.
    """
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # looked at, otherwise asyncio complains that nobody did
        raise cancelled
    return task.result()
