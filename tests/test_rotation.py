"""What becomes of an answer that the database does not take, step by step."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

from bon_scheduler import keeper, rotation
from bon_scheduler.db import Pool
from bon_scheduler.demo.shaam_simulator import ShaamSimulator, shaam_simulator
from bon_scheduler.jobs import Connection as AnyConnection
from bon_scheduler.refreshes import Credential
from handlers.shaam_token_refresh import RefreshTokens
from tests.conftest import Connection, MakeSettings
from tests.fated import Replica, Sendings
from tests.tax import CLIENT_ID, CLIENT_SECRET, Bon, environ
from tests.waiting import until

ALWAYS = range(10_000)


@pytest.fixture
async def simulator() -> AsyncIterator[ShaamSimulator]:
    async with shaam_simulator(client_id=CLIENT_ID, client_secret=CLIENT_SECRET) as simulator:
        yield simulator


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "SAVE_WAITS_SECONDS", (0,))
    monkeypatch.setattr(rotation, "SPOOLED_SAVE_WAITS_SECONDS", (0,))


class Replicas:
    def __init__(self, pool: Pool, make_settings: MakeSettings, simulator: ShaamSimulator) -> None:
        self._pool = pool
        self._settings = make_settings(**environ(simulator.token_url))
        self._sendings = Sendings()

    async def start(self, spool: Path | None) -> Replica:
        replica = Replica(self._pool, self._settings, self._sendings, lambda: 0.0, spool)
        await replica.start()
        return replica


@pytest.fixture
def replicas(pool: Pool, make_settings: MakeSettings, simulator: ShaamSimulator) -> Replicas:
    return Replicas(pool, make_settings, simulator)


async def rotate_in_an_outage(replica: Replica) -> None:
    """Have a replica's database fail from the moment the authority has answered."""
    shaam = replica._shaam
    assert shaam is not None
    refresh = shaam.refresh

    async def answer(refresh_token: str) -> object:
        answered = await refresh(refresh_token)
        replica.fate.outage = ALWAYS
        return answered

    shaam.refresh = answer  # type: ignore[method-assign, assignment] # the moment is inside the real call
    await replica.run(RefreshTokens(), fire_time=datetime.now(UTC))


async def told(_: AnyConnection, __: UUID) -> None:
    raise AssertionError("nobody may be asked")


@pytest.mark.parametrize("disk_full", [False, True])
async def test_what_neither_takes_is_saved_from_memory_once_the_database_is_back(
    replicas: Replicas,
    connection: Connection,
    simulator: ShaamSimulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    disk_full: bool,
) -> None:
    monkeypatch.setattr(keeper, "OFFER_SECONDS", 0.05)
    bon = Bon(connection, simulator)
    business = await bon.business("a")
    replica = await replicas.start(tmp_path if disk_full else None)
    replica.fate.disk_full = disk_full
    await rotate_in_an_outage(replica)
    assert not simulator.honours(await bon.refresh_token(business))
    replica.fate.outage = range(0)

    async def saved() -> bool:
        return simulator.honours(await bon.refresh_token(business))

    await until(saved)
    await replica.stop()


async def test_a_process_that_ends_in_good_order_saves_what_it_has_in_memory(
    replicas: Replicas, connection: Connection, simulator: ShaamSimulator
) -> None:
    bon = Bon(connection, simulator)
    business = await bon.business("a")
    replica = await replicas.start(None)
    await rotate_in_an_outage(replica)
    replica.fate.outage = range(0)
    await replica.stop()
    assert simulator.honours(await bon.refresh_token(business))


async def test_before_a_token_is_sent_again_the_spool_is_looked_into(
    replicas: Replicas, connection: Connection, simulator: ShaamSimulator, tmp_path: Path
) -> None:
    """Another replica with the same spool, whose last look at it was before the answer came."""
    bon = Bon(connection, simulator)
    business = await bon.business("a")
    spent = Credential(business, (await bon.row(business))["encrypted_refresh_token"])
    dying, other = await replicas.start(tmp_path), await replicas.start(tmp_path)
    await rotate_in_an_outage(dying)
    dying.fate.dead = True
    await connection.execute("update bon_scheduler.shaam_refreshes set lease_until = now() - interval '1 minute'")
    assert other._rotator is not None
    result = await other._rotator.rotate(spent, told)
    assert (result.count, result.outcome) == ("deferred", "kept")
    assert simulator.requests == 1
    assert simulator.honours(await bon.refresh_token(business))
    for replica in (dying, other):
        await replica.stop()


async def test_a_claim_that_began_before_a_save_committed_does_not_send_what_it_replaced(
    replicas: Replicas, pool: Pool, connection: Connection, simulator: ShaamSimulator
) -> None:
    """A snapshot taken earlier still shows the old token: the claim must look at what the save has left."""
    bon = Bon(connection, simulator)
    business = await bon.business("a")
    old = Credential(business, (await bon.row(business))["encrypted_refresh_token"])
    replica = await replicas.start(None)
    assert replica._rotator is not None
    async with pool.acquire() as saving:
        transaction = saving.transaction()
        await transaction.start()
        await saving.execute("update business_shaam_credentials set encrypted_refresh_token = 'newer'")
        claiming = asyncio.create_task(replica._rotator.rotate(old, told))

        async def waits() -> bool:
            query = "select exists (select from pg_stat_activity where wait_event_type = 'Lock')"
            return bool(await connection.fetchval(query))

        await until(waits)
        await transaction.commit()
    assert (await claiming).count == "deferred"
    assert simulator.requests == 0
    await replica.stop()
