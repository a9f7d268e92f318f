"""
What the performance claims about digests rest on: `python -m benchmarks.digests [--businesses N] [--invoices N]`.

On an embedded PostgreSQL with N businesses of N overdue invoices each (25,000 of 60 by default, 1.5 million in all):
how long it takes to find whom to write to and to ask for all their runs, to read and render each digest, how far
memory grows above idle; and how long 100,000 runs take to be asked for in bulk. Sends nothing.
"""

import argparse
import asyncio
import json
import resource
import statistics
import sys
import time
from datetime import UTC, date, datetime
from pathlib import Path
from uuid import UUID

from bon_scheduler import db, ledger, service
from bon_scheduler.clock import SystemClock
from bon_scheduler.config import Settings
from bon_scheduler.db import Pool
from bon_scheduler.demo.postgres import find_binaries, running_postgres
from bon_scheduler.demo.sample import create_tables
from bon_scheduler.dry import DryContext
from bon_scheduler.jobs import Connection
from handlers.digest import render_digest
from handlers.overdue_digest import FIND_OWED, OverdueDigest, overdue_digest
from handlers.statement import read_recipients, read_statement

AS_OF = date(2026, 11, 23)
BULK_RUNS = 100_000
EMPTY_QUEUE = "truncate bon_scheduler.runs, bon_scheduler.pgqueuer cascade"

# $1 businesses: int.
MAKE_BUSINESSES = """
    with people as (
        insert into users (email, name)
        select 'owner' || n || '@shop.example', 'Owner' from generate_series(1, $1::int) n
        returning id, email
    ), shops as (
        insert into businesses (name, business_type, registration_number, created_by_user_id)
        select 'עסק מספר ' || p.email, 'limited_company', p.email, p.id from people p
        returning id, created_by_user_id
    )
    insert into user_businesses (user_id, business_id, role)
    select created_by_user_id, id, 'owner' from shops
"""
# $1 invoices of each business: int, $2 as_of: date. Every fifth is partly paid, every twentieth partly credited.
MAKE_INVOICES = """
    insert into invoices (business_id, document_type, status, invoice_date, due_date, is_overdue, customer_name,
                          document_number, total_incl_vat_minor_units)
    select b.id, 'tax_invoice', 'sent', date '2025-01-01', $2 - (1 + n * 5 % 300), true, 'לקוח ' || n || ' בע״מ',
           'INV-2026-' || n, 10000 + (n * 7919 + abs(hashtext(b.id::text))) % 5000000
      from businesses b cross join generate_series(1, $1::int) n
"""
MAKE_PAYMENTS = """
    insert into invoice_payments (invoice_id, amount_minor_units, paid_at, method)
    select id, 5000, date '2026-01-01', 'transfer' from invoices where abs(hashtext(id::text)) % 5 = 0
"""
MAKE_CREDIT_NOTES = """
    insert into invoices (business_id, document_type, status, invoice_date, credited_invoice_id,
                          total_incl_vat_minor_units)
    select business_id, 'credit_note', 'finalized', date '2026-01-01', id, 1000
      from invoices where abs(hashtext(id::text)) % 20 = 1
"""


def say(text: str) -> None:
    """Print one line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def resident_mib() -> float:
    """Return how much memory this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    """Return the most memory this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def fill(connection: Connection, businesses: int, invoices: int) -> None:
    """Make the tables' rows."""
    await connection.execute(MAKE_BUSINESSES, businesses)
    await connection.execute(MAKE_INVOICES, invoices, AS_OF)
    await connection.execute(MAKE_PAYMENTS)
    await connection.execute(MAKE_CREDIT_NOTES)
    await connection.execute("vacuum analyze")


async def measure_asking(settings: Settings) -> dict[str, float]:
    """Run `overdue-digest` in earnest: find everybody, ask for all runs, commit."""
    async with service.machinery(settings) as parts, parts.pool.acquire() as connection:
        run_id = await ledger.enqueue(connection, ledger.Request("overdue-digest", {"as_of": str(AS_OF)}))
        if run_id is None:
            raise LookupError("no run without a key")
        started = time.perf_counter()
        await parts.runner.attempt(service_delivery(run_id))
        seconds = time.perf_counter() - started
        asked = await connection.fetchval("select count(*) from bon_scheduler.pgqueuer where entrypoint like 'send%'")
        await connection.execute(EMPTY_QUEUE)
    return {"asked_for": asked, "seconds": round(seconds, 2)}


def service_delivery(run_id: UUID) -> "service.Delivery":
    """Return what the queue would have brought."""
    return service.Delivery(run_id, overdue_digest)
