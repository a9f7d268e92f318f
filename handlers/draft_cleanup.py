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
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

import structlog

from bon_scheduler import BusinessOutcome, CatchUp, Counts, Cron, JobContext, NoPayload, Retry, job
from bon_scheduler.database import missing_indexes
from bon_scheduler.jobs import Connection

log = structlog.get_logger()
UNTOUCHED = timedelta(days=30)
BATCH = 500
BEGINNING = (datetime(1970, 1, 1, tzinfo=UTC), UUID(int=0))

# $1 untouched since: timestamptz, $2 and $3 the last draft seen: timestamptz, uuid, $4 batch size: int.
# Index: invoices_draft_cleanup_idx. Strictly older than $1. A draft that is being edited now is not stale.
LOCK_STALE = """
    select id, business_id, updated_at
      from public.invoices
     where status = 'draft'
       and updated_at < least($1, now() - interval '30 days')
       and (updated_at, id) > ($2, $3)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
     order by updated_at, id
     limit $4
       for update skip locked
"""

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

# $1 drafts: uuid[]. Index: unique (invoice_id, position).
COUNT_ITEMS = """
    select invoice_id, count(*) as items
      from public.invoice_items
     where invoice_id = any ($1)
     group by invoice_id
"""

# $1 drafts: uuid[], locked by this transaction. BON has no index for three of these references; `check`
# recommends two of them.
DELETE_UNREFERENCED = """
    delete from public.invoices i
     where i.id = any ($1)
       and i.status = 'draft'
       and not exists (select from public.invoice_payments p where p.invoice_id = i.id)
       and not exists (select from public.shaam_audit_log a where a.invoice_id = i.id)
       and not exists (select from public.emergency_allocation_numbers e where e.used_for_invoice_id = i.id)
       and not exists (select from public.invoices c where c.credited_invoice_id = i.id)
    returning i.id
"""


@job(
    "draft-cleanup",
    schedule=Cron("0 3 * * *", catch_up=CatchUp.LATEST, grace=timedelta(hours=24)),
    retry=Retry(attempts=5),
    timeout=timedelta(minutes=15),
)
async def draft_cleanup(ctx: JobContext, _: NoPayload) -> Counts:
    """Delete drafts untouched for 30 days, with their items."""
    since = ctx.fire_time - UNTOUCHED
    seen = BEGINNING
    total: Counter[str] = Counter(deleted=0, items=0, kept=0)
    whole: dict[UUID, Counter[str]] = {}
    while True:
        async with ctx.transaction() as tx:
            stale = await tx.fetch(LOCK_STALE, since, *seen, BATCH)
            if stale and seen == BEGINNING and (missing := await missing_indexes(tx)):
                # BEFORE the first is deleted, otherwise a run that is too slow to end would never say why.
                log.warning("drafts.unindexed", missing=list(missing), remedy=list(missing.values()))
            batch = await _delete_batch(tx, [(row["id"], row["business_id"]) for row in stale])
            for business, found in batch.items():
                total.update(found)
                whole.setdefault(business, Counter()).update(found)
            await ctx.record(_deleted(batch), on=tx)
            last = len(stale) < BATCH
            if last:
                # What is kept only now: each attempt finds it again, and the ledger adds up.
                await ctx.record(_kept(whole), on=tx)
                if paused := await tx.fetchval(COUNT_PAUSED, since):
                    total["paused"] = paused
                await ctx.finish(dict(total), on=tx)
        for business, found in batch.items():
            log.info("drafts.cleaned", business_id=str(business), **found)
        if last:
            return dict(total)
        seen = (stale[-1]["updated_at"], stale[-1]["id"])


async def _delete_batch(tx: Connection, stale: Sequence[tuple[UUID, UUID]]) -> dict[UUID, Counter[str]]:
    drafts = [draft for draft, _ in stale]
    items = {row["invoice_id"]: row["items"] for row in await tx.fetch(COUNT_ITEMS, drafts)}
    deleted = {row["id"] for row in await tx.fetch(DELETE_UNREFERENCED, drafts)}
    counts: dict[UUID, Counter[str]] = {}
    for draft, business in stale:
        found = counts.setdefault(business, Counter(deleted=0, items=0, kept=0))
        if draft in deleted:
            found.update(deleted=1, items=items.get(draft, 0))
        else:
            found.update(kept=1)
    return counts


def _deleted(batch: Mapping[UUID, Counter[str]]) -> list[BusinessOutcome]:
    return [
        BusinessOutcome(business, counts={"deleted": found["deleted"], "items": found["items"]})
        for business, found in batch.items()
        if found["deleted"]
    ]


def _kept(whole: Mapping[UUID, Counter[str]]) -> list[BusinessOutcome]:
    return [
        BusinessOutcome(business, "done" if found["deleted"] else "kept", counts={"kept": found["kept"]})
        for business, found in whole.items()
        if found["kept"]
    ]
