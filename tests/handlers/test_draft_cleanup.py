"""Draft clean-up on real PostgreSQL: what goes, what is kept, and what happens beside it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import pytest

from bon_scheduler import service
from bon_scheduler.database import connections
from bon_scheduler.ledger import entries
from bon_scheduler.ledger.entries import Request
from handlers import batches
from handlers.draft_cleanup import draft_cleanup
from tests import arrange
from tests.attempting import attempt
from tests.conftest import Connection, MakeSettings, RunJob, SetClock
from tests.waiting import until

FIRED = datetime(2026, 11, 23, 1, tzinfo=UTC)
"""03:00 in Israel; 30 days before it, summer time was in force."""
STALE = FIRED - timedelta(days=40)
STATUSES = ("finalized", "sending", "sent", "paid", "partially_paid", "cancelled", "credited")
WAITING = """
    select count(*) > 0
      from pg_stat_activity
     where datname = current_database() and wait_event_type = 'Lock' and query ilike '%' || $1 || '%'
"""

NO_END = "alter table bon_scheduler.runs add constraint no check (state not in ('succeeded', 'partial'))"


async def invoices(connection: Connection) -> set[UUID]:
    return {row["id"] for row in await connection.fetch("select id from invoices")}


async def outcomes(connection: Connection, run_id: UUID) -> dict[UUID, tuple[str, dict[str, int]]]:
    query = "select business_id, outcome, counts from bon_scheduler.business_outcomes where run_id = $1"
    return {row["business_id"]: (row["outcome"], row["counts"]) for row in await connection.fetch(query, run_id)}


async def pay(connection: Connection, _: UUID, draft: UUID) -> None:
    await arrange.payment(connection, draft)


async def audit(connection: Connection, business: UUID, draft: UUID) -> None:
    await arrange.audit_row(connection, business, draft)


async def number(connection: Connection, business: UUID, draft: UUID) -> None:
    await arrange.emergency_number(connection, business, draft)


async def credit(connection: Connection, business: UUID, draft: UUID) -> None:
    await arrange.credit_note(connection, business, draft)


async def credit_by_a_new_draft(connection: Connection, business: UUID, draft: UUID) -> None:
    await arrange.credit_note(connection, business, draft, status="draft", updated_at=FIRED)


References = Callable[[Connection, UUID, UUID], Awaitable[None]]
REFERENCES: tuple[References, ...] = (pay, audit, number, credit, credit_by_a_new_draft)


# What goes


@pytest.mark.parametrize(
    ("age", "stays"),
    [
        (timedelta(days=29, hours=23, minutes=59), True),
        (timedelta(days=30), True),
        (timedelta(days=30, microseconds=1), False),
        (timedelta(days=30, minutes=1), False),
        (timedelta(days=4000), False),
    ],
    ids=["29 d 23:59", "30 d", "30 d and an instant", "30 d 00:01", "years"],
)
async def test_a_draft_untouched_for_more_than_30_times_24_hours_goes_and_no_other(
    run_job: RunJob, connection: Connection, age: timedelta, stays: bool
) -> None:
    await arrange.draft(connection, await arrange.business(connection), updated_at=FIRED - age)
    await run_job(draft_cleanup, fire_time=FIRED)
    assert bool(await invoices(connection)) is stays


async def test_the_age_of_a_draft_is_judged_at_the_fire_time(run_job: RunJob, connection: Connection) -> None:
    draft = await arrange.draft(
        connection, await arrange.business(connection), updated_at=FIRED - timedelta(days=29, hours=20)
    )
    await run_job(draft_cleanup, fire_time=FIRED, now=FIRED + timedelta(hours=9))
    assert await invoices(connection) == {draft}


async def test_a_document_that_is_no_draft_never_goes(run_job: RunJob, connection: Connection) -> None:
    business = await arrange.business(connection)
    issued = {await arrange.invoice(connection, business, status=status, updated_at=STALE) for status in STATUSES}
    await run_job(draft_cleanup, fire_time=FIRED)
    assert await invoices(connection) == issued


async def test_the_items_of_a_draft_go_with_it_and_are_counted(run_job: RunJob, connection: Connection) -> None:
    business = await arrange.business(connection)
    for items in (0, 1, 2):
        draft = await arrange.draft(connection, business)
        for _ in range(items):
            await arrange.item(connection, draft)
    report = await run_job(draft_cleanup, fire_time=FIRED)
    left = await connection.fetchval("select count(*) from invoice_items")
    assert (report.run["counts"], left) == ({"deleted": 3, "items": 3, "kept": 0}, 0)


async def test_the_items_of_what_stays_stay_and_are_not_counted(run_job: RunJob, connection: Connection) -> None:
    business = await arrange.business(connection)
    kept = await arrange.draft(connection, business)
    await arrange.payment(connection, kept)
    await arrange.item(connection, kept)
    await arrange.item(connection, await arrange.draft(connection, business, updated_at=FIRED))
    report = await run_job(draft_cleanup, fire_time=FIRED)
    left = await connection.fetchval("select count(*) from invoice_items")
    assert (report.run["counts"]["items"], left) == (0, 2)


async def test_a_second_run_finds_nothing_left_to_delete(run_job: RunJob, connection: Connection) -> None:
    business = await arrange.business(connection)
    await arrange.item(connection, await arrange.draft(connection, business))
    await run_job(draft_cleanup, fire_time=FIRED)
    again = await run_job(draft_cleanup, fire_time=FIRED)
    assert (again.run["counts"], again.businesses["touched"]) == ({"deleted": 0, "items": 0, "kept": 0}, 0)


# What is kept


@pytest.mark.parametrize("refer", REFERENCES)
async def test_a_draft_that_something_refers_to_is_kept_and_counted(
    run_job: RunJob, connection: Connection, refer: References
) -> None:
    business = await arrange.business(connection)
    draft = await arrange.draft(connection, business)
    await refer(connection, business, draft)
    report = await run_job(draft_cleanup, fire_time=FIRED)
    assert draft in await invoices(connection)
    assert report.run["counts"] == {"deleted": 0, "items": 0, "kept": 1}


@pytest.mark.parametrize("refer", REFERENCES)
async def test_what_one_business_keeps_stops_no_other(
    run_job: RunJob, connection: Connection, refer: References
) -> None:
    keeps, other = [await arrange.business(connection) for _ in range(2)]
    kept = await arrange.draft(connection, keeps)
    await refer(connection, keeps, kept)
    gone = await arrange.draft(connection, other)
    await run_job(draft_cleanup, fire_time=FIRED)
    assert {kept, gone} & await invoices(connection) == {kept}


async def test_an_emergency_number_keeps_its_document(run_job: RunJob, connection: Connection) -> None:
    business = await arrange.business(connection)
    draft = await arrange.draft(connection, business)
    await arrange.emergency_number(connection, business, draft)
    await run_job(draft_cleanup, fire_time=FIRED)
    assert await connection.fetchval("select used_for_invoice_id from emergency_allocation_numbers") == draft


@pytest.mark.parametrize("batch", [1, 2, 500])
@pytest.mark.parametrize("younger", ["credited", "crediting"])
async def test_two_stale_drafts_of_which_one_credits_the_other_are_gone_after_one_more_night(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch, younger: str, batch: int
) -> None:
    monkeypatch.setattr(batches, "LARGEST", batch)
    business = await arrange.business(connection)
    hour = timedelta(hours=1) if younger == "credited" else timedelta(hours=-1)
    credited = await arrange.draft(connection, business, updated_at=STALE + hour)
    await arrange.credit_note(connection, business, credited, status="draft", updated_at=STALE)
    nights = [await run_job(draft_cleanup, fire_time=FIRED + timedelta(days=night)) for night in range(2)]
    assert ([night.run["state"] for night in nights], await invoices(connection)) == (["succeeded"] * 2, set())


# Batches


@pytest.mark.parametrize("drafts", [2, 3, 4, 7])
async def test_more_than_a_batch_is_deleted_batch_by_batch(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch, drafts: int
) -> None:
    monkeypatch.setattr(batches, "LARGEST", 3)
    business = await arrange.business(connection)
    for _ in range(drafts):
        # All of one instant, as after an import: the batches are told apart by the id.
        await arrange.draft(connection, business, updated_at=STALE)
    report = await run_job(draft_cleanup, fire_time=FIRED)
    assert (report.run["counts"]["deleted"], await invoices(connection)) == (drafts, set())


async def test_a_whole_batch_that_is_kept_stops_nothing_behind_it(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "LARGEST", 2)
    business = await arrange.business(connection)
    for day in range(5):
        draft = await arrange.draft(connection, business, updated_at=STALE - timedelta(days=day + 1))
        await arrange.payment(connection, draft)
    await arrange.draft(connection, business, updated_at=STALE)
    report = await run_job(draft_cleanup, fire_time=FIRED)
    assert report.run["counts"] == {"deleted": 1, "items": 0, "kept": 5}


# What is reported


async def two_businesses(connection: Connection) -> tuple[UUID, UUID]:
    """One with a draft of two items and a draft that is kept, and one that keeps its only draft."""
    cleaned, keeps = [await arrange.business(connection) for _ in range(2)]
    draft = await arrange.draft(connection, cleaned, updated_at=STALE)
    await arrange.item(connection, draft)
    await arrange.item(connection, draft)
    for business in (cleaned, keeps):
        await arrange.payment(connection, await arrange.draft(connection, business, updated_at=STALE))
    return cleaned, keeps


async def test_the_ledger_has_the_counts_of_each_business(run_job: RunJob, connection: Connection) -> None:
    cleaned, keeps = await two_businesses(connection)
    report = await run_job(draft_cleanup, fire_time=FIRED)
    assert await outcomes(connection, report.run["run_id"]) == {
        cleaned: ("done", {"deleted": 1, "items": 2, "kept": 1}),
        keeps: ("kept", {"kept": 1}),
    }


async def test_the_counts_of_a_business_whose_drafts_are_in_several_batches_add_up(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "LARGEST", 1)
    business = await arrange.business(connection)
    for days in (4, 3):
        await arrange.item(connection, await arrange.draft(connection, business, updated_at=STALE - timedelta(days)))
    for days in (2, 1):
        await arrange.payment(connection, await arrange.draft(connection, business, updated_at=STALE - timedelta(days)))
    report = await run_job(draft_cleanup, fire_time=FIRED)
    assert await outcomes(connection, report.run["run_id"]) == {
        business: ("done", {"deleted": 2, "items": 2, "kept": 2})
    }


async def test_a_second_attempt_does_not_count_again_what_is_kept(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "LARGEST", 2)
    business = await arrange.business(connection)
    for days in (4, 3, 2):
        await arrange.draft(connection, business, updated_at=STALE - timedelta(days))
    kept = await arrange.draft(connection, business, updated_at=STALE - timedelta(5))
    await arrange.payment(connection, kept)
    await connection.execute(NO_END)
    async with service.machinery(make_settings(), clock=SetClock(FIRED)) as parts:
        run_id = await entries.enqueue(connection, Request(draft_cleanup.name, {}, fire_time=FIRED))
        assert run_id is not None
        await attempt(parts, run_id, draft_cleanup)
        await connection.execute("alter table bon_scheduler.runs drop constraint no")
        await attempt(parts, run_id, draft_cleanup)
    assert await outcomes(connection, run_id) == {business: ("done", {"deleted": 3, "items": 0, "kept": 1})}


async def test_the_log_has_the_counts_of_each_business(
    run_job: RunJob, connection: Connection, logged: Callable[[], str]
) -> None:
    cleaned, keeps = await two_businesses(connection)
    await run_job(draft_cleanup, fire_time=FIRED)
    events = [json.loads(line) for line in logged().splitlines()]
    assert {
        event["business_id"]: (event["deleted"], event["items"], event["kept"])
        for event in events
        if event["event"] == "drafts.cleaned"
    } == {str(cleaned): (1, 2, 1), str(keeps): (0, 0, 1)}


@pytest.mark.parametrize("indexed", [False, True])
async def test_a_run_that_goes_without_an_index_says_so_once(
    run_job: RunJob, connection: Connection, logged: Callable[[], str], monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    monkeypatch.setattr(batches, "LARGEST", 1)
    await connection.execute("create index on invoices (credited_invoice_id)")
    if indexed:
        await connection.execute("create index on emergency_allocation_numbers (used_for_invoice_id)")
    business = await arrange.business(connection)
    for _ in range(3):
        await arrange.draft(connection, business, updated_at=STALE)
    await run_job(draft_cleanup, fire_time=FIRED)
    events = [json.loads(line) for line in logged().splitlines()]
    warnings = [event["missing"] for event in events if event["event"] == "drafts.unindexed"]
    assert warnings == ([] if indexed else [["emergency_allocation_numbers.used_for_invoice_id"]])


# What happens beside it


async def test_a_payment_that_is_being_recorded_is_never_erased(
    run_job: RunJob, connection: Connection, database_url: str
) -> None:
    draft = await arrange.draft(connection, await arrange.business(connection))
    async with connections.connect(database_url) as other:
        payment = other.transaction()
        await payment.start()
        await arrange.payment(other, draft)
        run = asyncio.ensure_future(run_job(draft_cleanup, fire_time=FIRED))

        async def ended_or_waiting() -> bool:
            return run.done() or bool(await connection.fetchval(WAITING, "invoices"))

        await until(ended_or_waiting)
        await payment.commit()
    await run
    assert await connection.fetchval("select count(*) from invoice_payments") == 1


async def test_a_payment_that_comes_while_its_draft_is_being_deleted_is_refused_and_not_erased(
    run_job: RunJob, connection: Connection, database_url: str
) -> None:
    draft = await arrange.draft(connection, await arrange.business(connection))
    async with connections.connect(database_url) as gate, connections.connect(database_url) as other:
        held = gate.transaction()
        await held.start()
        # Stops the run between locking its batch and deleting it.
        await gate.execute("lock table emergency_allocation_numbers in access exclusive mode")
        run = asyncio.ensure_future(run_job(draft_cleanup, fire_time=FIRED))
        await until(lambda: connection.fetchval(WAITING, "delete from public.invoices"))
        payment = asyncio.create_task(arrange.payment(other, draft))
        await until(lambda: connection.fetchval(WAITING, "insert into public.invoice_payments"))
        await held.rollback()
        await run
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await payment


async def test_a_draft_that_is_being_edited_stays_and_keeps_nothing_else(
    run_job: RunJob, connection: Connection, database_url: str
) -> None:
    business = await arrange.business(connection)
    edited = await arrange.draft(connection, business)
    await arrange.draft(connection, business)
    async with connections.connect(database_url) as other, other.transaction():
        await other.execute("update invoices set updated_at = $2 where id = $1", edited, FIRED)
        await asyncio.wait_for(run_job(draft_cleanup, fire_time=FIRED), timeout=20)
    assert await invoices(connection) == {edited}
