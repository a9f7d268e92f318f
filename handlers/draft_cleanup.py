"""
Delete drafts that nobody has touched for 30 days; their items go with them.

A draft is kept, counted and reported when deleting it would destroy more than a draft: payments and
audit rows would go or stand in the way, a legal emergency number would lose its invoice, and one
document that credits it would make a plain DELETE fail for every business at once. A draft credited
by another stale draft therefore goes after it, as a rule the night after.

Each batch is locked first and judged second: the second statement's snapshot sees every reference
that committed before the lock, and the lock keeps new ones out.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from uuid import UUID

import structlog

from bon_scheduler import BusinessOutcome, CatchUp, Counts, Cron, JobContext, NoPayload, Retry, job
from bon_scheduler.database import missing_indexes
from bon_scheduler.jobs import Connection
from handlers.batches import FIRST, Changed, Sweep, Swept, sweep
from handlers.brake import Candidates, brake

log = structlog.get_logger()
UNTOUCHED = timedelta(days=30)
IN_TIME = timedelta(minutes=12)
"""What is left then goes the next night: without BON's two missing indexes each draft costs a scan."""
FIRST_UNINDEXED = 20
"""Drafts of the first batch then."""
CLEANED = "drafts.cleaned"

# Parameters: `batches.Sweep`'s, $3 untouched since: timestamptz. Strictly older than it. Index:
# invoices_draft_cleanup_idx.
FIND_STALE = """
    select id
      from public.invoices
     where status = 'draft'
       and updated_at < least($3, now() - interval '30 days')
       and id <> all ($1)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
     order by updated_at
     limit $2
"""
# $1 drafts: uuid[], $2 untouched since: timestamptz. A draft that is being edited now is not stale. The status as text,
# otherwise all drafts are read for it. Index: invoices_pkey.
LOCK_STALE = """
    select id
      from public.invoices
     where id = any ($1)
       and status::text = 'draft'
       and updated_at < least($2, now() - interval '30 days')
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
       for update skip locked
"""
# $2 untouched since: timestamptz. Index: invoices_draft_cleanup_idx.
LEFT_STALE = """
    select count(*)
      from public.invoices
     where status = 'draft'
       and updated_at < least($2, now() - interval '30 days')
       and id <> all ($1)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
"""
# $1 untouched since: timestamptz, $2 the instant that a rehearsal takes for now: timestamptz; null: the database's own.
# Index: invoices_draft_cleanup_idx.
COUNT_STALE = """
    select count(*)
      from public.invoices
     where status = 'draft'
       and updated_at < least($1, coalesce($2, now()) - interval '30 days')
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
"""
# No parameters. Index: invoices_draft_cleanup_idx. Read only where the brake may trip, and in a rehearsal.
COUNT_DRAFTS = "select count(*) from public.invoices where status = 'draft'"
# $1 untouched since: timestamptz. How many paused businesses were left as they are.
# Index: the one on invoices (business_id, status).
COUNT_PAUSED = """
    select count(*)
      from bon_scheduler.business_pauses p
     where exists (select from public.invoices i
                    where i.business_id = p.business_id
                      and i.status = 'draft'
                      and i.updated_at < $1)
"""

# $1 run, $2 drafts: uuid[], locked by this transaction. BON has no index for three of these references; `check`
# recommends two of them. The items are counted before they go. Which drafts went is kept, in the same step.
# Index: unique (invoice_id, position).
DELETE_UNREFERENCED = """
    with deleted as (
        delete from public.invoices i
         where i.id = any ($2)
           and i.status = 'draft'
           and not exists (select from public.invoice_payments p where p.invoice_id = i.id)
           and not exists (select from public.shaam_audit_log a where a.invoice_id = i.id)
           and not exists (select from public.emergency_allocation_numbers e where e.used_for_invoice_id = i.id)
           and not exists (select from public.invoices c where c.credited_invoice_id = i.id)
        returning i.id, i.business_id, i.updated_at,
                  (select count(*) from public.invoice_items t where t.invoice_id = i.id)::int as items
    ), kept as (
        insert into bon_scheduler.changed_rows (run_id, change, ids, businesses, items, updated)
        select $1, 'deleted', array_agg(id), array_agg(business_id), array_agg(items),
               array_agg(bon_scheduler.shown(updated_at))
          from deleted
        having count(*) > 0
    )
    select business_id, count(*) as deleted, sum(items)::bigint as items from deleted group by business_id
"""
# $1 drafts: uuid[], those that are not deleted are returned. Index: invoices_pkey.
FIND_KEPT = "select id, business_id from public.invoices where id = any ($1)"


