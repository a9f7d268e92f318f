"""The brake on consent: many spent grants in one run are no owner's doing, and ten at most are asked for it."""

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeAlias
from uuid import UUID

import aiohttp
import pytest

from bon_scheduler import service, shaam
from bon_scheduler.cli.check import check_deployment
from bon_scheduler.clock import SystemClock
from bon_scheduler.demo.shaam_simulator import Misbehaviour
from bon_scheduler.engine.run_once import RunReport
from bon_scheduler.jobs import AnyJob
from bon_scheduler.ledger import Action, change_all
from handlers.shaam_refresh_batch import shaam_refresh_batch
from handlers.shaam_token_refresh import RefreshTokens, shaam_token_refresh
from tests.attempting import attempt
from tests.conftest import Connection, MakeSettings
from tests.process import run_command
from tests.tax import Bon, Refresh, environ
from tests.waiting import until

GoOn: TypeAlias = Callable[..., Awaitable[None]]
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
@pytest.mark.samples(3)
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


async def state_of(connection: Connection, run_id: UUID) -> str:
    return str(await connection.fetchval("select state::text from bon_scheduler.runs where id = $1", run_id))


@pytest.fixture
def go_on(bon: Bon, make_settings: MakeSettings) -> GoOn:
    """Make the next attempt at a run, with everything due again."""

    async def attempt_again(run_id: UUID, job: AnyJob = shaam_token_refresh) -> None:
        await bon.connection.execute(DUE_AGAIN)
        async with service.machinery(make_settings(**environ(bon.simulator.token_url))) as parts:
            await attempt(parts, run_id, job)

    return attempt_again


async def test_the_run_that_trips_it_is_held_and_says_what_it_did(
    refresh: Refresh, bon: Bon, connection: Connection
) -> None:
    await population(bon, 30, 5)
    report = await refresh()
    assert (report.run["state"], report.held) == ("held", True)
    asked, refreshed = report.run["counts"]["needs_reauth"], report.run["counts"]["refreshed"]
    assert (asked, report.run["counts"]["due"]) == (10, 35)
    reason = report.run["reason"]
    assert f"{asked} owners were asked to consent again before that was seen" in reason
    assert f"This run refreshed {refreshed} businesses, which stands" in reason
    assert f"release {report.run['run_id']} --reason" in reason
    assert len(await bon.outcomes(report.run["run_id"])) > asked
    assert (await shaam.consent_brake(connection)).held == report.run["run_id"]


async def test_one_run_is_held_and_closed_once_a_refresh_succeeds(
    refresh: Refresh, bon: Bon, connection: Connection
) -> None:
    await population(bon, 30)
    held = (await refresh()).run["run_id"]
    assert [(await again(refresh, bon)).run["state"] for _ in range(2)] == ["succeeded"] * 2
    bon.simulator.spoil.clear()
    for consents in bon.simulator._consents.values():
        consents[-1].revoked = False
    await again(refresh, bon)
    closed = await connection.fetchrow("select state::text, error, reason from bon_scheduler.runs where id = $1", held)
    assert closed is not None
    assert tuple(closed) == (
        "partial",
        "Held by the brake on consent until that was released by a refresh that succeeded.",
        None,
    )


async def test_a_person_releases_the_held_run_and_it_asks_them_all(
    refresh: Refresh, bon: Bon, connection: Connection, go_on: GoOn, database_url: str
) -> None:
    await population(bon, 30)
    held = (await refresh()).run["run_id"]
    released = await run_command("release", str(held), "--reason", "they did withdraw", DATABASE_URL=database_url)
    assert (released.status, "→ queued" in released.out) == (0, True)
    await go_on(held)
    await assert_asked(bon, 30)
    assert (await state_of(connection, held), await is_braked(connection)) == ("partial", False)
    noted = await connection.fetchrow("select release_reason, allowed from bon_scheduler.consent_brake")
    assert tuple(noted or ()) == ("they did withdraw", False)
    for n in range(30, 45):
        await bon.business(f"b{n}")
        bon.simulator.spoil[f"b{n}"] = Misbehaviour.INVALID_GRANT
    again_held = await again(refresh, bon)  # once, and for that run alone
    await assert_asked(bon, 40)
    assert again_held.run["state"] == "held"


