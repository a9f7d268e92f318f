"""
What BON's indexes cost the jobs, and what others would: the measurements behind `check`'s row `indexes`.

    python -m benchmarks.indexes [--invoices 100000] [--rounds 3]

A server of its own (the embedded one, with fsync), BON's tables, a fifth of the invoices overdue. Every variant marks
the same ones in batches of 5,000 by the job's own statements, each round on a fresh copy of the database, the variants
in turns. Printed beside BON's indexes as they are: time and WAL of marking, the share of HOT updates, and how long the
next night takes to find that there is nothing to mark or clear. Then deleting stale drafts, without BON's two missing
indexes and with them.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from urllib.parse import urlsplit, urlunsplit

from bon_scheduler import database, service
from bon_scheduler.database import missing_indexes
from bon_scheduler.demo.postgres import find_binaries, running_postgres
from bon_scheduler.demo.sample import create_tables
from bon_scheduler.environment import load_settings
from bon_scheduler.jobs import Connection
from bon_scheduler.log import configure_logging
from handlers.draft_cleanup import DELETE_UNREFERENCED
from handlers.overdue_detection import FIND_OVERDUE, LEFT_MOVED, LEFT_OVERDUE, LEFT_SETTLED, MARK

AS_OF = date(2026, 11, 23)
BATCH = 5000
DRAFTS = 1000
BASE = "base"
MAKE_USER = "insert into public.users (email, name) values ('user@bon.example', 'User') returning id"
# $1 user, $2 how many.
MAKE_BUSINESSES = """
    insert into public.businesses (name, business_type, registration_number, created_by_user_id)
    select 'Studio', 'limited_company', 'b' || n, $1 from generate_series(1, $2::int) n
"""
# $1 how many. Of a hundred 20 are overdue and not marked, 10 are open, 3 stale drafts, 67 paid; in no order.
MAKE_INVOICES = """
    with shops as (select array_agg(id) as ids from public.businesses)
    insert into public.invoices (business_id, customer_name, customer_tax_id, customer_address, document_type, status,
                                 sequence_group, sequence_number, document_number, invoice_date, due_date,
                                 total_incl_vat_minor_units, updated_at)
    select ids[1 + n % cardinality(ids)], 'A customer of ordinary length', '512345678', 'Herzl 1, Tel Aviv',
           'tax_invoice',
           (case when kind < 30 then 'sent' when kind < 33 then 'draft' else 'paid' end)::public.invoice_status,
           'tax_document', n, 'INV-' || n, '2026-01-01',
           case when kind < 20 then date '2026-06-01' + n % 170 when kind < 30 then date '2027-01-01' end,
           10000, '2026-03-01'
      from (select n, abs(hashint4(n)) % 100 as kind from generate_series(1, $1::int) n) as all_of_them, shops
"""
WITHOUT_PREDICATES = (
    "drop index public.invoices_overdue_candidates_idx",
    "drop index public.invoices_overdue_reset_idx",
    "create index on public.invoices (due_date, status) where due_date is not null "
    "and status in ('finalized', 'sent', 'partially_paid')",
)
WITHOUT_UPDATED_AT = (
    "drop index public.invoices_draft_cleanup_idx",
    "create index on public.invoices (created_at) where status = 'draft'",
)
ROOM = ("alter table public.invoices set (fillfactor = 85)",)
VARIANTS: dict[str, Sequence[str]] = {
    "as BON has them": (),
    "room of 15 % in each page": ROOM,
    "no is_overdue in predicates": WITHOUT_PREDICATES,
    "no is_overdue, and room": WITHOUT_PREDICATES + ROOM,
    "no is_overdue, no updated_at": WITHOUT_PREDICATES + WITHOUT_UPDATED_AT,
    "no is_overdue, no updated_at, and room": WITHOUT_PREDICATES + WITHOUT_UPDATED_AT + ROOM,
}
WAL = "select pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
HOT = """
    select n_tup_hot_upd::float8 / greatest(n_tup_upd, 1) from pg_stat_user_tables where relname = 'invoices'
"""
SIZE = "select pg_indexes_size('public.invoices') / 1048576.0"
STALE = "select id from public.invoices where status = 'draft' order by id limit $1"


@dataclass(frozen=True, slots=True)
class Marked:
    """One round of one variant."""

    seconds: float
    wal_bytes: float
    rows: int
    hot: float
    idle_seconds: float
    indexes_mib: float


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def named(url: str, name: str) -> str:
    """Return the address of another database of the server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


