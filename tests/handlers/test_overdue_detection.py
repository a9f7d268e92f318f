"""Overdue detection on real PostgreSQL: what is marked, what is cleared, who is told, and on which day."""

from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from bon_scheduler import service
from bon_scheduler.database import connections
from bon_scheduler.ledger import entries
from bon_scheduler.ledger.entries import Origin, Request
from handlers.overdue_detection import OverdueDetection, overdue_detection
from tests import arrange
from tests.attempting import attempt
from tests.conftest import Connection, MakeSettings, RunJob, SetClock

TODAY = date(2026, 11, 23)
YESTERDAY = TODAY - timedelta(days=1)
FIRED = datetime(2026, 11, 23, 4, tzinfo=UTC)
"""06:00 in Israel."""
STATUSES = ("draft", "finalized", "sending", "sent", "paid", "partially_paid", "cancelled", "credited")
OPEN = ("finalized", "sent", "partially_paid")
SETTLED = ("paid", "cancelled", "credited")


async def marked(connection: Connection) -> set[UUID]:
    return {row["id"] for row in await connection.fetch("select id from invoices where is_overdue")}


async def touched(connection: Connection) -> set[UUID]:
    """Whose `updated_at` has moved: also of what was marked and, in the same run, cleared again."""
    query = "select id from invoices where updated_at > now() - interval '1 minute'"
    return {row["id"] for row in await connection.fetch(query)}


async def digests(connection: Connection) -> list[dict[str, Any]]:
    """The payloads of the digest runs that were asked for."""
    query = "select payload from bon_scheduler.runs where job = 'overdue-digest'"
    return [row["payload"] for row in await connection.fetch(query)]


async def outcomes(connection: Connection, run_id: UUID) -> dict[UUID, dict[str, int]]:
    query = "select business_id, counts from bon_scheduler.business_outcomes where run_id = $1"
    return {row["business_id"]: row["counts"] for row in await connection.fetch(query, run_id)}


async def run_scheduled(settings: MakeSettings, *, fire_time: datetime, now: datetime) -> None:
    """Make one attempt at a run that the schedule asked for, not a person."""
    async with service.machinery(settings(), clock=SetClock(now)) as parts:
        request = Request(overdue_detection.name, {}, fire_time=fire_time, origin=Origin.SCHEDULE)
        async with parts.pool.acquire() as connection:
            run_id = await entries.enqueue(connection, request)
        assert run_id is not None
        await attempt(parts, run_id, overdue_detection)


# What is marked


async def test_open_invoices_past_their_due_date_are_marked_and_no_others(
    run_job: RunJob, connection: Connection
) -> None:
    business = await arrange.business(connection)
    by_status = {
        status: await arrange.invoice(connection, business, status=status, due_date=YESTERDAY) for status in STATUSES
    }
    await run_job(overdue_detection, fire_time=FIRED)
    assert await marked(connection) == {by_status[status] for status in OPEN}


async def test_updated_at_moves_for_what_is_marked_and_for_nothing_else(
    run_job: RunJob, connection: Connection
) -> None:
    business = await arrange.business(connection)
    late = await arrange.invoice(connection, business, due_date=YESTERDAY)
    await arrange.invoice(connection, business, due_date=YESTERDAY, is_overdue=True)
    await arrange.invoice(connection, business, due_date=TODAY)
    await arrange.invoice(connection, business, due_date=YESTERDAY, status="draft")
    await run_job(overdue_detection, fire_time=FIRED)
    assert await touched(connection) == {late}


@pytest.mark.parametrize(
    ("due", "is_marked"), [(YESTERDAY, True), (TODAY, False), (TODAY + timedelta(days=1), False), (None, False)]
)
async def test_due_yesterday_is_overdue_and_due_today_later_or_never_is_not(
    run_job: RunJob, connection: Connection, due: date | None, is_marked: bool
) -> None:
    await arrange.invoice(connection, await arrange.business(connection), due_date=due)
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert (report.run["counts"]["marked"], len(await marked(connection))) == (is_marked, is_marked)


