"""Rows of BON's for a test: each function inserts one, with defaults that a keyword overrides, and returns its id."""

from datetime import UTC, date, datetime
from itertools import count
from uuid import UUID, uuid4

from tests.conftest import Connection

LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
"""When a row was last touched, unless told."""
numbers = count(1)


async def insert(connection: Connection, table: str, values: dict[str, object]) -> UUID:
    marks = ", ".join(f"${n}" for n in range(1, len(values) + 1))
    query = f"insert into public.{table} ({', '.join(values)}) values ({marks}) returning id"
    return UUID(str(await connection.fetchval(query, *values.values())))


async def user(connection: Connection, **values: object) -> UUID:
    return await insert(connection, "users", {"email": f"user-{next(numbers)}@bon.example", "name": "User"} | values)


async def business(connection: Connection, **values: object) -> UUID:
    """Make a business that nobody owns and that has no address."""
    defaults = {
        "name": "Studio",
        "business_type": "limited_company",
        "registration_number": f"51{next(numbers):07}",
        "created_by_user_id": values.get("created_by_user_id") or await user(connection),
    }
    return await insert(connection, "businesses", defaults | values)


async def owner(connection: Connection, business_id: UUID, email: str, *, role: str = "owner") -> UUID:
    """Make a user of that address a member of the business; returns the user's id."""
    user_id = await user(connection, email=email)
    await insert(connection, "user_businesses", {"user_id": user_id, "business_id": business_id, "role": role})
    return user_id


async def customer(connection: Connection, business_id: UUID, **values: object) -> UUID:
    return await insert(connection, "customers", {"business_id": business_id, "name": "Customer"} | values)


async def invoice(connection: Connection, business_id: UUID, **values: object) -> UUID:
    """Make a tax invoice of 100.00 ILS, sent, without a due date."""
    defaults = {
        "business_id": business_id,
        "document_type": "tax_invoice",
        "status": "sent",
        "invoice_date": date(2026, 1, 1),
        "total_incl_vat_minor_units": 10_000,
        "updated_at": LONG_AGO,
    }
    return await insert(connection, "invoices", defaults | values)


async def draft(connection: Connection, business_id: UUID, **values: object) -> UUID:
    """Make a draft that nobody has touched for a long time."""
    return await invoice(connection, business_id, **({"status": "draft"} | values))


async def item(connection: Connection, invoice_id: UUID, **values: object) -> UUID:
    defaults = {
        "invoice_id": invoice_id,
        "position": next(numbers),
        "description": "Work",
        "quantity": 1,
        "unit_price_minor_units": 10_000,
        "vat_rate_basis_points": 1800,
    }
    return await insert(connection, "invoice_items", defaults | values)


async def payment(connection: Connection, invoice_id: UUID, amount: int = 1_000, **values: object) -> UUID:
    """Record a payment of `amount` agorot."""
    defaults = {
        "invoice_id": invoice_id,
        "amount_minor_units": amount,
        "paid_at": date(2026, 2, 1),
        "method": "transfer",
    }
    return await insert(connection, "invoice_payments", defaults | values)


async def credit_note(connection: Connection, business_id: UUID, credited: UUID, **values: object) -> UUID:
    """Make a finalized credit note of 100.00 ILS for the invoice `credited`."""
    defaults = {"document_type": "credit_note", "status": "finalized", "credited_invoice_id": credited}
    return await invoice(connection, business_id, **(defaults | values))


async def audit_row(connection: Connection, business_id: UUID, invoice_id: UUID) -> UUID:
    values = {"business_id": business_id, "invoice_id": invoice_id, "result": "error"}
    return await insert(connection, "shaam_audit_log", values)


async def emergency_number(connection: Connection, business_id: UUID, invoice_id: UUID) -> UUID:
    values = {"business_id": business_id, "number": f"E{next(numbers)}", "used_for_invoice_id": invoice_id}
    return await insert(connection, "emergency_allocation_numbers", values)


async def session(connection: Connection, user_id: UUID, expires_at: datetime) -> UUID:
    values = {"id": uuid4(), "user_id": user_id, "last_accessed_at": LONG_AGO, "expires_at": expires_at}
    return await insert(connection, "sessions", values)
