"""
Mark invoices overdue each morning; clear the mark once they are settled.

"Overdue" is judged on the Israeli calendar date of the fire time, so a late,
retried or replayed run gives the same answer. Marks and the digest run commit
together: a retry never finds invoices marked whose owners were never told.
"""

from collections import Counter
from datetime import timedelta
from uuid import UUID

from bon_scheduler import BusinessOutcome, CatchUp, Counts, Cron, JobContext, Payload, Retry, job
from handlers.overdue_digest import OverdueDigest, overdue_digest

# $1 as_of: date. Index: invoices_overdue_candidates_idx.
MARK_OVERDUE = """
    update public.invoices
       set is_overdue = true, updated_at = now()
     where status in ('finalized', 'sent', 'partially_paid')
       and due_date is not null
       and due_date < least($1, (now() at time zone 'UTC')::date + 1)
       and not is_overdue
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
    returning business_id
"""

# No parameters. Index: invoices_overdue_reset_idx.
CLEAR_SETTLED = """
    update public.invoices
       set is_overdue = false, updated_at = now()
     where is_overdue = true
       and status in ('paid', 'cancelled', 'credited')
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
    returning business_id
"""

# $1 the later of as_of and today: date. Invoices whose due date was moved after they were marked. The later
# date, so that replaying an old tick never un-marks what became overdue since. Index: none serves it; BON
# has few open invoices that are marked, and reads them through (business_id, status) elsewhere.
CLEAR_MOVED = """
    update public.invoices
       set is_overdue = false, updated_at = now()
     where is_overdue
       and status in ('finalized', 'sent', 'partially_paid')
       and (due_date is null or due_date >= $1)
       and not exists (select from bon_scheduler.business_pauses p where p.business_id = invoices.business_id)
    returning business_id
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
    as_of = ctx.business_date
    async with ctx.transaction() as tx:
        marked = await tx.fetch(MARK_OVERDUE, as_of)
        cleared = await tx.fetch(CLEAR_SETTLED)
        cleared += await tx.fetch(CLEAR_MOVED, max(as_of, ctx.today))
        paused = await tx.fetchval(COUNT_PAUSED, as_of, max(as_of, ctx.today))
        by_business = {
            "marked": Counter[UUID](row["business_id"] for row in marked),
            "cleared": Counter[UUID](row["business_id"] for row in cleared),
        }
        touched = set().union(*by_business.values())
        await ctx.record(
            [
                BusinessOutcome(business, counts={name: found[business] for name, found in by_business.items()})
                for business in touched
            ],
            on=tx,
        )
        if payload.send or not (ctx.replay and as_of < ctx.today):
            await ctx.enqueue(overdue_digest, OverdueDigest(as_of=as_of), on=tx, dedupe_key=str(ctx.run_id))
        counts = {"marked": len(marked), "cleared": len(cleared)}
        return await ctx.finish(counts | {"paused": paused} if paused else counts, on=tx)
