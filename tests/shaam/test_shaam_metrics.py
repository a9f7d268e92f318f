"""What a scrape says of SHAAM: requests by result, and all businesses at a glance, none by name."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest

from bon_scheduler import service
from bon_scheduler.demo.shaam_simulator import Misbehaviour, ShaamSimulator, shaam_simulator
from tests.conftest import Connection, MakeSettings
from tests.tax import CLIENT_ID, CLIENT_SECRET, Bon, environ
from tests.waiting import until


@pytest.fixture
async def simulator() -> AsyncIterator[ShaamSimulator]:
    async with shaam_simulator(client_id=CLIENT_ID, client_secret=CLIENT_SECRET) as simulator:
        yield simulator


async def test_a_scrape_shows_requests_and_what_is_wrong(
    make_settings: MakeSettings, connection: Connection, simulator: ShaamSimulator
) -> None:
    bon = Bon(connection, simulator)
    for subject, fault in (("away", "unavailable"), ("odd", "garbage"), ("withdrawn", "invalid_grant")):
        await bon.business(subject)
        simulator.spoil[subject] = Misbehaviour(fault)
    await bon.business("good")
    await bon.business("resting", expires_at=datetime.now(UTC) + timedelta(days=1))
    await bon.business("closed", active=False, needs_reauth=True)
    settings = make_settings(**environ(simulator.token_url), SCHEDULE_SHAAM_TOKEN_REFRESH="")
    async with service.serving(settings) as serving, aiohttp.ClientSession() as session:
        run_id = await connection.fetchval("select bon_scheduler.enqueue('shaam-token-refresh')")

        async def ended() -> bool:
            query = "select finished_at is not null from bon_scheduler.runs where id = $1"
            return bool(await connection.fetchval(query, run_id))

        await until(ended)
        async with session.get(f"http://127.0.0.1:{serving.port}/metrics") as answer:
            lines = (await answer.text()).splitlines()
    for expected in (
        'shaam_requests_total{result="refreshed"} 1.0',
        'shaam_requests_total{result="transient"} 1.0',
        'shaam_requests_total{result="ambiguous"} 1.0',
        'shaam_requests_total{result="needs_reauth"} 1.0',
        "shaam_request_duration_seconds_count 4.0",
        "shaam_needs_reauth 1.0",
        "shaam_failing 2.0",
    ):
        assert expected in lines
    (ttl,) = [float(line.split()[1]) for line in lines if line.startswith("shaam_token_min_ttl_seconds ")]
    assert -600 < ttl < 60  # of those that failed, which expire in a minute
    businesses = await connection.fetch("select business_id::text from business_shaam_credentials")
    assert [row[0] for row in businesses if row[0] in "\n".join(lines)] == []


async def test_without_any_token_the_smallest_time_to_expiry_is_no_number(make_settings: MakeSettings) -> None:
    async with (
        service.serving(make_settings()) as serving,
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{serving.port}/metrics") as answer,
    ):
        assert not [line for line in (await answer.text()).splitlines() if line.startswith("bon_shaam_token_min_ttl")]
