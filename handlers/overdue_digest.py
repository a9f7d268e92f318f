"""
Find, after overdue detection, every business that is owed something, and ask for its digest.

One run a business: a mail server's trouble with one never delays another. All
of them are asked for in one transaction, which also ends this run, so a retry
finds either none or all; they are read and asked for a thousand at a time, so
that memory does not grow with their number. A repeat of the whole on the same
day asks again; the delivery ledger then finds nothing left to send.
"""

from datetime import date

from bon_scheduler.jobs import Connection, Counts, JobContext, NeverRetryError, Payload, job
from handlers.brake import Candidates, brake
from handlers.digest import refuse_day_to_come
from handlers.send_overdue_digest import SendOverdueDigest, send_overdue_digest

__all__ = ["OverdueDigest", "letters_owed", "overdue_digest"]

AT_A_TIME = 1000
AFTER_EVERYTHING_ELSE = -10
"""The priority of sending: a hundred thousand letters take hours, and no other job may wait for them."""

# The active businesses that are owed something, on how many invoices, how many addresses are written to, and
# whether a person has paused them. The rules are those of statement.READ_STATEMENT and READ_RECIPIENTS, for all
# businesses at once.
# $1 as_of: date. No index: once marked, an overdue invoice is in none by due date, so this reads `invoices`
# through, once a day; payments and credit notes are looked up as in READ_STATEMENT.
FIND_OWED = """
      with owed as (
               select i.business_id, count(*) as invoices
                 from public.invoices i
                cross join lateral (
                          select coalesce(sum(p.amount_minor_units), 0) as amount
                            from public.invoice_payments p
                           where p.invoice_id = i.id
                      ) paid
                cross join lateral (
                          select coalesce(sum(n.total_incl_vat_minor_units), 0) as amount
                            from public.invoices n
                           where n.business_id = i.business_id
                             and n.credited_invoice_id = i.id
                             and n.document_type = 'credit_note'
                             and n.status in ('finalized', 'sending', 'sent', 'paid', 'partially_paid')
                             and n.currency = i.currency
                      ) credited
                where i.status in ('finalized', 'sent', 'partially_paid')
                  and i.due_date < $1
                  and i.document_type not in ('receipt', 'tax_invoice_receipt', 'credit_note')
                  and i.total_incl_vat_minor_units - paid.amount - credited.amount > 0
                group by i.business_id
           )
    select b.id as business_id,
           o.invoices,
           case when owners.addresses > 0 then least(owners.addresses, 20)  -- digest.MOST_OWNERS
                when bon_scheduler.visible(left(b.email, 400)) is not null then 1
                else 0
            end as addresses,
           exists (select from bon_scheduler.business_pauses p where p.business_id = b.id) as paused
      from owed o
      join public.businesses b on b.id = o.business_id
     cross join lateral (
               select count(distinct lower(bon_scheduler.visible(left(u.email, 400)))) as addresses
                 from public.user_businesses m
                 join public.users u on u.id = m.user_id
                where m.business_id = b.id
                  and m.role = 'owner'
           ) owners
     where b.is_active
       and b.deleted_at is null
     order by b.id
"""


# No parameters. One row an owner. Read only where the brake may trip, and in a rehearsal.
COUNT_OWNERS = """
    select count(*)
      from public.user_businesses m
      join public.businesses b on b.id = m.business_id
     where m.role = 'owner'
       and b.is_active
       and b.deleted_at is null
"""


class OverdueDigest(Payload):
    """Which day's digest."""

    as_of: date | None = None
    """An Israeli calendar date; what was due before it is overdue. None: that of the fire time."""


@job("overdue-digest")
async def overdue_digest(ctx: JobContext, payload: OverdueDigest) -> Counts:
    """Ask for a digest for each business that has overdue invoices."""
    as_of = payload.as_of or ctx.business_date
    refuse_day_to_come(ctx, as_of)
    if payload.as_of is None and as_of < ctx.today and not ctx.dry_run:
        raise NeverRetryError(
            f"The digest of {as_of} is of a day that is over, and nobody said that it is still wanted. If it is, "
            f'name the day: --payload \'{{"as_of": "{as_of}"}}\'.'
        )
    counts = {"businesses": 0, "invoices": 0, "deliveries": 0}
    async with ctx.transaction() as tx:
        found = await tx.cursor(FIND_OWED, as_of)
        while rows := await found.fetch(AT_A_TIME):
            owed = [row for row in rows if not row["paused"]]
            counts["businesses"] += len(owed)
            counts["invoices"] += sum(row["invoices"] for row in owed)
            counts["deliveries"] += sum(row["addresses"] for row in owed)
            if paused := len(rows) - len(owed):
                counts["paused"] = counts.get("paused", 0) + paused
            requests = (
                (
                    SendOverdueDigest(business_id=row["business_id"], as_of=as_of),
                    f"{ctx.run_id}/{row['business_id']}",
                )
                for row in owed
            )
            await ctx.enqueue_many(send_overdue_digest, requests, on=tx, priority=AFTER_EVERYTHING_ELSE)
        # In this transaction, which has committed nothing yet.
        await brake(ctx, _to_send(counts["deliveries"]), on=tx)
        return await ctx.finish(counts, on=tx)


async def letters_owed(connection: Connection, as_of: date) -> Candidates:
    """Count the letters that the digest of this day would send. In the caller's transaction."""
    letters, found = 0, await connection.cursor(FIND_OWED, as_of)
    while rows := await found.fetch(AT_A_TIME):
        letters += sum(row["addresses"] for row in rows if not row["paused"])
    return _to_send(letters)


def _to_send(letters: int) -> Candidates:
    return Candidates(
        number=letters, count="deliveries", kind="owners", which="would get a digest", of_all=COUNT_OWNERS
    )
