"""The authority, and BON's rows, for the tests of what becomes of SHAAM tokens."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bon_scheduler.demo.shaam_simulator import ShaamSimulator, shaam_simulator
from bon_scheduler.engine.run_once import RunReport
from handlers.shaam_token_refresh import shaam_token_refresh
from tests.conftest import Connection, RunJob
from tests.tax import CLIENT_ID, CLIENT_SECRET, NOW, Bon, Gate, Refresh, assert_secret, environ


@pytest.fixture
async def simulator(logged: Callable[[], str], connection: Connection) -> AsyncIterator[ShaamSimulator]:
    """The authority. Whatever a test does with it, no secret may be in the log or the ledger afterwards."""
    async with shaam_simulator(client_id=CLIENT_ID, client_secret=CLIENT_SECRET) as simulator:
        yield simulator
        await assert_secret(connection, simulator, logged())


@pytest.fixture
def refresh(run_job: RunJob, simulator: ShaamSimulator) -> Refresh:
    """Run the job whole, at NOW, against the simulator; keyword arguments are `run_job`'s."""

    async def run(*payload: Any, **changes: Any) -> RunReport:
        return await run_job(
            shaam_token_refresh, *payload, **({"fire_time": NOW} | environ(simulator.token_url) | changes)
        )

    return run


@pytest.fixture
async def gate(simulator: ShaamSimulator) -> AsyncIterator[Gate]:
    gate = Gate()

    async def keep_back(request: web.Request) -> web.StreamResponse:
        answer = await simulator._answer(request)
        gate.answered.set()
        await gate.proceed.wait()
        return answer

    app = web.Application()
    app.router.add_post("/token", keep_back)
    async with TestServer(app) as server:
        gate.url = str(server.make_url("/token"))
        yield gate
        gate.proceed.set()


@pytest.fixture
async def bon(connection: Connection, simulator: ShaamSimulator) -> Bon:
    return Bon(connection, simulator)
