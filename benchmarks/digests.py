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
from collections.abc import Mapping
from datetime import date

from bon_scheduler import database, declared, ledger, service
from bon_scheduler.config import Settings
from bon_scheduler.database import Pool
from bon_scheduler.demo.postgres import find_binaries, running_postgres
from bon_scheduler.demo.sample import create_tables
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import Request
from bon_scheduler.log import configure_logging
from handlers.digest import render_digest
from handlers.digest.statement import read_recipients, read_statement
from handlers.overdue_digest import overdue_digest

AS_OF = date(2026, 11, 23)
BULK_RUNS = 100_000
EMPTY_LEDGER = "truncate bon_scheduler.runs cascade"

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
    select b.id, 'tax_invoice', 'sent', date '2025-01-01', $2::date - (1 + n * 5 % 300), true, 'לקוח ' || n || ' בע״מ',
           'INV-2026-' || n, 10000 + (n * 7919 + abs(hashtext(b.id::text)::bigint)) % 5000000
      from businesses b cross join generate_series(1, $1::int) n
"""
MAKE_PAYMENTS = """
    insert into invoice_payments (invoice_id, amount_minor_units, paid_at, method)
    select id, 5000, date '2026-01-01', 'transfer' from invoices where abs(hashtext(id::text)::bigint) % 5 = 0
"""
MAKE_CREDIT_NOTES = """
    insert into invoices (business_id, document_type, status, invoice_date, credited_invoice_id,
                          total_incl_vat_minor_units)
    select business_id, 'credit_note', 'finalized', date '2026-01-01', id, 1000
      from invoices where abs(hashtext(id::text)::bigint) % 20 = 1
"""


def say(figures: Mapping[str, object]) -> None:
    """Print one line of JSON at once."""
    sys.stdout.write(f"{json.dumps(figures)}\n")
    sys.stdout.flush()


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
        run_id = await ledger.enqueue(connection, Request("overdue-digest", {"as_of": str(AS_OF)}))
        if run_id is None:
            raise LookupError("the ledger gave no run for a request without a key")
        before, started = peak_mib(), time.perf_counter()
        answer = await parts.runner.claim_one(connection, run_id, overdue_digest)
        if answer.claim is None:
            raise LookupError(f"the run could not be claimed: {answer.verdict}")
        await parts.runner.execute(overdue_digest, answer.claim, overdue_digest.retry)
        seconds = time.perf_counter() - started
        asked = await connection.fetchval("select count(*) from bon_scheduler.runs where priority < 0")
        await connection.execute(EMPTY_LEDGER)
    return {"asked_for": asked, "seconds": round(seconds, 1), "memory_mib": round(peak_mib() - before, 1)}


async def measure_bulk(pool: Pool) -> dict[str, float]:
    """Ask for 100,000 runs in one transaction, from a generator, as a handler would."""
    async with pool.acquire() as connection:
        cause = await ledger.enqueue(connection, Request("overdue-digest", {"as_of": str(AS_OF)}))
        if cause is None:
            raise LookupError("the ledger gave no run for a request without a key")
        requests = (({"business_id": str(n), "as_of": str(AS_OF)}, f"{cause}/{n}") for n in range(BULK_RUNS))
        before, started = peak_mib(), time.perf_counter()
        async with connection.transaction():
            new = await ledger.enqueue_many(
                connection, "send-overdue-digest", requests, priority=-10, asked_by="benchmark", caused_by=cause
            )
        seconds = time.perf_counter() - started
        await connection.execute(EMPTY_LEDGER)
    return {"runs": new, "seconds": round(seconds, 1), "memory_mib": round(peak_mib() - before, 1)}


async def measure_digests(pool: Pool, most: int) -> dict[str, float]:
    """Read and render the digest of each business, one after another."""
    reading, rendering, letters, size = [], [], 0, 0
    started = time.perf_counter()
    async with pool.acquire() as connection:
        rows = await connection.fetch("select id from businesses order by id limit $1", most)
        idle = peak_mib()
        for row in rows:
            begun = time.perf_counter()
            statement = await read_statement(connection, row["id"], AS_OF)
            recipients = await read_recipients(connection, row["id"])
            read = time.perf_counter()
            if statement is None:
                continue
            _, text, html = render_digest(statement, language="he", app_origin="https://app.bon.example")
            reading.append((read - begun) * 1000)
            rendering.append((time.perf_counter() - read) * 1000)
            letters += len(recipients)
            size = max(size, len(html.encode()) + len(text.encode()))
    return {
        "digests": len(rendering),
        "letters": letters,
        "seconds": round(time.perf_counter() - started, 1),
        "read_ms_median": round(statistics.median(reading), 2),
        "render_ms_median": round(statistics.median(rendering), 2),
        "render_ms_p99": round(statistics.quantiles(rendering, n=100)[98], 2),
        "largest_kib": round(size / 1024, 1),
        "memory_above_idle_mib": round(peak_mib() - idle, 1),
    }


async def measure(url: str, businesses: int, invoices: int, most: int) -> None:
    """Fill a database and measure everything, a line of JSON each."""
    settings = declared.read_settings({"DATABASE_URL": url, "LOG_LEVEL": "error"})
    configure_logging(settings.log_level, settings.log_format)
    async with database.connect(url) as connection:
        await create_tables(connection)
    await service.prepare(settings)
    async with database.open_pool(settings) as pool:
        say({"bulk": await measure_bulk(pool)})
        async with pool.acquire() as connection:
            await fill(connection, businesses, invoices)
        say({"idle_mib": round(peak_mib(), 1)})
        say({"asking": await measure_asking(settings)})
        say({"digests": await measure_digests(pool, most)})


def main() -> None:
    """Read the options, and measure on a server of our own."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--businesses", type=int, default=25_000)
    options.add_argument("--invoices", type=int, default=60, help="overdue ones of each business")
    options.add_argument("--digests", type=int, default=25_000, help="how many are read and rendered at most")
    chosen = options.parse_args()
    with running_postgres(find_binaries()) as url:
        asyncio.run(measure(url, chosen.businesses, chosen.invoices, chosen.digests))


if __name__ == "__main__":
    main()
