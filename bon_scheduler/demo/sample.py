"""
Sample data worth looking at, and what the jobs must make of it.

The same `now` gives the same rows in every database. Expectations are worked
out from the list of documents, not by the jobs' SQL, so that one checks the
other.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from importlib import resources
from uuid import UUID
from zoneinfo import ZoneInfo

from bon_scheduler.demo.sample_businesses import (
    BUSINESS_BY_KEY,
    DUE_TOKENS,
    RESTING_TOKENS,
    SPOILED,
    Row,
    Spoil,
    business_rows,
    credential_rows,
    customer_rows,
    member_rows,
    recipients_of,
    session_rows,
    user_rows,
)
from bon_scheduler.demo.sample_invoices import (
    AUDITED,
    DRAFT_LIFETIME,
    EMERGENCY,
    OPEN,
    SETTLED,
    Invoice,
    audit_rows,
    emergency_rows,
    invoice_rows,
    item_rows,
    payment_rows,
    sample_invoices,
)
from bon_scheduler.jobs import Connection

__all__ = ["SampleFacts", "Spoil", "create_tables", "load_sample", "sample_refresh_token", "spoiled_businesses"]

COLUMNS = {
    "users": "id email name last_login_at created_at updated_at",
    "businesses": "id name business_type registration_number vat_number email default_vat_rate is_active"
    " deleted_at created_by_user_id created_at updated_at",
    "user_businesses": "id user_id business_id role created_at updated_at",
    "customers": "id business_id name email is_active deleted_at created_at updated_at",
    "sessions": "id user_id created_at last_accessed_at expires_at",
    "business_shaam_credentials": "id business_id encrypted_access_token encrypted_refresh_token"
    " token_expires_at scope needs_reauth created_at updated_at",
    "invoices": "id business_id customer_id customer_name customer_email document_type status is_overdue"
    " sequence_number document_number credited_invoice_id sequence_group currency"
    " subtotal_minor_units total_excl_vat_minor_units vat_minor_units total_incl_vat_minor_units"
    " invoice_date issued_at due_date sent_at paid_at created_at updated_at",
    "invoice_items": "id invoice_id position description quantity unit_price_minor_units"
    " vat_rate_basis_points line_total_minor_units vat_amount_minor_units line_total_incl_vat_minor_units",
    "invoice_payments": "id invoice_id amount_minor_units paid_at method recorded_by_user_id created_at",
    "shaam_audit_log": "id business_id invoice_id result created_at",
    "emergency_allocation_numbers": "id business_id number used used_for_invoice_id reported created_at",
}


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What was loaded, and what each job must do to it when its fire time is `now`."""

    now: datetime
    today: date
    """The Israeli calendar date of `now`."""
    rows: Mapping[str, int]
    """How many rows each table was given."""
    marked: int
    cleared: int
    drafts_deleted: int
    draft_items: int
    """How many items go with the deleted drafts."""
    drafts_kept: int
    """How many drafts are stale and yet kept."""
    sessions_expired: int
    digest_recipients: Mapping[UUID, frozenset[str]]
    """Who is told, in lower case, for each business that gets a digest; empty: there is nobody to tell."""
    digest_invoices: int
    shaam_due: Mapping[UUID, str]
    """The refresh token, in clear, of each business whose tokens are due."""
    spoiled: Mapping[UUID, Spoil]
    """Which of the due SHAAM must answer how, other than with new tokens."""
    consent_letters: int
    """To how many owners it must be said that SHAAM wants their consent again."""


def sample_refresh_token(business: UUID) -> str:
    """Return a refresh token, in clear, for a business that no simulator has issued one."""
    return f"sample-refresh-{business}"


def spoiled_businesses() -> dict[UUID, Spoil]:
    """Return the businesses for which the authority is to fail, and how."""
    return {BUSINESS_BY_KEY[key].id: spoil for key, spoil in SPOILED.items()}


async def create_tables(connection: Connection) -> None:
    """Create BON's tables in schema `public` of an empty database."""
    await connection.execute(resources.files("bon_scheduler.demo").joinpath("bon.sql").read_text("utf-8"))


