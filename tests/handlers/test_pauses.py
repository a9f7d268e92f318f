"""A paused business is skipped by every job, and counted."""

from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from handlers.draft_cleanup import draft_cleanup
from handlers.overdue_detection import overdue_detection
from handlers.send_overdue_digest import SendOverdueDigest, send_overdue_digest
from handlers.shaam_token_refresh import shaam_token_refresh
from tests import arrange
from tests.conftest import Connection, RunJob
from tests.process import run_command

TODAY = date(2026, 11, 23)
FIRED = datetime(2026, 11, 23, 4, tzinfo=UTC)
PAUSE = "insert into bon_scheduler.business_pauses (business_id, by, reason) values ($1, 'dana', 'a dispute')"


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[SmtpSink]:
    async with smtp_sink(tmp_path) as listening:
        yield listening


def through(sink: SmtpSink) -> dict[str, str]:
    return {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none", "EMAIL_LANGUAGE": "en"}


async def shop(connection: Connection, email: str, *, paused: bool) -> UUID:
    """Make a business that is owed something, has a mark to clear, one to move, and a stale draft."""
    business = await arrange.business(connection)
    await arrange.owner(connection, business, email)
    await arrange.invoice(connection, business, due_date=TODAY - timedelta(days=3))
    await arrange.invoice(connection, business, status="paid", is_overdue=True)
    await arrange.invoice(connection, business, is_overdue=True, due_date=TODAY + timedelta(days=9))
    await arrange.draft(connection, business)
    if paused:
        await connection.execute(PAUSE, business)
    return business


async def test_detection_leaves_a_paused_business_as_it_is_and_counts_it(
    run_job: RunJob, connection: Connection
) -> None:
    paused = await shop(connection, "paused@shop.example", paused=True)
    await shop(connection, "other@shop.example", paused=False)
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert report.run["counts"] == {"marked": 1, "cleared": 2, "paused": 1}
    touched = "select count(*) from invoices where business_id = $1 and updated_at > $2"
    assert await connection.fetchval(touched, paused, arrange.LONG_AGO) == 0


async def test_a_paused_businesss_tokens_are_left_alone_and_it_is_counted(
    run_job: RunJob, connection: Connection
) -> None:
    for paused in (True, False):
        business = await shop(connection, f"{paused}@shop.example", paused=paused)
        credentials = {
            "business_id": business,
            "encrypted_access_token": "sealed",
            "encrypted_refresh_token": "sealed",
            "token_expires_at": FIRED,
        }
        await arrange.insert(connection, "business_shaam_credentials", credentials)
    report = await run_job(shaam_token_refresh, fire_time=FIRED)
    assert (report.run["counts"]["due"], report.run["counts"]["paused"]) == (1, 1)


async def test_a_paused_business_gets_no_digest_and_is_counted(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    await shop(connection, "paused@shop.example", paused=True)
    await shop(connection, "other@shop.example", paused=False)
    report = await run_job(overdue_detection, fire_time=FIRED, **through(sink))
    (counts,) = [run["counts"] for run in report.caused if run["job"] == "overdue-digest"]
    assert counts == {"businesses": 1, "invoices": 1, "deliveries": 1, "paused": 1}
    assert [message["To"] for message in sink.messages] == ["other@shop.example"]


async def test_a_business_that_was_paused_after_its_digest_was_asked_for_gets_none(
    run_job: RunJob, connection: Connection, sink: SmtpSink
) -> None:
    business = await shop(connection, "paused@shop.example", paused=True)
    payload = SendOverdueDigest(business_id=business, as_of=TODAY)
    report = await run_job(send_overdue_digest, payload, fire_time=FIRED, **through(sink))
    assert (report.run["state"], report.run["counts"]["paused"], sink.messages) == ("succeeded", 1, [])


async def test_drafts_of_a_paused_business_stay_and_it_is_counted(run_job: RunJob, connection: Connection) -> None:
    paused = await shop(connection, "paused@shop.example", paused=True)
    await shop(connection, "other@shop.example", paused=False)
    report = await run_job(draft_cleanup, fire_time=FIRED)
    assert report.run["counts"] == {"deleted": 1, "items": 0, "kept": 0, "paused": 1}
    assert await connection.fetchval("select business_id from invoices where status = 'draft'") == paused


async def test_a_paused_business_with_nothing_to_do_is_not_counted(run_job: RunJob, connection: Connection) -> None:
    await connection.execute(PAUSE, await arrange.business(connection))
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert report.run["counts"] == {"marked": 0, "cleared": 0}


# How it is done


async def test_an_operator_pauses_and_resumes_a_business_with_a_reason(
    connection: Connection, database_url: str
) -> None:
    business = str(await arrange.business(connection))
    paused = await run_command(
        "pause", "--business", business, "--reason", "a dispute", "--json", DATABASE_URL=database_url
    )
    assert (paused.status, paused.document) == (0, {"business_id": business, "paused": True, "changed": True})
    listed = await run_command("jobs", "--json", DATABASE_URL=database_url)
    assert list(listed.document["paused_businesses"]) == [business]
    assert listed.document["paused_businesses"][business]["reason"] == "a dispute"
    assert "a dispute" in (await run_command("jobs", DATABASE_URL=database_url)).out
    for changed in (True, False):
        resumed = await run_command(
            "resume", "--business", business, "--reason", "settled", "--json", DATABASE_URL=database_url
        )
        assert resumed.document["changed"] is changed
    actions = await connection.fetch("select action, target, reason from bon_scheduler.operator_actions order by id")
    assert [tuple(row) for row in actions] == [("pause", business, "a dispute"), ("resume", business, "settled")]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--business", "nobody"], 'bon-scheduler: "nobody" is not a business\'s id'),
        (["--business", str(uuid4())], "BON has no business"),
        ([], "either a JOB or --business UUID"),
        (["draft-cleanup", "--business", str(uuid4())], "either a JOB or --business UUID"),
    ],
)
async def test_what_cannot_be_paused_is_said_with_the_remedy(
    connection: Connection, database_url: str, arguments: list[str], what: str
) -> None:
    refused = await run_command("pause", *arguments, "--reason", "x", DATABASE_URL=database_url)
    assert refused.status == 2
    assert what in refused.err
    assert await connection.fetchval("select count(*) from bon_scheduler.operator_actions") == 0
