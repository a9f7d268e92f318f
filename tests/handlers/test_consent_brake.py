"""The brake on consent: many spent grants in one run are no owner's doing, and ten at most are asked for it."""

import asyncio
import importlib
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID

import aiohttp
import pytest

from bon_scheduler import service, shaam
from bon_scheduler.demo.shaam_simulator import Misbehaviour
from bon_scheduler.engine.run_once import RunReport
from handlers.shaam_token_refresh import RefreshTokens
from tests.conftest import Connection, MakeSettings
from tests.tax import Bon, Refresh, environ
from tests.waiting import until

module = importlib.import_module("handlers.shaam_token_refresh")
LETTERS = "select count(*) from bon_scheduler.runs where job = 'notify-reauth'"
DUE_AGAIN = "update business_shaam_credentials set token_expires_at = now()"


async def population(bon: Bon, spent: int, good: int = 0) -> list[UUID]:
    """Businesses with grants of which so many are spent."""
    businesses = []
    for n in range(spent + good):
        businesses.append(await bon.business(f"b{n}"))
        if n < spent:
            bon.simulator.spoil[f"b{n}"] = Misbehaviour.INVALID_GRANT
    return businesses


async def again(refresh: Refresh, bon: Bon, *payload: RefreshTokens) -> RunReport:
    await bon.connection.execute(DUE_AGAIN)
    return await refresh(*payload, fire_time=datetime.now(UTC))


async def is_braked(connection: Connection) -> bool:
    return (await shaam.consent_brake(connection)).since is not None


async def assert_asked(bon: Bon, count: int) -> None:
    """Assert that so many are flagged, and so many written to."""
    assert len(await bon.flagged()) == count
    assert await bon.connection.fetchval(LETTERS) == count


@pytest.mark.parametrize(
    ("spent", "good", "asked", "braked"),
    [
        (10, 0, 10, False),  # not more than ten
        (11, 0, 10, True),
        (11, 43, 10, True),  # 11 of 54
        (11, 44, 11, False),  # a fifth, not more
        (11, 60, 11, False),
        (40, 20, 10, True),
    ],
)
async def test_more_than_ten_and_more_than_a_fifth_is_no_owners_fault(
    refresh: Refresh, bon: Bon, connection: Connection, spent: int, good: int, asked: int, braked: bool
) -> None:
    businesses = await population(bon, spent, good)
    before = {business: await bon.row(business) for business in businesses}
    await refresh()
    await assert_asked(bon, asked)
    assert await is_braked(connection) is braked
    unflagged = set(businesses[:spent]) - await bon.flagged()
    for business in unflagged:
        assert await bon.row(business) == before[business]


async def test_the_count_goes_over_all_batches_of_a_run(
    refresh: Refresh, bon: Bon, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_FOR_ONE_RUN", 10)
    monkeypatch.setattr(module, "BATCH", 8)
    await population(bon, 60)
    await refresh()
    await assert_asked(bon, 10)
    assert await is_braked(connection)


async def test_few_of_many_batches_are_asked_by_the_next_run(
    refresh: Refresh, bon: Bon, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_FOR_ONE_RUN", 10)
    monkeypatch.setattr(module, "BATCH", 20)
    await population(bon, 14, 86)
    await refresh()
    await assert_asked(bon, 10)
    await again(refresh, bon)
    await assert_asked(bon, 14)
    assert not await is_braked(connection)


async def test_it_counts_what_replicas_refresh_on_demand_at_once(refresh: Refresh, bon: Bon) -> None:
    businesses = await population(bon, 14)
    await asyncio.gather(*(refresh(RefreshTokens(business_id=business)) for business in businesses))
    await assert_asked(bon, 10)


async def test_braked_each_run_asks_one_until_one_is_refreshed(
    refresh: Refresh, bon: Bon, connection: Connection
) -> None:
    await population(bon, 30)
    await refresh()
    for _ in range(2):
        requests = bon.simulator.requests
        report = await again(refresh, bon)
        assert report.run["counts"]["due"] == 1
        assert bon.simulator.requests == requests + 1
        await assert_asked(bon, 10)
    bon.simulator.spoil.clear()  # the client was another environment's, and is mended
    for consents in bon.simulator._consents.values():
        consents[-1].revoked = False
    assert (await again(refresh, bon)).run["counts"]["refreshed"] == 1
    assert not await is_braked(connection)
    assert (await again(refresh, bon)).run["counts"]["refreshed"] == 20
    await assert_asked(bon, 10)


async def test_a_person_releases_it_for_one_run(refresh: Refresh, bon: Bon, connection: Connection) -> None:
    await population(bon, 30)
    await refresh()
    async with connection.transaction():
        assert await shaam.release_consent_brake(connection, by="dana", reason="they did withdraw")
    await again(refresh, bon)
    await assert_asked(bon, 30)
    assert not await is_braked(connection)
    for n in range(30, 45):
        await bon.business(f"b{n}")
        bon.simulator.spoil[f"b{n}"] = Misbehaviour.INVALID_GRANT
    await again(refresh, bon)
    await assert_asked(bon, 40)
    assert await is_braked(connection)


async def test_there_is_nothing_to_release_where_it_does_not_hold(connection: Connection) -> None:
    async with connection.transaction():
        assert not await shaam.release_consent_brake(connection, by="dana", reason="to be sure")


async def test_it_says_what_it_looks_like(
    refresh: Refresh, bon: Bon, connection: Connection, make_settings: MakeSettings, logged: Callable[[], str]
) -> None:
    await population(bon, 12)
    report = await refresh()
    reason = (await shaam.consent_brake(connection)).reason
    assert reason is not None
    assert "restored from a backup" in reason
    assert report.run["counts"]["braked"] == 2
    assert logged().count("consent.braked") == 1
    settings = make_settings(**environ(bon.simulator.token_url), SCHEDULE_SHAAM_TOKEN_REFRESH="")
    async with service.serving(settings) as serving, aiohttp.ClientSession() as session:

        async def shown() -> bool:
            async with session.get(f"http://127.0.0.1:{serving.port}/metrics") as answer:
                return "bon_consent_braked 1.0" in await answer.text()

        await until(shown)


async def test_a_backup_of_bons_rows_alone_asks_ten_and_calls_nobody(
    refresh: Refresh, bon: Bon, connection: Connection
) -> None:
    """The ledger knows that these were spent; the authority would revoke their successors for a reuse."""
    await population(bon, 0, 30)
    await connection.execute("create table backup as table business_shaam_credentials")
    await refresh()
    requests = bon.simulator.requests
    await connection.execute(
        "update business_shaam_credentials c set encrypted_refresh_token = b.encrypted_refresh_token"
        "  from backup b where b.business_id = c.business_id"
    )
    await again(refresh, bon)
    assert bon.simulator.requests == requests
    await assert_asked(bon, 10)
    assert await is_braked(connection)
