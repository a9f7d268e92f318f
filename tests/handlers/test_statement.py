"""What a business is owed, against an account kept independently of random invoices, payments and credit notes."""

import asyncio
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import date, timedelta
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bon_scheduler.database import connections
from handlers.digest.statement import Statement, read_statement
from handlers.overdue_digest import FIND_OWED
from tests import arrange
from tests.conftest import Connection

AS_OF = date(2026, 11, 23)
CURRENCIES = ("ILS", "USD", "JPY")
STATUSES = ("draft", "finalized", "sending", "sent", "paid", "partially_paid", "cancelled", "credited")
DOCUMENTS = ("tax_invoice", "tax_invoice_receipt", "receipt", "credit_note")


@dataclass(frozen=True)
class Note:
    """A document that names an invoice it credits."""

    amount: int
    status: str
    currency: str
    document: str = "credit_note"


@dataclass(frozen=True)
class Invoice:
    """An invoice, what was paid of it, and what names it."""

    total: int
    status: str
    document: str
    currency: str
    days: int | None
    """Overdue on AS_OF; none: it has no due date."""
    payments: list[int] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


amounts = st.one_of(st.integers(1, 500), st.integers(1, 2**31 - 1))
notes = st.builds(
    Note,
    amounts,
    st.sampled_from(STATUSES),
    st.sampled_from(CURRENCIES),
    st.sampled_from(["credit_note", "tax_invoice"]),
)
# Mostly such as count, otherwise most examples would owe nothing.
invoices = st.builds(
    Invoice,
    amounts,
    st.sampled_from([*STATUSES, "sent", "finalized", "partially_paid", "sent"]),
    st.sampled_from([*DOCUMENTS, "tax_invoice", "tax_invoice", "tax_invoice"]),
    st.sampled_from(CURRENCIES),
    st.one_of(st.none(), st.sampled_from([-1, 0, 1, 2, 29, 30, 31, 60, 61, 90, 91]), st.integers(-5, 2000)),
    st.lists(amounts, max_size=4),
    st.lists(notes, max_size=3),
)


def owed_on(invoice: Invoice) -> int:
    """What is still owed, in words of the contract and nothing of ours."""
    if invoice.status not in {"finalized", "sent", "partially_paid"} or invoice.document != "tax_invoice":
        return 0
    if invoice.days is None or invoice.days < 1:
        return 0
    left = invoice.total
    for payment in invoice.payments:
        left -= payment
    for note in invoice.notes:
        issued = note.status not in {"draft", "cancelled", "credited"}
        if note.document == "credit_note" and issued and note.currency == invoice.currency:
            left -= note.amount
    return max(left, 0)


def bucket_of(days: int) -> int:
    return 0 if days <= 30 else 1 if days <= 60 else 2 if days <= 90 else 3


async def store(connection: Connection, business: UUID, invoice: Invoice) -> None:
    due = None if invoice.days is None else AS_OF - timedelta(days=invoice.days)
    values = {"due_date": due, "total_incl_vat_minor_units": invoice.total, "currency": invoice.currency}
    kind = {"document_type": invoice.document, "status": invoice.status}
    stored = await arrange.invoice(connection, business, **values, **kind)
    for payment in invoice.payments:
        await arrange.payment(connection, stored, payment)
    for note in invoice.notes:
        await arrange.credit_note(
            connection,
            business,
            stored,
            document_type=note.document,
            status=note.status,
            currency=note.currency,
            total_incl_vat_minor_units=note.amount,
        )


async def read(url: str, ours: list[Invoice], theirs: list[Invoice]) -> tuple[Statement | None, dict[UUID, int], UUID]:
    """Store both businesses' invoices; return our statement and how many invoices FIND_OWED counts for each."""
    async with connections.connect(url) as connection, connection.transaction():
        await connection.execute("truncate invoices cascade")
        us, them = await arrange.business(connection), await arrange.business(connection)
        for business, stock in ((us, ours), (them, theirs)):
            for invoice in stock:
                await store(connection, business, invoice)
        found = {row["business_id"]: row["invoices"] for row in await connection.fetch(FIND_OWED, AS_OF)}
        return await read_statement(connection, us, AS_OF), found, us


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ours=st.lists(invoices, max_size=8), theirs=st.lists(invoices, max_size=2))
def test_amounts_are_those_of_an_independent_account(
    database_url: str, ours: list[Invoice], theirs: list[Invoice]
) -> None:
    statement, found, us = asyncio.run(read(database_url, ours, theirs))
    owed = [(invoice, owed_on(invoice)) for invoice in ours if owed_on(invoice)]
    assert found.get(us, 0) == len(owed)
    if statement is None:
        assert owed == []
        return
    rows = Counter((i.currency, i.total, i.owed, statement.days_overdue(i)) for i in statement.invoices)
    assert rows == Counter((i.currency, i.total, left, i.days) for i, left in owed)
    assert [i.due_date for i in statement.invoices] == sorted(i.due_date for i in statement.invoices)
    buckets: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for invoice, left in owed:
        buckets[invoice.currency][bucket_of(invoice.days or 0)] += left
    assert {ageing.currency: list(ageing.buckets) for ageing in statement.ageing} == buckets
    assert statement.count == len(owed)
    assert statement.new == sum(invoice.days == 1 for invoice, _ in owed)


