"""A token belongs to its business: in another's row nobody sends it, and nobody is flagged or written to for it."""

import asyncio
import importlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from bon_scheduler.engine.run_once import RunReport
from bon_scheduler.ledger import retention
from handlers.shaam_token_refresh import RefreshTokens
from tests import arrange
from tests.conftest import Connection
from tests.tax import CIPHER, NOTHING, NOW, Bon, Refresh, ended

# The package's attribute of this name is the job, not the module.
module = importlib.import_module("handlers.shaam_token_refresh")

# $1 to, $2 from. What one careless statement does, the time of writing included or not.
COPY = """
    update business_shaam_credentials
       set encrypted_refresh_token = (select encrypted_refresh_token from business_shaam_credentials
                                       where business_id = $2)
     where business_id = $1
"""
DUE_AGAIN = "update business_shaam_credentials set token_expires_at = now()"
LETTERS = "select count(*) from bon_scheduler.runs where job = 'notify-reauth'"
SEVERAL = "another row held it too"


async def put(bon: Bon, business: UUID, token: str) -> None:
    """Write a token to a business's row as BON does, sealed anew."""
    query = "update business_shaam_credentials set encrypted_refresh_token = $2 where business_id = $1"
    await bon.connection.execute(query, business, CIPHER.encrypt(token))


async def again(refresh: Refresh, bon: Bon, *payload: RefreshTokens) -> RunReport:
    """Refresh once more, everything being due."""
    await bon.connection.execute(DUE_AGAIN)
    return await refresh(*payload, fire_time=datetime.now(UTC))


async def assert_left_alone(bon: Bon, report: RunReport, *foreign: UUID) -> None:
    """Assert that these were refused as foreign, and that nobody was asked, flagged or written to for it."""
    outcomes = await bon.outcomes(report.run["run_id"])
    refused = {business for business, outcome in outcomes.items() if "token.foreign" in (outcome.error or "")}
    assert refused == set(foreign)
    assert report.run["state"] == "partial"
    assert report.run["counts"]["foreign"] == len(foreign)
    assert {outcomes[business].outcome for business in foreign} == {"failed"}
    assert await bon.flagged() == set()
    assert await bon.connection.fetchval(LETTERS) == 0
    assert bon.simulator.reuses == []


@pytest.fixture
async def two(bon: Bon) -> tuple[UUID, UUID]:
    """Two businesses with owners, neither of them seen yet."""
    businesses = [await bon.business(subject) for subject in "ab"]
    for business in businesses:
        await arrange.owner(bon.connection, business, f"{business}@shop.example")
    return businesses[0], businesses[1]


async def test_a_token_that_was_moved_is_refused_and_its_business_refreshed(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID], logged: Callable[[], str]
) -> None:
    a, b = two
    await refresh()
    await bon.connection.execute(COPY, b, a)
    before = await bon.row(b)
    report = await again(refresh, bon)
    assert ended(report) == ("partial", NOTHING | {"due": 2, "refreshed": 1, "foreign": 1})
    await assert_left_alone(bon, report, b)
    assert await bon.refresh_token(a) == bon.simulator.current("a")
    assert (await bon.row(b))["encrypted_refresh_token"] == before["encrypted_refresh_token"]
    assert str(a) in (await bon.standing(b))["error"]
    assert logged().count("token.foreign") >= 1


async def test_it_stays_refused_however_often_its_business_has_rotated_since(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID]
) -> None:
    """Sent now it would be a reuse, for which the authority revokes all that came of that consent."""
    a, b = two
    await refresh()
    await bon.connection.execute(COPY, b, a)
    for _ in range(3):
        await assert_left_alone(bon, await again(refresh, bon), b)
    assert bon.simulator.honours(await bon.refresh_token(a))


async def test_one_that_was_spent_before_it_was_moved_is_refused_too(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID]
) -> None:
    a, b = two
    spent = await bon.refresh_token(a)
    await refresh()
    await again(refresh, bon)
    await put(bon, b, spent)
    await assert_left_alone(bon, await again(refresh, bon), b)


async def test_two_that_were_exchanged_for_each_other_are_both_refused_until_they_are_put_back(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID]
) -> None:
    a, b = two
    await refresh()
    tokens = [await bon.refresh_token(business) for business in two]
    await put(bon, a, tokens[1])
    await put(bon, b, tokens[0])
    await assert_left_alone(bon, await again(refresh, bon), a, b)
    await put(bon, a, tokens[0])
    await put(bon, b, tokens[1])
    assert ended(await again(refresh, bon)) == ("succeeded", NOTHING | {"due": 2, "refreshed": 2})


async def test_a_new_consent_ends_the_refusal(refresh: Refresh, bon: Bon, two: tuple[UUID, UUID]) -> None:
    a, b = two
    await refresh()
    await bon.connection.execute(COPY, b, a)
    await again(refresh, bon)
    await put(bon, b, bon.simulator.issue("b"))
    assert ended(await again(refresh, bon)) == ("succeeded", NOTHING | {"due": 2, "refreshed": 2})
    assert await bon.refresh_token(b) == bon.simulator.current("b")


async def test_the_token_of_a_business_that_is_gone_is_nobody_elses(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID]
) -> None:
    a, b = two
    await refresh()
    await bon.connection.execute(COPY, b, a)
    await bon.connection.execute("delete from business_shaam_credentials where business_id = $1", a)
    await assert_left_alone(bon, await again(refresh, bon), b)


