"""
Refresh the SHAAM tokens of some businesses, side by side.

The schedule's run does it for those that are due (`shaam_token_refresh`); where they are too many for one replica it
asks for runs of this job instead, one a batch, which the replicas share. Nothing is lost when two runs meet at a
business: the second finds it claimed or refreshed.

A business's failure, slowness or defect stays its own. Only the application's fault ends the run: it is tried a
handful of times, flags nobody, and is reported once. A token that is another business's is neither sent nor flagged:
its business is counted as `foreign`, where there is one.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from uuid import UUID

import structlog

from bon_scheduler import shaam
from bon_scheduler.jobs import (
    BusinessOutcome,
    Connection,
    Counts,
    HeldError,
    JobContext,
    NeverRetryError,
    NotNowError,
    Payload,
    Retry,
    job,
)
from bon_scheduler.shaam import Credential, Result
from handlers.notify_reauth import NotifyReauth, notify_reauth

__all__ = ["COUNTS", "RefreshBatch", "end_run", "read_due", "rotate", "shaam_refresh_batch", "teller"]

log = structlog.get_logger()

# $1 horizon: timestamptz, $2 businesses: uuid[], or null for all, $3 whether a business that failed is left alone for
# a while: boolean. What was written after the failure, a consent, ends the wait. No index on token_expires_at: one
# row a business, read once a run. Index: shaam_refreshes_pkey.
DUE = """
    select c.business_id
      from public.business_shaam_credentials c
      join public.businesses b on b.id = c.business_id
      left join bon_scheduler.shaam_refreshes r on r.business_id = c.business_id
     where c.token_expires_at < $1
       and ($2::uuid[] is null or c.business_id = any ($2))
       and c.needs_reauth = false
       and b.is_active = true
       and b.deleted_at is null
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = c.business_id)
       and (not $3
            or r.next_attempt_at is null
            or r.next_attempt_at <= clock_timestamp()
            or r.changed_at < c.updated_at)
     order by c.token_expires_at, c.business_id
"""
# $1 before: timestamptz. How many paused businesses are left as they are.
COUNT_PAUSED = """
    select count(*)
      from bon_scheduler.business_pauses p
      join public.business_shaam_credentials c on c.business_id = p.business_id
      join public.businesses b on b.id = c.business_id
     where c.token_expires_at < $1
       and c.needs_reauth = false
       and b.is_active = true
       and b.deleted_at is null
"""
# $1 businesses: uuid[]. Index: unique (business_id).
READ_TOKENS = """
    select business_id, encrypted_refresh_token
      from public.business_shaam_credentials
     where business_id = any ($1)
"""
# Written last, so with the key that is in use. One row a business, read only where nothing that is due can be opened.
READ_SAMPLE = """
    select encrypted_refresh_token
      from public.business_shaam_credentials
     order by updated_at desc
     limit 100
"""

AT_ONCE = timedelta(0)
COUNTS = ("refreshed", "joined", "needs_reauth", "deferred", "failed")
RARE_COUNTS = ("foreign", "braked")


class RefreshBatch(Payload):
    """Which businesses, of those that expire before when."""

    businesses: tuple[UUID, ...]
    horizon: datetime


@job(
    "shaam-refresh-batch",
    retry=Retry(attempts=2, delay=timedelta(seconds=30)),
    timeout=timedelta(minutes=12),
)
async def shaam_refresh_batch(ctx: JobContext, payload: RefreshBatch) -> Counts:
    """Refresh the SHAAM tokens of one batch of the businesses that are due."""
    if ctx.released:
        async with ctx.transaction() as tx:
            await shaam.release_consent_brake(tx, ctx.run_id)
    async with ctx.connection() as connection:
        due = await read_due(connection, payload.horizon, payload.businesses)
    return await end_run(ctx, await rotate(ctx, due))


async def read_due(
    connection: Connection, horizon: datetime, businesses: Sequence[UUID] | None = None, *, patient: bool = True
) -> list[UUID]:
    """
    Read whose token expires before `horizon`, the first first, of all active businesses or of these.

    `patient` leaves those alone that failed a little while ago.
    """
    rows = await connection.fetch(DUE, horizon, None if businesses is None else list(businesses), patient)
    return [row["business_id"] for row in rows]


async def count_paused(connection: Connection, horizon: datetime) -> int:
    """Count the businesses that would be due before `horizon`, had nobody paused them."""
    return int(await connection.fetchval(COUNT_PAUSED, horizon))


async def rotate(ctx: JobContext, due: Sequence[UUID], *, braked: bool = False) -> list[Result]:
    """
    Refresh each of these, SHAAM_CONCURRENCY at a time; return what became of each. One is, while consent is `braked`.

    Raises NeverRetryError where no stored token at all can be opened: then nobody is called.
    """
    if not due:
        return []
    rotator = ctx.get(shaam.Rotator)
    async with ctx.connection() as connection:
        rows = await connection.fetch(READ_TOKENS, list(due))
        credentials = [Credential(*row) for row in rows]
        # The first few decide whether the application is accepted: those that are always refused, which expire first,
        # must not speak for all the others, run after run. Within a batch only: all over the table takes 15 % longer.
        random.shuffle(credentials)
        if not _any_readable(rotator.cipher, (credential.stored for credential in credentials)):
            sample = [row[0] for row in await connection.fetch(READ_SAMPLE)]
            if not _any_readable(rotator.cipher, sample):
                log.error("shaam.key_wrong", due=len(due))
                raise NeverRetryError(
                    f"None of the {len(due)} stored tokens that are due can be decrypted, and none of any other "
                    "business; nobody was called or flagged. SHAAM_ENCRYPTION_KEY must be the key BON encrypts with."
                )
    await rotator.prepare()
    tell = teller(ctx)
    answers = await asyncio.gather(
        *(rotator.rotate(credential, tell, on_demand=braked) for credential in credentials), return_exceptions=True
    )
    return [
        _failure(credential.business_id, answer) if isinstance(answer, BaseException) else answer
        for credential, answer in zip(credentials, answers, strict=True)
    ]


def teller(ctx: JobContext) -> "shaam.Tell":
    """Return what asks for the letter to a business's owners, in the transaction that flags it."""

    async def tell(connection: Connection, business_id: UUID) -> None:
        await ctx.enqueue(notify_reauth, NotifyReauth(business_id=business_id, as_of=ctx.today), on=connection)

    return tell