async def test_of_many_batches_one_is_held_and_releasing_it_lets_the_others_go_on(
    refresh: Refresh, bon: Bon, connection: Connection, go_on: GoOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_FOR_ONE_RUN", 10)
    monkeypatch.setattr(module, "BATCH", 8)
    await population(bon, 60)
    report = await refresh()
    states = [run["state"] for run in report.caused if run["job"] == "shaam-refresh-batch"]
    assert (report.run["state"], states.count("held"), len(states)) == ("succeeded", 1, 8)
    (held,) = [run["run_id"] for run in report.caused if run["state"] == "held"]
    await change_all(connection, Action.RELEASE, [held], by="dana", reason="they did withdraw")
    await go_on(held, shaam_refresh_batch)
    assert await state_of(connection, held) == "partial"
    await again(refresh, bon)
    await assert_asked(bon, 60)


async def test_what_an_earlier_run_left_holds_the_run_that_finds_it(
    refresh: Refresh, bon: Bon, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hundred 15 are few; of the 40 that the authority judged, which is known at the end, they are many."""
    monkeypatch.setattr(module, "MOST_FOR_ONE_RUN", 10)
    monkeypatch.setattr(module, "BATCH", 100)
    await population(bon, 15, 85)
    assert not (await refresh()).held
    # As if the authority had given 60 of them no answer.
    refreshed = "select business_id from bon_scheduler.shaam_refreshes where state = 'refreshed' limit 60"
    unanswered = (
        f"update bon_scheduler.shaam_refreshes set changed_at = '2026-01-01' where business_id in ({refreshed})"
    )
    await connection.execute(unanswered)
    bon.simulator.spoil |= {f"b{n}": Misbehaviour.INVALID_GRANT for n in range(100)}  # nor is the one that is asked now
    found = await again(refresh, bon)
    assert (found.run["state"], await is_braked(connection)) == ("held", True)
    assert "of which the authority judged" in found.run["reason"]
    await assert_asked(bon, 10)


async def test_a_run_that_is_asked_for_one_business_is_never_held(
    refresh: Refresh, bon: Bon, connection: Connection
) -> None:
    businesses = await population(bon, 30)
    held = (await refresh()).run["run_id"]
    await connection.execute("update bon_scheduler.consent_brake set held = null")
    flagged = await bon.flagged()
    waiting = next(business for business in businesses if business not in flagged)
    report = await refresh(RefreshTokens(business_id=waiting), fire_time=datetime.now(UTC))
    assert report.run["state"] != "held"
    assert (await shaam.consent_brake(connection)).held is None
    assert (await again(refresh, bon)).run["state"] == "held"  # somebody must tell of it
    assert (await shaam.consent_brake(connection)).held != held


async def test_a_held_run_that_a_person_cancels_is_followed_by_another_while_the_brake_holds(
    refresh: Refresh, bon: Bon, connection: Connection
) -> None:
    await population(bon, 30)
    held = (await refresh()).run["run_id"]
    await change_all(connection, Action.CANCEL, [held], by="dana", reason="not now")
    assert [(await again(refresh, bon)).run["state"] for _ in range(2)] == ["held", "succeeded"]


async def test_the_command_ends_with_status_3_and_goes_on_when_told(
    bon: Bon, connection: Connection, database_url: str
) -> None:
    await population(bon, 20)
    told = {"DATABASE_URL": database_url, **environ(bon.simulator.token_url)}
    held = await run_command("run-once", "shaam-token-refresh", "--json", **told)
    assert (held.status, held.document["state"], held.document["counts"]["needs_reauth"]) == (3, "held", 10)
    await connection.execute(DUE_AGAIN)
    command = ("run-once", "shaam-token-refresh", "--release-brake", "--reason", "they did withdraw", "--json")
    released = await run_command(*command, **told)
    assert (released.status, released.document["counts"]["needs_reauth"]) == (1, 10)
    await assert_asked(bon, 20)
    # What was held for it has nothing left to decide.
    assert await state_of(connection, UUID(held.document["run_id"])) == "partial"


async def test_check_fails_while_it_holds_and_says_how_to_release_it(
    refresh: Refresh, bon: Bon, connection: Connection, make_settings: MakeSettings
) -> None:
    async def found() -> tuple[str, str, str | None]:
        findings = await check_deployment(make_settings(), SystemClock())
        (finding,) = [each for each in findings if each.name == "consent"]
        return finding.level, finding.what, finding.remedy

    assert (await found())[0] == "ok"
    await population(bon, 20)
    held = (await refresh()).run["run_id"]
    level, what, remedy = await found()
    assert (level, "restored from a backup" in what) == ("failure", True)
    assert f"release {held} --reason" in (remedy or "")
    await connection.execute("update bon_scheduler.consent_brake set held = null")
    assert "run-once shaam-token-refresh --release-brake --reason" in ((await found())[2] or "")


async def test_there_is_nothing_to_release_where_it_does_not_hold(connection: Connection) -> None:
    async with connection.transaction():
        assert not await shaam.release_consent_brake(connection, UUID(int=1))


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
