"""
Delete expired sessions each night, in batches, so that no lock is held for long.

"Expired" is judged at the fire time. A batch that committed stays deleted when a later one fails,
and the next attempt goes on from there.
"""

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from uuid import UUID

from bon_scheduler import CatchUp, Counts, Cron, JobContext, NoPayload, Retry, job
from bon_scheduler.jobs import Connection
from handlers.at_once import commit_at_once
from handlers.batches import Changed, Sweep, Swept, sweep
from handlers.brake import Candidates, brake

IN_TIME = timedelta(minutes=8)
"""What is left then goes the next night."""
AT_ONCE = 100_000
"""Sessions of a range. Nobody waits for an expired one, and it goes in a microsecond."""

# $1 the end of the range before, which is gone: timestamptz as text, $2 how many, $3 fire time: timestamptz. Sessions
# of one instant are in one range. Nothing that is valid by the database's clock is deleted, whatever the fire time
# says. Index: session_expires_idx, alone.
END_OF_RANGE = """
    select expires_at::text as last
      from public.sessions
     where expires_at < least($3, now())
       and expires_at >= $1::text::timestamptz
     order by expires_at
    offset $2
     limit 1
"""
# $1 the end of the range before: timestamptz as text, $2 of this one, $3 fire time. Index: session_expires_idx.
DELETE_RANGE = """
    delete from public.sessions
     where expires_at < least($3, now())
       and expires_at >= $1::text::timestamptz
       and expires_at <= $2::text::timestamptz
"""
# $1 sessions to pass over: uuid[], $2 how many, $3 fire time. Index: session_expires_idx. A session is nobody's
# business: it is its own.
FIND_EXPIRED = """
    select id
      from public.sessions
     where expires_at < least($3, now())
       and id <> all ($1)
     order by expires_at
     limit $2
"""
# $1 sessions that do not count: uuid[], $2 fire time: timestamptz. Indexes: session_expires_idx, alone, and
# sessions_pkey for the few.
LEFT_EXPIRED = """
    select count(*) - (select count(*) from public.sessions where id = any ($1) and expires_at < least($2, now()))
      from public.sessions
     where expires_at < least($2, now())
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
# $1 sessions: uuid[]. Index: sessions_pkey.
LOCK = "select id from public.sessions where id = any ($1) for update skip locked"
# $1 sessions: uuid[], $2 fire time: timestamptz. Index: sessions_pkey.
DELETE = "delete from public.sessions where id = any ($1) and expires_at < least($2, now())"


@job(
    "session-cleanup",
    schedule=Cron("0 4 * * *", catch_up=CatchUp.LATEST, grace=timedelta(hours=24)),
    retry=Retry(attempts=5),
    timeout=timedelta(minutes=10),
)
async def session_cleanup(ctx: JobContext, _: NoPayload) -> Counts:
    """Delete sessions that have expired."""
    ends = time.monotonic() + IN_TIME.total_seconds()
    expired = Sweep(
        name="delete sessions",
        find=FIND_EXPIRED,
        left=LEFT_EXPIRED,
        change=_deleting(ctx.fire_time),
        arguments=(ctx.fire_time,),
        business_of=None,
    )
    async with ctx.connection() as connection:
        found = await expired_sessions(connection, ctx.fire_time)
        await brake(ctx, found, on=connection)
    swept = Swept()
    if ctx.dry_run or not await _delete_ranges(ctx, found.number, ends):
        swept = await sweep(ctx, expired, within=timedelta(seconds=ends - time.monotonic()))
    async with ctx.transaction() as tx:
        done = await ctx.progress({}, on=tx)
        counts = {"deleted": done.get("deleted", 0)} | swept.shortfall()
        return await ctx.finish(counts, on=tx, undone=swept.undone)


async def _delete_ranges(ctx: JobContext, left: int, ends: float) -> bool:
    """
    Delete range by range, each by one statement: a session costs so little that its id would cost as much again.

    A range in which a session is in use, or cannot be deleted, is left as it is. Return whether all went.
    """
    last, complete = "-infinity", True
    while last != "infinity":
        if time.monotonic() >= ends:
            return False
        first, last = last, "infinity"
        if left > AT_ONCE:
            async with ctx.connection() as connection:
                last = await connection.fetchval(END_OF_RANGE, first, AT_ONCE - 1, ctx.fire_time) or "infinity"
        if last == first:
            return False  # there is more of this instant than fits, and it could not be deleted
        complete &= await commit_at_once(ctx, partial(_delete_range, first, last, ctx.fire_time))
        left -= AT_ONCE
    return complete


async def _delete_range(first: str, last: str, fire_time: datetime, tx: Connection) -> Counts:
    return {"deleted": int((await tx.execute(DELETE_RANGE, first, last, fire_time)).split()[-1])}


async def expired_sessions(connection: Connection, fire_time: datetime, *, now: datetime | None = None) -> Candidates:
    """Count the sessions that a run of this fire time would delete; `now`: as if it were then."""
    number = await connection.fetchval(COUNT_EXPIRED, fire_time, now)
    return Candidates(number=number, count="deleted", kind="sessions", which="have expired", of_all=COUNT_SESSIONS)


def _deleting(fire_time: datetime) -> Callable[[Connection, Sequence[UUID], bool], Awaitable[Changed]]:
    async def change(tx: Connection, ids: Sequence[UUID], with_care: bool) -> Changed:
        if with_care:
            ids = [row["id"] for row in await tx.fetch(LOCK, ids)]
        number = int((await tx.execute(DELETE, ids, fire_time)).split()[-1])
        return Changed({None: Counter(deleted=number)}, number)

    return change