# Many rows


@pytest.fixture
async def busy(connection: Connection) -> UUID:
    """A business with 20,000 overdue invoices of 1.00 each, five of 100.00 USD among the newest, oldest first."""
    business = await arrange.business(connection)
    await connection.execute(
        """
        insert into invoices (business_id, document_type, status, invoice_date, due_date, currency,
                              total_incl_vat_minor_units, document_number)
        select $1, 'tax_invoice', 'sent', date '2026-01-01', $2::date - (20001 - n) / 10 - 1,
               case when n > 19995 then 'USD' else 'ILS' end, case when n > 19995 then 10000 else 100 end, n::text
          from generate_series(1, 20000) n
        """,
        business,
        AS_OF,
    )
    await connection.execute("analyze invoices")
    return business


async def test_of_20000_invoices_the_200_oldest_are_read_and_all_are_counted(
    connection: Connection, busy: UUID
) -> None:
    statement = await read_statement(connection, busy, AS_OF)
    assert statement is not None
    assert len(statement.invoices) == 200
    assert (statement.count, statement.hidden) == (20_000, 19_800)
    assert max(int(invoice.number or 0) for invoice in statement.invoices) <= 210
    assert [(a.currency, a.invoices, a.total) for a in statement.ageing] == [
        ("ILS", 19_995, 1_999_500),
        ("USD", 5, 50_000),
    ]


async def test_a_business_with_20000_invoices_costs_little(connection: Connection, busy: UUID) -> None:
    started = time.perf_counter()
    await read_statement(connection, busy, AS_OF)
    assert time.perf_counter() - started < 3


# What is new


async def delivered(connection: Connection, business: UUID, as_of: date, state: str = "sent") -> None:
    run = await connection.fetchval("select bon_scheduler.enqueue('send-overdue-digest')")
    await connection.execute(
        "insert into bon_scheduler.deliveries "
        "(kind, business_id, as_of, recipient_hash, state, message_id, run_id, attempt) "
        "values ('overdue-digest', $1, $2, gen_random_uuid()::text, $3, '<x@y>', $4, 1)",
        business,
        as_of,
        state,
        run,
    )


async def new_ones(connection: Connection, business: UUID) -> list[str | None]:
    statement = await read_statement(connection, business, AS_OF)
    assert statement is not None
    marked = [invoice.number for invoice in statement.invoices if statement.is_new(invoice)]
    assert statement.new == len(marked)
    return marked


@pytest.fixture
async def shop(connection: Connection) -> UUID:
    """A business with invoices due 1, 2, 3, 4, 5, 6, 7 and 8 days ago, numbered so."""
    business = await arrange.business(connection)
    for days in range(1, 9):
        due = AS_OF - timedelta(days=days)
        await arrange.invoice(connection, business, due_date=due, document_number=str(days))
    return business


async def test_what_was_not_overdue_in_the_last_digest_that_was_sent_is_new(connection: Connection, shop: UUID) -> None:
    await delivered(connection, shop, AS_OF - timedelta(days=7))
    await delivered(connection, shop, AS_OF - timedelta(days=4))
    assert await new_ones(connection, shop) == ["4", "3", "2", "1"]


async def test_without_an_earlier_digest_what_became_overdue_today_is_new(connection: Connection, shop: UUID) -> None:
    assert await new_ones(connection, shop) == ["1"]


@pytest.mark.parametrize("state", ["refused", "unknown", "intended"])
async def test_a_digest_that_may_not_have_arrived_told_nobody_anything(
    connection: Connection, shop: UUID, state: str
) -> None:
    await delivered(connection, shop, AS_OF - timedelta(days=3))
    await delivered(connection, shop, AS_OF - timedelta(days=1), state)
    assert await new_ones(connection, shop) == ["3", "2", "1"]


async def test_neither_the_same_days_digest_nor_another_business_s_nor_another_kind_of_letter_counts(
    connection: Connection, shop: UUID
) -> None:
    await delivered(connection, shop, AS_OF - timedelta(days=3))
    await delivered(connection, shop, AS_OF)
    await delivered(connection, await arrange.business(connection), AS_OF - timedelta(days=1))
    await delivered(connection, shop, AS_OF - timedelta(days=1))
    await connection.execute(
        "update bon_scheduler.deliveries set kind = 'other' where business_id = $1 and as_of = $2",
        shop,
        AS_OF - timedelta(days=1),
    )
    assert await new_ones(connection, shop) == ["3", "2", "1"]
