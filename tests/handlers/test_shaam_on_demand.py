"""One business's tokens, now: whatever their expiry, beside the schedule's runs, and never twice at once."""

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from bon_scheduler import service
from bon_scheduler.demo.shaam_simulator import RETRY_AFTER_SECONDS, Misbehaviour
from handlers.shaam_token_refresh import RefreshTokens
from tests.conftest import Connection, MakeSettings
from tests.tax import NOTHING, NOW, Bon, Gate, Refresh, ended, environ
from tests.waiting import until

ASK = "select bon_scheduler.enqueue('shaam-token-refresh', $1)"


def one(business: UUID) -> RefreshTokens:
    return RefreshTokens(business_id=business)


async def test_one_business_is_refreshed_whatever_its_expiry(refresh: Refresh, bon: Bon) -> None:
    business = await bon.business("a", expires_at=NOW + timedelta(days=1))
    other = await bon.business("other")
    before = await bon.row(other)
    assert ended(await refresh(one(business))) == ("succeeded", NOTHING | {"due": 1, "refreshed": 1})
    assert await bon.refresh_token(business) == bon.simulator.current("a")
    assert await bon.row(other) == before


async def test_it_is_refreshed_again_for_whoever_asks_later(refresh: Refresh, bon: Bon) -> None:
    business = await bon.business("a")
    await refresh(one(business))
    later = await refresh(one(business), fire_time=datetime.now(UTC) + timedelta(seconds=1))
    assert later.run["counts"]["refreshed"] == 1
    assert bon.simulator.reuses == []


async def joining(bon: Bon) -> None:
    """Wait until a second run is under way, and for what it then does first."""

    async def both_run() -> bool:
        query = "select count(*) from bon_scheduler.runs where job = 'shaam-token-refresh' and state = 'running'"
        return int(await bon.connection.fetchval(query)) == 2

    await until(both_run)
    await asyncio.sleep(0.3)


async def test_it_joins_a_refresh_that_is_under_way(refresh: Refresh, bon: Bon, gate: Gate) -> None:
    business = await bon.business("a")
    scheduled = asyncio.create_task(refresh(SHAAM_TOKEN_URL=gate.url))
    await gate.answered.wait()
    asked = asyncio.create_task(refresh(one(business), fire_time=datetime.now(UTC) + timedelta(seconds=30)))
    await joining(bon)
    assert not asked.done()
    gate.proceed.set()
    assert (await scheduled).run["counts"]["refreshed"] == 1
    assert ended(await asked) == ("succeeded", NOTHING | {"due": 1, "joined": 1})
    assert bon.simulator.requests == 1


@pytest.mark.parametrize(
    ("fault", "count"), [(Misbehaviour.UNAVAILABLE, "deferred"), (Misbehaviour.INVALID_GRANT, "needs_reauth")]
)
async def test_whoever_joins_hears_how_it_failed(
    refresh: Refresh, bon: Bon, gate: Gate, fault: Misbehaviour, count: str
) -> None:
    business = await bon.business("a")
    bon.simulator.spoil["a"] = fault
    scheduled = asyncio.create_task(refresh(SHAAM_TOKEN_URL=gate.url))
    await gate.answered.wait()
    asked = asyncio.create_task(refresh(one(business)))
    await joining(bon)
    gate.proceed.set()
    await scheduled
    report = await asked
    assert ended(report) == ("partial", NOTHING | {"due": 1, count: 1})
    assert (await bon.outcomes(report.run["run_id"]))[business].error
    assert bon.simulator.requests == 1


async def test_a_process_that_stops_calls_nobody_more_and_gives_the_rest_back(
    make_settings: MakeSettings, bon: Bon, gate: Gate
) -> None:
    """A request that began when the process had seconds left could not be seen to its end."""
    businesses = [await bon.business(name, expires_at=datetime.now(UTC)) for name in "abcd"]
    before = {business: await bon.row(business) for business in businesses}
    environment = {"SCHEDULE_SHAAM_TOKEN_REFRESH": "", "SHAAM_CONCURRENCY": "1"}
    async with service.serving(make_settings(**environ(gate.url) | environment)) as serving:
        run_id = await bon.connection.fetchval(ASK, {})
        await gate.answered.wait()
        serving.machinery.stopping.set()  # as it is when the block ends, which then waits for the run
        gate.proceed.set()

        async def given_back() -> bool:
            query = "select exists (select from bon_scheduler.attempts where outcome = 'given_back')"
            return bool(await bon.connection.fetchval(query))

        await until(given_back)
    assert bon.simulator.requests == 1
    refreshed = [business for business in businesses if await bon.row(business) != before[business]]
    assert list(await bon.outcomes(run_id)) == refreshed


