"""
The sample's invoices: what is written down about each, and the rows that follow from it.

Dates count from today in Israel, ages from `now`, so the sample is as old on
every day it is loaded. Which cases it must hold is BON's contract: each status
of each document type, both sides of every boundary, and what a job must leave
alone.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Literal
from uuid import UUID
from zoneinfo import ZoneInfo

from bon_scheduler.demo.sample_businesses import (
    BUSINESS_BY_KEY,
    BUSINESSES,
    CUSTOMERS_PER_BUSINESS,
    Business,
    Row,
    customers_of,
    identify,
)

__all__ = [
    "AUDITED",
    "DOCUMENT_TYPES",
    "DRAFT_LIFETIME",
    "EMERGENCY",
    "OPEN",
    "SETTLED",
    "STATUSES",
    "Invoice",
    "audit_rows",
    "emergency_rows",
    "invoice_rows",
    "item_rows",
    "payment_rows",
    "sample_invoices",
]

Status = Literal["draft", "finalized", "sending", "sent", "paid", "partially_paid", "cancelled", "credited"]
DocumentType = Literal["tax_invoice", "tax_invoice_receipt", "receipt", "credit_note"]

STATUSES: tuple[Status, ...] = (
    *("draft", "finalized", "sending", "sent"),
    *("paid", "partially_paid", "cancelled", "credited"),
)
DOCUMENT_TYPES: tuple[DocumentType, ...] = ("tax_invoice", "tax_invoice_receipt", "receipt", "credit_note")
SEQUENCE_GROUPS = {
    "tax_invoice": "tax_document",
    "tax_invoice_receipt": "tax_document",
    "receipt": "receipt",
    "credit_note": "credit_note",
}
OPEN = frozenset({"finalized", "sent", "partially_paid"})
SETTLED = frozenset({"paid", "cancelled", "credited"})
DRAFT_LIFETIME = timedelta(days=30)
TERM = timedelta(days=30)
FIRST_SEQUENCE_NUMBER = 1001


@dataclass(frozen=True, slots=True)
class Invoice:
    """One document. Amounts are in the currency's hundredths (agorot), dates in days from today in Israel."""

    key: str
    business: str
    status: Status
    due_in_days: int | None
    total_minor_units: int = 118_000
    type: DocumentType = "tax_invoice"
    paid_minor_units: tuple[int, ...] = ()
    marked: bool = False
    credits: str | None = None
    """The key of the document this one credits."""
    currency: str = "ILS"
    customer: int | None = 0
    customer_named: bool = True
    numbered: bool = True
    items: int = 2
    idle: timedelta = timedelta(days=5)
    """How long ago a draft was last changed."""

    @property
    def id(self) -> UUID:
        """Return the document's id."""
        return identify("invoice", self.key)

    @property
    def owner(self) -> Business:
        """Return the business it belongs to."""
        return BUSINESS_BY_KEY[self.business]

    @property
    def is_draft(self) -> bool:
        """Return whether it was never issued."""
        return self.status == "draft"


