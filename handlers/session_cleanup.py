"""
Delete expired sessions each night, in batches, so that no lock is held for long.

"Expired" is judged at the fire time. A batch that committed stays deleted when a later one fails,
and the next attempt goes on from there.
"""

from datetime import timedelta

from bon_scheduler import CatchUp, Counts, Cron, JobContext, NoPayload, Retry, job

BATCH = 5000

# $1 fire time: timestamptz, $2 batch size: int. Index: session_expires_idx. A session that is being used
# just now is somebody else's to delete: skip it.
DELETE_EXPIRED = """
    with expired as (
        select id
          from sessions
         where expires_at < $1
         order by expires_at
         limit $2
           for update skip locked
    )
    delete from sessions s
     using expired e
     where s.id = e.id
    returning s.id
"""


@job(
    "session-cleanup",
    schedule=Cron("0 4 * * *", catch_up=CatchUp.LATEST, grace=timedelta(hours=24)),
    retry=Retry(attempts=5),
    timeout=timedelta(minutes=10),
)
async def session_cleanup(ctx: JobContext, _: NoPayload) -> Counts:
    """Delete sessions that have expired."""
    deleted = 0
    while True:
        async with ctx.transaction() as tx:
            batch = len(await tx.fetch(DELETE_EXPIRED, ctx.fire_time, BATCH))
            deleted += batch
            if batch < BATCH:
                return await ctx.finish({"deleted": deleted}, on=tx)