async def end_run(ctx: JobContext, results: Sequence[Result], *, paused: int = 0, on_demand: bool = False) -> Counts:
    """
    Record what became of each business, and end the run; businesses that are paused are counted, if any are.

    Raises NeverRetryError where the application is at fault, NotNowError where this process stops, and HeldError where
    the brake on consent holds and no run is held for it; `on_demand` none is. What was done is recorded all the same.
    """
    if ctx.get(shaam.Rotator).stopping.is_set() and not all(result.called for result in results):
        await _record(ctx, (result for result in results if result.called))
        raise NotNowError("This process is stopping. Another goes on with the businesses that are left.", after=AT_ONCE)
    counts = _count(results)
    refused = [result for result in results if result.refused]
    accepted = counts["refreshed"] + counts["needs_reauth"]
    if refused and (ctx.get(shaam.Rotator).breaker.refusal is not None or not accepted):
        called = [result for result in results if result.called and not result.refused]
        await _record(ctx, called)
        raise NeverRetryError(
            f"The authority refuses the application: {refused[0].error}. Refreshed {counts['refreshed']} of "
            f"{len(results)}, left {len(results) - len(called)} for later, flagged nobody for it. "
            "Check SHAAM_CLIENT_ID, SHAAM_CLIENT_SECRET, SHAAM_TOKEN_URL and where this machine calls from."
        )
    counts |= with_paused(paused)
    if not on_demand:
        await _hold_if_first(ctx, results, counts)
    async with ctx.transaction() as tx:
        await ctx.record(_outcomes(results), on=tx)
        return await ctx.finish(counts, on=tx)


async def _hold_if_first(ctx: JobContext, results: Sequence[Result], counts: Counts) -> None:
    """Record what was done and raise HeldError, where the brake on consent holds and this is the run to tell of it."""
    async with ctx.connection() as connection:
        reason = await shaam.hold_run(connection, ctx.run_id)
    if reason is None:
        return
    await _record(ctx, results)
    raise HeldError(
        f"{reason} This run refreshed {counts['refreshed']} businesses, which stands; the tokens and flags of all "
        "others are as they were. Mend the cause: each later run asks one business, and once that is refreshed all go "
        "on by themselves. If the owners did withdraw their consent, release it, and they are asked: "
        f"bon-scheduler release {ctx.run_id} --reason …",
        figures=counts,
    )


async def _record(ctx: JobContext, results: Iterable[Result]) -> None:
    async with ctx.transaction() as tx:
        await ctx.record(_outcomes(results), on=tx)


def with_paused(paused: int) -> dict[str, int]:
    """Return the count of paused businesses, where it is worth a word."""
    return {"paused": paused} if paused else {}


def _count(results: Iterable[Result]) -> dict[str, int]:
    """Count results by name, those that did not occur as 0, unless they are rare."""
    tally: Counter[str] = Counter(result.count for result in results)
    rare = {name: tally[name] for name in RARE_COUNTS if tally[name]}
    return {"due": tally.total(), **{name: tally[name] for name in COUNTS}} | rare


def _any_readable(cipher: "shaam.TokenCipher", stored: Iterable[str]) -> bool:
    return any(_is_readable(cipher, text) for text in stored)


def _is_readable(cipher: "shaam.TokenCipher", stored: str) -> bool:
    try:
        cipher.decrypt(stored)
    except shaam.UnreadableTokenError:
        return False
    return True


def _failure(business_id: UUID, error: BaseException) -> Result:
    """Turn an exception into that business's failure; its text may quote a statement's values."""
    return Result(business_id, "failed", "failed", type(error).__name__)


def _outcomes(results: Iterable[Result]) -> list[BusinessOutcome]:
    return [BusinessOutcome(r.business_id, r.outcome, {r.count: 1}, r.error) for r in results]