async def test_a_business_cannot_be_refreshed_on_demand_with_anothers_token(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID]
) -> None:
    a, b = two
    await refresh()
    await bon.connection.execute(COPY, b, a)
    requests = bon.simulator.requests
    await assert_left_alone(bon, await again(refresh, bon, RefreshTokens(business_id=b)), b)
    assert bon.simulator.requests == requests


# What nobody has seen before


@pytest.mark.parametrize("sealed_anew", [False, True])
async def test_of_two_equal_ones_that_nobody_has_seen_neither_is_sent(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID], sealed_anew: bool
) -> None:
    a, b = two
    if sealed_anew:
        await put(bon, b, await bon.refresh_token(a))
    else:
        await bon.connection.execute(COPY, b, a)
    await assert_left_alone(bon, await refresh(), a, b)
    assert bon.simulator.requests == 0
    assert SEVERAL in (await bon.standing(a))["error"]


async def test_they_are_found_however_many_lie_between_and_in_whatever_batches_they_are(
    refresh: Refresh, bon: Bon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_FOR_ONE_RUN", 10)
    monkeypatch.setattr(module, "BATCH", 200)
    businesses = sorted([await bon.business(f"b{n}") for n in range(1100)])
    first, last = businesses[0], businesses[-1]
    await bon.connection.execute(COPY, last, first)
    report = await refresh()
    assert sum(run["counts"]["refreshed"] for run in report.caused) == 1098
    assert sum(run["counts"].get("foreign", 0) for run in report.caused) == 2
    assert await bon.flagged() == set()
    assert bon.simulator.requests == 1098


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_two_replicas_that_refresh_them_at_once_send_neither(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID], order: tuple[int, int]
) -> None:
    a, b = two
    await bon.connection.execute(COPY, b, a)
    reports = await asyncio.gather(*(refresh(RefreshTokens(business_id=two[n])) for n in order))
    assert [report.run["counts"]["foreign"] for report in reports] == [1, 1]
    assert bon.simulator.requests == 0
    assert await bon.flagged() == set()


async def test_one_that_was_nobodys_stays_so_when_a_single_row_is_left_with_it(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID]
) -> None:
    """Otherwise the wrong one of the two would spend it once the right one's owner has consented again."""
    a, b = two
    await bon.connection.execute(COPY, b, a)
    await refresh()
    await put(bon, a, bon.simulator.issue("a"))
    report = await again(refresh, bon)
    await assert_left_alone(bon, report, b)
    assert report.run["counts"]["refreshed"] == 1
    # What operations.md says, once BON's rows are right.
    await put(bon, b, bon.simulator.current("b"))
    await bon.connection.execute("delete from bon_scheduler.shaam_tokens where business_id is null")
    assert ended(await again(refresh, bon)) == ("succeeded", NOTHING | {"due": 2, "refreshed": 2})


async def test_a_ledger_that_has_forgotten_everything_sends_neither(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID]
) -> None:
    a, b = two
    await refresh()
    await bon.connection.execute(COPY, b, a)
    await bon.connection.execute("truncate bon_scheduler.shaam_tokens")
    requests = bon.simulator.requests
    await assert_left_alone(bon, await again(refresh, bon), a, b)
    assert bon.simulator.requests == requests


@pytest.mark.parametrize("of_another", [False, True])
async def test_an_access_token_in_the_place_of_a_refresh_token_is_not_sent(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID], of_another: bool
) -> None:
    a, b = two
    await refresh()
    move = """
        update business_shaam_credentials set encrypted_refresh_token =
               (select encrypted_access_token from business_shaam_credentials where business_id = $2)
         where business_id = $1
    """
    await bon.connection.execute(move, b, a if of_another else b)
    await assert_left_alone(bon, await again(refresh, bon), b)


async def test_a_consent_that_comes_after_the_census_is_seen_before_it_is_sent(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID]
) -> None:
    a, _ = two
    await refresh()
    await put(bon, a, bon.simulator.issue("a"))
    report = await again(refresh, bon, RefreshTokens(business_id=a))
    assert ended(report) == ("succeeded", NOTHING | {"due": 1, "refreshed": 1})


# What is forgotten


async def test_a_token_is_forgotten_once_it_was_in_no_row_for_a_week(
    refresh: Refresh, bon: Bon, two: tuple[UUID, UUID], connection: Connection
) -> None:
    a, b = two
    await refresh()
    await bon.connection.execute(COPY, b, a)
    await again(refresh, bon)  # known: two that were spent, one that is in b's row, b's own, a's newest
    count = "select count(*) from bon_scheduler.shaam_tokens"
    assert await connection.fetchval(count) == 5
    await connection.execute("update bon_scheduler.shaam_tokens set seen_at = seen_at - interval '8 days'")
    await again(refresh, bon)  # sees what is in b's row, and spends a's newest
    horizon = retention.Horizon(NOW + timedelta(minutes=1), timedelta(days=400))
    assert await retention.PRUNERS["tokens"](connection, horizon) == 4
    await assert_left_alone(bon, await again(refresh, bon), b)


async def test_it_is_kept_for_a_week(refresh: Refresh, bon: Bon, connection: Connection) -> None:
    await bon.business("a")
    await refresh()
    await connection.execute("update bon_scheduler.shaam_tokens set seen_at = seen_at - interval '6 days'")
    horizon = retention.Horizon(NOW + timedelta(minutes=1), timedelta(days=1))
    assert await retention.PRUNERS["tokens"](connection, horizon) == 0
