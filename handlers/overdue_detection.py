"""
Mark invoices overdue each morning; clear the mark once they are settled.

"Overdue" is judged on the Israeli calendar date of the fire time, so a late,
retried or replayed run gives the same answer. Each batch commits by itself; the run
ends, in one transaction, with the request for the digest, which tells of all that is
overdue: a run that dies in between is tried again, marks the rest, and asks for it.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import date, datetime, timedelta
from typing import Literal
from uuid import UUID

from asyncpg import Record

from bon_scheduler import CatchUp, Counts, Cron, JobContext, Payload, Retry, job
from bon_scheduler.jobs import ChangedRow, Connection
from handlers.batches import Changed, Sweep, Swept, sweep
from handlers.brake import Candidates, brake
from handlers.overdue_digest import OverdueDigest, overdue_digest

IN_TIME = timedelta(minutes=8)
"""For all changes together; what is left then goes with the next run."""

# Parameters of PICK and LEFT: `batches.Sweep`'s. A row whose mark or status BON changes meanwhile is judged again
# when it is locked.

# $5 as_of: date. Index: invoices_overdue_candidates_idx.
PICK_OVERDUE = """
    select id, business_id, due_date::text as key
      from public.invoices
     where status in ('finalized', 'sent', 'partially_paid')
       and due_date is not null
       and due_date < least($5, (now() at time zone 'UTC')::date + 1)
       and not is_overdue
       and (due_date, id) > ($1::text::date, $2)
       and id <> all ($3)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
     order by due_date, id
     limit $4
       for no key update skip locked
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
# No parameters. No index: it reads the invoices through. Read only where the brake may trip, and in a rehearsal.
COUNT_UNMARKED = """
    select count(*)
      from public.invoices
     where status in ('finalized', 'sent', 'partially_paid')
       and not is_overdue
"""
# $1 invoices: uuid[], locked by this transaction. Index: invoices_pkey.
MARK = """
    update public.invoices
       set is_overdue = true, updated_at = now()
     where id = any ($1)
    returning id, business_id
"""

# Index: invoices_overdue_reset_idx.
PICK_SETTLED = """
    select id, business_id, '' as key
      from public.invoices
     where is_overdue = true
       and status in ('paid', 'cancelled', 'credited')
       and ($1::text, id) > ('', $2)
       and id <> all ($3)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
     order by id
     limit $4
       for no key update skip locked
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

# $5 the later of as_of and today: date. Invoices whose due date was moved after they were marked. The later date, so
# that replaying an old tick never un-marks what became overdue since. Index: none of BON's serves it, so that each
# batch reads the open invoices through; there are few such rows, as a rule one batch.
PICK_MOVED = """
    select id, business_id, '' as key
      from public.invoices
     where is_overdue
       and status in ('finalized', 'sent', 'partially_paid')
       and (due_date is null or due_date >= $5)
       and ($1::text, id) > ('', $2)
       and id <> all ($3)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
     order by id
     limit $4
       for no key update skip locked
"""
# $2 the later of as_of and today: date. Index: as PICK_MOVED.
LEFT_MOVED = """
    select count(*)
      from public.invoices
     where is_overdue
       and status in ('finalized', 'sent', 'partially_paid')
       and (due_date is null or due_date >= $2)
       and id <> all ($1)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
"""
# $1 invoices: uuid[], locked by this transaction. Index: invoices_pkey.
CLEAR = """
    update public.invoices
       set is_overdue = false, updated_at = now()
     where id = any ($1)
    returning id, business_id
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
    sweeps = (
        Sweep(
            name="mark",
            pick=PICK_OVERDUE,
            left=LEFT_OVERDUE,
            change=_setting(MARK, "marked"),
            arguments=(as_of,),
            begin="-infinity",
        ),
        Sweep(name="clear", pick=PICK_SETTLED, left=LEFT_SETTLED, change=_setting(CLEAR, "cleared"), begin=""),
        Sweep(
            name="clear",
            pick=PICK_MOVED,
            left=LEFT_MOVED,
            change=_setting(CLEAR, "cleared"),
            arguments=(latest,),
            begin="",
        ),
    )
    async with ctx.connection() as connection:
        await brake(ctx, await unmarked_overdue(connection, as_of), on=connection)
    swept = Swept()
    for each in sweeps:
        swept.add(await sweep(ctx, each, within=IN_TIME / len(sweeps)))
    async with ctx.transaction() as tx:
        paused = await tx.fetchval(COUNT_PAUSED, as_of, latest)
        await ctx.record(swept.failures(), on=tx)
        if payload.send or not (ctx.replay and as_of < ctx.today):
            await ctx.enqueue(overdue_digest, OverdueDigest(as_of=as_of), on=tx, dedupe_key=str(ctx.run_id))
        counts = {name: swept.counts[name] for name in ("marked", "cleared")}
        counts |= swept.shortfall()
        counts |= {"paused": paused} if paused else {}
        return await ctx.finish(counts, on=tx, undone=swept.undone)


async def unmarked_overdue(connection: Connection, as_of: date, *, now: datetime | None = None) -> Candidates:
    """Count the invoices that a run of this day would mark; `now`: as if it were then."""
    return Candidates(
        number=await connection.fetchval(COUNT_OVERDUE, as_of, now),
        count="marked",
        kind="open invoices without the mark",
        which="are overdue",
        of_all=COUNT_UNMARKED,
    )


def _setting(
    statement: str, counted_as: Literal["marked", "cleared"]
) -> Callable[[Connection, Sequence[Record]], Awaitable[Changed]]:
    async def change(tx: Connection, rows: Sequence[Record]) -> Changed:
        changed = await tx.fetch(statement, [row["id"] for row in rows])
        number = Counter[UUID](row["business_id"] for row in changed)
        return Changed(
            {business: Counter({counted_as: rows}) for business, rows in number.items()},
            evidence=(counted_as, [ChangedRow(row["id"], row["business_id"]) for row in changed]),
        )

    return change
