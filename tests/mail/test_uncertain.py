"""Letters that may or may not have arrived: found, shown, counted, and sent again only by a person."""

import re
from collections.abc import AsyncIterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import asyncpg
import pytest

from bon_scheduler import declared, service
from bon_scheduler.database import connections
from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from bon_scheduler.ledger.attempts import release_lost
from bon_scheduler.mail.deliveries import give_up_unanswered, release
from bon_scheduler.mail.keys import read_key, recipient_hash
from bon_scheduler.mail.mailer import Delivery
from tests import arrange
from tests.conftest import Connection, MakeSettings
from tests.mailserver import Server
from tests.mailworld import LETTER, World, a_run, intend
from tests.process import run_command
from tests.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")

STATE = "select state from bon_scheduler.deliveries"
AS_OF = date(2026, 11, 23)
WORKER = "insert into bon_scheduler.workers (id, host, pid, version, seen_at) values ($1, 'h', 1, '0', $2::timestamptz)"


# Found without another attempt


@pytest.mark.parametrize("state", ["dead", "retrying", "cancelled", "succeeded"])
async def test_a_letter_whose_run_has_ended_becomes_unknown_by_itself(
    make_settings: MakeSettings, world: World, connection: Connection, state: str
) -> None:
    run = await a_run(world.pool, state)
    await connection.execute("update bon_scheduler.runs set run_at = now() + interval '1 day'")
    await intend(world.pool, run)
    async with service.serving(make_settings(LEASE_SECONDS="2")):

        async def unknown() -> bool:
            return str(await connection.fetchval(STATE)) == "unknown"

        await until(unknown, seconds=10)


async def test_a_letter_that_a_living_worker_is_sending_is_left_alone(
    make_settings: MakeSettings, world: World, connection: Connection
) -> None:
    worker, run = uuid4(), await a_run(world.pool)
    await connection.execute(WORKER.replace("$2::timestamptz", "now() + interval '1 hour'"), worker)
    await connection.execute("update bon_scheduler.runs set worker = $1, attempt = 1", worker)
    await intend(world.pool, run)
    async with service.serving(make_settings(LEASE_SECONDS="2")) as serving:
        for _ in range(3):
            await serving.machinery.reconciler.make_pass()
        assert await connection.fetchval(STATE) == "intended"
        await connection.execute("update bon_scheduler.workers set last_word = null where id = $1", worker)
        await serving.machinery.reconciler.make_pass()
        assert await connection.fetchval(STATE) == "unknown"


async def test_a_letter_of_an_attempt_before_the_one_that_runs_is_nobodys(
    make_settings: MakeSettings, world: World, connection: Connection
) -> None:
    """The run's next attempt lives, and may be about another letter."""
    worker, run = uuid4(), await a_run(world.pool)
    await connection.execute(WORKER.replace("$2::timestamptz", "now() + interval '1 hour'"), worker)
    await connection.execute("update bon_scheduler.runs set worker = $1, attempt = 2", worker)
    await intend(world.pool, run)
    async with service.serving(make_settings(LEASE_SECONDS="60")) as serving:
        await serving.machinery.reconciler.make_pass()
        assert await connection.fetchval("select state::text from bon_scheduler.runs") == "running"
        assert await connection.fetchval(STATE) == "unknown"


async def test_a_letter_of_a_dead_worker_becomes_unknown_though_its_run_cannot_be_released_yet(
    world: World, connection: Connection, database_url: str
) -> None:
    """Somebody has locked the run, so that it stays `running`, of a worker that is not there."""
    run = await a_run(world.pool)
    await connection.execute("update bon_scheduler.runs set worker = $1, attempt = 1", uuid4())
    await intend(world.pool, run)
    async with connections.connect(database_url) as other, other.transaction():
        await other.execute("select from bon_scheduler.runs for update")
        assert await release_lost(connection) == []
        assert len(await give_up_unanswered(connection)) == 1
    assert await connection.fetchval(STATE) == "unknown"


# Shown


