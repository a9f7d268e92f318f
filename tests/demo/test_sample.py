"""What the sample holds, and that what it says of itself is what BON's rules say of its rows."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import asyncpg
import pytest

from bon_scheduler.demo.postgres import find_binaries, running_postgres
from bon_scheduler.demo.sample import SampleFacts, create_tables, load_sample
from bon_scheduler.jobs import Connection

NOW = datetime(2026, 11, 23, 4, 0, tzinfo=UTC)
ISRAEL = ZoneInfo("Asia/Jerusalem")

MARKED = """
    select count(*) from invoices
     where status in ('finalized', 'sent', 'partially_paid') and due_date < $1 and not is_overdue
"""
CLEARED = """
    select count(*) from invoices
     where is_overdue
       and (status in ('paid', 'cancelled', 'credited')
            or status in ('finalized', 'sent', 'partially_paid') and (due_date is null or due_date >= $1))
"""
STALE = """
    select id,
           exists (select from invoice_payments p where p.invoice_id = i.id)
           or exists (select from shaam_audit_log a where a.invoice_id = i.id)
           or exists (select from emergency_allocation_numbers e where e.used_for_invoice_id = i.id)
           or exists (select from invoices c where c.credited_invoice_id = i.id) as kept
      from invoices i
     where status = 'draft' and updated_at < $1::timestamptz - interval '720 hours'
"""
DIGEST = """
    select b.id, count(distinct i.id) as invoices,
           coalesce(array_agg(distinct lower(u.email)) filter (where u.email is not null),
                    array_remove(array[b.email], null)) as recipients
      from invoices i
      join businesses b on b.id = i.business_id and b.is_active
      left join user_businesses m on m.business_id = b.id and m.role = 'owner'
      left join users u on u.id = m.user_id
     where i.status in ('finalized', 'sent', 'partially_paid')
       and i.document_type = 'tax_invoice'
       and i.due_date < $1
       and i.total_incl_vat_minor_units
           > (select coalesce(sum(amount_minor_units), 0) from invoice_payments where invoice_id = i.id)
           + (select coalesce(sum(total_incl_vat_minor_units), 0) from invoices
               where credited_invoice_id = i.id and document_type = 'credit_note' and status = 'finalized')
     group by b.id
"""
DUE_TOKENS = """
    select b.id, encrypted_refresh_token
      from business_shaam_credentials c join businesses b on b.id = c.business_id and b.is_active
     where not needs_reauth and token_expires_at < $1::timestamptz + interval '5 minutes'
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_postgres(find_binaries()) as dsn:
        yield dsn


@asynccontextmanager
async def sample_in(server: str, name: str, now: datetime = NOW) -> AsyncIterator[tuple[Connection, SampleFacts]]:
    admin = await asyncpg.connect(server)
    await admin.execute(f"create database {name}")
    connection = await asyncpg.connect(server, database=name)
    try:
        await create_tables(connection)
        yield (
            connection,
            await load_sample(connection, now=now, zone=ISRAEL, encrypt=lambda text: f"<{text}>"),
        )
    finally:
        await connection.close()
        await admin.execute(f"drop database {name}")
        await admin.close()


async def test_every_status_of_every_document_type_occurs(server: str) -> None:
    async with sample_in(server, "statuses") as (connection, _):
        missing = await connection.fetch("""
            select s, t
              from unnest(enum_range(null::invoice_status)) s, unnest(enum_range(null::document_type)) t
            except select status, document_type from invoices
        """)
    assert missing == []


async def test_the_same_sample_in_two_databases_has_equal_rows(server: str) -> None:
    async with sample_in(server, "first") as (one, facts), sample_in(server, "second") as (other, _):
        for table, count in facts.rows.items():
            rows = await all_rows(one, table)
            assert len(rows) == count
            assert rows == await all_rows(other, table)


async def all_rows(connection: Connection, table: str) -> list[Any]:
    return await connection.fetch(f"select * from {table} order by id")


async def test_what_is_expected_is_what_the_rules_say(server: str) -> None:
    async with sample_in(server, "rules") as (connection, facts):
        stale = await connection.fetch(STALE, NOW)
        deleted = [row["id"] for row in stale if not row["kept"]]
        found = {
            "marked": await connection.fetchval(MARKED, facts.today),
            "cleared": await connection.fetchval(CLEARED, facts.today),
            "kept": len(stale) - len(deleted),
            "items": await connection.fetchval(
                "select count(*) from invoice_items where invoice_id = any($1)", deleted
            ),
            "deleted": await connection.execute("delete from invoices where id = any($1)", deleted),
            "sessions": await connection.fetchval("select count(*) from sessions where expires_at < $1", NOW),
        }
    assert found == {
        "marked": facts.marked,
        "cleared": facts.cleared,
        "kept": facts.drafts_kept,
        "items": facts.draft_items,
        "deleted": f"DELETE {facts.drafts_deleted}",
        "sessions": facts.sessions_expired,
    }


async def test_a_digest_is_expected_for_every_active_business_that_is_owed_something(server: str) -> None:
    async with sample_in(server, "digests") as (connection, facts):
        rows = await connection.fetch(DIGEST, facts.today)
    assert {row["id"]: set(row["recipients"]) for row in rows} == facts.digest_recipients
    assert sum(row["invoices"] for row in rows) == facts.digest_invoices
    assert {len(recipients) for recipients in facts.digest_recipients.values()} == {0, 1, 2}


@pytest.mark.parametrize("until_next_run", [timedelta(seconds=1), timedelta(minutes=15)])
async def test_the_same_tokens_are_due_throughout_a_quarter_of_an_hour(server: str, until_next_run: timedelta) -> None:
    async with sample_in(server, "tokens") as (connection, facts):
        rows = await connection.fetch(DUE_TOKENS, NOW + until_next_run)
    assert {row["id"]: row["encrypted_refresh_token"] for row in rows} == {
        business: f"<{token}>" for business, token in facts.shaam_due.items()
    }
    assert sorted(facts.spoiled.values()) == ["garbage", "invalid_grant", "unavailable"]
    assert facts.spoiled.keys() < facts.shaam_due.keys()


async def test_due_dates_count_from_the_day_it_is_in_israel(server: str) -> None:
    after_midnight_there = datetime(2026, 11, 23, 22, 30, tzinfo=UTC)
    async with sample_in(server, "midnight", after_midnight_there) as (connection, facts):
        due = await connection.fetch(
            "select distinct due_date from invoices where due_date - $1 between -1 and 1", facts.today
        )
    assert facts.today == date(2026, 11, 24)
    assert {row["due_date"].day for row in due} == {23, 24, 25}
