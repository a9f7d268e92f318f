"""
Forget, each night, what the ledger has kept long enough: `RUN_RETENTION_DAYS`.

In batches, so that no lock is held for long; a batch that committed stays deleted when a later one
fails. What is old, and what must stay however old it is, is `retention`'s to say.
"""

from datetime import timedelta

from bon_scheduler import CatchUp, Counts, Cron, JobContext, NoPayload, Retry, job
from bon_scheduler.config import Settings
from bon_scheduler.retention import PRUNERS, Horizon, mark_horizon

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
    counts = dict.fromkeys(PRUNERS, 0)
    for name, prune in PRUNERS.items():
        deleted = 1
        while deleted:
            async with ctx.transaction() as tx:
                deleted = await prune(tx, horizon)
            counts[name] += deleted
    async with ctx.transaction() as tx:
        return await ctx.finish(counts, on=tx)
