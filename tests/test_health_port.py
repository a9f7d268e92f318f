"""Whoever reaches the health port, and holds it, keeps nobody from it and nothing from the service."""

import asyncio
import resource
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias

import aiohttp
import pytest

from bon_scheduler.database import connections
from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from health.listening import LIFE_SECONDS, MOST_CONNECTIONS
from tests import arrange
from tests.conftest import Connection
from tests.process import Service, serve
from tests.tax import CIPHER, environ
from tests.waiting import until

Peer: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
DESCRIPTORS = 256
HELD = 300
SOON_SECONDS = 1.0
NO_SCHEDULES = {"SCHEDULE_OVERDUE_DETECTION": "", "SCHEDULE_SHAAM_TOKEN_REFRESH": ""}
UNFINISHED = "select count(*) from bon_scheduler.runs where state in ('queued', 'running', 'retrying')"
OUTCOMES = "select distinct outcome from bon_scheduler.attempts where outcome is not null"
REQUEST = b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n"
SCRAPE = REQUEST.replace(b"livez", b"metrics")
UNENDED = b"GET /livez HTTP/1.1\r\nX: "
BAD = (b"\x16\x03\x01", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100, b"GET /" + b"a" * 4000, b"a" * 9000, b"\r\n: :\r\n")
ODD = ("/no-such-page", "/%00", "//", "/livez/../../etc/passwd")


def limit_descriptors(process: Service, soft: int) -> None:
    _, hard = resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE, (soft, hard))


def descriptors_of(process: Service) -> list[int]:
    return [int(entry.name) for entry in Path(f"/proc/{process.process.pid}/fd").iterdir()]


async def seconds_of_livez(process: Service) -> float:
    before = time.monotonic()
    url, limit = f"http://127.0.0.1:{process.port}/livez", aiohttp.ClientTimeout(5)
    async with aiohttp.ClientSession() as session, session.get(url, timeout=limit) as answer:
        assert answer.status == 200
    return time.monotonic() - before


@asynccontextmanager
async def holding(process: Service, many: int, say: bytes, address: str = "127.0.0.1") -> AsyncIterator[list[Peer]]:
    """Open so many connections from an address, say something on each, and hold them."""
    peers: list[Peer] = []
    try:
        for _ in range(many):
            reader, writer = await asyncio.open_connection("127.0.0.1", process.port, local_addr=(address, 0))
            writer.write(say)
            peers.append((reader, writer))
        yield peers
    finally:
        for _, writer in peers:
            writer.close()


async def ended(peers: Sequence[Peer], seconds: float) -> int:
    """Return how many of them the service ends within so long."""

    async def end(peer: Peer) -> None:
        try:
            await peer[0].read()
        except ConnectionError:
            return

    done, left = await asyncio.wait([asyncio.create_task(end(peer)) for peer in peers], timeout=seconds)
    for task in left:
        task.cancel()
    return len(done)


async def owe(connection: Connection, many: int) -> None:
    """Have so many owners be owed something since ten days."""
    for n in range(many):
        business = await arrange.business(connection)
        await arrange.owner(connection, business, f"owner{n}@shop.example")
        await arrange.invoice(connection, business, due_date=datetime.now(UTC).date() - timedelta(days=10))


