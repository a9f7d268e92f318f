"""The digest, from overdue detection to a real mail server on loopback: who gets one, what is in it, how often."""

import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from bon_scheduler.engine.run_once import RunReport
from handlers.overdue_detection import overdue_detection
from handlers.overdue_digest import OverdueDigest, overdue_digest
from handlers.send_overdue_digest import SendOverdueDigest, send_overdue_digest
from tests import arrange
from tests.conftest import Connection, RunJob

TODAY = date(2026, 11, 23)
YESTERDAY = TODAY - timedelta(days=1)
FIRED = datetime(2026, 11, 23, 4, tzinfo=UTC)
"""06:00 in Israel."""
NOTHING = {"sent": 0, "logged": 0, "refused": 0, "unknown": 0, "already_sent": 0, "no_recipient": 0}


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[SmtpSink]:
    async with smtp_sink(tmp_path) as listening:
        yield listening


def through(sink: SmtpSink) -> dict[str, str]:
    """The environment of a service that sends its mail there."""
    return {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none", "EMAIL_LANGUAGE": "en"}


def addressees(sink: SmtpSink) -> list[str]:
    return sorted(str(message["To"]) for message in sink.messages)


def part(sink: SmtpSink, kind: str) -> str:
    """The text of the only letter, as `plain` or as `html`."""
    (message,) = sink.messages
    body = message.get_body(preferencelist=(kind,))
    assert body is not None
    return str(body.get_content())


def sendings(report: RunReport) -> list[dict[str, Any]]:
    """The counts of the runs that send."""
    return [run["counts"] for run in report.caused if run["job"] == "send-overdue-digest"]


async def owed(connection: Connection, *owners: str, **business: object) -> UUID:
    """Make a business that is owed 100.00 ILS since yesterday; returns its id."""
    business_id = await arrange.business(connection, **business)
    for email in owners:
        await arrange.owner(connection, business_id, email)
    await late(connection, business_id)
    return business_id


async def late(connection: Connection, business_id: UUID, **values: object) -> UUID:
    return await arrange.invoice(connection, business_id, **({"due_date": YESTERDAY} | values))


# Who gets one


async def test_each_owner_of_a_business_that_is_owed_something_gets_one(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection, "first@shop.example", "second@shop.example")
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert addressees(sink) == ["first@shop.example", "second@shop.example"]


async def test_a_business_that_is_owed_nothing_gets_none(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    business = await arrange.business(connection)
    await arrange.owner(connection, business, "owner@shop.example")
    await late(connection, business, due_date=TODAY)
    report = await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert (sendings(report), addressees(sink)) == ([], [])


async def test_members_who_are_not_owners_get_none(run_job: RunJob, connection: Connection, sink: SmtpSink) -> None:
    business = await owed(connection, "owner@shop.example")
    await arrange.owner(connection, business, "admin@shop.example", role="admin")
    await arrange.owner(connection, business, "user@shop.example", role="user")
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert addressees(sink) == ["owner@shop.example"]


async def test_a_business_that_is_not_active_gets_none(run_job: RunJob, connection: Connection, sink: SmtpSink) -> None:
    await owed(connection, "owner@closed.example", is_active=False, deleted_at=FIRED)
    report = await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert (sendings(report), addressees(sink)) == ([], [])


async def test_a_business_that_was_closed_after_its_digest_was_asked_for_gets_none(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    business = await owed(connection, "owner@closed.example", is_active=False, deleted_at=FIRED)
    payload = SendOverdueDigest(business_id=business, as_of=TODAY)
    report = await run_job(send_overdue_digest, payload, fire_time=FIRED, **through(sink))
    assert (report.run["state"], report.run["counts"], addressees(sink)) == ("succeeded", NOTHING, [])


async def test_owners_whose_addresses_differ_in_case_only_get_one(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection, "Owner@Shop.example", "owner@shop.example")
    report = await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert (sendings(report), len(sink.messages)) == ([NOTHING | {"sent": 1}], 1)


async def test_an_owner_of_two_businesses_gets_one_for_each(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    owner = await arrange.owner(connection, await owed(connection), "owner@both.example")
    values = {"user_id": owner, "business_id": await owed(connection), "role": "owner"}
    await arrange.insert(connection, "user_businesses", values)
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert addressees(sink) == ["owner@both.example"] * 2


async def test_the_address_of_the_business_is_written_to_where_nobody_owns_it(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection, email="office@shop.example")
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert addressees(sink) == ["office@shop.example"]


async def test_the_address_of_the_business_is_not_written_to_where_somebody_owns_it(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection, "owner@shop.example", email="office@shop.example")
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert addressees(sink) == ["owner@shop.example"]


async def test_a_business_without_any_address_is_counted_and_is_no_failure(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection)
    report = await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert (sendings(report), report.went_well) == ([NOTHING | {"no_recipient": 1}], True)


async def test_a_business_without_any_address_is_reported(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    business = await owed(connection)
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    kept = await connection.fetch("select business_id from bon_scheduler.business_outcomes where outcome = 'kept'")
    assert [row["business_id"] for row in kept] == [business]


async def test_each_business_has_a_run_of_its_own(run_job: RunJob, connection: Connection, sink: SmtpSink) -> None:
    businesses = {await owed(connection, f"{name}@shop.example") for name in ("a", "b")}
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    runs = await connection.fetch("select payload from bon_scheduler.runs where job = 'send-overdue-digest'")
    assert sorted(row["payload"]["business_id"] for row in runs) == sorted(map(str, businesses))


async def test_the_digest_counts_businesses_invoices_and_letters(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection, "Owner@a.example", "owner@a.example", "other@a.example")
    await late(connection, await owed(connection, email="office@b.example"))
    await owed(connection)
    report = await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    (counts,) = [run["counts"] for run in report.caused if run["job"] == "overdue-digest"]
    assert (counts, len(sink.messages)) == ({"businesses": 3, "invoices": 4, "deliveries": 3}, 3)


async def test_an_address_that_is_none_keeps_nobody_else_from_getting_theirs(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection, "a mistake", "owner@shop.example")
    report = await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert (sendings(report), addressees(sink)) == ([NOTHING | {"sent": 1, "refused": 1}], ["owner@shop.example"])


# How often


async def test_a_second_detection_the_same_day_sends_nothing(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection, "owner@shop.example")
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    again = await run_job(overdue_detection, fire_time=FIRED + timedelta(hours=3), **through(sink))
    assert (sendings(again), len(sink.messages)) == ([NOTHING | {"already_sent": 1}], 1)


async def test_what_is_still_owed_the_next_day_is_sent_again(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection, "owner@shop.example")
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    await run_job(overdue_detection, fire_time=FIRED + timedelta(days=1), **through(sink))
    assert addressees(sink) == ["owner@shop.example"] * 2


async def test_an_owner_who_joined_since_gets_the_digest_of_the_day_and_the_others_do_not(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    business = await owed(connection, "first@shop.example")
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    await arrange.owner(connection, business, "second@shop.example")
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert addressees(sink) == ["first@shop.example", "second@shop.example"]


async def test_without_a_mail_server_a_digest_is_only_logged(run_job: RunJob, connection: Connection) -> None:
    await owed(connection, "owner@shop.example")
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert sendings(report) == [NOTHING | {"logged": 1}]


async def test_a_digest_that_was_only_logged_is_sent_by_a_later_run_of_the_day(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection, "owner@shop.example")
    await run_job(overdue_detection, fire_time=FIRED)
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert addressees(sink) == ["owner@shop.example"]


# What is in it


async def test_the_digest_lists_only_invoices_on_which_something_is_owed(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    business = await owed(connection, "owner@shop.example")
    await late(connection, business, document_number="OWED-1")
    await arrange.payment(connection, await late(connection, business, document_number="NOT-PAID"), 10_000)
    credited = await late(connection, business, document_number="NOT-CREDITED")
    await arrange.credit_note(connection, business, credited, document_number="NOT-NOTE", due_date=YESTERDAY)
    for kind in ("receipt", "tax_invoice_receipt"):
        await late(connection, business, document_type=kind, document_number=f"NOT-{kind}")
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert "OWED-1" in part(sink, "plain")
    assert "NOT-" not in part(sink, "plain")


@pytest.mark.parametrize("kind", ["plain", "html"])
async def test_the_amount_is_what_is_left_after_payments_and_finalized_credit_notes(
    run_job: RunJob, connection: Connection, sink: SmtpSink, kind: str
) -> None:
    business = await arrange.business(connection)
    await arrange.owner(connection, business, "owner@shop.example")
    invoice = await late(connection, business, status="partially_paid", total_incl_vat_minor_units=123_456)
    await arrange.payment(connection, invoice, 20_000)
    await arrange.payment(connection, invoice, 3_000)
    await arrange.credit_note(connection, business, invoice, total_incl_vat_minor_units=456)
    await arrange.credit_note(connection, business, invoice, status="draft", total_incl_vat_minor_units=7_000)
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    assert "₪1,000.00" in part(sink, kind)
    assert "₪1,234.56" in part(sink, kind)


async def test_an_invoice_that_was_paid_since_it_was_marked_is_not_dunned(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    business = await owed(connection, "owner@shop.example")
    await connection.execute("update invoices set status = 'paid', is_overdue = true")
    payload = SendOverdueDigest(business_id=business, as_of=TODAY)
    await run_job(send_overdue_digest, payload, fire_time=FIRED, **through(sink))
    assert addressees(sink) == []


async def test_names_are_escaped_in_html(run_job: RunJob, connection: Connection, sink: SmtpSink) -> None:
    business = await owed(connection, "owner@shop.example", name="<b>Studio</b>")
    await late(connection, business, customer_name="<script>Customer", document_number="<i>7</i>")
    await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    html = part(sink, "html")
    assert [text for text in ("<b>Studio", "<script>", "<i>") if text in html] == []
    assert "&lt;b&gt;Studio&lt;/b&gt;" in html


# Asked for by a person


async def test_without_a_day_the_digest_is_of_the_day_it_is_asked_for(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection, "owner@shop.example")
    await run_job(overdue_digest, fire_time=FIRED, **through(sink))
    assert addressees(sink) == ["owner@shop.example"]


async def test_the_digest_of_a_day_that_is_over_is_sent_only_when_that_day_is_named(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection, "owner@shop.example")
    tomorrow = FIRED + timedelta(days=1)
    unnamed = await run_job(overdue_digest, fire_time=FIRED, now=tomorrow, **through(sink))
    assert (unnamed.run["state"], addressees(sink)) == ("dead", [])
    assert "day that is over" in unnamed.run["error"]
    await run_job(overdue_digest, OverdueDigest(as_of=TODAY), fire_time=FIRED, now=tomorrow, **through(sink))
    assert addressees(sink) == ["owner@shop.example"]


@pytest.mark.parametrize("one_business", [False, True])
async def test_the_digest_of_a_day_to_come_is_refused(
    run_job: RunJob, connection: Connection, sink: SmtpSink, one_business: bool
) -> None:
    """It would dun for what is not due yet, and use up that day's letter."""
    business = await owed(connection, "owner@shop.example")
    await late(connection, business, due_date=TODAY)
    tomorrow = TODAY + timedelta(days=1)
    job = send_overdue_digest if one_business else overdue_digest
    payload = SendOverdueDigest(business_id=business, as_of=tomorrow) if one_business else OverdueDigest(as_of=tomorrow)
    report = await run_job(job, payload, fire_time=FIRED, **through(sink))
    assert (report.run["state"], report.caused, addressees(sink)) == ("dead", [], [])
    assert f"Ask for {TODAY} or an earlier day" in report.run["error"]


async def test_a_worker_whose_clock_is_slow_sends_what_was_asked_for_by_one_that_is_right(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await owed(connection, "owner@shop.example")
    midnight = datetime(2026, 11, 22, 22, tzinfo=UTC)
    slow = midnight - timedelta(minutes=1)
    await run_job(overdue_digest, OverdueDigest(as_of=TODAY), fire_time=midnight, now=slow, **through(sink))
    assert addressees(sink) == ["owner@shop.example"]


# What is logged


@pytest.mark.parametrize("sends", [True, False], ids=["sent", "logged only"])
async def test_nothing_logged_names_a_person_an_address_or_a_token(
    run_job: RunJob, connection: Connection, sink: SmtpSink, logged: Callable[[], str], sends: bool
) -> None:
    business = await owed(connection, "secret-owner@shop.example", "secret mistake", name="Secret Studio")
    customer = await arrange.customer(connection, business, name="Secret Customer", email="secret-buyer@shop.example")
    await late(connection, business, customer_id=customer)
    await late(connection, business, customer_name="Secret Snapshot", customer_email="secret-copy@shop.example")
    await owed(connection, email="secret-office@shop.example")
    await owed(connection, name="Secret Nobody")
    mail = through(sink) if sends else {}
    link = "https://app.bon.example/stop?token=secret-token"
    await run_job(overdue_detection, fire_time=FIRED, LOG_LEVEL="debug", UNSUBSCRIBE_URL=link, **mail)
    events = [json.loads(line) for line in logged().splitlines()]
    assert [event for event in events if "secret" in json.dumps(event).lower()] == []
    assert {event["job"] for event in events if event["event"] == "run.ended"} == {
        "overdue-detection",
        "overdue-digest",
        "send-overdue-digest",
    }
