"""
Mark invoices overdue each morning; clear the mark once they are settled.

"Overdue" is judged on the Israeli calendar date of the fire time, so a late,
retried or replayed run gives the same answer. Each batch commits by itself; the run
ends, in one transaction, with the request for the digest, which tells of all that is
overdue: a run that dies in between is tried again, marks the rest, and asks for it.
"""

import time
from collections import Counter
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from typing import Literal
from uuid import UUID

from bon_scheduler import CatchUp, Counts, Cron, JobContext, Payload, Retry, job
from bon_scheduler.jobs import Connection
from handlers.at_once import FOUND_AT_ONCE, Piece, change_pieces, rows_of_piece
from handlers.batches import Changed, Sweep, Swept, sweep
from handlers.brake import Candidates, brake
from handlers.overdue_digest import OverdueDigest, overdue_digest

IN_TIME = timedelta(minutes=2)
"""For each kind of change, and for what is left of it; what is left then goes with the next run."""

# Parameters of FIND and LEFT: `batches.Sweep`'s. What FIND found is judged again by the statement that changes it: a
# row that BON has changed meanwhile is left alone.

# $3 as_of: date. Index: invoices_overdue_candidates_idx.
FIND_OVERDUE = """
    select id
      from public.invoices
     where status in ('finalized', 'sent', 'partially_paid')
       and due_date is not null
       and due_date < least($3, (now() at time zone 'UTC')::date + 1)
       and not is_overdue
       and id <> all ($1)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
     order by due_date
     limit $2
"""
# $2 as_of: date. Index: invoices_overdue_candidates_idx.
LEFT_OVERDUE = """
    select count(*)
      from public.invoices
     where status in ('finalized', 'sent', 'partially_paid')
       and due_date is not null
       and due_date < least($2, (now() at time zone 'UTC')::date + 1)
       and not is_overdue
       and id <> all ($1)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
"""
# $1 as_of: date, $2 the instant that a rehearsal takes for now: timestamptz; null: the database's own.
# Index: invoices_overdue_candidates_idx.
COUNT_OVERDUE = """
    select count(*)
      from public.invoices
     where status in ('finalized', 'sent', 'partially_paid')
       and due_date is not null
       and due_date < least($1, (coalesce($2, now()) at time zone 'UTC')::date + 1)
       and not is_overdue
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
"""
# $1 as_of: date, $2 how many in a piece, $3 how many at most. In no order: as a rule they are found in that of the
# table, so that each of its pages is changed by one batch, and not by many. Index: invoices_overdue_candidates_idx.
FIND_PIECES = """
    select array_agg(id)::text as ids, count(*) as number
      from (select id, (row_number() over () - 1) / $2 as piece
              from public.invoices
             where status in ('finalized', 'sent', 'partially_paid')
               and due_date is not null
               and due_date < least($1, (now() at time zone 'UTC')::date + 1)
               and not is_overdue
               and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
             limit $3) as found
     group by piece
     order by piece
"""
# No parameters. No index: it reads the invoices through. Read only where the brake may trip, and in a rehearsal.
COUNT_UNMARKED = """
    select count(*)
      from public.invoices
     where status in ('finalized', 'sent', 'partially_paid')
       and not is_overdue
"""
# $1 invoices: uuid[]. Index: invoices_pkey.
LOCK = "select id from public.invoices where id = any ($1) for no key update skip locked"
# Each statement that changes invoices keeps which they were, in the same step; it returns how many. $1 run.

# $2 invoices: uuid[] as text, $3 as_of: date. They are joined: `= any` would change them in the order of their ids.
# Index: invoices_pkey.
MARK = """
    with marked as (
        update public.invoices
           set is_overdue = true, updated_at = now()
          from unnest($2::text::uuid[]) as given (given_id)
         where id = given_id
           and status in ('finalized', 'sent', 'partially_paid')
           and due_date is not null
           and due_date < least($3, (now() at time zone 'UTC')::date + 1)
           and not is_overdue
           and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
        returning id, business_id
    )
    insert into bon_scheduler.changed_rows (run_id, change, ids, businesses)
    select $1, 'marked', array_agg(id), array_agg(business_id) from marked having count(*) > 0
    returning cardinality(ids)
"""