@pytest.mark.parametrize(
    ("fire_time", "today"),
    [
        (datetime(2026, 11, 23, 21, 30, tzinfo=UTC), date(2026, 11, 23)),
        (datetime(2026, 11, 23, 22, 30, tzinfo=UTC), date(2026, 11, 24)),
        (datetime(2026, 7, 14, 20, 30, tzinfo=UTC), date(2026, 7, 14)),
        (datetime(2026, 7, 14, 21, 30, tzinfo=UTC), date(2026, 7, 15)),
    ],
    ids=["winter 23:30", "winter 00:30", "summer 23:30", "summer 00:30"],
)
async def test_today_is_the_date_in_israel_whatever_the_date_in_utc(
    run_job: RunJob, connection: Connection, fire_time: datetime, today: date
) -> None:
    business = await arrange.business(connection)
    late = await arrange.invoice(connection, business, due_date=today - timedelta(days=1))
    await arrange.invoice(connection, business, due_date=today)
    await run_job(overdue_detection, fire_time=fire_time)
    assert (await marked(connection), await touched(connection)) == ({late}, {late})


@pytest.mark.parametrize(("zone", "hour"), [("Pacific/Kiritimati", 12), ("Pacific/Pago_Pago", 8)])
async def test_today_does_not_depend_on_the_time_zone_of_the_database_session(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch, zone: str, hour: int
) -> None:
    options = connections._options

    def in_zone(*address: Any, **given: Any) -> dict[str, Any]:
        whole = options(*address, **given)
        return {**whole, "server_settings": {**whole["server_settings"], "TimeZone": zone}}

    business = await arrange.business(connection)
    late = await arrange.invoice(connection, business, due_date=YESTERDAY)
    await arrange.invoice(connection, business, due_date=TODAY)
    monkeypatch.setattr(connections, "_options", in_zone)
    await run_job(overdue_detection, fire_time=datetime(2026, 11, 23, hour, tzinfo=UTC))
    assert (await marked(connection), await touched(connection)) == ({late}, {late})


async def test_neither_the_type_of_a_document_nor_its_amount_keeps_it_from_being_marked(
    run_job: RunJob, connection: Connection
) -> None:
    business = await arrange.business(connection)
    late = {
        await arrange.invoice(
            connection, business, due_date=YESTERDAY, document_type=kind, total_incl_vat_minor_units=amount
        )
        for kind in ("tax_invoice", "tax_invoice_receipt", "receipt", "credit_note")
        for amount in (10_000, 0, -10_000)
    }
    await run_job(overdue_detection, fire_time=FIRED)
    assert await marked(connection) == late


# What is cleared


async def test_a_mark_is_cleared_once_the_invoice_is_settled(run_job: RunJob, connection: Connection) -> None:
    business = await arrange.business(connection)
    by_status = {
        status: await arrange.invoice(connection, business, status=status, due_date=YESTERDAY, is_overdue=True)
        for status in STATUSES
    }
    await run_job(overdue_detection, fire_time=FIRED)
    assert await marked(connection) == {by_status[status] for status in STATUSES if status not in SETTLED}


@pytest.mark.parametrize(
    ("due", "is_cleared"), [(YESTERDAY, False), (TODAY, True), (TODAY + timedelta(days=30), True), (None, True)]
)
@pytest.mark.parametrize("status", OPEN)
@pytest.mark.samples(6)
async def test_a_mark_is_cleared_once_the_due_date_is_moved_to_where_it_is_not_past(
    run_job: RunJob, connection: Connection, status: str, due: date | None, is_cleared: bool
) -> None:
    await arrange.invoice(connection, await arrange.business(connection), status=status, due_date=due, is_overdue=True)
    await run_job(overdue_detection, fire_time=FIRED)
    assert (await marked(connection) == set()) is is_cleared


async def test_updated_at_moves_for_what_is_cleared(run_job: RunJob, connection: Connection) -> None:
    business = await arrange.business(connection)
    paid = await arrange.invoice(connection, business, status="paid", due_date=YESTERDAY, is_overdue=True)
    moved = await arrange.invoice(connection, business, due_date=TODAY, is_overdue=True)
    await arrange.invoice(connection, business, status="paid", due_date=YESTERDAY)
    await run_job(overdue_detection, fire_time=FIRED)
    assert await touched(connection) == {paid, moved}


# What is counted


async def test_a_second_run_finds_nothing_left_to_do(run_job: RunJob, connection: Connection) -> None:
    business = await arrange.business(connection)
    await arrange.invoice(connection, business, due_date=YESTERDAY)
    await arrange.invoice(connection, business, status="paid", is_overdue=True)
    await run_job(overdue_detection, fire_time=FIRED)
    again = await run_job(overdue_detection, fire_time=FIRED)
    assert (again.run["counts"], again.businesses["touched"]) == ({"marked": 0, "cleared": 0}, 0)


async def test_a_run_counts_what_it_marked_and_cleared(run_job: RunJob, connection: Connection) -> None:
    business = await arrange.business(connection)
    for _ in range(3):
        await arrange.invoice(connection, business, due_date=YESTERDAY)
    await arrange.invoice(connection, business, status="credited", is_overdue=True)
    await arrange.invoice(connection, business, due_date=TODAY, is_overdue=True)
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert report.run["counts"] == {"marked": 3, "cleared": 2}


