"""
What one business is owed on a day, and who is told: the reading behind the digest.

One statement reads it all, so that the rows, the totals and what is new agree with one another whatever
is paid meanwhile. Only the oldest rows are read; the totals count every invoice.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from uuid import UUID

from bon_scheduler.jobs import Connection

__all__ = [
    "DIGEST_KIND",
    "Ageing",
    "OverdueInvoice",
    "Rest",
    "Statement",
    "count_owners",
    "is_paused",
    "read_recipients",
    "read_statement",
]

DIGEST_KIND = "overdue-digest"
"""The kind under which the delivery ledger knows these letters."""
MAX_ROWS = 200
"""More would be cut off by mail readers (some at 102 kB); the totals always count every invoice."""

MOST_OWNERS = 20
"""Of one business that are written to: whoever may name owners could have us write to anybody (decision 0026)."""
MOST_CURRENCIES = 10
"""Whose totals are shown; the others are counted."""

# What is still owed on each overdue invoice of an active business: the oldest rows, and totals of all by currency.
# A credit note counts once it is issued: `sending` is between finalized and sent, and `paid` or
# `partially_paid` say that it was refunded, not that it is void. `draft` is not issued yet, `cancelled`
# and `credited` no longer stand. One in another currency is nothing we may subtract.
# An invoice is new when it was not overdue yet on the day of the last digest that was sent, or, without one, the
# day before.
# $1 business: uuid, $2 as_of: date, $3 rows: int, $4 kind of delivery: text, $5 currencies: int. Indexes: the ones on
# invoices (business_id, status), invoice_payments (invoice_id), for the credit notes invoices (business_id,
# credited_invoice_id, document_type), and deliveries_kind_business_id_as_of_recipient_hash_key.
READ_STATEMENT = """
      with owed as materialized (
               select i.id, left(i.document_number, 200) as document_number,
                      left(i.customer_name, 400) as customer_name, i.customer_id,
                      left(i.currency, 40) as currency, i.sequence_number,
                      greatest(i.due_date, date '0001-01-01') as due_date,  -- what a calendar has
                      i.total_incl_vat_minor_units as total,
                      (i.total_incl_vat_minor_units - paid.amount - credited.amount)::bigint as owed
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
                where i.business_id = $1
                  and i.status in ('finalized', 'sent', 'partially_paid')
                  and i.due_date < $2
                  and i.document_type not in ('receipt', 'tax_invoice_receipt', 'credit_note')
                  and i.total_incl_vat_minor_units - paid.amount - credited.amount > 0
           ),
           last_digest as (
               select coalesce((select d.as_of
                                  from bon_scheduler.deliveries d
                                 where d.kind = $4
                                   and d.business_id = $1
                                   and d.as_of < $2
                                   and d.state = 'sent'
                                 order by d.as_of desc
                                 limit 1), $2 - 1) as day
           ),
           oldest as (
               select o.document_number,
                      coalesce(bon_scheduler.visible(o.customer_name),
                               bon_scheduler.visible(left(c.name, 400))) as customer,
                      o.currency, o.total, o.owed, o.due_date
                 from (select * from owed order by due_date, sequence_number nulls last, id limit $3) o
                 left join public.customers c on c.id = o.customer_id
                order by o.due_date, o.sequence_number nulls last, o.id
           ),
           totals as (
               select currency,
                      count(*) as invoices,
                      count(*) filter (where due_date >= (select day from last_digest)) as new,
                      coalesce(sum(owed) filter (where $2 - due_date <= 30), 0)::bigint as upto_30,
                      coalesce(sum(owed) filter (where $2 - due_date between 31 and 60), 0)::bigint as upto_60,
                      coalesce(sum(owed) filter (where $2 - due_date between 61 and 90), 0)::bigint as upto_90,
                      coalesce(sum(owed) filter (where $2 - due_date > 90), 0)::bigint as over_90
                 from owed
                group by currency
           ),
           shown as (select * from totals order by currency <> 'ILS', invoices desc, currency limit $5),
           rest as (
               select count(*) as currencies, coalesce(sum(invoices), 0)::bigint as invoices,
                      coalesce(sum(new), 0)::bigint as new
                 from (select * from totals order by currency <> 'ILS', invoices desc, currency offset $5) t
           )
    select left(b.name, 400) as name,
           (select day from last_digest) as since,
           (select array_agg(o) from oldest o) as invoices,
           (select array_agg(t order by currency <> 'ILS', currency) from shown t) as totals,
           (select r from rest r) as rest
      from public.businesses b
     where b.id = $1
       and b.is_active
       and b.deleted_at is null