# The business each of these is in has other overdue invoices, except "roga", which must end with none.
BOUNDARIES = (
    Invoice("due-today", "gan", "sent", 0),
    Invoice("due-yesterday", "gan", "sent", -1),
    Invoice("due-tomorrow", "gan", "sent", 1),
    Invoice("never-due", "gan", "finalized", None),
    Invoice("sending-and-late", "gan", "sending", -3),
    Invoice("oldest", "keshet", "sent", -200, 4_720_050),
    Invoice("largest", "ale", "finalized", -95, 2_147_483_600),
    Invoice("one-agora", "keshet", "sent", -12, 1, items=1),
)
ALREADY_MARKED = (
    Invoice("marked-then-paid", "gan", "paid", -20, paid_minor_units=(118_000,), marked=True),
    Invoice("marked-then-cancelled", "gan", "cancelled", -20, marked=True),
    Invoice("marked-then-credited", "teena", "credited", -20, marked=True),
    Invoice(
        "marked-then-credited-note",
        "teena",
        "finalized",
        None,
        type="credit_note",
        credits="marked-then-credited",
    ),
    Invoice("marked-then-moved", "teena", "sent", 10, marked=True),
    Invoice("marked-then-moved-to-today", "derech", "partially_paid", 0, paid_minor_units=(8_000,), marked=True),
    Invoice("marked-then-never-due", "derech", "finalized", None, marked=True),
    Invoice("marked-and-late-still", "derech", "sent", -33, marked=True),
)
OWED = (
    Invoice("paid-in-parts", "nitzotz", "partially_paid", -14, 590_000, paid_minor_units=(100_000, 90_000)),
    Invoice("paid-but-still-open", "roga", "partially_paid", -9, 23_600, paid_minor_units=(20_000, 3_600)),
    Invoice("paid-too-much", "nitzotz", "sent", -8, 11_800, paid_minor_units=(12_000,)),
    Invoice("credited-in-full", "roga", "sent", -17, 70_800),
    Invoice("credited-in-full-note", "roga", "finalized", None, 70_800, "credit_note", credits="credited-in-full"),
    Invoice("credited-in-part", "nitzotz", "sent", -41, 236_000, paid_minor_units=(36_000,)),
    Invoice(
        "credited-in-part-note",
        "nitzotz",
        "finalized",
        None,
        50_000,
        "credit_note",
        credits="credited-in-part",
    ),
    # A draft credits nothing yet.
    Invoice("to-be-credited", "giva", "sent", -26, 354_000),
    Invoice("to-be-credited-note", "giva", "draft", None, 354_000, "credit_note", credits="to-be-credited"),
)
INCOMPLETE = (
    Invoice("without-a-number", "or", "sent", -6, 45_000, numbered=False),
    Invoice("named-by-customer", "or", "sent", -11, 65_000, customer=1, customer_named=False),
    Invoice("without-a-customer", "or", "finalized", -61, 82_500, customer=None, customer_named=False),
    Invoice("dollars", "giva", "sent", -72, 1_250_000, currency="USD", customer=4),
    Invoice("more-dollars", "giva", "sent", -2, 99_999, currency="USD", customer=4),
    Invoice("euros", "giva", "partially_paid", -31, 880_000, currency="EUR", paid_minor_units=(400_000,)),
    Invoice("closed-and-late", "tzuk", "sent", -50, 300_000),
    Invoice("closed-and-late-again", "tzuk", "finalized", -90, 125_000, marked=True),
)

MINUTE = timedelta(minutes=1)
# Business and days since the last change.
STALE_DRAFTS = (
    *(("gan", 31), ("gan", 45), ("teena", 60), ("keshet", 75), ("ale", 90), ("ale", 120)),
    *(("derech", 150), ("giva", 200), ("or", 250), ("pina", 300), ("tzuk", 400)),
)
DRAFTS = (
    Invoice("draft-young-by-a-minute", "gan", "draft", 5, idle=DRAFT_LIFETIME - MINUTE),
    Invoice("draft-stale-by-a-minute", "gan", "draft", 5, items=3, idle=DRAFT_LIFETIME + MINUTE),
    *(
        # Some have no line yet, and so no amount.
        Invoice(
            f"draft-stale-{number}",
            business,
            "draft",
            None,
            total_minor_units=23_600 * (number % 5),
            items=number % 5,
            idle=timedelta(days=days),
        )
        for number, (business, days) in enumerate(STALE_DRAFTS)
    ),
    # Stale and yet kept: deleting each of these would erase or strand something that counts.
    Invoice("draft-with-payment", "shibolet", "draft", None, paid_minor_units=(5_000,), idle=timedelta(days=40)),
    Invoice("draft-with-audit", "shibolet", "draft", None, idle=timedelta(days=41)),
    Invoice("draft-with-emergency-number", "keshet", "draft", None, idle=timedelta(days=42)),
    Invoice("draft-credited", "ale", "draft", None, idle=timedelta(days=43)),
    Invoice("draft-credited-note", "ale", "finalized", None, type="credit_note", credits="draft-credited"),
)
AUDITED = ("draft-with-audit", "due-yesterday")
EMERGENCY = {"draft-with-emergency-number": "9900000001", "oldest": "9900000002"}

