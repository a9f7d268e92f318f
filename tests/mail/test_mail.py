"""Delivery against a real SMTP server on loopback that answers, hangs or hangs up as it is told."""

import asyncio
import re
import ssl
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import trustme
from aiosmtpd.smtp import SMTP
from pydantic import SecretStr
from structlog.testing import capture_logs

from bon_scheduler.config import SmtpTls
from bon_scheduler.database.connections import Pool, Pools
from bon_scheduler.jobs import NeverRetryError, RetryLaterError
from bon_scheduler.ledger import retention
from bon_scheduler.mail.mailer import Delivery, LetterDeferredError, Mailer, MailUnavailableError
from tests.conftest import SetClock
from tests.mailserver import Hook, hang, hang_up
from tests.mailworld import AS_OF, LETTER, NOW, RECIPIENT, World, a_run, intend, settings
from tests.waiting import until

# aiosmtpd warns that a login over plain TCP is unsafe, also where the socket itself is TLS.
pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")

# What the server accepts


async def test_a_letter_is_sent_once_and_its_answer_kept(world: World) -> None:
    assert await world.deliver() is Delivery.SENT
    assert await world.rows() == [("sent", "250 queued as 42")]
    (message,) = world.server.received
    assert message["To"] == RECIPIENT
    assert message["Subject"] == "נושא סודי"
    plain, html = message.iter_parts()
    assert plain.get_content() == "שלום\r\n.\r\nsecret 1,234\r\n"
    assert html.get_content_type() == "text/html"


async def test_a_second_run_of_the_day_sends_nothing(world: World) -> None:
    await world.deliver()
    again = replace(LETTER, recipient=RECIPIENT.upper())
    assert await world.deliver(letter=again) is Delivery.ALREADY_SENT
    assert len(world.server.received) == 1


async def test_another_day_business_or_kind_is_another_letter(world: World) -> None:
    mailer = await world.mailer()
    others = (
        replace(LETTER, as_of=AS_OF + timedelta(days=1)),
        replace(LETTER, business_id=uuid4()),
        replace(LETTER, kind="other"),
    )
    for letter in (LETTER, *others):
        assert await world.deliver(mailer, letter) is Delivery.SENT
    assert len({message["Message-ID"] for message in world.server.received}) == 4


async def test_letters_delivered_at_once_each_arrive_once(world: World) -> None:
    mailer = await world.mailer()
    letters = [replace(LETTER, recipient=f"{n}@shop.example") for n in range(10)]
    assert await asyncio.gather(*(world.deliver(mailer, letter) for letter in letters)) == [Delivery.SENT] * 10
    assert sorted(world.server.recipients) == [f"{n}@shop.example" for n in range(10)]


async def test_of_two_runs_at_once_only_one_sends(world: World) -> None:
    mailer = await world.mailer()
    results = await asyncio.gather(*(world.deliver(mailer) for _ in range(5)), return_exceptions=True)
    assert results.count(Delivery.SENT) == 1
    assert len(world.server.received) == 1
    assert all(r is Delivery.ALREADY_SENT or type(r) is RetryLaterError for r in results if r != Delivery.SENT)


async def test_implicit_tls_works_too(world: World) -> None:
    world.server.implicit = True
    assert await world.deliver(await world.mailer(smtp_tls=SmtpTls.IMPLICIT)) is Delivery.SENT


async def test_without_a_user_name_nobody_logs_in(world: World) -> None:
    world.server.auth = False
    mailer = await world.mailer(smtp_tls=SmtpTls.NONE, smtp_username=None, smtp_password=None)
    assert await world.deliver(mailer) is Delivery.SENT


async def test_without_a_server_a_letter_is_logged_and_the_day_not_used_up(pool: Pool) -> None:
    async with Mailer(settings(None), Pools(pool, pool), clock=SetClock(NOW)) as mailer:
        with capture_logs() as events:
            result = await mailer.deliver(LETTER, run_id=await a_run(pool), attempt=1)
    assert result is Delivery.LOGGED
    assert [event["event"] for event in events] == ["delivery.logged"]
    assert await pool.fetchval("select count(*) from bon_scheduler.deliveries") == 0


