"""
Forget, each night, what the ledger has kept long enough: `RUN_RETENTION_DAYS`.

In batches, so that no lock is held for long; a batch that committed stays deleted when a later one
fails. What is old, and what must stay however old it is, is `retention`'s to say.

A batch is "what is left", because a run goes once nothing refers to it any more: no cursor would find it again.
So a dry run is one transaction, else each batch would find what the one before was not allowed to keep. It locks
nothing but old rows of the ledger, which a pruning beside it leaves for the next night.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import timedelta

from bon_scheduler import CatchUp, Counts, Cron, JobContext, NoPayload, Retry, job
from bon_scheduler.config import Settings
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import PRUNERS, Horizon, mark_horizon

__all__ = ["ledger_pruning"]


@job(
    "ledger-pruning",
    schedule=Cron("30 4 * * *", catch_up=CatchUp.LATEST, grace=timedelta(hours=24)),
    retry=Retry(attempts=5),
    timeout=timedelta(hours=1),
)
async def ledger_pruning(ctx: JobContext, _: NoPayload) -> Counts:
    """Delete runs and what belongs to them once they have been kept long enough."""
    horizon = Horizon(ctx.fire_time, timedelta(days=ctx.get(Settings).run_retention_days))
    async with ctx.transaction() as tx:
        await mark_horizon(tx, horizon)
    if ctx.dry_run:
        async with ctx.transaction() as tx:
            return await _prune(lambda: nullcontext(tx), horizon)
    counts = await _prune(ctx.transaction, horizon)
    async with ctx.transaction() as tx:
        return await ctx.finish(counts, on=tx)


async def _prune(begin: Callable[[], AbstractAsyncContextManager[Connection]], horizon: Horizon) -> dict[str, int]:
    """Delete batch by batch until nothing old is left; return how many rows of each kind."""
    counts = dict.fromkeys(PRUNERS, 0)
    for name, prune in PRUNERS.items():
        deleted = 1
        while deleted:
            async with begin() as tx:
                deleted = await prune(tx, horizon)
            counts[name] += deleted
    return counts
