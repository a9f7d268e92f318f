"""
Delete expired sessions each night, in batches, so that no lock is held for long.

"Expired" is judged at the fire time. A batch that committed stays deleted when a later one fails,
and the next attempt goes on from there.
"""

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from uuid import UUID

from bon_scheduler import CatchUp, Counts, Cron, JobContext, NoPayload, Retry, job
from bon_scheduler.jobs import Connection
from handlers.batches import Changed, NotChangedError, Sweep, bounded, sweep
from handlers.brake import Candidates, brake

IN_TIME = timedelta(minutes=8)
"""What is left then goes the next night."""
AT_ONCE = 20_000
"""Sessions of a range. Nobody waits for an expired one, and it goes in a microsecond."""

# $1 and $2 the last session of the range before: text, uuid, $3 how many, $4 fire time: timestamptz. Nothing that is
# valid by the database's clock is deleted, whatever the fire time says. Index: session_expires_idx.
END_OF_RANGE = """
    select expires_at::text as key, id
      from public.sessions
     where expires_at < least($4, now())
       and (expires_at, id) > ($1::text::timestamptz, $2)
     order by expires_at, id
    offset $3
     limit 1
"""
# $1 and $2 the last session of the range before: text, uuid, $3 and $4 of this one, $5 fire time. Index: as above.
DELETE_RANGE = """
    delete from public.sessions
     where expires_at < least($5, now())
       and (expires_at, id) > ($1::text::timestamptz, $2)
       and (expires_at, id) <= ($3::text::timestamptz, $4)
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
# $2 fire time: timestamptz. Index: session_expires_idx.
LEFT_EXPIRED = """
    select count(*)
      from public.sessions
     where expires_at < least($2, now())
       and id <> all ($1)
"""
# No parameters. Read only where the brake may trip.
COUNT_SESSIONS = "select count(*) from public.sessions"
# $1 sessions: uuid[]. Index: sessions_pkey.
LOCK = "select id from public.sessions where id = any ($1) for update skip locked"
# $1 sessions: uuid[], $2 fire time: timestamptz. Index: sessions_pkey.
DELETE = "delete from public.sessions where id = any ($1) and expires_at < least($2, now())"
BEGINNING, END = ("-infinity", UUID(int=0)), ("infinity", UUID(int=2**128 - 1))


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
        number = await connection.fetchval(LEFT_EXPIRED, [], ctx.fire_time)
        await brake(ctx, _to_delete(number), on=connection)
    if not ctx.dry_run:
        await _delete_ranges(ctx, ends)
    swept = await sweep(ctx, expired, within=timedelta(seconds=ends - time.monotonic()))
    async with ctx.transaction() as tx:
        done = await ctx.progress({}, on=tx)
        counts = {"deleted": done.get("deleted", 0)} | swept.shortfall()
        return await ctx.finish(counts, on=tx, undone=swept.undone)


async def _delete_ranges(ctx: JobContext, ends: float) -> None:
    """
    Delete range by range, each by one statement: a session costs so little that its id would cost as much again.

    A range in which a session is in use, or cannot be deleted, is left as it is.
    """
    last: tuple[str, UUID] = BEGINNING
    while last != END and time.monotonic() < ends:
        with suppress(NotChangedError):
            async with ctx.transaction() as tx:
                row = await tx.fetchrow(END_OF_RANGE, *last, AT_ONCE - 1, ctx.fire_time)
                first, last = last, (row["key"], row["id"]) if row else END
                async with bounded(tx):
                    status = await tx.execute(DELETE_RANGE, *first, *last, ctx.fire_time)
                await ctx.progress({"deleted": int(status.split()[-1])}, on=tx)


def _to_delete(number: int) -> Candidates:
    return Candidates(number=number, count="deleted", kind="sessions", which="have expired", of_all=COUNT_SESSIONS)


def _deleting(fire_time: datetime) -> Callable[[Connection, Sequence[UUID], bool], Awaitable[Changed]]:
    async def change(tx: Connection, ids: Sequence[UUID], with_care: bool) -> Changed:
        if with_care:
            ids = [row["id"] for row in await tx.fetch(LOCK, ids)]
        number = int((await tx.execute(DELETE, ids, fire_time)).split()[-1])
        return Changed({None: Counter(deleted=number)}, number)

    return change
