"""
What the service does in BON's tables, column by column, and what it takes each column for.

`check` asks the database whether the role that works may do it. `tests/database/test_contract.py` compares this with
the statements themselves: a role with these privileges executes each of them, and with one less it does not. Where
they differ, it says which line to write here. A job without SQL on BON's tables has no entry.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

__all__ = ["COLUMNS", "USES", "WORDS", "Kind", "Privilege", "Uses", "privileges", "tables_of"]


class Kind(StrEnum):
    """What a column holds; the value is how a person is told of it."""

    ID = "uuid"
    TEXT = "text"
    WORD = "an enumeration, or text"
    DAY = "date"
    INSTANT = "timestamp with time zone"
    WHOLE = "integer"
    FLAG = "boolean"

    def takes(self, base_type: str, *, is_enum: bool) -> bool:
        """Return whether a column of this type, as `format_type` writes it without its length, is as good."""
        return base_type.rpartition(".")[2] in ALIKE.get(self, {self.value}) or (self is Kind.WORD and is_enum)


TEXTS = frozenset({"text", "character varying", "character", "citext"})
ALIKE: Mapping[Kind, frozenset[str]] = {
    Kind.TEXT: TEXTS,
    Kind.WORD: TEXTS,
    Kind.WHOLE: frozenset({"smallint", "integer", "bigint"}),
}

COLUMNS: Mapping[str, Mapping[str, Kind]] = {
    "users": {"id": Kind.ID, "email": Kind.TEXT},
    "sessions": {"id": Kind.ID, "expires_at": Kind.INSTANT},
    "businesses": {
        "id": Kind.ID,
        "name": Kind.TEXT,
        "email": Kind.TEXT,
        "is_active": Kind.FLAG,
        "deleted_at": Kind.INSTANT,
    },
    "user_businesses": {"user_id": Kind.ID, "business_id": Kind.ID, "role": Kind.WORD},
    "customers": {"id": Kind.ID, "name": Kind.TEXT},
    "invoices": {
        "id": Kind.ID,
        "business_id": Kind.ID,
        "customer_id": Kind.ID,
        "customer_name": Kind.TEXT,
        "document_type": Kind.WORD,
        "status": Kind.WORD,
        "is_overdue": Kind.FLAG,
        "document_number": Kind.TEXT,
        "sequence_number": Kind.WHOLE,
        "credited_invoice_id": Kind.ID,
        "due_date": Kind.DAY,
        "currency": Kind.TEXT,
        "total_incl_vat_minor_units": Kind.WHOLE,
        "updated_at": Kind.INSTANT,
    },
    "invoice_items": {"invoice_id": Kind.ID},
    "invoice_payments": {"invoice_id": Kind.ID, "amount_minor_units": Kind.WHOLE},
    "business_shaam_credentials": {
        "business_id": Kind.ID,
        "encrypted_access_token": Kind.TEXT,
        "encrypted_refresh_token": Kind.TEXT,
        "token_expires_at": Kind.INSTANT,
        "scope": Kind.TEXT,
        "needs_reauth": Kind.FLAG,
        "updated_at": Kind.INSTANT,
    },
    "shaam_audit_log": {"invoice_id": Kind.ID},
    "emergency_allocation_numbers": {"used_for_invoice_id": Kind.ID},
}
"""Each column that some statement names, by table of schema `public`."""

WORDS: Mapping[tuple[str, str], frozenset[str]] = {
    ("user_businesses", "role"): frozenset({"owner"}),
    ("invoices", "document_type"): frozenset({"receipt", "tax_invoice_receipt", "credit_note"}),
    ("invoices", "status"): frozenset(
        {"draft", "finalized", "sending", "sent", "paid", "partially_paid", "cancelled", "credited"}
    ),
}
"""The words that statements name. An enumeration that lacks one makes each such statement an error."""


@dataclass(frozen=True, slots=True)
class Uses:
    """What a job does in one table."""

    reads: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    inserts: tuple[str, ...] = ()
    deletes: bool = False
    locks: str | None = None
    """It locks rows and changes nothing in them: UPDATE of any column is enough, and this one is to be granted."""


class Privilege(NamedTuple):
    """What a role needs: `lock` is UPDATE of any column, and `delete` has no column."""

    table: str
    kind: str
    column: str | None


PEOPLE = {"user_businesses": Uses(("user_id", "business_id", "role")), "users": Uses(("id", "email"))}
CREDIT_NOTES = ("business_id", "status", "document_type", "credited_invoice_id", "currency", "due_date")
DIGEST = {
    "invoices": Uses(("id", *CREDIT_NOTES, "total_incl_vat_minor_units")),
    "invoice_payments": Uses(("invoice_id", "amount_minor_units")),
    "businesses": Uses(("id", "email", "is_active", "deleted_at")),
    **PEOPLE,
}
TOKENS = {
    "businesses": Uses(("id", "is_active", "deleted_at")),
    "business_shaam_credentials": Uses(
        (
            *("business_id", "encrypted_access_token", "encrypted_refresh_token"),
            *("token_expires_at", "scope", "needs_reauth", "updated_at"),
        ),
        changes=(
            *("encrypted_access_token", "encrypted_refresh_token"),
            *("token_expires_at", "scope", "needs_reauth", "updated_at"),
        ),
    ),
}

USES: Mapping[str, Mapping[str, Uses]] = {
    "overdue-detection": {
        "invoices": Uses(
            ("id", "business_id", "due_date", "is_overdue", "status"), changes=("is_overdue", "updated_at")
        ),
    },
    "overdue-digest": DIGEST,
    "rehearsal": {
        **DIGEST,
        "invoices": Uses(("id", *CREDIT_NOTES, "total_incl_vat_minor_units", "is_overdue", "updated_at")),
        "sessions": Uses(("expires_at",)),
    },
    "send-overdue-digest": {
        "invoices": Uses(
            (
                *("id", *CREDIT_NOTES, "total_incl_vat_minor_units"),
                *("document_number", "sequence_number", "customer_id", "customer_name"),
            )
        ),
        "invoice_payments": Uses(("invoice_id", "amount_minor_units")),
        "customers": Uses(("id", "name")),
        "businesses": Uses(("id", "name", "email", "is_active", "deleted_at")),
        **PEOPLE,
    },
    "notify-reauth": {
        "businesses": Uses(("id", "name", "email", "is_active", "deleted_at")),
        "business_shaam_credentials": Uses(("business_id", "needs_reauth")),
        **PEOPLE,
    },
    "draft-cleanup": {
        "invoices": Uses(
            ("id", "business_id", "status", "updated_at", "credited_invoice_id"), deletes=True, locks="updated_at"
        ),
        "invoice_items": Uses(("invoice_id",)),
        "invoice_payments": Uses(("invoice_id",)),
        "shaam_audit_log": Uses(("invoice_id",)),
        "emergency_allocation_numbers": Uses(("used_for_invoice_id",)),
    },
    "session-cleanup": {"sessions": Uses(("id", "expires_at"), deletes=True, locks="expires_at")},
    "shaam-token-refresh": TOKENS,
    "shaam-refresh-batch": TOKENS,
    "ledger-pruning": {"business_shaam_credentials": Uses(("business_id", "encrypted_refresh_token"))},
    "metrics": {
        "businesses": Uses(("id", "is_active", "deleted_at")),
        "business_shaam_credentials": Uses(("business_id", "token_expires_at", "needs_reauth")),
    },
    "commands": {"businesses": Uses(("id",))},
}
"""By job, then by table of schema `public`; `metrics` and `commands` are those of the service itself."""


def tables_of(jobs: Iterable[str]) -> frozenset[str]:
    """Return the tables of BON's that some of these jobs need."""
    return frozenset(table for job in jobs for table in USES.get(job, ()))


def privileges(user: str) -> Iterator[Privilege]:
    """Yield what a job, or another of USES, needs."""
    for table, uses in USES[user].items():
        yield from (Privilege(table, "select", column) for column in uses.reads)
        yield from (Privilege(table, "update", column) for column in uses.changes)
        yield from (Privilege(table, "insert", column) for column in uses.inserts)
        if uses.locks is not None:
            yield Privilege(table, "lock", uses.locks)
        if uses.deletes:
            yield Privilege(table, "delete", None)
