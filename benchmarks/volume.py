"""
BON's tables at volume, for measuring: a million invoices, as `bon-contract` plans for them, or others.

Of a million invoices of 4,000 businesses: 180,000 open ones are past due and not marked, 40,000 are marked, 31,000 are
drafts (29,000 of them untouched for more than 30 days), 130,000 are open and not due, the others are paid. Two items an
invoice; a payment for each that is paid; 10,000 emergency numbers; 200,000 sessions, half of them expired.
"""

from bon_scheduler.jobs import Connection

__all__ = ["BACKLOG", "DRAFTS", "SESSIONS", "fill"]

BACKLOG, DRAFTS, SESSIONS = 0.18, 0.029, 0.1
"""Shares of the invoices: to be marked, stale drafts, expired sessions."""

# $1 invoices: int. Each has a business of 250 invoices.
MAKE_BUSINESSES = """
    with people as (
        insert into public.users (email, name)
        select 'owner' || n || '@shop.example', 'Owner' from generate_series(1, greatest($1::int / 250, 1)) n
        returning id, email
    ), shops as (
        insert into public.businesses (name, business_type, registration_number, created_by_user_id)
        select 'Shop ' || email, 'limited_company', email, id from people
        returning id, created_by_user_id
    )
    insert into public.user_businesses (user_id, business_id, role)
    select created_by_user_id, id, 'owner' from shops
"""
# $1 invoices: int. `place` spreads the kinds over businesses and pages, from 0 to 999. As in a table that grew, an
# invoice stands behind those of earlier days; it is payable at once, or after some weeks.
MAKE_INVOICES = """
    with shops as (
        select array_agg(id) as ids from public.businesses
    ), places as (
        select n, (n * 7919::bigint + n / 1000) % 1000 as place,
               current_date - (4 * 365 * (1 - n::float8 / $1::int))::int as made,
               (array[0, 15, 30, 30, 45, 60])[1 + n % 6] as days
          from generate_series(1, $1::int) n
    )
    insert into public.invoices (business_id, document_type, status, is_overdue, invoice_date, due_date, customer_name,
                                 customer_address, sequence_group, sequence_number, document_number, updated_at,
                                 subtotal_minor_units, total_incl_vat_minor_units)
    select ids[1 + n % cardinality(ids)], 'tax_invoice',
           (case when place < 31 then 'draft' when place < 381 then 'sent' else 'paid' end)::public.invoice_status,
           place between 211 and 250,
           made,
           case when place < 31 then null when place < 251 then least(made + days, current_date - 1 - n % 45)
                when place < 381 then greatest(made + days, current_date + 1 + n % 60) else made + days end,
           'Customer ' || n, 'Herzl ' || n % 200 || ', Tel Aviv', 'tax_document',
           case when place >= 31 then n end, case when place >= 31 then 'INV-2026-' || n end,
           now() - case when place < 29 then interval '31 days' + n * interval '1 second' else interval '1 day' end,
           10000 + n % 5000, 11800 + n % 5000
      from places cross join shops
"""
MAKE_ITEMS = """
    insert into public.invoice_items (invoice_id, position, description, quantity, unit_price_minor_units,
                                      vat_rate_basis_points)
    select id, position, 'Work', 1, 5000, 1800 from public.invoices cross join generate_series(1, 2) position
"""
MAKE_PAYMENTS = """
    insert into public.invoice_payments (invoice_id, amount_minor_units, paid_at, method)
    select id, total_incl_vat_minor_units, current_date - 3, 'transfer' from public.invoices where status = 'paid'
"""
# $1 invoices: int.
MAKE_NUMBERS = """
    insert into public.emergency_allocation_numbers (business_id, number, used, used_for_invoice_id)
    select business_id, 'E' || document_number, true, id
      from public.invoices where status = 'paid' order by id limit $1::int / 100
"""
# $1 invoices: int.
MAKE_SESSIONS = """
    with people as (
        select array_agg(id) as ids from public.users
    )
    insert into public.sessions (id, user_id, last_accessed_at, expires_at)
    select gen_random_uuid(), ids[1 + n % cardinality(ids)], now() - interval '1 day',
           now() + case when n % 2 = 0 then interval '20 days' else - n * interval '1 second' end
      from generate_series(1, $1::int / 5) n cross join people
"""


async def fill(connection: Connection, invoices: int) -> None:
    """Make the rows."""
    await connection.execute(MAKE_BUSINESSES, invoices)
    await connection.execute(MAKE_INVOICES, invoices)
    await connection.execute(MAKE_ITEMS)
    await connection.execute(MAKE_PAYMENTS)
    await connection.execute(MAKE_NUMBERS, invoices)
    await connection.execute(MAKE_SESSIONS, invoices)
    await connection.execute("vacuum analyze")