# Ordinary business: due dates on both sides of today, and 200 days back.
ORDINARY_STATUSES: tuple[Status, ...] = (
    *("sent", "paid", "finalized", "sent", "partially_paid", "paid", "sent"),
    *("cancelled", "sent", "paid", "draft", "sent"),
)
ORDINARY_PER_BUSINESS = 13
ORDINARY_CURRENCIES = {("gan", 3): "USD", ("ale", 6): "EUR", ("giva", 8): "USD"}
MARKED_BEFORE_DAYS = -45
AHEAD_EVERY = 4


def sample_invoices() -> tuple[Invoice, ...]:
    """Return every document, credited ones before those that credit them."""
    return (
        *(*BOUNDARIES, *ALREADY_MARKED, *OWED, *INCOMPLETE, *DRAFTS),
        *_each_status_of_each_type(),
        *(
            _ordinary(business, position, number)
            for position, business in enumerate(BUSINESSES)
            for number in range(ORDINARY_PER_BUSINESS)
        ),
    )


def _each_status_of_each_type() -> Iterator[Invoice]:
    businesses = [b.key for b in BUSINESSES if b.key != "roga" and not b.closed]
    for number, (status, type_) in enumerate((s, t) for s in STATUSES for t in DOCUMENT_TYPES):
        business = businesses[number % len(businesses)]
        total = 10_000 + 4_321 * number
        due_in_days = 21 - 7 * (number % 9)
        paid = _payments(status, total)
        yield Invoice(f"{status}-{type_}", business, status, due_in_days, total, type_, paid)


def _ordinary(business: Business, position: int, number: int) -> Invoice:
    status = ORDINARY_STATUSES[(number + position) % len(ORDINARY_STATUSES)]
    late_days = (position * 37 + number * 23) % 200 + 1
    is_ahead = business.key == "roga" or number % AHEAD_EVERY == AHEAD_EVERY - 1
    due_in_days = late_days % 25 if is_ahead else -late_days
    total = 20_000 + (position * 104_729 + number * 7_919 * 13) % 900_000
    return Invoice(
        f"{business.key}-{number}",
        business.key,
        status,
        due_in_days,
        total,
        paid_minor_units=_payments(status, total),
        marked=status in OPEN and due_in_days < MARKED_BEFORE_DAYS,
        currency=ORDINARY_CURRENCIES.get((business.key, number), "ILS"),
        customer=number % CUSTOMERS_PER_BUSINESS,
        items=1 + number % 4,
    )


