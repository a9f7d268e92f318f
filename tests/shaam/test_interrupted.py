"""A refresh whose run is cancelled, wherever that is."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import pytest

from bon_scheduler import service
from bon_scheduler.demo.shaam_simulator import ShaamSimulator, shaam_simulator
from bon_scheduler.jobs import Connection as AnyConnection
from bon_scheduler.service import Machinery
from bon_scheduler.shaam.refreshes import Credential
from bon_scheduler.shaam.results import Result
from tests.conftest import Connection, MakeSettings
from tests.interrupting import interrupted_everywhere
from tests.tax import CLIENT_ID, CLIENT_SECRET, Bon, environ


@pytest.fixture
async def simulator() -> AsyncIterator[ShaamSimulator]:
    async with shaam_simulator(client_id=CLIENT_ID, client_secret=CLIENT_SECRET) as simulator:
        yield simulator


@pytest.fixture
async def parts(make_settings: MakeSettings, simulator: ShaamSimulator) -> AsyncIterator[Machinery]:
    async with service.machinery(make_settings(**environ(simulator.token_url))) as parts:
        yield parts


async def nobody(_: AnyConnection, __: UUID) -> None:
    raise AssertionError("nobody may be asked")


@dataclass(slots=True)
class Tokens:
    """One token after another, each of another business."""

    bon: Bon
    parts: Machinery
    business: UUID = field(default_factory=uuid4)
    asked_before: int = 0

    async def begin(self) -> Coroutine[Any, Any, Result]:
        self.business = await self.bon.business(str(uuid4()))
        self.asked_before = self.bon.simulator.requests
        assert self.parts.rotator is not None
        stored = (await self.bon.row(self.business))["encrypted_refresh_token"]
        return self.parts.rotator.rotate(Credential(self.business, stored), nobody)


async def test_a_token_is_rotated_and_saved_or_not_sent(
    parts: Machinery, connection: Connection, simulator: ShaamSimulator
) -> None:
    tokens = Tokens(Bon(connection, simulator), parts)
    became = set()
    async for step, outcome in interrupted_everywhere(tokens.begin):
        while parts.rotator and parts.rotator._under_way:
            await asyncio.wait(parts.rotator._under_way)
        asked = simulator.requests - tokens.asked_before
        at = f"at step {step}, asked {asked} times: {outcome!r}"
        assert simulator.honours(await tokens.bon.refresh_token(tokens.business)), at
        held = "select count(*) from bon_scheduler.shaam_refreshes where business_id = $1 and holder is not null"
        assert await connection.fetchval(held, tokens.business) == 0, at
        became.add((asked, isinstance(outcome, asyncio.CancelledError)))
    assert became == {(0, True), (1, True), (1, False)}


async def test_a_rotated_token_waits_for_no_handler(
    parts: Machinery, connection: Connection, simulator: ShaamSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handlers take every connection of theirs while the authority answers."""
    tokens = Tokens(Bon(connection, simulator), parts)
    rotating = await tokens.begin()
    assert parts.rotator is not None
    send = parts.rotator._send

    async with AsyncExitStack() as busy:

        async def take_all(token: str) -> Any:
            answer = await send(token)
            for _ in range(parts.pool.get_max_size()):
                await busy.enter_async_context(parts.pool.acquire())
            return answer

        monkeypatch.setattr(parts.rotator, "_send", take_all)
        result = await asyncio.wait_for(rotating, 5)
        assert result.count == "refreshed"
        assert simulator.honours(await tokens.bon.refresh_token(tokens.business))
