"""A throw-away database with BON's tables and our schema, and rows to put in it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib import resources
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from bon_scheduler.db import connect, migrating
from bon_scheduler.demo.postgres import find_binaries, running_postgres

AS_OF = date(2026, 11, 23)


@contextmanager
def bon_database() -> Iterator[str]:
    """Yield the URL of a server of its own with BON's tables and schema `bon_scheduler`."""
    with running_postgres(find_binaries()) as url:
        asyncio.run(_install(url))
        yield url


async def _install(url: str) -> None:
    async with connect(url) as connection:
        await connection.execute(resources.files("bon_scheduler.demo").joinpath("bon.sql").read_text("utf-8"))
    async with migrating(url):
        pass
    async with connect(url) as connection:
        await connection.execute("insert into bon_scheduler.jobs (name) values ('send-overdue-digest')")


async def a_run(pool: "asyncpg.Pool[asyncpg.Record]", state: str = "running") -> UUID:
    """Put a run of `send-overdue-digest` in the ledger."""
    return UUID(
        str(
            await pool.fetchval(
                "insert into bon_scheduler.runs (job, origin, state) "
                "values ('send-overdue-digest', 'run', $1::text::bon_scheduler.run_state) returning id",
                state,
            )
        )
    )


@dataclass(frozen=True, slots=True)
class World:
    """Rows of BON's, made one at a time."""

    pool: "asyncpg.Pool[asyncpg.Record]"

    async def insert(self, table: str, **values: Any) -> UUID:
        """Insert one row; returns its id."""
        columns = ", ".join(values)
        types = {"status": "invoice_status", "document_type": "document_type", "role": "business_role"}
        types |= {"method": "payment_method", "business_type": "business_type"}
        marks = ", ".join(
            f"${n}::text::public.{types[name]}" if name in types else f"${n}" for n, name in enumerate(values, 1)
        )
        query = f"insert into public.{table} ({columns}) values ({marks}) returning id"
        return UUID(str(await self.pool.fetchval(query, *values.values())))

    async def user(self, email: str) -> UUID:
        return await self.insert("users", email=email, name="User")

    async def business(self, *, owners: tuple[str, ...] = (), **values: Any) -> UUID:
        """Make a business with an owner for each address."""
        creator = await self.user(f"{uuid4()}@creator.example")
        defaults = {"name": "Studio", "business_type": "limited_company", "registration_number": str(uuid4())}
        business = await self.insert("businesses", **{**defaults, "created_by_user_id": creator, **values})
        for email in owners:
            await self.member(business, email, "owner")
        return business

    async def member(self, business: UUID, email: str, role: str) -> None:
        await self.insert("user_businesses", user_id=await self.user(email), business_id=business, role=role)

    async def invoice(self, business: UUID, **values: Any) -> UUID:
        """Make an invoice of 100.00 ILS, sent, due the day before AS_OF."""
        defaults = {
            "document_type": "tax_invoice",
            "status": "sent",
            "invoice_date": date(2026, 9, 1),
            "due_date": date(2026, 11, 22),
            "total_incl_vat_minor_units": 10_000,
        }
        return await self.insert("invoices", business_id=business, **{**defaults, **values})

    async def payment(self, invoice: UUID, amount: int) -> None:
        payer = await self.user(f"{uuid4()}@payer.example")
        await self.insert(
            "invoice_payments",
            invoice_id=invoice,
            amount_minor_units=amount,
            paid_at=date(2026, 11, 1),
            method="transfer",
            recorded_by_user_id=payer,
        )