def _payments(status: Status, total: int) -> tuple[int, ...]:
    if status == "paid":
        return (total // 2, total - total // 2)
    return (total // 3,) if status == "partially_paid" else ()


def invoice_rows(invoices: Sequence[Invoice], now: datetime, zone: ZoneInfo) -> Iterator[Row]:
    """
    Yield rows of `invoices`: id, business_id, customer_id, customer_name, customer_email, document_type,
    status, is_overdue, sequence_number, document_number, credited_invoice_id, sequence_group, currency,
    subtotal_, total_excl_vat_, vat_ and total_incl_vat_minor_units, invoice_date, issued_at, due_date,
    sent_at, paid_at, created_at, updated_at.
    """
    used: Counter[tuple[str, str]] = Counter()
    for invoice in invoices:
        numbered = invoice.numbered and not invoice.is_draft
        series = (invoice.business, SEQUENCE_GROUPS[invoice.type])
        used[series] += numbered
        number = FIRST_SEQUENCE_NUMBER + used[series] - 1 if numbered else None
        yield (
            *(invoice.id, invoice.owner.id, *_customer(invoice)),
            *(invoice.type, invoice.status, invoice.marked, number, _document_number(invoice, number)),
            identify("invoice", invoice.credits) if invoice.credits else None,
            None if number is None else series[1],
            *_amounts(invoice),
            *_dates(invoice, now, zone),
        )


def _customer(invoice: Invoice) -> Row:
    if invoice.customer is None:
        return None, None, None
    customer = customers_of(invoice.owner)[invoice.customer]
    return customer.id, customer.name if invoice.customer_named else None, customer.email


def _document_number(invoice: Invoice, number: int | None) -> str | None:
    if number is None:
        return None
    return f"CN-{number}" if invoice.type == "credit_note" else str(number)


def _dates(invoice: Invoice, now: datetime, zone: ZoneInfo) -> Row:
    today = now.astimezone(zone).date()
    due = None if invoice.due_in_days is None else today + timedelta(days=invoice.due_in_days)
    if invoice.is_draft:
        changed_at = now - invoice.idle
        return changed_at.astimezone(zone).date(), None, due, None, None, changed_at, changed_at
    dated = _invoice_date(invoice, today)
    issued_at = datetime.combine(dated, time(10, 30), zone).astimezone(UTC)
    sent_at = None if invoice.status == "finalized" else issued_at + timedelta(minutes=2)
    paid_at = issued_at + timedelta(days=1) if invoice.status == "paid" else None
    return dated, issued_at, due, sent_at, paid_at, issued_at, paid_at or sent_at or issued_at


def _invoice_date(invoice: Invoice, today: date) -> date:
    return today + timedelta(days=invoice.due_in_days or 0) - TERM


def _amounts(invoice: Invoice) -> Row:
    excluding = _without_vat(invoice)
    vat = invoice.total_minor_units - excluding
    return invoice.currency, excluding, excluding, vat, invoice.total_minor_units


def _without_vat(invoice: Invoice) -> int:
    return round(Decimal(invoice.total_minor_units) * 10_000 / (10_000 + invoice.owner.vat_rate_basis_points))


def item_rows(invoices: Sequence[Invoice]) -> Iterator[Row]:
    """
    Yield rows of `invoice_items`: id, invoice_id, position, description, quantity,
    unit_price_minor_units, vat_rate_basis_points, line_total_, vat_amount_ and
    line_total_incl_vat_minor_units. The lines of a document add up to it.
    """
    for invoice in invoices:
        excluding = _shares(_without_vat(invoice), invoice.items)
        including = _shares(invoice.total_minor_units, invoice.items)
        for position, (without, total) in enumerate(zip(excluding, including, strict=True), start=1):
            yield (
                *(identify("item", invoice.key, position), invoice.id, position, f"שירות לדוגמה {position}"),
                *(Decimal(1), without, invoice.owner.vat_rate_basis_points),
                *(without, total - without, total),
            )


def _shares(amount: int, parts: int) -> list[int]:
    """Split an amount into equal parts; the last takes what is left over."""
    if not parts:
        return []
    share = amount // parts
    return [share] * (parts - 1) + [amount - share * (parts - 1)]


def payment_rows(invoices: Sequence[Invoice], now: datetime, zone: ZoneInfo) -> Iterator[Row]:
    """
    Yield rows of `invoice_payments`: id, invoice_id, amount_minor_units, paid_at, method,
    recorded_by_user_id, created_at.
    """
    today = now.astimezone(zone).date()
    methods = ("transfer", "credit", "check", "cash", "other")
    for invoice in invoices:
        members = (*invoice.owner.owners, *invoice.owner.others)
        paid_on = _invoice_date(invoice, today) + timedelta(days=1)
        paid_at = datetime.combine(paid_on, time(12, 0), zone).astimezone(UTC)
        for number, amount in enumerate(invoice.paid_minor_units):
            yield (
                *(identify("payment", invoice.key, number), invoice.id, amount, paid_on),
                *(methods[(number + len(invoice.key)) % len(methods)], identify("user", members[0]), paid_at),
            )


def audit_rows(invoices: Sequence[Invoice], now: datetime) -> Iterator[Row]:
    """Yield rows of `shaam_audit_log`: id, business_id, invoice_id, result, created_at."""
    for invoice in invoices:
        if invoice.key in AUDITED:
            asked_at = now - timedelta(days=45)
            yield identify("audit", invoice.key), invoice.owner.id, invoice.id, "rejected", asked_at


def emergency_rows(invoices: Sequence[Invoice], now: datetime) -> Iterator[Row]:
    """
    Yield rows of `emergency_allocation_numbers`: id, business_id, number, used, used_for_invoice_id,
    reported, created_at.
    """
    for invoice in invoices:
        if invoice.key in EMERGENCY:
            number = EMERGENCY[invoice.key]
            used_at = now - timedelta(days=44)
            yield identify("emergency", number), invoice.owner.id, number, True, invoice.id, False, used_at
