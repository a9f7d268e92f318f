"""
Keep every business's SHAAM tokens alive, each quarter of an hour; and one business's, now, for whoever asks.

Due is what is, or before the next run will be, within 5 minutes of expiry. With 601-second tokens an access token
is dead a third of the time all the same, so a caller about to use one asks for a run with its `business_id`: it
refreshes that one whatever its expiry, beside the schedule's runs, and joins a refresh that is under way already.

How a token is rotated without being lost is in `bon_scheduler.shaam.rotation`; how many at once, and what the
application's own fault does, in `shaam_refresh_batch`.
"""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

from bon_scheduler import shaam
from bon_scheduler.config import Settings, ShaamMode, shaam_off
from bon_scheduler.jobs import (
    CatchUp,
    Connection,
    Counts,
    Cron,
    Exclusive,
    JobContext,
    NeverRetryError,
    Payload,
    Retry,
    RetryLaterError,
    job,
)
from bon_scheduler.shaam import Credential, Result, find_standing
from handlers.shaam_refresh_batch import (
    COUNTS,
    RefreshBatch,
    count_paused,
    end_run,
    read_due,
    rotate,
    shaam_refresh_batch,
    teller,
    with_paused,
)

__all__ = ["RefreshTokens", "shaam_token_refresh"]

# $1 business. Index: unique (business_id).
READ_CREDENTIAL = """
    select encrypted_refresh_token, needs_reauth
      from public.business_shaam_credentials
     where business_id = $1
"""

LOOK_AHEAD = timedelta(minutes=5)
WHATEVER_ITS_EXPIRY = datetime(9999, 1, 1, tzinfo=UTC)
MOST_FOR_ONE_RUN = 2000
BATCH = 500


class RefreshTokens(Payload):
    """Whose tokens: one business's, now; without it, those of all that are due."""

    business_id: UUID | None = None


@job(
    "shaam-token-refresh",
    schedule=Cron("*/15 * * * *", catch_up=CatchUp.LATEST, grace=timedelta(minutes=15)),
    retry=Retry(attempts=2, delay=timedelta(seconds=30)),
    timeout=timedelta(minutes=12),
    exclusive=Exclusive.BUSINESS,
)
async def shaam_token_refresh(ctx: JobContext, payload: RefreshTokens) -> Counts:
    """Refresh every SHAAM token that is, or before the next run will be, within 5 minutes of expiry."""
    if payload.business_id is not None:
        return await _refresh_one(ctx, payload.business_id)
    horizon = _horizon(ctx)
    async with ctx.connection() as connection:
        due = await read_due(connection, horizon)
        paused = await count_paused(connection, horizon)
    if ctx.get(Settings).shaam_mode is ShaamMode.MOCK:
        return await _mock(ctx, len(due), paused)
    # Once for all batches: each business that meets a token which nobody has seen would ask for it otherwise.
    await ctx.get(shaam.Rotator).census.take()
    async with ctx.transaction() as tx:
        brake = await shaam.begin_run(tx, ctx.run_id, due=len(due), tell=teller(ctx), released=ctx.released)
        if brake.since is not None:
            due = await shaam.choose_one(tx, due)
    async with ctx.connection() as connection:
        await shaam.close_held_run(connection)
    if len(due) > MOST_FOR_ONE_RUN:
        return await _share_out(ctx, due, horizon, paused)
    results = await rotate(ctx, due, braked=brake.since is not None)
    async with ctx.transaction() as tx:
        if brake.since is not None and any(result.count == "refreshed" for result in results):
            await shaam.release_after_success(tx)
        flagged = await shaam.end_run(tx, tell=teller(ctx))
    async with ctx.connection() as connection:
        await shaam.close_held_run(connection)
    return await end_run(ctx, [_as_flagged(result, flagged) for result in results], paused=paused)


def _as_flagged(result: Result, flagged: set[UUID]) -> Result:
    """Tell of a business whose owner was asked only at the end of the run."""
    if result.business_id not in flagged:
        return result
    return replace(result, count="needs_reauth", outcome="failed")


def _horizon(ctx: JobContext) -> datetime:
    """Return the expiry before which a token is due (BON's contract, "Decision (look-ahead)")."""
    return max(ctx.fire_time, ctx.next_fire_time or ctx.now) + LOOK_AHEAD


async def _mock(ctx: JobContext, due: int, paused: int = 0) -> Counts:
    counts = {"due": due, **dict.fromkeys(COUNTS, 0), **with_paused(paused)}
    if not ctx.dry_run:
        counts["mocked"] = due
    off = shaam_off(ctx.get(Settings))
    async with ctx.transaction() as tx:
        return await ctx.finish(counts, on=tx, undone=(off and off.fault) or False)


async def _share_out(ctx: JobContext, due: list[UUID], horizon: datetime, paused: int) -> Counts:
    """Ask for a run a batch, the first to expire first, so that all replicas take part."""
    starts = range(0, len(due), BATCH)
    batches = [
        (RefreshBatch(businesses=tuple(due[start : start + BATCH]), horizon=horizon), f"{ctx.run_id}/{start}")
        for start in starts
    ]
    async with ctx.transaction() as tx:
        await ctx.enqueue_many(shaam_refresh_batch, batches, on=tx)
        counts = {"due": len(due), "batches": len(batches), **dict.fromkeys(COUNTS, 0), **with_paused(paused)}
        return await ctx.finish(counts, on=tx)


async def _refresh_one(ctx: JobContext, business_id: UUID) -> Counts:
    """Refresh one business, or join whoever is at it."""
    if ctx.get(Settings).shaam_mode is ShaamMode.MOCK:
        return await _mock(ctx, 1)
    rotator = ctx.get(shaam.Rotator)
    # Refreshed since this was asked for, by whomever: that is what was asked for.
    result = await rotator.join(business_id, since=ctx.fire_time)
    if result is None:
        async with ctx.connection() as connection:
            credential = await _read_credential(connection, business_id)
        await rotator.prepare()
        result = await rotator.rotate(credential, teller(ctx), on_demand=True)
        if result.held:
            result = await rotator.join(business_id, since=ctx.fire_time) or result
    return await end_run(ctx, [result], on_demand=True)


async def _read_credential(connection: Connection, business_id: UUID) -> Credential:
    """Read what is to be sent. Raises NeverRetryError where nothing may be, and RetryLaterError where not yet."""
    row = await connection.fetchrow(READ_CREDENTIAL, business_id)
    if row is None:
        raise NeverRetryError(f"Business {business_id} has no SHAAM credentials. Its owner must consent first, in BON.")
    if row["needs_reauth"]:
        raise NeverRetryError(f"The owner of business {business_id} must consent again, in BON, first.")
    if not await read_due(connection, WHATEVER_ITS_EXPIRY, [business_id], patient=False):
        raise NeverRetryError(
            f"Business {business_id} is not active, or a person has paused it, so its tokens are not refreshed. "
            "End a pause with: bon-scheduler resume --business UUID --reason …"
        )
    standing = await find_standing(connection, business_id)
    if standing is not None and standing.silence:
        raise RetryLaterError("The authority asked for this business to be left alone.", after=standing.silence)
    return Credential(business_id, row["encrypted_refresh_token"])
