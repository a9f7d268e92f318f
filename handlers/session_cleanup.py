"""
Delete expired sessions each night, in batches, so that no lock is held for long.

"Expired" is judged at the fire time. A batch that committed stays deleted when a later one fails,
and the next attempt goes on from there.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta

from asyncpg import Record

from bon_scheduler import CatchUp, Counts, Cron, JobContext, NoPayload, Retry, job
from bon_scheduler.jobs import Connection
from handlers.batches import Changed, Sweep, sweep
from handlers.brake import Candidates, brake

IN_TIME = timedelta(minutes=8)
"""What is left then goes the next night."""

# Parameters: `batches.Sweep`'s, $5 fire time: timestamptz. Nothing that is valid by the database's clock is deleted,
# whatever the fire time says. Index: session_expires_idx. A session is nobody's business: it is its own.
PICK_EXPIRED = """
    select id, null::uuid as business_id, expires_at::text as key
      from public.sessions
     where expires_at < least($5, now())
       and (expires_at, id) > ($1::text::timestamptz, $2)
       and id <> all ($3)
     order by expires_at, id
     limit $4
       for update skip locked
"""
# $2 fire time: timestamptz. Index: session_expires_idx.
LEFT_EXPIRED = """
    select count(*)
      from public.sessions
     where expires_at < least($2, now())
       and id <> all ($1)
"""
# $1 fire time: timestamptz, $2 the instant that a rehearsal takes for now: timestamptz; null: the database's own.
# Index: session_expires_idx.
COUNT_EXPIRED = """
    select count(*)
      from public.sessions
     where expires_at < least($1, coalesce($2, now()))
"""
# No parameters. Read only where the brake may trip, and in a rehearsal.
COUNT_SESSIONS = "select count(*) from public.sessions"
# $1 sessions: uuid[], locked by this transaction. Index: sessions_pkey.
DELETE = "delete from public.sessions where id = any ($1)"


@job(
    "session-cleanup",
    schedule=Cron("0 4 * * *", catch_up=CatchUp.LATEST, grace=timedelta(hours=24)),
    retry=Retry(attempts=5),
    timeout=timedelta(minutes=10),
)
async def session_cleanup(ctx: JobContext, _: NoPayload) -> Counts:
    """Delete sessions that have expired."""
    expired = Sweep(
        name="delete sessions",
        pick=PICK_EXPIRED,
        left=LEFT_EXPIRED,
        change=_delete,
        arguments=(ctx.fire_time,),
        begin="-infinity",
    )
    async with ctx.connection() as connection:
        await brake(ctx, await expired_sessions(connection, ctx.fire_time), on=connection)
    swept = await sweep(ctx, expired, within=IN_TIME)
    async with ctx.transaction() as tx:
        counts = {"deleted": swept.counts["deleted"]} | swept.shortfall()
        return await ctx.finish(counts, on=tx, undone=swept.undone)


async def expired_sessions(connection: Connection, fire_time: datetime, *, now: datetime | None = None) -> Candidates:
    """Count the sessions that a run of this fire time would delete; `now`: as if it were then."""
    number = await connection.fetchval(COUNT_EXPIRED, fire_time, now)
    return Candidates(number=number, count="deleted", kind="sessions", which="have expired", of_all=COUNT_SESSIONS)


async def _delete(tx: Connection, rows: Sequence[Record]) -> Changed:
    status = await tx.execute(DELETE, [row["id"] for row in rows])
    return Changed({None: Counter(deleted=int(status.split()[-1]))})