# Index: invoices_overdue_reset_idx.
FIND_SETTLED = """
    select id
      from public.invoices
     where is_overdue = true
       and status in ('paid', 'cancelled', 'credited')
       and id <> all ($1)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
     limit $2
"""
# Index: invoices_overdue_reset_idx.
LEFT_SETTLED = """
    select count(*)
      from public.invoices
     where is_overdue = true
       and status in ('paid', 'cancelled', 'credited')
       and id <> all ($1)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
"""

# $2 invoices: uuid[] as text. Index: invoices_pkey.
CLEAR_SETTLED = """
    with cleared as (
        update public.invoices
           set is_overdue = false, updated_at = now()
         where id = any ($2::text::uuid[])
           and is_overdue = true
           and status in ('paid', 'cancelled', 'credited')
           and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
        returning id, business_id
    )
    insert into bon_scheduler.changed_rows (run_id, change, ids, businesses)
    select $1, 'cleared', array_agg(id), array_agg(business_id) from cleared having count(*) > 0
    returning cardinality(ids)
"""

# $3 the later of as_of and today: date. Invoices whose due date was moved after they were marked. The later date, so
# that replaying an old tick never un-marks what became overdue since. Index: none of BON's serves it, so that the
# invoices are read through, once: see docs/decisions/0035.
FIND_MOVED = """
    select id
      from public.invoices
     where is_overdue
       and status in ('finalized', 'sent', 'partially_paid')
       and (due_date is null or due_date >= $3)
       and id <> all ($1)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
     limit $2
"""
# $2 the later of as_of and today: date. Index: as FIND_MOVED.
LEFT_MOVED = """
    select count(*)
      from public.invoices
     where is_overdue
       and status in ('finalized', 'sent', 'partially_paid')
       and (due_date is null or due_date >= $2)
       and id <> all ($1)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
"""
# $2 invoices: uuid[] as text, $3 the later of as_of and today: date. Index: invoices_pkey.
CLEAR_MOVED = """
    with cleared as (
        update public.invoices
           set is_overdue = false, updated_at = now()
         where id = any ($2::text::uuid[])
           and is_overdue
           and status in ('finalized', 'sent', 'partially_paid')
           and (due_date is null or due_date >= $3)
           and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
        returning id, business_id
    )
    insert into bon_scheduler.changed_rows (run_id, change, ids, businesses)
    select $1, 'cleared', array_agg(id), array_agg(business_id) from cleared having count(*) > 0
    returning cardinality(ids)
"""

# $1 as_of: date, $2 the later of as_of and today: date. How many paused businesses were left as they are.
# Index: the one on invoices (business_id, status).
COUNT_PAUSED = """
    select count(*)
      from bon_scheduler.business_pauses p
     where exists (select from public.invoices i
                    where i.business_id = p.business_id
                      and (   (not i.is_overdue and i.status in ('finalized', 'sent', 'partially_paid')
                               and i.due_date < $1)
                           or (i.is_overdue and i.status in ('paid', 'cancelled', 'credited'))
                           or (i.is_overdue and i.status in ('finalized', 'sent', 'partially_paid')
                               and (i.due_date is null or i.due_date >= $2))))
"""


class OverdueDetection(Payload):
    """Whether a replay dated before today sends the digest as well."""

    send: bool = False


