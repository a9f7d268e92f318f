"""The real service and a mail server that is away: one alert, no attempt used up, everything sent in the end."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiosmtpd.smtp import SMTP

from bon_scheduler import Counts, JobContext, NoPayload, NotNowError, declared, job, service
from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from bon_scheduler.jobs import AnyJob
from bon_scheduler.ledger import changes
from bon_scheduler.mail import gate
from handlers.send_overdue_digest import SendOverdueDigest, send_overdue_digest
from tests import arrange
from tests.conftest import Connection, MakeSettings, RunJob
from tests.mailserver import Server
from tests.process import serve
from tests.waiting import until

NO_SCHEDULES = {f"SCHEDULE_{job.name.replace('-', '_').upper()}": "" for job in declared.JOBS}
BUSINESSES = 40
UNFINISHED = "select count(*) from bon_scheduler.runs where state in ('queued', 'running', 'retrying')"
TAKEN_WHILE_CLOSED = """
    select a.started_at
      from bon_scheduler.attempts a
      join bon_scheduler.mail_gate g on a.started_at > g.closed_since
     order by 1
"""
DETECT = "select bon_scheduler.enqueue('overdue-detection')"


async def build(connection: Connection, businesses: int = BUSINESSES) -> None:
    for n in range(businesses):
        business = await arrange.business(connection)
        await arrange.owner(connection, business, f"owner{n}@shop.example")
        await arrange.invoice(connection, business, due_date=datetime.now(UTC).date() - timedelta(days=10))


async def all_ended(connection: Connection) -> bool:
    return not await connection.fetchval(UNFINISHED)


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[SmtpSink]:
    async with smtp_sink(tmp_path) as listening:
        yield listening


async def test_an_outage_is_said_once_costs_no_attempt_and_then_everything_is_sent(
    make_settings: MakeSettings,
    connection: Connection,
    sink: SmtpSink,
    logged: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wait = timedelta(seconds=0.2)
    for name in ("FIRST_WAIT", "LONGEST_WAIT"):
        monkeypatch.setattr(gate, name, wait)
    await build(connection)
    mail = {"SMTP_HOST": sink.host, "SMTP_TLS": "none", "EMAIL_RATE_PER_SECOND": "1000", **NO_SCHEDULES}
    await connection.execute(DETECT)
    async with service.serving(make_settings(SMTP_PORT="1", **mail)):

        async def tried_often() -> bool:
            given_back = "select sum(given_back) from bon_scheduler.runs where job = 'send-overdue-digest'"
            return int(await connection.fetchval(given_back) or 0) >= 20

        await until(tried_often, seconds=40)
        # The others wait in the ledger, not in a handler's place: once it is closed, one at a time is taken.
        taken = await connection.fetch(TAKEN_WHILE_CLOSED)
        assert len(taken) > 2
        assert all(later[0] - earlier[0] > wait * 0.9 for earlier, later in itertools.pairwise(taken))
    spent = await connection.fetchval("select max(attempt - given_back) from bon_scheduler.runs")
    assert spent <= 1
    errors = [json.loads(line) for line in logged().splitlines() if '"error"' in line]
    assert [event["event"] for event in errors if event["level"] == "error"] == ["mail.unavailable"]
    async with service.serving(make_settings(SMTP_PORT=str(sink.port), **mail)):
        await until(lambda: all_ended(connection), seconds=40)
    assert sorted(str(message["To"]) for message in sink.messages) == sorted(
        f"owner{n}@shop.example" for n in range(BUSINESSES)
    )


async def test_a_digest_that_could_not_be_sent_on_its_day_is_given_up_and_says_so(
    run_job: RunJob, connection: Connection
) -> None:
    await build(connection, 1)
    business = await connection.fetchval("select business_id from user_businesses")
    now = datetime.now(UTC)
    payload = SendOverdueDigest(business_id=business, as_of=now.date())
    mail = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": "1", "SMTP_TLS": "none"}
    soon = await run_job(send_overdue_digest, payload, fire_time=now, now=now + timedelta(hours=17), **mail)
    late = await run_job(send_overdue_digest, payload, fire_time=now, now=now + timedelta(hours=19), **mail)
    assert (soon.run["state"], late.run["state"]) == ("queued", "dead")
    assert "is given up after 18:00:00" in late.run["error"]


async def test_the_rate_holds_for_two_processes_together(
    connection: Connection, database_url: str, sink: SmtpSink
) -> None:
    """Real processes, each of which alone would send ten times as fast."""
    rate, letters = 10, 30
    await build(connection, letters)
    arrivals: list[float] = []

    async def watch() -> None:
        while True:
            arrivals.extend([time.monotonic()] * (len(sink.messages) - len(arrivals)))
            await asyncio.sleep(0.01)

    environ = {
        **NO_SCHEDULES,
        "DATABASE_URL": database_url,
        "SMTP_HOST": sink.host,
        "SMTP_PORT": str(sink.port),
        "SMTP_TLS": "none",
        "EMAIL_RATE_PER_SECOND": str(rate),
    }
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(serve(**environ))
        watching = asyncio.create_task(watch())
        await connection.execute(DETECT)

        async def all_there() -> bool:
            return len(arrivals) == letters

        await until(all_there, seconds=30)
        watching.cancel()
    # From the claim of the first letter's run, which brought its place, to the last letter.
    span = """
        select extract(epoch from (select max(intended_at) from bon_scheduler.deliveries) - min(started_at))::float8
          from bon_scheduler.runs
         where job = 'send-overdue-digest'
    """
    assert await connection.fetchval(span) >= (letters - 1) / rate * 0.95
    assert arrivals[-1] - arrivals[0] <= (letters - 1) / rate * 3
    workers = "select count(distinct worker) from bon_scheduler.attempts where run_id in "
    assert await connection.fetchval(f"{workers} (select run_id from bon_scheduler.deliveries)") == 2


async def test_letters_that_wait_for_their_turn_keep_no_other_job_waiting(
    make_settings: MakeSettings, connection: Connection, sink: SmtpSink
) -> None:
    await build(connection, 30)
    mail = {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none", **NO_SCHEDULES}
    async with service.serving(make_settings(EMAIL_RATE_PER_SECOND="3", WORKER_CONCURRENCY="4", **mail)):
        await connection.execute(DETECT)

        async def sending() -> bool:
            return len(sink.messages) >= 2

        await until(sending, seconds=20)
        run = await connection.fetchval("select bon_scheduler.enqueue('session-cleanup')")

        async def cleaned() -> bool:
            state = await connection.fetchval("select state::text from bon_scheduler.runs where id = $1", run)
            return str(state) == "succeeded"

        await until(cleaned, seconds=6)
        assert len(sink.messages) < 28


async def test_a_letter_that_is_not_taken_now_is_sent_by_a_later_attempt_and_the_others_at_once(
    make_settings: MakeSettings, connection: Connection, server: Server
) -> None:
    refusals = ["450 4.2.0 greylisted"]
    server.auth = False

    async def greylist(_: SMTP) -> str:
        return refusals.pop() if refusals else "250 OK"

    server.on["RCPT"] = greylist
    await build(connection, 1)
    business = await connection.fetchval("select business_id from user_businesses")
    await arrange.owner(connection, business, "second@shop.example")
    async with server.listening():
        mail = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(server.port), "SMTP_TLS": "none", **NO_SCHEDULES}
        async with service.serving(make_settings(**mail)):
            await connection.execute(DETECT)

            async def retrying() -> bool:
                found = "select count(*) from bon_scheduler.runs where state = 'retrying'"
                return bool(await connection.fetchval(found))

            await until(retrying)
            assert len(server.recipients) == 1
            await connection.execute("update bon_scheduler.runs set run_at = now() where state = 'retrying'")
            await until(lambda: all_ended(connection))
    assert sorted(server.recipients) == ["owner0@shop.example", "second@shop.example"]
    run = await connection.fetchrow("select attempt, counts from bon_scheduler.runs where job = 'send-overdue-digest'")
    assert run is not None
    assert (run["attempt"], run["counts"]["sent"], run["counts"]["already_sent"]) == (2, 2, 0)


# What a handler that must wait is given


def not_now(times: int, wait: timedelta = timedelta(milliseconds=20)) -> AnyJob:
    """Make a job whose handler is not ready the first `times` times."""
    asked = 0

    @job("a-test")
    async def handler(_: JobContext, __: NoPayload) -> Counts:
        nonlocal asked
        asked += 1
        if asked <= times:
            raise NotNowError("the printer is away", after=wait)
        return {"asked": asked}

    return handler


async def test_a_run_that_cannot_begin_comes_again_and_no_attempt_counts(
    make_settings: MakeSettings, connection: Connection
) -> None:
    a_test = not_now(8)
    async with service.serving(make_settings(), jobs=[a_test]):
        await connection.execute("select bon_scheduler.enqueue('a-test')")
        await until(lambda: all_ended(connection))
    row = await connection.fetchrow("select state::text, attempt, given_back, counts, error from bon_scheduler.runs")
    assert row is not None
    assert tuple(row)[:4] == ("succeeded", 9, 8, {"asked": 9})
    assert row["error"] is None
    outcomes = await connection.fetch("select outcome, error from bon_scheduler.attempts order by attempt")
    assert [row["outcome"] for row in outcomes] == ["given_back"] * 8 + ["succeeded"]
    assert outcomes[0]["error"] == "NotNowError: the printer is away"


async def test_while_it_waits_the_run_says_why_and_until_when(run_job: RunJob, connection: Connection) -> None:
    a_test = not_now(1, timedelta(minutes=7))
    await run_job(a_test, jobs=[a_test])
    row = await connection.fetchrow(
        "select state::text, error, run_at - clock_timestamp() > interval '6 minutes' as later from bon_scheduler.runs"
    )
    assert row is not None
    assert tuple(row) == ("queued", "NotNowError: the printer is away", True)
    assert not await connection.fetchval("select ready from bon_scheduler.runs")


# Runs that wait for a letter's turn


async def test_a_digest_that_waited_past_its_day_is_given_up_and_a_person_may_have_it_sent(
    make_settings: MakeSettings, connection: Connection, sink: SmtpSink
) -> None:
    await build(connection, 1)
    business = await connection.fetchval("select business_id from user_businesses")
    payload = {"business_id": str(business), "as_of": str(datetime.now(UTC).date() - timedelta(days=1))}
    run = await connection.fetchval("select bon_scheduler.enqueue('send-overdue-digest', $1)", payload)
    await connection.execute("update bon_scheduler.runs set enqueued_at = now() - interval '19 hours'")
    mail = {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none", **NO_SCHEDULES}
    async with service.serving(make_settings(**mail)):
        await until(lambda: all_ended(connection))
        row = await connection.fetchrow("select state::text, error from bon_scheduler.runs where id = $1", run)
        assert row is not None
        assert row["state"] == "dead"
        assert "until its day was over" in row["error"]
        await changes.change_all(connection, changes.Action.RETRY, [run], by="dana", reason="mail is back")
        await until(lambda: all_ended(connection))
    assert len(sink.messages) == 1


async def test_a_place_that_no_letter_used_is_given_back(
    make_settings: MakeSettings, connection: Connection, sink: SmtpSink
) -> None:
    """Forty runs that find nothing to send do not take forty letters' time."""
    await build(connection, 40)
    mail = {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none", **NO_SCHEDULES}
    await connection.execute("update invoices set status = 'paid'")
    await connection.execute(
        "select bon_scheduler.enqueue('send-overdue-digest', jsonb_build_object("
        "'business_id', business_id, 'as_of', current_date)) from user_businesses"
    )
    async with service.serving(make_settings(EMAIL_RATE_PER_SECOND="1", **mail)):
        await until(lambda: all_ended(connection), seconds=20)


async def test_a_trial_that_sends_no_letter_leaves_the_trial_to_another(
    make_settings: MakeSettings, connection: Connection, sink: SmtpSink
) -> None:
    await build(connection, 2)
    first, second = await connection.fetch("select business_id from user_businesses order by business_id")
    await connection.execute("update invoices set status = 'paid' where business_id = $1", first["business_id"])
    await connection.execute(
        "update bon_scheduler.mail_gate set failures = 3, trouble = 'x', closed_since = now(), closed_until = now()"
    )
    for row in (first, second):
        payload = {"business_id": str(row["business_id"]), "as_of": str(datetime.now(UTC).date())}
        await connection.execute("select bon_scheduler.enqueue('send-overdue-digest', $1)", payload)
    mail = {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none", **NO_SCHEDULES}
    async with service.serving(make_settings(**mail)):
        await until(lambda: all_ended(connection), seconds=20)
    assert len(sink.messages) == 1
    assert await connection.fetchval("select closed_since is null from bon_scheduler.mail_gate")


async def test_a_greylisted_letter_waits_by_its_own_attempts_and_not_by_those_that_were_given_back(
    make_settings: MakeSettings, connection: Connection, server: Server
) -> None:
    """Six times given back while the server was away; then the first 4yz: half a minute, not half an hour."""
    await build(connection, 1)
    business = await connection.fetchval("select business_id from user_businesses")
    payload = {"business_id": str(business), "as_of": str(datetime.now(UTC).date())}
    run = await connection.fetchval("select bon_scheduler.enqueue('send-overdue-digest', $1)", payload)
    await connection.execute("update bon_scheduler.runs set attempt = 6, given_back = 6")
    server.auth, server.on["RCPT"] = False, "450 4.2.0 greylisted"
    query = "select extract(epoch from run_at - now())::float8 from bon_scheduler.runs where id = $1 and attempt = 7"

    async def waits() -> float:
        return float(await connection.fetchval(f"{query} and state = 'retrying'", run) or 0)

    async with server.listening():
        mail = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(server.port), "SMTP_TLS": "none", **NO_SCHEDULES}
        async with service.serving(make_settings(**mail)):
            seconds = await until(waits)
    assert 5 < seconds <= 30