async def test_each_business_that_was_changed_is_reported_with_its_own_counts(
    run_job: RunJob, connection: Connection
) -> None:
    late, settled, neither = [await arrange.business(connection) for _ in range(3)]
    await arrange.invoice(connection, late, due_date=YESTERDAY)
    await arrange.invoice(connection, late, due_date=YESTERDAY)
    await arrange.invoice(connection, late, due_date=None, is_overdue=True)
    await arrange.invoice(connection, settled, status="paid", is_overdue=True)
    await arrange.invoice(connection, neither, due_date=TODAY)
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert await outcomes(connection, report.run["run_id"]) == {
        late: {"marked": 2, "cleared": 1},
        settled: {"cleared": 1},
    }


# Who is told


async def test_a_run_asks_once_for_the_digest_of_its_day(run_job: RunJob, connection: Connection) -> None:
    await run_job(overdue_detection, fire_time=FIRED)
    assert await digests(connection) == [{"as_of": "2026-11-23"}]


async def test_the_digest_is_caused_by_the_run_that_marked(run_job: RunJob) -> None:
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert [(run["job"], run["state"]) for run in report.caused] == [("overdue-digest", "succeeded")]


async def test_a_scheduled_run_that_comes_after_midnight_asks_for_the_digest_of_its_fire_time(
    make_settings: MakeSettings, connection: Connection
) -> None:
    await run_scheduled(make_settings, fire_time=FIRED, now=FIRED + timedelta(hours=18, minutes=1))
    assert await digests(connection) == [{"as_of": "2026-11-23"}]


async def test_a_digest_that_could_not_be_asked_for_is_asked_for_by_a_later_attempt_of_the_run(
    make_settings: MakeSettings, connection: Connection
) -> None:
    late = await arrange.invoice(connection, await arrange.business(connection), due_date=YESTERDAY)
    await connection.execute("alter table bon_scheduler.runs add constraint no check (job <> 'overdue-digest')")
    async with service.machinery(make_settings(), clock=SetClock(FIRED)) as parts:
        run_id = await entries.enqueue(connection, Request(overdue_detection.name, {}, fire_time=FIRED))
        assert run_id is not None
        await attempt(parts, run_id, overdue_detection)
        assert (await marked(connection), await digests(connection)) == ({late}, [])
        await connection.execute("alter table bon_scheduler.runs drop constraint no")
        await attempt(parts, run_id, overdue_detection)
    assert await digests(connection) == [{"as_of": "2026-11-23"}]
    state = await connection.fetchrow("select state::text, counts from bon_scheduler.runs where id = $1", run_id)
    assert tuple(state or ()) == ("succeeded", {"marked": 1, "cleared": 0})


# Replays


async def test_a_replay_of_an_old_tick_keeps_the_mark_of_what_became_overdue_since(
    run_job: RunJob, connection: Connection
) -> None:
    business = await arrange.business(connection)
    since = await arrange.invoice(connection, business, due_date=YESTERDAY, is_overdue=True)
    await arrange.invoice(connection, business, due_date=TODAY, is_overdue=True)
    await run_job(overdue_detection, fire_time=FIRED - timedelta(days=5), now=FIRED)
    assert await marked(connection) == {since}


async def test_a_replay_marks_only_what_was_overdue_on_its_day(run_job: RunJob, connection: Connection) -> None:
    business = await arrange.business(connection)
    then = await arrange.invoice(connection, business, due_date=TODAY - timedelta(days=6))
    await arrange.invoice(connection, business, due_date=TODAY - timedelta(days=5))
    await run_job(overdue_detection, fire_time=FIRED - timedelta(days=5), now=FIRED)
    assert await marked(connection) == {then}


@pytest.mark.parametrize(
    ("days_ago", "send", "asked"),
    [
        (1, False, []),
        (5, False, []),
        (1, True, [{"as_of": "2026-11-22"}]),
        (0, False, [{"as_of": "2026-11-23"}]),
    ],
)
async def test_a_replay_dated_before_today_tells_nobody_unless_it_is_told_to(
    run_job: RunJob, connection: Connection, days_ago: int, send: bool, asked: list[dict[str, str]]
) -> None:
    fire_time = FIRED - timedelta(days=days_ago)
    await run_job(overdue_detection, OverdueDetection(send=send), fire_time=fire_time, now=FIRED)
    assert await digests(connection) == asked
