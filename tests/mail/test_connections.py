"""Connections to the mail server: used again, replaced when they are gone, and never in the clear."""

import asyncio
import os
import resource
from datetime import timedelta
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP
from pydantic import SecretStr

from bon_scheduler.config import SmtpTls
from bon_scheduler.jobs import NotNowError
from bon_scheduler.mail import smtp
from bon_scheduler.mail.mailer import Delivery, Mailer, MailUnavailableError
from bon_scheduler.mail.smtp import NotConnectedError, SmtpConnections
from tests.mailserver import Server, hang
from tests.mailworld import LETTER, World, a_run, another, settings
from tests.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")


async def send(world: World, mailer: Mailer, letters: int = 1) -> None:
    for _ in range(letters):
        assert await world.deliver(mailer, another()) is Delivery.SENT


@pytest.fixture
async def mailer(world: World) -> Mailer:
    return await world.mailer(email_rate_per_second=1000)


async def test_letters_one_after_another_share_a_connection(world: World, mailer: Mailer) -> None:
    await send(world, mailer, 10)
    assert (world.server.connections, world.server.logins) == (1, 1)


async def test_a_connection_that_the_server_dropped_is_replaced_and_costs_no_letter(
    world: World, mailer: Mailer
) -> None:
    await send(world, mailer)
    for session in world.server.sessions:
        assert isinstance(session.transport, asyncio.WriteTransport)
        session.transport.close()
    await send(world, mailer, 2)
    assert world.server.connections == 2


async def test_a_connection_that_the_server_forgot_without_a_word_is_replaced(world: World, server: Server) -> None:
    mailer = await world.mailer(seconds=0.5, email_rate_per_second=1000)
    await send(world, mailer)
    server.on["RSET"] = hang
    await send(world, mailer)
    assert world.server.connections == 2


async def test_a_refused_recipient_spoils_no_connection(world: World, mailer: Mailer) -> None:
    world.server.on["RCPT"] = "550 no such user"
    assert await world.deliver(mailer, another()) is Delivery.REFUSED
    world.server.on.clear()
    await send(world, mailer)
    assert world.server.connections == 1
    (message,) = world.server.received
    assert message["To"] is not None


async def test_after_421_a_connection_is_not_used_again(world: World, mailer: Mailer) -> None:
    await send(world, mailer)
    world.server.on["MAIL"] = "421 closing"
    with pytest.raises(MailUnavailableError):
        await world.deliver(mailer, another())
    world.server.on.clear()
    await send(world, mailer)
    assert world.server.connections == 2


async def test_a_connection_carries_a_hundred_letters_at_most(
    world: World, mailer: Mailer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "MOST_LETTERS", 3)
    await send(world, mailer, 7)
    assert world.server.connections == 3


async def test_an_idle_connection_is_left_with_a_farewell(
    world: World, mailer: Mailer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "IDLE", timedelta(seconds=0.05))
    await send(world, mailer)

    async def left() -> bool:
        return world.server.farewells == 1

    await until(left)


async def test_closing_says_goodbye(world: World, mailer: Mailer) -> None:
    await send(world, mailer)
    await mailer.close()
    assert world.server.farewells == 1


async def test_there_are_never_more_connections_than_the_most(world: World, mailer: Mailer) -> None:
    at_once, most = 0, 0

    async def count(_: SMTP) -> str:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.3)
        at_once -= 1
        return "250 OK"

    world.server.on["MAIL"] = count
    letters = [another() for _ in range(smtp.MOST_CONNECTIONS * 3)]
    run = await a_run(world.pool)
    await asyncio.gather(*(mailer.deliver(letter, run_id=run, attempt=1) for letter in letters))
    assert most == smtp.MOST_CONNECTIONS
    assert world.server.connections <= smtp.MOST_CONNECTIONS


# Nothing in the clear


async def test_where_starttls_is_stripped_neither_login_nor_letter_is_sent(world: World, mailer: Mailer) -> None:
    world.server.offer_tls = False
    with pytest.raises(MailUnavailableError, match="STARTTLS"):
        await world.deliver(mailer, another())
    assert (world.server.logins, world.server.received, world.server.mails) == (0, [], 0)


async def test_a_password_never_goes_in_the_clear_even_if_the_settings_said_so() -> None:
    values: dict[str, Any] = {"smtp_host": "mail.example", "smtp_tls": SmtpTls.NONE}
    careless = settings(None, **values, smtp_username="bon", smtp_password=SecretStr("x"))
    connections = SmtpConnections(careless, tls_context=None, timeout=timedelta(seconds=1))
    with pytest.raises(Exception, match="in the clear"):
        connections._refuse_clear_text()


async def test_a_failed_login_says_the_stage(world: World, server: Server) -> None:
    await world.mailer()
    wrong = settings(server, smtp_password=SecretStr("wrong"))
    connections = SmtpConnections(wrong, tls_context=world.trusting, timeout=timedelta(seconds=5))
    with pytest.raises(NotConnectedError, match="AUTH"):
        async with connections.line():
            pass


async def test_without_a_descriptor_nothing_is_sent_and_the_server_is_not_blamed(world: World) -> None:
    assert await world.deliver(letter=another()) is Delivery.SENT  # what is imported late, is
    mailer, run = await world.mailer(), await a_run(world.pool)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = [os.dup(2) for _ in range(64)]  # whatever was free below the last
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, hard))
    try:
        with pytest.raises(NotNowError, match="no file descriptor left") as refused:
            await mailer.deliver(LETTER, run_id=run, attempt=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in spare:
            os.close(each)
    assert not isinstance(refused.value, MailUnavailableError)
    assert len(await world.rows()) == 1
    assert await world.pool.fetchval("select failures from bon_scheduler.mail_gate") == 0
    assert await mailer.deliver(LETTER, run_id=run, attempt=2) is Delivery.SENT