"""

# The owners' addresses, at most so many, else the business's own, else nothing. Which of too many does not change from
# one attempt to the next: a repeat must not find others.
# $1 business: uuid, $2 how many: int. Indexes: the one on user_businesses (business_id), users_pkey, businesses_pkey.
READ_RECIPIENTS = """
      with owners as (
               select distinct on (lower(mine.email)) mine.id, mine.email
                 from public.user_businesses m
                cross join lateral (
                          select u.id, bon_scheduler.visible(left(u.email, 400)) as email
                            from public.users u
                           where u.id = m.user_id
                      ) mine
                where m.business_id = $1
                  and m.role = 'owner'
                  and mine.email is not null
                order by lower(mine.email), mine.id
           ),
           first_owners as (select email from owners order by id limit $2)
    select email
      from first_owners
     union all
    select bon_scheduler.visible(left(b.email, 400))
      from public.businesses b
     where b.id = $1
       and bon_scheduler.visible(left(b.email, 400)) is not null
       and not exists (select from owners)
     order by email
"""

# $1 business: uuid. Indexes: the one on user_businesses (business_id), users_pkey.
COUNT_OWNERS = """
    select count(distinct lower(bon_scheduler.visible(left(u.email, 400))))
      from public.user_businesses m
      join public.users u on u.id = m.user_id
     where m.business_id = $1
       and m.role = 'owner'
"""

# $1 business: uuid. Index: business_pauses_pkey.
IS_PAUSED = "select exists (select from bon_scheduler.business_pauses where business_id = $1)"


@dataclass(frozen=True, slots=True)
class OverdueInvoice:
    """One row of the digest; amounts in minor units of `currency` (agorot for ILS)."""

    number: str | None
    customer: str | None
    currency: str
    total: int
    owed: int
    due_date: date


@dataclass(frozen=True, slots=True)
class Ageing:
    """
    All that is owed in one currency: how many invoices, how many of them new, and the minor units
    that are 1-30, 31-60, 61-90 and over 90 days overdue.
    """

    currency: str
    invoices: int
    new: int
    buckets: tuple[int, int, int, int]

    @property
    def total(self) -> int:
        """Minor units owed in all."""
        return sum(self.buckets)


@dataclass(frozen=True, slots=True)
class Rest:
    """The currencies whose totals are not shown: how many, of how many invoices, how many of these new."""

    currencies: int = 0
    invoices: int = 0
    new: int = 0


@dataclass(frozen=True, slots=True)
class Statement:
    """What is owed to one business on a day; never empty. `invoices` are the oldest, `ageing` and `rest` count all."""

    business_name: str
    as_of: date
    since: date
    """The day of the last digest: what was not overdue then is new."""
    invoices: tuple[OverdueInvoice, ...]
    ageing: tuple[Ageing, ...]
    """By currency, ILS first, then by code."""
    rest: Rest = Rest()

    def days_overdue(self, invoice: OverdueInvoice) -> int:
        """Count calendar days from the due date; 1 is the day after it."""
        return (self.as_of - invoice.due_date).days

    def is_new(self, invoice: OverdueInvoice) -> bool:
        """Return whether the invoice was not overdue yet in the last digest."""
        return invoice.due_date >= self.since

    @property
    def count(self) -> int:
        """How many invoices are overdue, shown or not."""
        return sum(ageing.invoices for ageing in self.ageing) + self.rest.invoices

    @property
    def new(self) -> int:
        """How many of them became overdue since the last digest."""
        return sum(ageing.new for ageing in self.ageing) + self.rest.new

    @property
    def hidden(self) -> int:
        """How many are counted but not shown."""
        return self.count - len(self.invoices)


async def read_statement(connection: Connection, business_id: UUID, as_of: date) -> Statement | None:
    """Read what is overdue on `as_of`; None when nothing is owed or the business is not active."""
    row = await connection.fetchrow(READ_STATEMENT, business_id, as_of, MAX_ROWS, DIGEST_KIND, MOST_CURRENCIES)
    if row is None or row["totals"] is None:
        return None
    invoices = tuple(OverdueInvoice(*columns) for columns in row["invoices"])
    ageing = tuple(Ageing(currency, count, new, tuple(sums)) for currency, count, new, *sums in row["totals"])
    return Statement(row["name"], as_of, row["since"], invoices, ageing, Rest(*row["rest"]))


async def read_recipients(connection: Connection, business_id: UUID) -> list[str]:
    """Read the addresses to write to, each once whatever its case, at most MOST_OWNERS; none: nobody can be reached."""
    return _each_once(row["email"] for row in await connection.fetch(READ_RECIPIENTS, business_id, MOST_OWNERS))


async def count_owners(connection: Connection, business_id: UUID) -> int:
    """Count the owners who have an address, each once whatever its case."""
    return int(await connection.fetchval(COUNT_OWNERS, business_id))


def _each_once(addresses: Iterable[str]) -> list[str]:
    # Lower case, as the delivery ledger's hash: what it takes for one recipient is one here.
    return list({address.lower(): address for address in addresses}.values())


async def is_paused(connection: Connection, business_id: UUID) -> bool:
    """Return whether a person has every job leave this business alone."""
    return bool(await connection.fetchval(IS_PAUSED, business_id))