@pytest.mark.parametrize("cut", ["pg_cancel_backend", "pg_terminate_backend"])
@pytest.mark.parametrize(("answer", "rows"), [("250 taken", [("sent", "250 taken")]), ("452 disk full", [])])
async def test_an_answer_is_recorded_though_the_database_ends_the_statement_that_records_it(
    world: World, cut: str, answer: str, rows: list[tuple[str, str]]
) -> None:
    """As a restart, an administrator or a full server does: the letter's fate is known, and must not be lost."""
    mailer = await world.mailer()
    async with world.pool.acquire() as holder:
        held = holder.transaction()

        async def hold_the_row(_: SMTP) -> str:
            await held.start()
            await holder.execute("select from bon_scheduler.deliveries for update")
            return answer

        world.server.on["DATA"] = hold_the_row
        delivering = asyncio.create_task(world.deliver(mailer))
        recording = f"select max({cut}(pid)::int) from pg_stat_activity where wait_event_type = 'Lock'"
        recording += " and datname = current_database()"
        await until(lambda: world.pool.fetchval(recording))
        await held.rollback()
        await asyncio.wait({delivering})
    assert await world.rows() == rows


# What it refuses, and when


@pytest.mark.parametrize("command", ["RCPT", "DATA"])
async def test_a_final_refusal_is_kept_and_never_tried_again(world: World, command: str) -> None:
    world.server.on[command] = f"550 5.1.1 <{RECIPIENT.lower()}> dana.owner is unknown, ask help@host.example"
    assert await world.deliver() is Delivery.REFUSED
    assert await world.rows() == [("refused", "550 5.1.1 <[address]> [address] is unknown, ask [address]")]
    world.server.on.clear()
    assert await world.deliver() is Delivery.REFUSED
    assert world.server.connections == 1


async def test_a_long_or_broken_answer_is_stored_whatever_it_holds(world: World) -> None:
    world.server.on["RCPT"] = "550 no\x00such " + "user " * 100
    await world.deliver()
    ((_, reply),) = await world.rows()
    assert reply is not None
    assert reply.startswith("550 no such user")
    assert len(reply) == 200


@pytest.mark.parametrize(("command", "answer"), [("RCPT", "450 greylisted"), ("DATA", "452 disk full")])
async def test_a_letter_that_is_not_taken_now_may_be_sent_later(world: World, command: str, answer: str) -> None:
    world.server.on[command] = answer
    with pytest.raises(LetterDeferredError, match=answer[:3]) as caught:
        await world.deliver()
    assert caught.value.after is None
    assert await world.rows() == []
    world.server.on.clear()
    assert await world.deliver() is Delivery.SENT


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("MAIL", "451 later"),
        ("MAIL", "550 sender not allowed"),
        ("RCPT", "530 authentication required"),
        ("RCPT", "421 closing"),
        ("DATA", "421 closing"),
    ],
)
async def test_a_server_that_takes_nobodys_letter_is_away(world: World, command: str, answer: str) -> None:
    world.server.on[command] = answer
    with pytest.raises(MailUnavailableError, match=answer[:3]) as caught:
        await world.deliver()
    assert timedelta(seconds=30) <= caught.value.after <= timedelta(seconds=45)
    assert await world.rows() == []
    world.server.on.clear()
    assert await world.deliver() is Delivery.SENT


@pytest.mark.parametrize("command", ["MAIL", "RCPT"])
@pytest.mark.parametrize("trouble", [hang_up, hang])
async def test_trouble_before_data_leaves_nothing_behind(world: World, command: str, trouble: Hook) -> None:
    world.server.on[command] = trouble
    with pytest.raises(MailUnavailableError):
        await world.deliver(await world.mailer(seconds=0.5))
    assert await world.rows() == []