async def load_sample(
    connection: Connection,
    *,
    now: datetime,
    zone: ZoneInfo,
    encrypt: Callable[[str], str],
    refresh_tokens: Callable[[UUID], str] = sample_refresh_token,
) -> SampleFacts:
    """
    Fill BON's empty tables, in one transaction; return what the jobs must make of them.

    `now` is aware; `encrypt` is how BON stores a token; `refresh_tokens` is asked once for each
    business that has consented to SHAAM, due or not.
    """
    invoices = sample_invoices()
    consented = [BUSINESS_BY_KEY[key].id for key in (*DUE_TOKENS, *RESTING_TOKENS)]
    tokens = {business: refresh_tokens(business) for business in consented}
    tables: dict[str, Iterable[Row]] = {
        "users": user_rows(now),
        "businesses": business_rows(now),
        "user_businesses": member_rows(now),
        "customers": customer_rows(now),
        "sessions": session_rows(now),
        "business_shaam_credentials": credential_rows(now, encrypt, tokens),
        "invoices": invoice_rows(invoices, now, zone),
        "invoice_items": item_rows(invoices),
        "invoice_payments": payment_rows(invoices, now, zone),
        "shaam_audit_log": audit_rows(invoices, now),
        "emergency_allocation_numbers": emergency_rows(invoices, now),
    }
    loaded = {table: list(rows) for table, rows in tables.items()}
    async with connection.transaction():
        for table, rows in loaded.items():
            await connection.copy_records_to_table(
                table, records=rows, columns=COLUMNS[table].split(), schema_name="public"
            )
    return _facts(now, zone, loaded, invoices, tokens)


def _facts(
    now: datetime,
    zone: ZoneInfo,
    loaded: Mapping[str, list[Row]],
    invoices: tuple[Invoice, ...],
    tokens: Mapping[UUID, str],
) -> SampleFacts:
    stale = [i for i in invoices if i.is_draft and i.idle > DRAFT_LIFETIME]
    kept = [i for i in stale if _is_worth_keeping(i, invoices)]
    told = [i for i in invoices if _is_in_digest(i, invoices)]
    expires_at = COLUMNS["sessions"].split().index("expires_at")
    return SampleFacts(
        now=now,
        today=now.astimezone(zone).date(),
        rows={table: len(rows) for table, rows in loaded.items()},
        marked=sum(_is_late(i) and not i.marked for i in invoices),
        cleared=sum(i.marked and (i.status in SETTLED or _was_moved(i)) for i in invoices),
        drafts_deleted=len(stale) - len(kept),
        draft_items=sum(i.items for i in stale if i not in kept),
        drafts_kept=len(kept),
        sessions_expired=sum(_instant(row[expires_at]) < now for row in loaded["sessions"]),
        digest_recipients={i.owner.id: recipients_of(i.owner) for i in told},
        digest_invoices=len(told),
        shaam_due={BUSINESS_BY_KEY[key].id: tokens[BUSINESS_BY_KEY[key].id] for key in DUE_TOKENS},
        spoiled=spoiled_businesses(),
        consent_letters=sum(
            len(recipients_of(BUSINESS_BY_KEY[key])) for key, spoil in SPOILED.items() if spoil == "invalid_grant"
        ),
    )


def _instant(value: object) -> datetime:
    if not isinstance(value, datetime):
        raise TypeError(f"{value!r} is not an instant")
    return value


def _is_late(invoice: Invoice) -> bool:
    return invoice.status in OPEN and invoice.due_in_days is not None and invoice.due_in_days < 0


def _was_moved(invoice: Invoice) -> bool:
    return invoice.status in OPEN and not _is_late(invoice)


def _is_worth_keeping(draft: Invoice, invoices: tuple[Invoice, ...]) -> bool:
    return (
        bool(draft.paid_minor_units)
        or draft.key in AUDITED
        or draft.key in EMERGENCY
        or any(i.credits == draft.key for i in invoices)
    )


def _is_in_digest(invoice: Invoice, invoices: tuple[Invoice, ...]) -> bool:
    credited = sum(i.total_minor_units for i in invoices if i.credits == invoice.key and i.status == "finalized")
    owed = invoice.total_minor_units - sum(invoice.paid_minor_units) - credited
    return _is_late(invoice) and invoice.type == "tax_invoice" and owed > 0 and not invoice.owner.closed