@asynccontextmanager
async def service_with_mail(database_url: str, directory: Path, **more: str) -> AsyncIterator[tuple[Service, SmtpSink]]:
    async with AsyncExitStack() as stack:
        sink = await stack.enter_async_context(smtp_sink(directory))
        mail = {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none", "EMAIL_RATE_PER_SECOND": "500"}
        service = await stack.enter_async_context(serve(DATABASE_URL=database_url, **NO_SCHEDULES, **mail, **more))
        yield service, sink


async def all_ended(connection: Connection) -> None:
    async def look() -> bool:
        return not await connection.fetchval(UNFINISHED)

    await until(look, seconds=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    "say",
    [pytest.param(b"", marks=pytest.mark.long), REQUEST, pytest.param(UNENDED, marks=pytest.mark.long), SCRAPE * 50],
)
async def test_three_hundred_held_connections_keep_nothing_from_the_service(
    database_url: str, connection: Connection, tmp_path: Path, say: bytes
) -> None:
    await owe(connection, 30)
    async with service_with_mail(database_url, tmp_path) as (service, sink):
        limit_descriptors(service, DESCRIPTORS)
        async with holding(service, HELD, say) as peers:
            assert max([await seconds_of_livez(service) for _ in range(10)]) < SOON_SECONDS
            await connection.execute("select bon_scheduler.enqueue('overdue-detection')")
            await all_ended(connection)
            assert await seconds_of_livez(service) < SOON_SECONDS
            assert await ended(peers, LIFE_SECONDS + 3) == HELD
        said = service.events
    assert len(sink.messages) == 30
    assert [row[0] for row in await connection.fetch(OUTCOMES)] == ["succeeded"]
    assert not [line for line in said if "accept" in str(line).lower() or "Too many open files" in str(line)]


@pytest.mark.slow
async def test_a_request_that_drips_or_is_not_read_ends(database_url: str) -> None:
    async with serve(DATABASE_URL=database_url) as service, holding(service, 10, UNENDED) as peers:

        async def drip() -> None:
            while True:
                for _, writer in peers:
                    writer.write(b"a")
                await asyncio.sleep(0.5)

        dripping = asyncio.create_task(drip())
        assert await ended(peers, LIFE_SECONDS + 3) == 10
        dripping.cancel()


@pytest.mark.slow
async def test_bad_requests_are_refused_and_fill_no_log(database_url: str) -> None:
    async with serve(DATABASE_URL=database_url) as service:
        before = len(service.events)
        for bad in BAD:
            async with holding(service, 20, bad + b"\r\n\r\n") as peers:
                assert await ended(peers, SOON_SECONDS * 5) == 20
        for path in ODD:
            async with holding(service, 20, f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()) as peers:
                assert await ended(peers, SOON_SECONDS * 5) == 20
        assert await seconds_of_livez(service) < SOON_SECONDS
        said = [line for line in service.events[before:] if line["event"] != "run.started"]
    about = [line for line in said if "HEALTH_PORT" in line["event"]]
    assert len(about) == 1
    assert all(len(str(line)) < 500 for line in about)
    assert not [line for line in said if "Traceback" in str(line)]


@pytest.mark.slow
async def test_without_a_descriptor_left_probes_answer_and_no_run_loses_an_attempt(
    database_url: str, connection: Connection, tmp_path: Path
) -> None:
    """Letters and tokens wait: neither the mail server nor the authority nor a business is blamed for it."""
    await owe(connection, 5)
    business = await arrange.business(connection)
    credentials = {
        "business_id": business,
        "encrypted_access_token": CIPHER.encrypt("old-access"),
        "encrypted_refresh_token": CIPHER.encrypt("a-token"),
        "token_expires_at": datetime.now(UTC) + timedelta(minutes=1),
        "scope": "kept",
        "needs_reauth": False,
        "updated_at": arrange.LONG_AGO,
    }
    await arrange.insert(connection, "business_shaam_credentials", credentials)
    nobody = environ("http://127.0.0.1:9/token")
    async with service_with_mail(database_url, tmp_path, **nobody) as (service, sink):
        limit_descriptors(service, max(descriptors_of(service)) + 1)  # not one more
        await connection.execute("select bon_scheduler.enqueue('overdue-detection')")
        await connection.execute("select bon_scheduler.enqueue('shaam-token-refresh')")

        async def given_back() -> bool:
            sql = "select count(*) from bon_scheduler.attempts where outcome = 'given_back'"
            return bool(await connection.fetchval(sql) >= 5)

        await until(given_back, seconds=30)
        for _ in range(5):
            assert await seconds_of_livez(service) < SOON_SECONDS
        async with holding(service, 50, b"") as peers:
            assert await seconds_of_livez(service) < SOON_SECONDS
            assert len(peers) == 50
        assert not sink.messages
        blamed = "select failures > 0 or closed_since is not null from bon_scheduler.mail_gate"
        assert not await connection.fetchval(blamed)
        limit_descriptors(service, DESCRIPTORS)
        await all_ended(connection)
        noise = len(service.events)
    assert noise < 300
    assert len(sink.messages) == 5
    # `partial`: the token is left for the next run, as if nobody had been called.
    assert {row[0] for row in await connection.fetch(OUTCOMES)} == {"succeeded", "given_back", "partial"}
    told = await connection.fetchval(
        "select error from bon_scheduler.business_outcomes where business_id = $1", business
    )
    if "Connect call failed" in told:
        return  # a connection that ended just then left it a descriptor, and nobody listens on port 9
    assert told == "not called: this process has no file descriptor left"
    assert await connection.fetchval("select failures from bon_scheduler.shaam_refreshes") == 0


async def test_of_many_connections_the_newest_is_kept_and_the_number_is_bounded(database_url: str) -> None:
    async with serve(DATABASE_URL=database_url) as service:
        before = len(descriptors_of(service))
        async with holding(service, MOST_CONNECTIONS * 3, b"") as peers:
            assert await seconds_of_livez(service) < SOON_SECONDS
            assert len(descriptors_of(service)) <= before + MOST_CONNECTIONS + 1
            assert await ended(peers[: MOST_CONNECTIONS * 2 - 1], SOON_SECONDS) == MOST_CONNECTIONS * 2 - 1


async def test_connections_of_one_address_end_none_of_another(database_url: str) -> None:
    async with (
        serve(DATABASE_URL=database_url) as service,
        holding(service, 1, UNENDED, "127.0.0.2") as (probe,),
        holding(service, MOST_CONNECTIONS * 2, b""),
    ):
        await seconds_of_livez(service)
        probe[1].write(b"y\r\nHost: h\r\n\r\n")
        assert (await probe[0].read()).startswith(b"HTTP/1.1 200 OK")


async def scrape(process: Service, path: str = "/metrics") -> int:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{process.port}{path}") as answer:
        await answer.read()
        return answer.status


async def test_scrapes_at_once_and_soon_after_ask_the_database_once(database_url: str, connection: Connection) -> None:
    asking = "select count(*) from pg_stat_activity where query like '%read_queue%' and wait_event_type = 'Lock'"

    async def asked() -> int:
        return int(await other.fetchval(asking))

    async with (
        serve(DATABASE_URL=database_url, **NO_SCHEDULES) as service,
        connections.connect(database_url) as other,
    ):
        async with connection.transaction():
            await connection.execute("lock table bon_scheduler.runs in access exclusive mode")
            scrapes = [asyncio.create_task(scrape(service)) for _ in range(20)]
            await until(asked)
            assert await scrape(service, "/readyz") == 200
            assert await asked() == 1
        assert await asyncio.gather(*scrapes) == [200] * 20
        async with connection.transaction():
            await connection.execute("lock table bon_scheduler.runs in access exclusive mode")
            async with asyncio.timeout(SOON_SECONDS):  # far less than a scrape waits for the database
                assert await scrape(service) == 200
