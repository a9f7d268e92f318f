"""Real processes asked to stop while the world outside has something of theirs: a letter, a token."""

import asyncio
import signal
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime

import pytest
import trustme
from aiosmtpd.smtp import SMTP

from bon_scheduler.cli.work import LEAVING
from bon_scheduler.declared import JOBS
from tests import arrange
from tests.authority import authority
from tests.conftest import Connection
from tests.mailserver import Hook, Server
from tests.process import Service, run_command, serve
from tests.tax import CIPHER, NOW, environ
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")]

NO_SCHEDULES = {f"SCHEDULE_{job.name.replace('-', '_').upper()}": "" for job in JOBS}
STATES = "select state::text from bon_scheduler.deliveries"
RUNS = "select state::text, attempt, given_back from bon_scheduler.runs"
LOCK_CREDENTIALS = "select from business_shaam_credentials for update"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A mail server without encryption or login, on loopback."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    server = Server(context, offer_tls=False, auth=False)
    async with server.listening():
        yield server


def slowly(seconds: float, answer: str) -> Hook:
    async def answer_slowly(_: SMTP) -> str:
        await asyncio.sleep(seconds)
        return answer

    return answer_slowly


async def ask_for_digests(connection: Connection, many: int) -> None:
    """Have so many businesses be owed something, and ask for the digest of each."""
    for number in range(many):
        business = await arrange.business(connection, name=f"b{number}")
        await arrange.owner(connection, business, f"owner{number}@shop.example")
        await arrange.invoice(connection, business, due_date=date(2026, 1, 1), is_overdue=True)
        payload = {"business_id": str(business), "as_of": str(datetime.now(UTC).date())}
        await connection.execute("select bon_scheduler.enqueue('send-overdue-digest', $1)", payload)


def mailing(url: str, server: Server, shutdown_seconds: float) -> dict[str, str]:
    return {
        "DATABASE_URL": url,
        "SMTP_HOST": "127.0.0.1",
        "SMTP_PORT": str(server.port),
        "SMTP_TLS": "none",
        "EMAIL_RATE_PER_SECOND": "20",
        "SHUTDOWN_SECONDS": str(shutdown_seconds),
        **NO_SCHEDULES,
    }


async def seen(happened: Callable[[], bool]) -> None:
    async def look() -> bool:
        return happened()

    await until(look, seconds=30)


async def stopped(service: Service) -> tuple[int, float]:
    before = time.monotonic()
    return await service.stop(), time.monotonic() - before


async def test_beside_a_slow_mail_server_each_letter_is_sent_and_recorded_or_never_left(
    connection: Connection, database_url: str, server: Server
) -> None:
    for command in ("EHLO", "MAIL", "RCPT", "DATA", "RSET"):
        server.on[command] = slowly(1.0, "" if command == "EHLO" else "250 OK")
    await ask_for_digests(connection, 20)
    async with serve(**mailing(database_url, server, 4)) as service:
        await seen(lambda: len(server.received) >= 2)
        status, seconds = await stopped(service)
    states = Counter(row["state"] for row in await connection.fetch(STATES))
    assert states == {"sent": len(server.received)}
    assert (status, seconds < 4 + LEAVING.total_seconds()) == (0, True)
    runs = Counter(row["state"] for row in await connection.fetch(RUNS))
    assert runs == {"succeeded": len(server.received), "queued": 20 - len(server.received)}
    assert not service.saw("service.forced")
    assert not service.saw("engine.cancelled")


async def test_a_letter_that_has_been_sent_is_waited_for_beyond_the_time_to_stop(
    connection: Connection, database_url: str, server: Server
) -> None:
    answering = asyncio.Event()

    async def answer(_: SMTP) -> str:
        answering.set()
        await asyncio.sleep(6)
        return "250 queued"

    server.on["DATA"] = answer
    await ask_for_digests(connection, 1)
    async with serve(**mailing(database_url, server, 0.5)) as service:
        await answering.wait()
        status, seconds = await stopped(service)
    assert [row["state"] for row in await connection.fetch(STATES)] == ["sent"]
    assert [tuple(row) for row in await connection.fetch(RUNS)] == [("succeeded", 1, 0)]
    assert (status, seconds < 9) == (0, True)
    assert service.saw("service.waits_for_answers")


async def test_a_token_that_has_been_rotated_is_saved_beyond_the_time_to_stop(
    connection: Connection, database_url: str
) -> None:
    async with authority(0.3) as one:
        business = await arrange.business(connection)
        values = {
            "business_id": business,
            "encrypted_access_token": CIPHER.encrypt("access"),
            "encrypted_refresh_token": CIPHER.encrypt(await one.issue("a")),
            "token_expires_at": NOW,
        }
        await arrange.insert(connection, "business_shaam_credentials", values)
        settings = environ(one.token_url) | {"SHAAM_TIMEOUT_SECONDS": "0.9", "SHUTDOWN_SECONDS": "1", **NO_SCHEDULES}
        async with serve(DATABASE_URL=database_url, **settings) as service:
            await connection.execute(
                "select bon_scheduler.enqueue('shaam-token-refresh', $1)", {"business_id": str(business)}
            )

            async def asked() -> bool:
                return await one.requests() == 1

            await until(asked)
            async with connection.transaction():
                await connection.execute(LOCK_CREDENTIALS)
                service.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(1 + LEAVING.total_seconds() + 1.5)
                assert service.process.returncode is None
            assert await service.stop(signal.SIGWINCH) == 0
        row = await connection.fetchrow("select encrypted_refresh_token from business_shaam_credentials")
        assert row is not None
        assert await one.honours(CIPHER.decrypt(row[0]))
        assert service.saw("service.waits_for_answers")


@pytest.mark.parametrize(("stopping", "answer"), [("3", "20"), ("25", "28"), ("20", "20")])
async def test_settings_that_leave_no_time_to_save_a_token_are_refused(
    database_url: str, stopping: str, answer: str
) -> None:
    settings = environ("http://127.0.0.1:9/") | {"SHAAM_TIMEOUT_SECONDS": answer, "SHUTDOWN_SECONDS": stopping}
    ended = await run_command("serve", DATABASE_URL=database_url, **settings)
    assert ended.status == 2
    assert "SHAAM_TIMEOUT_SECONDS" in ended.err
    assert "SHUTDOWN_SECONDS" in ended.err
