"""
Delete expired sessions each night, in batches, so that no lock is held for long.

"Expired" is judged at the fire time. A batch that committed stays deleted when a later one fails,
and the next attempt goes on from there. Each batch begins where the one before it ended, whether or
not that was really deleted.
"""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from bon_scheduler import CatchUp, Counts, Cron, JobContext, NoPayload, Retry, job

BATCH = 5000

BEGINNING = (datetime(1970, 1, 1, tzinfo=UTC), UUID(int=0))

# $1 fire time: timestamptz, $2 and $3 the last session seen: timestamptz, uuid, $4 batch size: int. Nothing that is
# valid by the database's clock is deleted, whatever the fire time says.
# Index: session_expires_idx. A session that is being used just now is somebody else's to delete: skip it.
DELETE_EXPIRED = """
    with expired as (
        select id
          from public.sessions
         where expires_at < least($1, now())
           and (expires_at, id) > ($2, $3)
         order by expires_at, id
         limit $4
           for update skip locked
    )
    delete from public.sessions s
     using expired e
     where s.id = e.id
    returning s.expires_at, s.id
"""


@job(
    "session-cleanup",
    schedule=Cron("0 4 * * *", catch_up=CatchUp.LATEST, grace=timedelta(hours=24)),
    retry=Retry(attempts=5),
    timeout=timedelta(minutes=10),
)
async def session_cleanup(ctx: JobContext, _: NoPayload) -> Counts:
    """Delete sessions that have expired."""
    deleted, seen = 0, BEGINNING
    while True:
        async with ctx.transaction() as tx:
            expired = await tx.fetch(DELETE_EXPIRED, ctx.fire_time, *seen, BATCH)
            batch = [(row["expires_at"], row["id"]) for row in expired]
            deleted += len(batch)
            if len(batch) < BATCH:
                return await ctx.finish({"deleted": deleted}, on=tx)
        seen = max(batch)
