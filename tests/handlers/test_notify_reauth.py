"""The letter that asks an owner to consent again: once, in the owner's language, in the transaction of the flag."""

from collections.abc import AsyncIterator
from datetime import timedelta
from email.message import EmailMessage
from pathlib import Path
from uuid import UUID

import pytest

from bon_scheduler import service
from bon_scheduler.demo.shaam_simulator import Misbehaviour
from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from bon_scheduler.ledger.pauses import pause_business
from bon_scheduler.mail.deliveries import release
from bon_scheduler.mail.keys import read_key, recipient_hash
from handlers.notify_reauth import NotifyReauth, notify_reauth
from tests import arrange
from tests.attempting import attempt
from tests.conftest import MakeSettings, RunJob, SetClock
from tests.tax import NOW, Bon, Refresh


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[SmtpSink]:
    async with smtp_sink(tmp_path) as sink:
        yield sink


def smtp(sink: SmtpSink) -> dict[str, str]:
    return {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none"}


def body(message: EmailMessage, kind: str) -> str:
    part = message.get_body((kind,))
    assert part is not None
    return str(part.get_content())


async def flagged(bon: Bon, subject: str = "a") -> UUID:
    """A business with an owner, whose consent was withdrawn."""
    business = await bon.business(subject)
    await arrange.owner(bon.connection, business, "owner@example.com")
    bon.simulator.spoil[subject] = Misbehaviour.INVALID_GRANT
    return business


async def test_the_owner_is_told_once_however_often_the_runs_are_repeated(
    refresh: Refresh, bon: Bon, sink: SmtpSink, run_job: RunJob
) -> None:
    business = await flagged(bon)
    report = await refresh(**smtp(sink))
    assert [(run["job"], run["counts"]["sent"]) for run in report.caused] == [("notify-reauth", 1)]
    assert (await refresh(**smtp(sink))).caused == []
    again = await run_job(notify_reauth, NotifyReauth(business_id=business), fire_time=NOW, **smtp(sink))
    assert again.run["counts"]["already_sent"] == 1
    assert [message["To"] for message in sink.messages] == ["owner@example.com"]


async def test_the_letter_says_in_hebrew_what_to_do(refresh: Refresh, bon: Bon, sink: SmtpSink) -> None:
    await flagged(bon, "<Keshet & Sons>")
    await refresh(APP_ORIGIN="https://app.bon.example", **smtp(sink))
    (message,) = sink.messages
    assert message["Content-Language"] == "he"
    assert "רשות המסים" in message["Subject"]
    text, html = body(message, "plain"), body(message, "html")
    assert "\u2068<Keshet & Sons>\u2069" in text
    assert "מה לעשות" in text
    assert "https://app.bon.example" in text
    assert "&lt;Keshet &amp; Sons&gt;" in html
    assert '<html lang="he" dir="rtl">' in html
    assert "<Keshet" not in html


async def test_the_letter_may_be_english(refresh: Refresh, bon: Bon, sink: SmtpSink) -> None:
    await flagged(bon)
    await refresh(EMAIL_LANGUAGE="en", **smtp(sink))
    (message,) = sink.messages
    assert "consent" in message["Subject"]
    assert "What to do: sign in to BON" in body(message, "plain")


async def test_every_owner_is_told_and_nobody_else(refresh: Refresh, bon: Bon, sink: SmtpSink) -> None:
    business = await flagged(bon)
    await arrange.owner(bon.connection, business, "second@example.com")
    await arrange.owner(bon.connection, business, "admin@example.com", role="admin")
    await refresh(**smtp(sink))
    assert {message["To"] for message in sink.messages} == {"owner@example.com", "second@example.com"}


async def test_a_failure_that_is_not_the_owners_to_mend_writes_to_nobody(
    refresh: Refresh, bon: Bon, sink: SmtpSink
) -> None:
    await flagged(bon)
    bon.simulator.spoil["a"] = Misbehaviour.FORBIDDEN
    assert (await refresh(**smtp(sink))).caused == []
    assert sink.messages == []


async def test_an_owner_who_has_consented_meanwhile_gets_no_letter(bon: Bon, sink: SmtpSink, run_job: RunJob) -> None:
    business = await flagged(bon)
    report = await run_job(notify_reauth, NotifyReauth(business_id=business), fire_time=NOW, **smtp(sink))
    assert report.run["counts"]["consented"] == 1
    assert sink.messages == []


async def test_a_business_that_nobody_can_be_told_of_is_counted(bon: Bon, sink: SmtpSink, run_job: RunJob) -> None:
    business = await bon.business("a", needs_reauth=True)
    report = await run_job(notify_reauth, NotifyReauth(business_id=business), fire_time=NOW, **smtp(sink))
    assert (report.run["state"], report.run["counts"]["no_recipient"]) == ("succeeded", 1)


async def test_the_flag_and_the_letters_run_commit_together(
    refresh: Refresh, bon: Bon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A business that is flagged and whose owner is never told would stay locked out."""
    business = await flagged(bon)
    await bon.connection.execute("delete from bon_scheduler.jobs where name = 'notify-reauth'")
    await bon.connection.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$;"
        "create trigger refuse before insert on bon_scheduler.runs for each row when (new.job = 'notify-reauth')"
        " execute function refuse()"
    )
    monkeypatch.setattr("bon_scheduler.shaam.rotation.SAVE_WAITS_SECONDS", ())
    report = await refresh()
    assert report.run["counts"]["failed"] == 1
    assert not (await bon.row(business))["needs_reauth"]


async def test_a_second_consent_that_is_lost_on_another_day_is_told_again(
    bon: Bon, sink: SmtpSink, run_job: RunJob
) -> None:
    business = await flagged(bon)
    await bon.connection.execute("update business_shaam_credentials set needs_reauth = true")
    for days in range(2):
        fire_time = NOW - timedelta(days=1 - days)
        await run_job(notify_reauth, NotifyReauth(business_id=business), fire_time=fire_time, **smtp(sink))
    assert len(sink.messages) == 2


async def test_a_paused_business_gets_no_letter_and_is_counted(bon: Bon, sink: SmtpSink, run_job: RunJob) -> None:
    business = await flagged(bon)
    await bon.connection.execute("update business_shaam_credentials set needs_reauth = true")
    await pause_business(bon.connection, business, by="dana", reason="a dispute")
    report = await run_job(notify_reauth, NotifyReauth(business_id=business), fire_time=NOW, **smtp(sink))
    assert (report.run["state"], report.run["counts"]["paused"], sink.messages) == ("succeeded", 1, [])


async def test_a_letter_that_is_sent_again_days_later_goes_to_its_owner_alone(
    refresh: Refresh, bon: Bon, sink: SmtpSink, make_settings: MakeSettings
) -> None:
    """The other owner has theirs: to the delivery ledger another day's letter would be another letter."""
    later = NOW + timedelta(days=3)
    await arrange.owner(bon.connection, await flagged(bon), "second@example.com")
    await refresh(**smtp(sink))
    assert len(sink.messages) == 2
    business = await bon.connection.fetchval("select id from businesses")
    delivery = await bon.connection.fetchval(
        "update bon_scheduler.deliveries set state = 'unknown' where recipient_hash = $1 returning id",
        recipient_hash(await read_key(bon.connection), business, "owner@example.com"),
    )
    run = await release(bon.connection, delivery, by="dana", reason="she has it not")
    await bon.connection.execute("update bon_scheduler.runs set enqueued_at = $2 where id = $1", run, later)
    async with service.machinery(make_settings(**smtp(sink)), clock=SetClock(later)) as parts:
        await attempt(parts, run, notify_reauth)
    assert [str(message["To"]) for message in sink.messages[2:]] == ["owner@example.com"]
    assert await bon.connection.fetchval("select array_agg(state) from bon_scheduler.deliveries") == ["sent"] * 2
