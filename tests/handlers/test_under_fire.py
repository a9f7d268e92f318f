"""
The nightly jobs beside those who pay, edit, finalize and delete, row by row against a journal that the database keeps.

The journal has each change as the database saw it: what a row was, committed, when it was changed, what it became, and
by whom. What the jobs may do is said here in plain SQL, over that journal and over the rows as they were before.
"""

import asyncio
import importlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bon_scheduler.database import connections
from bon_scheduler.jobs import AnyJob
from handlers import batches
from handlers.draft_cleanup import draft_cleanup
from handlers.overdue_detection import overdue_detection
from handlers.session_cleanup import session_cleanup
from tests import arrange
from tests.conftest import Connection, RunJob

FIRED = datetime(2026, 11, 23, 4, tzinfo=UTC)
TODAY = date(2026, 11, 23)
SINCE = FIRED - timedelta(days=30)
OURS = "application_name like 'bon_scheduler%'"
JOURNAL = """
    create table public.journal (n bigint generated always as identity, ours boolean, was public.invoices,
                                 became public.invoices);
    create function public.keep() returns trigger language plpgsql as $$
    begin
        insert into public.journal (ours, was, became)
        values (current_setting('application_name') like 'bon_scheduler%', old,
                case when tg_op = 'DELETE' then null else new end);
        return null;
    end $$;
    create trigger keep after update or delete on public.invoices for each row execute function public.keep();
    create table public.before as select * from public.invoices
"""
# Changes of ours that no rule allows, given what the row was at that moment.
WRONG = """
    select (was).id, (was).status, (was).due_date, (was).is_overdue, (became).is_overdue, (was).updated_at
      from public.journal
     where ours
       and not coalesce(
           (became).is_overdue and not (was).is_overdue and (was).status in ('finalized', 'sent', 'partially_paid')
               and (was).due_date < date '2026-11-23'
        or not (became).is_overdue and (was).is_overdue
               and ((was).status in ('paid', 'cancelled', 'credited')
                    or (was).status in ('finalized', 'sent', 'partially_paid')
                       and ((was).due_date is null or (was).due_date >= date '2026-11-23'))
        or became is null and (was).status = 'draft'
               and (was).updated_at < timestamptz '2026-10-24 04:00Z', false)
"""
# $1 the business that goes, $2 job: roughly what the job is to change, so that the writers are in its way.
CANDIDATES = """
    select id from public.before
     where business_id <> $1
       and case when $2 = 'draft-cleanup' then status = 'draft' and updated_at < '2026-10-24 04:00Z'
                else status in ('finalized', 'sent', 'partially_paid')
                     and due_date < '2026-11-23' and not is_overdue end
"""
# Rows that nobody else has changed, and that are not what the rules make of what they were before.
NOT_DONE = """
    select b.id
      from public.before b left join public.invoices i on i.id = b.id
     where not exists (select from public.journal j where not j.ours and (j.was).id = b.id)
       and case when $1 = 'draft-cleanup'
                then (i.id is null) is distinct from
                     (b.status = 'draft' and b.updated_at < timestamptz '2026-10-24 04:00Z'
                      and not exists (select from public.invoice_payments p where p.invoice_id = b.id))
                else i.is_overdue is distinct from
                     case when b.status in ('finalized', 'sent', 'partially_paid')
                          then coalesce(b.due_date < date '2026-11-23', false)
                          when b.status in ('paid', 'cancelled', 'credited') then false
                          else b.is_overdue end end
"""
DONE = """
    select case when became is null then 'deleted' when (became).is_overdue then 'marked' else 'cleared' end as change,
           (was).id, (was).business_id
      from public.journal where ours
"""
KEPT = """
    select c.change, r.id, r.business_id
      from bon_scheduler.changed_rows c cross join lateral unnest(c.ids, c.businesses) as r (id, business_id)
"""
OUTCOMES = """
    select o.business_id, c.key as change, c.value::int as number
      from bon_scheduler.business_outcomes o cross join lateral jsonb_each_text(o.counts) c
     where c.key in ('deleted', 'marked', 'cleared')
"""
PAY = """
    with paid as (
        update public.invoices set status = 'paid', is_overdue = false, updated_at = now()
         where id = $1 and status <> 'draft' returning id
    )
    insert into public.invoice_payments (invoice_id, amount_minor_units, paid_at, method)
    select id, 100, current_date, 'cash' from paid
"""
WRITES = (
    PAY,
    "update public.invoices set customer_name = 'edited', updated_at = now() where id = $1",
    "update public.invoices set due_date = date '2026-12-24', updated_at = now() where id = $1",
    "update public.invoices set status = 'finalized', updated_at = now() where id = $1 and status = 'draft'",
    "delete from public.invoices where id = $1 and status = 'draft'",
    "insert into public.invoice_payments (invoice_id, amount_minor_units, paid_at, method)"
    " values ($1, 1, current_date, 'cash')",
)
MAKE = """
    insert into public.invoices (business_id, document_type, status, is_overdue, invoice_date, due_date, updated_at)
    select $1, 'tax_invoice', s, s <> 'draft' and o, date '2026-01-01', d, u
      from unnest(enum_range(null::public.invoice_status)) s,
           unnest(array[true, false]) o,
           unnest(array[null, '2026-11-21', '2026-11-22', '2026-11-23', '2026-11-24']::date[]) d,
           unnest(array['2026-10-24 03:59:59.999999Z', '2026-10-24 04:00Z', '2026-11-01']::timestamptz[]) u
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "LARGEST", 4)
    monkeypatch.setattr(batches, "FOUND_AT_ONCE", 30)
    monkeypatch.setattr(batches, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(importlib.import_module("handlers.session_cleanup"), "AT_ONCE", 3)


async def keep_writing(url: str, ids: list[UUID], chance: random.Random) -> None:
    async with connections.connect(url, session={"application_name": "bon"}) as writer:
        while True:
            # What is deleted meanwhile refuses a payment, and two writers may meet.
            with suppress(asyncpg.ForeignKeyViolationError, asyncpg.DeadlockDetectedError):
                async with writer.transaction():
                    for row in chance.sample(ids, chance.choice([1, 1, 2])):
                        await writer.execute(chance.choice(WRITES), row)
                    await asyncio.sleep(chance.choice([0, 0, 0.01, 0.08]))
            await asyncio.sleep(0.002)


@asynccontextmanager
async def writers(url: str, ids: list[UUID], number: int = 3) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(keep_writing(url, ids, random.Random(seed))) for seed in range(number)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(answer, asyncio.CancelledError), answer


async def triples(connection: Connection, sql: str) -> list[tuple[Any, ...]]:
    return sorted(tuple(row) for row in await connection.fetch(sql))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("job", [overdue_detection, draft_cleanup], ids=lambda job: job.name)
async def test_beside_writers_each_row_is_changed_by_what_it_was_at_that_moment(
    run_job: RunJob, connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch, job: AnyJob
) -> None:
    # All ids are read at once, so that much happens between a row's being found and its turn.
    monkeypatch.setattr(batches, "FOUND_AT_ONCE", 10_000)
    made = [await arrange.business(connection) for _ in range(12)]
    for business in made:
        await connection.execute(MAKE, business)
    await connection.execute(JOURNAL)
    goes = await arrange.business(connection)
    await connection.execute(MAKE, goes)
    ids = [row["id"] for row in await connection.fetch(CANDIDATES, goes, job.name)]
    async with writers(database_url, ids, 5):
        run = asyncio.ensure_future(run_job(job, fire_time=FIRED))
        while not await connection.fetchval("select exists (select from bon_scheduler.changed_rows)"):
            await asyncio.sleep(0.005)
            assert not run.done()
        async with (
            connections.connect(database_url, session={"application_name": "bon"}) as bon,
            bon.transaction(),
        ):
            await bon.execute("delete from public.invoices where business_id = $1", goes)
            await bon.execute("delete from public.businesses where id = $1", goes)
        report = await run
    assert report.run["state"] == "succeeded"
    assert await triples(connection, WRONG) == []
    left = report.run["counts"].get("left", 0)
    assert len(await connection.fetch(NOT_DONE, job.name)) <= left
    done = await triples(connection, DONE)
    assert done == await triples(connection, KEPT)
    assert await connection.fetchval("select count(*) from public.journal where not ours") > 20
    counts = {change: sum(row[0] == change for row in done) for change in ("deleted", "marked", "cleared")}
    assert {name: report.run["counts"].get(name, 0) for name in counts} == counts
    by_business = {(business, change) for change, _, business in done}
    assert {(row[0], row[1]): row[2] for row in await triples(connection, OUTCOMES)} == {
        pair: sum((row[2], row[0]) == pair for row in done) for pair in by_business
    }


LATE: dict[str, object] = {"due_date": date(2026, 11, 1)}
MOMENTS: dict[str, tuple[AnyJob, dict[str, object], str]] = {
    "paid, and so not marked": (overdue_detection, LATE, "update public.invoices set status = 'paid' where id = $1"),
    "moved, and so not marked": (
        overdue_detection,
        LATE,
        "update public.invoices set due_date = date '2026-12-24' where id = $1",
    ),
    "deleted, and so not marked": (overdue_detection, LATE, "delete from public.invoices where id = $1"),
    "edited, and so not deleted": (
        draft_cleanup,
        {"status": "draft"},
        "update public.invoices set updated_at = now() where id = $1",
    ),
    "finalized, and so not deleted": (
        draft_cleanup,
        {"status": "draft"},
        "update public.invoices set status = 'finalized' where id = $1",
    ),
    "reopened, and so not cleared": (
        overdue_detection,
        {"status": "paid", "is_overdue": True, **LATE},
        "update public.invoices set status = 'sent' where id = $1",
    ),
    "due again, and so not cleared": (
        overdue_detection,
        {"is_overdue": True, "due_date": date(2026, 12, 24)},
        "update public.invoices set due_date = date '2026-11-01' where id = $1",
    ),
}


@pytest.mark.parametrize("waits", ["20ms", "5s"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.samples(7)
async def test_a_row_that_is_changed_between_being_found_and_being_changed_is_judged_again(
    run_job: RunJob,
    connection: Connection,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    waits: str,
) -> None:
    monkeypatch.setattr(batches, "WAIT_LITTLE", f"set local lock_timeout = '{waits}'")
    monkeypatch.setattr(batches, "PAUSE_SECONDS", 1.5)
    job, values, change = MOMENTS[moment]
    row = await arrange.invoice(connection, await arrange.business(connection), **values)
    async with connections.connect(database_url, session={"application_name": "bon"}) as bon:
        editing = bon.transaction()
        await editing.start()
        await bon.execute(change, row)
        run = asyncio.ensure_future(run_job(job, fire_time=FIRED))
        for _ in range(40):  # it has found the row by then: it waits for it, or has passed it over
            await asyncio.sleep(0.01)
        assert not run.done()
        await editing.commit()
        report = await asyncio.wait_for(run, 30)
    left = await connection.fetchrow("select is_overdue from public.invoices where id = $1", row)
    assert (left and left["is_overdue"]) == (None if "deleted, " in moment else bool(values.get("is_overdue")))
    counts = report.run["counts"]
    assert report.run["state"] == "succeeded"
    assert sum(counts.get(name, 0) for name in ("marked", "cleared", "deleted", "left")) == 0


STATUSES = ("draft", "finalized", "sending", "sent", "paid", "partially_paid", "cancelled", "credited")
DAYS = [None, *(date(2026, 11, day) for day in (1, 21, 22, 23, 24))]
TOUCHED = [SINCE + timedelta(microseconds=away) for away in (-1, 0, 1)] + [FIRED]
rows = st.tuples(
    st.sampled_from(STATUSES), st.booleans(), st.sampled_from(DAYS), st.sampled_from(TOUCHED), st.booleans()
)


async def night(url: str, run_job: RunJob, job: AnyJob, population: list[Any]) -> tuple[list[Any], list[Any]]:
    """Make the rows; return those that a rule in plain SQL changes, and those that the job changes."""
    async with connections.connect(url) as connection:
        await connection.execute(
            "drop table if exists public.before, public.journal; drop trigger if exists keep on public.invoices;"
            "drop function if exists public.keep(); truncate public.invoices, bon_scheduler.business_pauses cascade"
        )
        businesses = [await arrange.business(connection) for _ in range(2)]
        await connection.execute(
            "insert into bon_scheduler.business_pauses (business_id, by, reason) values ($1, 'dana', 'x')",
            businesses[1],
        )
        for status, mark, due, touched, paused in population:
            values = {"status": status, "is_overdue": mark, "due_date": due, "updated_at": touched}
            await arrange.invoice(connection, businesses[paused], **values)
        await connection.execute(JOURNAL)
        await run_job(job, fire_time=FIRED)
        if job is draft_cleanup:
            rule = "status = 'draft' and updated_at < timestamptz '2026-10-24 04:00Z'"
        else:
            rule = """
                   status in ('finalized', 'sent', 'partially_paid')
                   and is_overdue <> coalesce(due_date < date '2026-11-23', false)
                or status in ('paid', 'cancelled', 'credited') and is_overdue
            """
        expected = f"select id from public.before where business_id = $1 and ({rule})"
        changed = "select (was).id from public.journal where ours"
        return (
            sorted(row["id"] for row in await connection.fetch(expected, businesses[0])),
            sorted(row["id"] for row in await connection.fetch(changed)),
        )


@pytest.mark.parametrize("job", [overdue_detection, draft_cleanup], ids=lambda job: job.name)
@pytest.mark.usefixtures("small")
def test_of_any_population_what_the_rule_says_is_changed_and_nothing_else(
    run_job: RunJob, database_url: str, job: AnyJob
) -> None:
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(population=st.lists(rows, max_size=12))
    def check(population: list[Any]) -> None:
        expected, changed = asyncio.run(night(database_url, run_job, job, population))
        assert changed == expected

    check()


async def touch(url: str, ids: list[UUID], done: Callable[[], bool]) -> None:
    async with connections.connect(url, session={"application_name": "bon"}) as bon:
        while not done():
            async with bon.transaction():
                await bon.execute(
                    "update public.sessions set last_accessed_at = now() where id = $1", random.choice(ids)
                )
                await asyncio.sleep(0.03)


@pytest.mark.usefixtures("small")
async def test_sessions_that_are_used_meanwhile_keep_no_other_and_are_gone_or_left(
    run_job: RunJob, connection: Connection, database_url: str
) -> None:
    user = await arrange.user(connection)
    ages = [timedelta(minutes=n // 2 - 10) for n in range(60)]
    made = {await arrange.session(connection, user, FIRED - age): age for age in ages}
    expired = {row for row, age in made.items() if age > timedelta(0)}
    run = asyncio.ensure_future(run_job(session_cleanup, fire_time=FIRED))
    await asyncio.gather(*(touch(database_url, list(made), run.done) for _ in range(2)))
    report = await run
    stay = {row["id"] for row in await connection.fetch("select id from public.sessions")}
    left = report.run["counts"].get("left", 0)
    assert (len(stay & expired), made.keys() - expired <= stay) == (left, True)
    assert report.run["counts"]["deleted"] == len(expired) - left