async def test_neither_waits_for_the_other_run(make_settings: MakeSettings, bon: Bon, gate: Gate) -> None:
    """The schedule's run is exclusive; one with a business is not, however long the other takes."""
    await bon.business("slow")
    settings = make_settings(**environ(gate.url) | {"SCHEDULE_SHAAM_TOKEN_REFRESH": ""})
    async with service.serving(settings):
        scheduled = await bon.connection.fetchval(ASK, {})
        await gate.answered.wait()
        quick = await bon.business("quick", expires_at=NOW + timedelta(days=1))
        waits = await bon.connection.fetchval(ASK, {})
        asked = await bon.connection.fetchval(ASK, {"business_id": str(quick)})

        async def called() -> bool:
            return bon.simulator.requests == 2

        await until(called)
        states = "select id, state from bon_scheduler.runs where job = 'shaam-token-refresh'"
        found = {row["id"]: row["state"] for row in await bon.connection.fetch(states)}
        assert found == {scheduled: "running", asked: "running", waits: "queued"}
        gate.proceed.set()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("none", "has no SHAAM credentials"),
        ("flagged", "must consent again"),
        ("inactive", "is not active"),
    ],
)
async def test_what_cannot_be_refreshed_ends_at_once_and_says_why(
    refresh: Refresh, bon: Bon, case: str, message: str
) -> None:
    business = {
        "none": uuid4(),
        "flagged": await bon.business("flagged", needs_reauth=True),
        "inactive": await bon.business("inactive", active=False),
    }[case]
    report = await refresh(one(business))
    assert report.run["state"] == "dead"
    assert message in report.run["error"]
    assert bon.simulator.requests == 0


async def test_it_does_not_wait_for_a_back_off_but_for_what_the_authority_asks(refresh: Refresh, bon: Bon) -> None:
    business = await bon.business("a")
    bon.simulator.spoil["a"] = Misbehaviour.UNAVAILABLE
    await refresh()
    assert ended(await refresh())[1] == NOTHING  # left alone by the schedule
    bon.simulator.spoil["a"] = Misbehaviour.TOO_MANY
    assert ended(await refresh(one(business)))[1]["deferred"] == 1
    silence = (await bon.standing(business))["silent_until"] - datetime.now(UTC)
    assert timedelta(seconds=RETRY_AFTER_SECONDS - 10) < silence <= timedelta(seconds=RETRY_AFTER_SECONDS)
    del bon.simulator.spoil["a"]
    report = await refresh(one(business))
    assert "asked for this business to be left alone" in report.run["error"]
    assert bon.simulator.requests == 2
    await bon.age(timedelta(seconds=RETRY_AFTER_SECONDS))
    assert ended(await refresh(one(business)))[1]["refreshed"] == 1


async def test_a_refused_application_is_said_at_once(refresh: Refresh, bon: Bon) -> None:
    business = await bon.business("a")
    report = await refresh(one(business), SHAAM_CLIENT_SECRET="wrong")
    assert report.run["state"] == "dead"
    assert "refuses the application" in report.run["error"]
    assert await bon.flagged() == set()


async def test_a_payload_that_names_no_business_is_refused(connection: Connection, make_settings: MakeSettings) -> None:
    async with service.serving(make_settings(SCHEDULE_SHAAM_TOKEN_REFRESH="")):
        run_id = await connection.fetchval(ASK, {"business_id": "Studio"})

        async def error() -> str | None:
            query = "select error from bon_scheduler.runs where id = $1 and state = 'dead'"
            return str(await connection.fetchval(query, run_id) or "")

        assert "business_id: input should be a valid UUID" in str(await until(error))
