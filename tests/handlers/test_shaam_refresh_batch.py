"""Who is due, who is left alone for a while, and what is shared out."""

import importlib
from datetime import timedelta
from uuid import UUID

import pytest

from bon_scheduler.demo.shaam_simulator import Misbehaviour
from tests.tax import CIPHER, NOTHING, NOW, Bon, Refresh, ended

# The package's attribute of this name is the job, not the module.
module = importlib.import_module("handlers.shaam_token_refresh")


async def test_too_many_for_one_run_are_shared_out_in_batches(
    refresh: Refresh, bon: Bon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_FOR_ONE_RUN", 10)
    monkeypatch.setattr(module, "BATCH", 4)
    businesses = {f"b{n}": await bon.business(f"b{n}", expires_at=NOW - timedelta(minutes=n)) for n in range(11)}
    report = await refresh()
    assert ended(report) == ("succeeded", NOTHING | {"due": 11, "batches": 3})
    assert [run["job"] for run in report.caused] == ["shaam-refresh-batch"] * 3
    assert sorted(run["counts"]["refreshed"] for run in report.caused) == [3, 4, 4]
    for subject, business in businesses.items():
        assert await bon.refresh_token(business) == bon.simulator.current(subject)
    assert bon.simulator.reuses == []


async def test_as_many_as_one_run_may_take_are_not_shared_out(
    refresh: Refresh, bon: Bon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_FOR_ONE_RUN", 3)
    for n in range(3):
        await bon.business(f"b{n}")
    report = await refresh()
    assert ended(report) == ("succeeded", NOTHING | {"due": 3, "refreshed": 3})
    assert report.caused == []


def test_two_thousand_are_not_too_many_for_one_run() -> None:
    assert module.MOST_FOR_ONE_RUN == 2000


async def fail(refresh: Refresh, bon: Bon, fault: Misbehaviour = Misbehaviour.UNAVAILABLE) -> UUID:
    business = await bon.business("a")
    bon.simulator.spoil["a"] = fault
    await refresh()
    del bon.simulator.spoil["a"]
    return business


async def test_a_business_that_failed_is_left_alone_for_a_while(refresh: Refresh, bon: Bon) -> None:
    business = await fail(refresh, bon)
    assert ended(await refresh())[1] == NOTHING
    await bon.age(timedelta(minutes=5))
    assert ended(await refresh())[1]["refreshed"] == 1
    assert (await bon.standing(business))["failures"] == 0


async def test_each_failure_in_a_row_doubles_the_wait_up_to_four_hours(refresh: Refresh, bon: Bon) -> None:
    business = await bon.business("a")
    bon.simulator.spoil["a"] = Misbehaviour.UNAVAILABLE
    for minutes in (5, 10, 20, 40, 80, 160, 240, 240):
        await refresh()
        standing = await bon.standing(business)
        wait = standing["next_attempt_at"] - standing["changed_at"]
        assert timedelta(minutes=minutes / 2) <= wait <= timedelta(minutes=minutes, seconds=1)
        await bon.age(timedelta(minutes=minutes))


async def test_retry_after_is_waited_for_where_it_is_longer(refresh: Refresh, bon: Bon) -> None:
    business = await fail(refresh, bon, Misbehaviour.TOO_MANY)
    standing = await bon.standing(business)
    assert standing["next_attempt_at"] >= standing["silent_until"] > standing["changed_at"] + timedelta(seconds=119)


async def test_a_consent_ends_the_wait(refresh: Refresh, bon: Bon) -> None:
    await fail(refresh, bon)
    fresh = CIPHER.encrypt(bon.simulator.issue("a"))
    await bon.connection.execute(
        "update business_shaam_credentials set encrypted_refresh_token = $1, updated_at = now()", fresh
    )
    assert ended(await refresh())[1]["refreshed"] == 1


async def test_a_token_that_was_spent_before_is_not_sent_and_its_owner_is_asked(refresh: Refresh, bon: Bon) -> None:
    """As when a backup of BON's table alone is restored: sending it would revoke what was rotated from it."""
    business = await bon.business("a")
    before = (await bon.row(business))["encrypted_refresh_token"]
    await refresh()
    await bon.connection.execute(
        "update business_shaam_credentials set encrypted_refresh_token = $1, token_expires_at = now()", before
    )
    report = await refresh()
    assert ended(report)[1]["needs_reauth"] == 1
    assert "an earlier refresh spent this token" in ((await bon.outcomes(report.run["run_id"]))[business].error or "")
    assert bon.simulator.requests == 1
    assert (await bon.standing(business))["state"] == "needs_reauth"