@job(
    "draft-cleanup",
    schedule=Cron("0 3 * * *", catch_up=CatchUp.LATEST, grace=timedelta(hours=24)),
    retry=Retry(attempts=5),
    timeout=timedelta(minutes=15),
)
async def draft_cleanup(ctx: JobContext, _: NoPayload) -> Counts:
    """Delete drafts untouched for 30 days, with their items."""
    since = ctx.fire_time - UNTOUCHED
    async with ctx.connection() as connection:
        candidates = await stale_drafts(connection, ctx.fire_time)
        missing = await missing_indexes(connection) if candidates.number else {}
        await brake(ctx, candidates, on=connection)
    if missing:
        # BEFORE the first is deleted, otherwise a run that is too slow to end would never say why.
        log.warning("drafts.unindexed", missing=list(missing), remedy=list(missing.values()))
    stale = Sweep(
        name="delete drafts",
        find=FIND_STALE,
        left=LEFT_STALE,
        change=_deleting(ctx.run_id, since),
        arguments=(since,),
        locks=True,
        first=FIRST_UNINDEXED if missing else FIRST,
        event=CLEANED,
    )
    swept = await sweep(ctx, stale, within=IN_TIME)
    async with ctx.transaction() as tx:
        await ctx.record_changed(on=tx)
        # What is kept only now: each attempt finds it again, and the ledger adds up.
        await ctx.record(_kept(swept), on=tx)
        await ctx.record(swept.failures(), on=tx)
        done = await ctx.progress({}, on=tx)
        counts = {name: done.get(name, 0) for name in ("deleted", "items")} | {"kept": len(swept.kept)}
        paused = await tx.fetchval(COUNT_PAUSED, since)
        counts |= swept.shortfall()
        counts |= {"paused": paused} if paused else {}
        await ctx.finish(counts, on=tx, undone=swept.undone)
    swept.log(CLEANED)
    return counts


async def stale_drafts(connection: Connection, fire_time: datetime, *, now: datetime | None = None) -> Candidates:
    """Count the drafts that a run of this fire time would look at; `now`: as if it were then."""
    return Candidates(
        number=await connection.fetchval(COUNT_STALE, fire_time - UNTOUCHED, now),
        count="deleted",
        kind="drafts",
        which="are older than 30 days",
        of_all=COUNT_DRAFTS,
    )


def _deleting(run: UUID, since: datetime) -> Callable[[Connection, Sequence[UUID], bool], Awaitable[Changed]]:
    async def change(tx: Connection, ids: Sequence[UUID], with_care: bool) -> Changed:
        del with_care  # always: see `locks`
        locked = [row["id"] for row in await tx.fetch(LOCK_STALE, ids, since)]
        gone = await tx.fetch(DELETE_UNREFERENCED, run, locked)
        counts: dict[UUID | None, Counter[str]] = {
            row["business_id"]: Counter(deleted=row["deleted"], items=row["items"]) for row in gone
        }
        kept: dict[UUID, UUID | None] = {}
        if sum(row["deleted"] for row in gone) < len(locked):
            kept = {row["id"]: row["business_id"] for row in await tx.fetch(FIND_KEPT, locked)}
            for business in kept.values():
                counts.setdefault(business, Counter(deleted=0, items=0))
        return Changed(counts, len(locked), kept)

    return change


def _kept(swept: Swept) -> list[BusinessOutcome]:
    return [
        BusinessOutcome(business, "kept", counts={"kept": number})
        for business, number in Counter(swept.kept.values()).items()
        if business is not None
    ]