async def unknown_letter(connection: Connection, email: str = "owner@shop.example", *, days_ago: int = 0) -> UUID:
    """Make a business that is owed something and whose owner's letter is unknown; return the delivery."""
    business = await arrange.business(connection)
    await arrange.owner(connection, business, email)
    await arrange.invoice(connection, business, due_date=AS_OF - timedelta(days=2))
    run = await connection.fetchval(
        "insert into bon_scheduler.runs (job, origin, state, payload, attempt) "
        "values ('send-overdue-digest', 'run', 'partial', $1, 1) returning id",
        f'{{"business_id": "{business}", "as_of": "{AS_OF}"}}',
    )
    delivery: UUID = await connection.fetchval(
        "insert into bon_scheduler.deliveries (kind, business_id, as_of, recipient_hash, state, message_id, run_id, "
        "attempt, intended_at) values ('overdue-digest', $1, $2, $3, 'unknown', '<x@y>', $4, 1, "
        "now() - make_interval(days => $5)) returning id",
        business,
        AS_OF,
        recipient_hash(await read_key(connection), business, email),
        run,
        days_ago,
    )
    return delivery


@pytest.fixture
async def plain(database_url: str) -> AsyncIterator[Connection]:
    """A connection that leaves JSON as text."""
    opened = await asyncpg.connect(database_url)
    yield opened
    await opened.close()


async def test_check_names_the_letters_of_the_week_and_the_remedy(plain: Connection, database_url: str) -> None:
    delivery = await unknown_letter(plain)
    await unknown_letter(plain, "other@shop.example", days_ago=8)
    checked = await run_command("check", "--json", DATABASE_URL=database_url)
    (finding,) = [f for f in checked.document["findings"] if f["name"] == "deliveries"]
    assert finding["level"] == "warning"
    assert finding["what"].startswith("1 of the last seven days")
    assert str(delivery) in finding["what"]
    assert "resend DELIVERY_ID" in finding["remedy"]


async def test_show_lists_the_letters_of_a_run(plain: Connection, database_url: str) -> None:
    delivery = await unknown_letter(plain)
    run = str(await plain.fetchval("select run_id from bon_scheduler.deliveries"))
    shown = (await run_command("show", run, "--json", DATABASE_URL=database_url)).document["deliveries"]
    assert [(letter["delivery_id"], letter["state"]) for letter in shown] == [(str(delivery), "unknown")]
    assert str(delivery)[:8] in (await run_command("show", run, DATABASE_URL=database_url)).out


async def test_metrics_count_letters_by_what_became_of_them(
    make_settings: MakeSettings, plain: Connection, tmp_path: Path
) -> None:
    await unknown_letter(plain)
    async with smtp_sink(tmp_path) as sink:
        settings = make_settings(SMTP_HOST=sink.host, SMTP_PORT=str(sink.port), SMTP_TLS="none")
        await owed(plain)
        async with service.serving(settings) as serving:
            await plain.execute("select bon_scheduler.enqueue('overdue-detection')")

            async def sent() -> bool:
                return len(sink.messages) == 2  # the unknown letter is of another day

            await until(sent, seconds=20)
            url = f"http://127.0.0.1:{serving.port}/metrics"
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                text = await answer.text()
    assert re.search(r'^email_sent_total\{status="sent"\} 2\.0$', text, re.MULTILINE)
    assert re.search(r"^email_send_duration_seconds_count 2\.0$", text, re.MULTILINE)
    assert re.search(r"^email_unknown 1\.0$", text, re.MULTILINE)
    assert re.search(r'^health_check_status\{dependency="mail"\} 1\.0$', text, re.MULTILINE)


async def owed(connection: Connection) -> None:
    business = await arrange.business(connection)
    await arrange.owner(connection, business, "other@shop.example")
    await arrange.invoice(connection, business, due_date=AS_OF - timedelta(days=900))


# Sent again


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[SmtpSink]:
    async with smtp_sink(tmp_path) as listening:
        yield listening


async def resend(delivery: UUID | str, database_url: str, reason: str = "she has it not") -> Any:
    return await run_command("resend", str(delivery), "--reason", reason, "--json", DATABASE_URL=database_url)