@job(
    "overdue-detection",
    schedule=Cron("0 6 * * *", catch_up=CatchUp.LATEST, grace=timedelta(hours=18)),
    retry=Retry(attempts=5),
    timeout=timedelta(minutes=10),
)
async def overdue_detection(ctx: JobContext, payload: OverdueDetection) -> Counts:
    """Mark invoices overdue, clear the mark of settled ones, and have the owners told."""
    as_of, latest = ctx.business_date, max(ctx.business_date, ctx.today)
    async with ctx.connection() as connection:
        pieces = await _find_pieces(connection, as_of)
        all_of_them = _rows(pieces) < FOUND_AT_ONCE
        found = _candidates(_rows(pieces)) if all_of_them else await unmarked_overdue(connection, as_of)
        await brake(ctx, found, on=connection)
    sweeps = [
        _sweep(ctx, "cleared", (FIND_SETTLED, LEFT_SETTLED, CLEAR_SETTLED)),
        _sweep(ctx, "cleared", (FIND_MOVED, LEFT_MOVED, CLEAR_MOVED), latest),
    ]
    # What a dry run changes is rolled back, so that it would be found again.
    if ctx.dry_run or not await _mark_pieces(ctx, pieces, as_of):
        sweeps.insert(0, _sweep(ctx, "marked", (FIND_OVERDUE, LEFT_OVERDUE, MARK), as_of))
    swept = Swept()
    for each in sweeps:
        swept.add(await sweep(ctx, each, within=IN_TIME))
    async with ctx.transaction() as tx:
        paused = await tx.fetchval(COUNT_PAUSED, as_of, latest)
        await ctx.record_changed(on=tx)
        await ctx.record(swept.failures(), on=tx)
        if payload.send or not (ctx.replay and as_of < ctx.today):
            await ctx.enqueue(overdue_digest, OverdueDigest(as_of=as_of), on=tx, dedupe_key=str(ctx.run_id))
        done = await ctx.progress({}, on=tx)
        counts = {name: done.get(name, 0) for name in ("marked", "cleared")}
        counts |= swept.shortfall()
        counts |= {"paused": paused} if paused else {}
        return await ctx.finish(counts, on=tx, undone=swept.undone)


async def unmarked_overdue(connection: Connection, as_of: date, *, now: datetime | None = None) -> Candidates:
    """Count the invoices that a run of this day would mark; `now`: as if it were then."""
    return _candidates(await connection.fetchval(COUNT_OVERDUE, as_of, now))


def _candidates(number: int) -> Candidates:
    return Candidates(
        number=number,
        count="marked",
        kind="open invoices without the mark",
        which="are overdue",
        of_all=COUNT_UNMARKED,
    )


async def _find_pieces(connection: Connection, as_of: date) -> list[Piece]:
    rows = await connection.fetch(FIND_PIECES, as_of, rows_of_piece(), FOUND_AT_ONCE)
    return [(row["ids"], row["number"]) for row in rows]


def _rows(pieces: Sequence[Piece]) -> int:
    return sum(number for _, number in pieces)


async def _mark_pieces(ctx: JobContext, pieces: Sequence[Piece], as_of: date) -> bool:
    """Mark these, and what there is beyond them; return whether all went."""

    async def mark(ids: str, tx: Connection) -> Counts:
        return {"marked": await tx.fetchval(MARK, ctx.run_id, ids, as_of) or 0}

    ends = time.monotonic() + IN_TIME.total_seconds()
    while await change_pieces(ctx, pieces, mark, ends=ends):
        if _rows(pieces) < FOUND_AT_ONCE:
            return True
        async with ctx.connection() as connection:
            pieces = await _find_pieces(connection, as_of)
    return False


def _sweep(
    ctx: JobContext, counted_as: Literal["marked", "cleared"], statements: tuple[str, str, str], *arguments: date
) -> Sweep:
    """Return how to find, to count and to change what is counted as this."""
    find, left, statement = statements

    async def change(tx: Connection, ids: Sequence[UUID], with_care: bool) -> Changed:
        if with_care:
            ids = [row["id"] for row in await tx.fetch(LOCK, ids)]
        given = "{" + ",".join(map(str, ids)) + "}"
        number = await tx.fetchval(statement, ctx.run_id, given, *arguments) or 0
        return Changed({None: Counter({counted_as: number})}, number)

    return Sweep(name=counted_as, find=find, left=left, change=change, arguments=arguments)