@pytest.mark.parametrize(
    ("stage", "trouble"),
    [("EHLO", hang_up), ("EHLO", hang), ("STARTTLS", hang_up), ("AUTH", hang_up)],
)
async def test_trouble_before_anybody_is_named_is_the_servers(world: World, stage: str, trouble: Hook) -> None:
    world.server.on[stage] = trouble
    with pytest.raises(MailUnavailableError):
        await world.deliver(await world.mailer(seconds=0.5))
    assert await world.rows() == []
    world.server.on.clear()
    assert await world.deliver() is Delivery.SENT


async def test_a_server_that_takes_the_connection_and_drops_it_is_away(world: World) -> None:
    async def drop(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(drop, "127.0.0.1", 0) as dropping:
        port = dropping.sockets[0].getsockname()[1]
        with pytest.raises(MailUnavailableError, match="connect"):
            await world.deliver(await world.mailer(smtp_port=port))
    assert await world.rows() == []


async def test_what_the_server_says_of_one_recipient_touches_nobody_else(world: World) -> None:
    async def only_the_second(session: SMTP) -> str:
        assert session.envelope is not None
        return "550 unknown" if session.envelope.rcpt_tos == ["first@shop.example"] else "250 OK"

    world.server.on["RCPT"] = only_the_second
    mailer = await world.mailer()
    letters = [replace(LETTER, recipient=f"{who}@shop.example") for who in ("first", "second")]
    answers = [await world.deliver(mailer, letter) for letter in letters]
    assert answers == [Delivery.REFUSED, Delivery.SENT]
    assert world.server.recipients == ["second@shop.example"]


@pytest.mark.parametrize("trouble", [hang_up, hang])
async def test_no_answer_after_data_is_unknown_and_never_sent_again(world: World, trouble: Hook) -> None:
    world.server.on["DATA"] = trouble
    mailer = await world.mailer(seconds=0.5)
    with capture_logs() as events:
        assert await world.deliver(mailer) is Delivery.UNKNOWN
    assert [event["event"] for event in events] == ["delivery.unknown"]
    world.server.on.clear()
    assert await world.deliver(mailer) is Delivery.UNKNOWN
    assert await world.state() == "unknown"
    assert world.server.connections == 1


async def test_a_server_that_is_not_there_is_transient(world: World) -> None:
    mailer = await world.mailer(smtp_port=1)
    with pytest.raises(MailUnavailableError, match="connect"):
        await world.deliver(mailer)
    assert await world.rows() == []


async def test_an_untrusted_certificate_is_never_talked_to(world: World) -> None:
    with pytest.raises(MailUnavailableError, match="STARTTLS"):
        await world.deliver(await world.mailer(tls_context=ssl.create_default_context()))
    assert await world.rows() == []


async def test_a_certificate_of_another_host_is_never_talked_to(world: World, authority: trustme.CA) -> None:
    world.server.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("elsewhere.example").configure_cert(world.server.tls)
    with pytest.raises(MailUnavailableError, match="STARTTLS"):
        await world.deliver()


async def test_a_server_without_starttls_gets_no_letter_in_the_clear(world: World) -> None:
    world.server.offer_tls = False
    with pytest.raises(MailUnavailableError, match="STARTTLS"):
        await world.deliver()
    assert world.server.received == []


async def test_a_refused_login_is_our_trouble_not_the_recipients(world: World) -> None:
    mailer = await world.mailer(smtp_password=SecretStr("wrong"))
    with pytest.raises(MailUnavailableError, match="535"):
        await world.deliver(mailer)
    assert await world.rows() == []


@pytest.mark.parametrize(
    "recipient", ["nobody", "a@b\r\nRCPT TO:<x@y>", "a b@c.example", "<a@b.example>", "a@b@c", "a@b,c@d", ""]
)
async def test_what_is_no_address_is_refused_without_asking(world: World, recipient: str) -> None:
    assert await world.deliver(letter=replace(LETTER, recipient=recipient)) is Delivery.REFUSED
    assert world.server.connections == 0


@pytest.mark.parametrize("recipient", [".a@b.example", "a..b@c.example", "o'brien+x@b.example"])
async def test_an_odd_address_is_left_to_the_server(world: World, recipient: str) -> None:
    assert await world.deliver(letter=replace(LETTER, recipient=recipient)) is Delivery.SENT


async def test_a_hebrew_address_needs_a_server_that_takes_it(world: World) -> None:
    letter = replace(LETTER, recipient="דנה@shop.example")
    assert await world.deliver(letter=letter) is Delivery.SENT
    assert world.server.recipients == ["דנה@shop.example"]
    world.server.utf8 = False
    assert await world.deliver(letter=replace(letter, business_id=uuid4())) is Delivery.REFUSED


# Who finds an intention


async def test_the_intention_is_committed_before_the_server_hears_of_it(world: World) -> None:
    seen: list[tuple[str, str | None]] = []

    async def look(_: SMTP) -> str:
        seen.extend(await world.rows())
        return "250 OK"

    world.server.on["MAIL"] = look
    await world.deliver()
    assert seen == [("intended", None)]


async def test_an_earlier_attempts_intention_becomes_unknown(world: World) -> None:
    run = await a_run(world.pool)
    await intend(world.pool, run, attempt=1)
    mailer = await world.mailer()
    with capture_logs() as events:
        assert await mailer.deliver(LETTER, run_id=run, attempt=2) is Delivery.UNKNOWN
    assert [event["event"] for event in events] == ["delivery.unknown"]
    assert await world.state() == "unknown"
    assert world.server.connections == 0


@pytest.mark.parametrize("state", ["retrying", "dead", "succeeded", "queued"])
async def test_the_intention_of_a_run_that_ended_becomes_unknown(world: World, state: str) -> None:
    await intend(world.pool, await a_run(world.pool, state))
    assert await world.deliver() is Delivery.UNKNOWN


async def test_the_intention_of_a_run_that_lives_is_waited_for(world: World) -> None:
    await intend(world.pool, await a_run(world.pool))
    with pytest.raises(RetryLaterError) as caught:
        await world.deliver()
    assert caught.value.after == timedelta(minutes=1)
    assert await world.state() == "intended"


async def test_an_older_attempt_that_comes_back_gives_up_nothing(world: World) -> None:
    run = await a_run(world.pool)
    await intend(world.pool, run, attempt=2)
    with pytest.raises(RetryLaterError):
        await (await world.mailer()).deliver(LETTER, run_id=run, attempt=1)
    assert await world.state() == "intended"


async def test_a_late_answer_settles_what_somebody_gave_up_on(world: World) -> None:
    run = await a_run(world.pool)
    mailer = await world.mailer()

    async def given_up_meanwhile(_: SMTP) -> str:
        assert await mailer.deliver(LETTER, run_id=run, attempt=2) is Delivery.UNKNOWN
        return "250 late"

    world.server.on["DATA"] = given_up_meanwhile
    assert await mailer.deliver(LETTER, run_id=run, attempt=1) is Delivery.SENT
    assert await world.rows() == [("sent", "250 late")]


# Being cancelled


async def cancel_while(world: World, command: str, answer: asyncio.Event) -> Mailer:
    """Cancel a delivery while the server thinks about `command`; it accepts once `answer` is set."""
    reached = asyncio.Event()

    async def think(_: SMTP) -> str:
        reached.set()
        await answer.wait()
        return "250 accepted"

    world.server.on[command] = think
    mailer = await world.mailer()
    task = asyncio.create_task(world.deliver(mailer))
    await reached.wait()
    task.cancel()
    asyncio.get_running_loop().call_later(0.2, answer.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    return mailer


async def test_cancelled_before_data_the_intention_is_withdrawn(world: World) -> None:
    answer = asyncio.Event()
    await cancel_while(world, "RCPT", answer)
    assert await world.rows() == []
    assert not answer.is_set()
    assert world.server.received == []


async def test_cancelled_after_data_the_answer_is_still_recorded(world: World) -> None:
    await cancel_while(world, "DATA", asyncio.Event())
    assert await world.rows() == [("sent", "250 accepted")]


async def test_closing_waits_for_an_answer_that_is_under_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bon_scheduler.mail.mailer.CANCEL_PATIENCE", timedelta(0))
    mailer = await cancel_while(world, "DATA", asyncio.Event())
    assert await world.state() == "intended"
    await mailer.close()
    assert await world.state() == "sent"


# What is told of it


@pytest.mark.parametrize("answer", ["250 ok", f"550 <{RECIPIENT}> dana.owner no", f"450 {RECIPIENT}", None])
async def test_nothing_told_names_anybody(world: World, answer: str | None) -> None:
    world.server.on["RCPT" if answer else "DATA"] = answer or hang_up
    told: list[Any] = []
    with capture_logs() as events:
        try:
            told.append(await world.deliver())
        except (MailUnavailableError, LetterDeferredError) as error:
            told += [str(error), repr(error), repr(error.__cause__), repr(error.__context__)]
    told += [events, repr(LETTER), await world.rows()]
    assert events
    assert not re.search(r"dana|owner@|shop\.example|סודי|1,234", str(told), re.IGNORECASE)


# What is not tried at all


async def test_a_letter_that_was_sent_and_forgotten_is_not_sent_again_whatever_is_kept_now(world: World) -> None:
    """Pruned once with RUN_RETENTION_DAYS=30, which is 400 again."""
    mailer = await world.mailer(run_retention_days=400)
    old = [replace(LETTER, as_of=AS_OF - timedelta(days=days)) for days in (32, 31)]
    for letter in old:
        assert await world.deliver(mailer, letter) is Delivery.SENT
    await world.pool.execute("update bon_scheduler.deliveries set intended_at = as_of")
    horizon = retention.Horizon(NOW, timedelta(days=30))
    async with world.pool.acquire() as connection:
        await retention.mark_horizon(connection, horizon)
        assert await retention.PRUNERS["deliveries"](connection, horizon) == 1
    with pytest.raises(NeverRetryError, match="days before 2026-10-23 has been forgotten"):
        await world.deliver(mailer, old[0])
    assert await world.deliver(mailer, old[1]) is Delivery.ALREADY_SENT
    assert await world.deliver(mailer, replace(old[1], recipient="else@shop.example")) is Delivery.SENT
    assert len(world.server.received) == 3


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("email_from", "<noreply@bon.co.il>"),
        ("email_from", "noreply@bon..co.il"),
        ("unsubscribe_url", "https://bon.co.il/הסרה"),
        ("unsubscribe_url", "https://bon.co.il/u\nx"),
    ],
)
async def test_a_letter_that_cannot_be_written_is_not_used_up_and_no_server_is_blamed(
    world: World, setting: str, value: str
) -> None:
    """Such settings are refused at start; should one get past, what is said is which."""
    await world.mailer()
    unusable = settings(world.server).model_copy(update={setting: value})
    gate = await world.pool.fetchrow("select * from bon_scheduler.mail_gate")
    async with Mailer(
        unusable, Pools(world.pool, world.pool), tls_context=world.trusting, clock=SetClock(NOW)
    ) as mailer:
        with pytest.raises(NeverRetryError, match=f"{setting.upper()} "):
            await world.deliver(mailer)
    assert (await world.rows(), world.server.connections) == ([], 0)
    assert await world.pool.fetchrow("select * from bon_scheduler.mail_gate") == gate


async def test_a_fault_that_nobody_thought_of_does_not_use_a_letter_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("a fault of the library")

    mailer = await world.mailer()
    with monkeypatch.context() as patch:
        patch.setattr("aiosmtplib.SMTP.supports_extension", fail)
        with pytest.raises(LookupError):
            await world.deliver(mailer, replace(LETTER, recipient="דנה@shop.example"))
    assert await world.rows() == []