async def test_an_unknown_letter_is_sent_once_more_when_a_person_says_so(
    plain: Connection, database_url: str, sink: SmtpSink
) -> None:
    delivery = await unknown_letter(plain)
    released = await resend(delivery, database_url)
    assert released.status == 0
    again = await resend(delivery, database_url)
    assert again.status == 2
    assert "was released already" in again.err
    environ = {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none"}
    settings = declared.read_settings({"DATABASE_URL": database_url, "HEALTH_PORT": "0", **environ})
    async with service.serving(settings):

        async def sent() -> bool:
            return str(await plain.fetchval(STATE)) == "sent"

        await until(sent, seconds=20)
    assert [str(message["To"]) for message in sink.messages] == ["owner@shop.example"]
    third = await resend(delivery, database_url)
    assert "was sent" in third.err
    action = await plain.fetchrow("select action, target, reason from bon_scheduler.operator_actions")
    assert action is not None
    assert tuple(action) == ("resend", str(delivery), "she has it not")


async def test_the_run_that_sends_a_letter_again_is_told_its_day_though_the_first_was_not(
    plain: Connection, connection: Connection
) -> None:
    """Otherwise it would be today's letter, to everybody, and this one `released` for good."""
    delivery = await unknown_letter(plain)
    await plain.execute("update bon_scheduler.runs set payload = payload - 'as_of'")
    run = await release(connection, delivery, by="dana", reason="she has it not")
    day = await plain.fetchval("select payload ->> 'as_of' from bon_scheduler.runs where id = $1", run)
    assert day == AS_OF.isoformat()


@pytest.mark.parametrize(
    ("state", "why"), [("sent", "was sent"), ("refused", "was refused"), ("intended", "is being sent")]
)
async def test_only_an_unknown_letter_is_sent_again(plain: Connection, database_url: str, state: str, why: str) -> None:
    delivery = await unknown_letter(plain)
    await plain.execute("update bon_scheduler.deliveries set state = $1", state)
    refused = await resend(delivery, database_url)
    assert refused.status == 2
    assert why in refused.err
    assert await plain.fetchval("select count(*) from bon_scheduler.runs") == 1


async def test_a_letter_of_a_paused_business_is_released_after_the_pause(plain: Connection, database_url: str) -> None:
    """Its run would leave the business out, and the letter could never be sent again."""
    delivery = await unknown_letter(plain)
    business = await plain.fetchval("select business_id from bon_scheduler.deliveries")
    await plain.execute(
        "insert into bon_scheduler.business_pauses (business_id, by, reason) values ($1, 'dana', 'a dispute')", business
    )
    refused = await resend(delivery, database_url)
    assert (refused.status, await plain.fetchval(STATE)) == (2, "unknown")
    assert f"resume --business {business}" in " ".join(refused.err.split())
    await plain.execute("delete from bon_scheduler.business_pauses")
    assert (await resend(delivery, database_url)).status == 0


@pytest.mark.parametrize(("delivery", "what"), [(str(UUID(int=0)), "No delivery"), ("x", "is not a delivery's id")])
async def test_what_is_no_delivery_is_said(database_url: str, delivery: str, what: str) -> None:
    refused = await resend(delivery, database_url)
    assert refused.status == 2
    assert what in refused.err


async def test_a_released_letter_keeps_its_message_id_and_is_sent_by_one_of_many(world: World, server: Server) -> None:
    mailer = await world.mailer()
    await world.deliver(mailer)
    await world.pool.execute("update bon_scheduler.deliveries set state = 'released'")
    assert await world.deliver(mailer, LETTER) is Delivery.SENT
    assert await world.deliver(mailer, LETTER) is Delivery.ALREADY_SENT
    assert len({message["Message-ID"] for message in server.received}) == 1
    assert len(server.received) == 2


# Is mail of use at all?


async def test_check_logs_in_where_it_may_and_says_what_is_wrong(
    plain: Connection, database_url: str, sink: SmtpSink
) -> None:
    mail = {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port)}
    good = await run_command("check", "--json", DATABASE_URL=database_url, SMTP_TLS="none", **mail)
    bad = await run_command("check", "--json", DATABASE_URL=database_url, SMTP_TLS="starttls", **mail)
    unset = await run_command("check", "--json", DATABASE_URL=database_url, EMAIL_MODE="")

    def of(name: str, document: Any) -> Any:
        return next((f for f in document["findings"] if f["name"] == name), None)

    assert of("mail", good.document)["level"] == "ok"
    assert (of("mail", bad.document)["level"], bad.status) == ("failure", 1)
    assert "STARTTLS" in of("mail", bad.document)["what"]
    assert of("mail", unset.document)["level"] == "warning"
    await plain.execute(
        "update bon_scheduler.mail_gate set failures = 3, closed_since = now(), trouble = 'ConnectionRefusedError'"
    )
    closed = await run_command("check", "--json", DATABASE_URL=database_url, SMTP_TLS="none", **mail)
    assert "away since" in of("mail gate", closed.document)["what"]