async def make_base(url: str, invoices: int) -> None:
    """Make the database that each round gets a copy of."""
    async with database.connect(url) as connection:
        await connection.execute(f"create database {BASE}")
    async with database.connect(named(url, BASE)) as connection:
        await create_tables(connection)
    await service.prepare(load_settings({"DATABASE_URL": named(url, BASE)}))
    async with database.connect(named(url, BASE)) as connection:
        user = await connection.fetchval(MAKE_USER)
        await connection.execute(MAKE_BUSINESSES, user, max(invoices // 240, 1))
        await connection.execute(MAKE_INVOICES, invoices, timeout=600)


async def fresh(url: str, statements: Sequence[str]) -> str:
    """Make a copy of the base with these statements executed; return its address."""
    async with database.connect(url) as connection:
        await connection.execute("drop database if exists copy with (force)")
        await connection.execute(f"create database copy template {BASE}")
    async with database.connect(named(url, "copy")) as connection:
        for statement in (*statements, "vacuum full public.invoices", "vacuum analyze public.invoices", "checkpoint"):
            await connection.execute(statement, timeout=600)
    return named(url, "copy")


async def mark(connection: Connection) -> int:
    """Mark all that is overdue, in batches, each committed."""
    rows = 0
    while True:
        async with connection.transaction():
            found = await connection.fetch(FIND_OVERDUE, [], BATCH, AS_OF)
            if not found:
                return rows
            rows += len(await connection.fetch(MARK, [row["id"] for row in found], AS_OF))


async def measure_marking(url: str, statements: Sequence[str]) -> Marked:
    """Mark on a fresh copy, then look what an idle night takes."""
    copy = await fresh(url, statements)
    async with database.connect(copy) as connection:
        wal, began = await connection.fetchval(WAL), time.perf_counter()
        rows = await mark(connection)
        seconds, wal = time.perf_counter() - began, await connection.fetchval(WAL) - wal
        await connection.execute("select pg_stat_force_next_flush()")
        hot = await connection.fetchval(HOT)
        await connection.execute("vacuum analyze public.invoices")
        began = time.perf_counter()
        await mark(connection)
        for sql, *arguments in ((LEFT_OVERDUE, AS_OF), (LEFT_SETTLED,), (LEFT_MOVED, AS_OF)):
            await connection.fetchval(sql, [], *arguments)
        idle = time.perf_counter() - began
        return Marked(seconds, float(wal), rows, hot, idle, float(await connection.fetchval(SIZE)))


async def measure_deleting(url: str, *, indexed: bool) -> float:
    """Delete stale drafts on a fresh copy; return the milliseconds for each."""
    copy = await fresh(url, ())
    async with database.connect(copy) as connection:
        if indexed:
            for statement in (await missing_indexes(connection)).values():
                await connection.execute(statement.replace("CONCURRENTLY", ""))
        drafts = [row["id"] for row in await connection.fetch(STALE, DRAFTS)]
        began = time.perf_counter()
        deleted = await connection.fetch(DELETE_UNREFERENCED, drafts, timeout=600)
        return (time.perf_counter() - began) * 1000 / len(deleted)


async def measure(url: str, invoices: int, rounds: int) -> None:
    """Print each variant beside BON's indexes as they are."""
    await make_base(url, invoices)
    found: dict[str, list[Marked]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, statements in VARIANTS.items():
            found[name].append(await measure_marking(url, statements))
    base = found["as BON has them"]

    def middle(several: Sequence[Marked], name: str) -> float:
        return float(statistics.median(getattr(each, name) for each in several))

    say(f"{invoices:,} invoices, {base[0].rows:,} of them marked, the median of {rounds} rounds")
    say(f"{'indexes':<40}{'time':>9}{'×':>6}{'WAL/row':>9}{'×':>6}{'HOT':>6}{'idle night':>12}{'size':>9}")
    for name, several in found.items():
        seconds, wal = middle(several, "seconds"), middle(several, "wal_bytes")
        say(
            f"{name:<40}{seconds:>7.2f} s{seconds / middle(base, 'seconds'):>6.2f}"
            f"{wal / several[0].rows:>7.0f} B{wal / middle(base, 'wal_bytes'):>6.2f}{middle(several, 'hot'):>6.0%}"
            f"{middle(several, 'idle_seconds') * 1000:>9.0f} ms{middle(several, 'indexes_mib'):>6.1f} MiB"
        )
    without = statistics.median([await measure_deleting(url, indexed=False) for _ in range(rounds)])
    within = statistics.median([await measure_deleting(url, indexed=True) for _ in range(rounds)])
    say(f"deleting a draft: {without:.2f} ms without the two missing indexes, {within:.3f} ms with them ")
    say(f"(× {within / without:.3f}); {DRAFTS:,} drafts at once")


def main() -> int:
    """Measure on a server of our own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.indexes")
    parser.add_argument("--invoices", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    settings = {"fsync": "on", "synchronous_commit": "on", "autovacuum": "off", "shared_buffers": "256MB"}
    with running_postgres(find_binaries(), settings=settings) as url:
        known = load_settings({"DATABASE_URL": url, "LOG_LEVEL": "error"})
        configure_logging(known.log_level, known.log_format)
        asyncio.run(measure(url, told.invoices, told.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
