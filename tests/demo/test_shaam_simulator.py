"""The simulator through the real client: single use, revocation, and each way to misbehave."""

from collections.abc import AsyncIterator

import pytest
from pydantic import SecretStr

from bon_scheduler.config import ClientAuth, Settings, ShaamMode
from bon_scheduler.demo.shaam_simulator import WITHOUT_ROTATION, Misbehaviour, ShaamSimulator, shaam_simulator
from bon_scheduler.shaam.client import Ambiguous, Answer, Misconfigured, NeedsReauth, Refreshed, Shaam, Transient
from tests.tax import KEY

KINDS: dict[Misbehaviour, type[Answer]] = {
    Misbehaviour.INVALID_GRANT: NeedsReauth,
    Misbehaviour.UNAVAILABLE: Transient,
    Misbehaviour.GARBAGE: Ambiguous,
    Misbehaviour.SLOW: Transient,
    Misbehaviour.GATEWAY_401: Misconfigured,
    Misbehaviour.INVALID_CLIENT: Misconfigured,
    Misbehaviour.FORBIDDEN: Misconfigured,
    Misbehaviour.DROP: Transient,
    Misbehaviour.TOO_MANY: Transient,
    Misbehaviour.REDIRECT: Transient,
    Misbehaviour.EMPTY: Ambiguous,
    Misbehaviour.TRUNCATED: Ambiguous,
    Misbehaviour.MISSING_FIELDS: Ambiguous,
    Misbehaviour.HUGE_BODY: Ambiguous,
    Misbehaviour.SLOW_LORIS: Ambiguous,
    Misbehaviour.EXPIRES_TEXT: Refreshed,
    Misbehaviour.EXPIRES_NEGATIVE: Refreshed,
    Misbehaviour.EXPIRES_HUGE: Refreshed,
    Misbehaviour.REFRESH_EXPIRES_HUGE: Refreshed,
    Misbehaviour.SCOPE_NUL: Refreshed,
    Misbehaviour.WRONG_TYPE: Refreshed,
}


@pytest.fixture
async def simulator() -> AsyncIterator[ShaamSimulator]:
    async with shaam_simulator(client_id="bon", client_secret="s:cret") as simulator:
        yield simulator


async def refresh(simulator: ShaamSimulator, token: str, **changes: object) -> Answer:
    values: dict[str, object] = {
        "database_url": SecretStr("postgresql://nobody@localhost/none"),
        "shaam_mode": ShaamMode.SANDBOX,
        "shaam_encryption_key": SecretStr(KEY),
        "shaam_client_id": SecretStr("bon"),
        "shaam_client_secret": SecretStr("s:cret"),
        "shaam_token_url": simulator.token_url,
        "shaam_timeout_seconds": 5,
    }
    async with Shaam(Settings.model_validate(values | changes)) as shaam:
        return await shaam.refresh(token)


async def test_a_success_returns_the_successor(simulator: ShaamSimulator) -> None:
    first = simulator.issue("a")
    answer = await refresh(simulator, first)
    assert isinstance(answer, Refreshed)
    assert answer.refresh_token == simulator.current("a") != first
    assert isinstance(await refresh(simulator, answer.refresh_token), Refreshed)
    assert (simulator.requests, simulator.reuses) == (2, [])


async def test_a_token_used_twice_revokes_what_was_rotated_from_it(simulator: ShaamSimulator) -> None:
    first = simulator.issue("a")
    await refresh(simulator, first)
    again = await refresh(simulator, first)
    assert isinstance(again, NeedsReauth)
    assert "was used before or revoked" in again.reason
    assert isinstance(await refresh(simulator, simulator.current("a")), NeedsReauth)
    assert simulator.reuses == ["a"]


async def test_a_new_consent_works_after_a_revocation(simulator: ShaamSimulator) -> None:
    first = simulator.issue("a")
    await refresh(simulator, first)
    await refresh(simulator, first)
    assert isinstance(await refresh(simulator, simulator.issue("a")), Refreshed)


async def test_businesses_do_not_share_tokens_and_each_process_issues_the_same() -> None:
    async with (
        shaam_simulator(client_id="bon", client_secret="x") as one,
        shaam_simulator(client_id="bon", client_secret="x") as two,
    ):
        assert one.issue("a") == two.issue("a")
        assert one.issue("b") != two.current("a")
        assert one.issue("a") != two.current("a")


@pytest.mark.parametrize("auth", list(ClientAuth))
async def test_the_client_is_verified_either_way(simulator: ShaamSimulator, auth: ClientAuth) -> None:
    token = simulator.issue("a")
    wrong = await refresh(simulator, token, shaam_client_auth=auth, shaam_client_secret=SecretStr("wrong"))
    assert isinstance(wrong, Misconfigured)
    assert isinstance(await refresh(simulator, token, shaam_client_auth=auth), Refreshed)


async def test_a_token_it_never_issued_is_refused(simulator: ShaamSimulator) -> None:
    assert isinstance(await refresh(simulator, "made-up"), NeedsReauth)


@pytest.mark.parametrize(("fault", "kind"), KINDS.items())
async def test_it_misbehaves_for_one_business_only(
    simulator: ShaamSimulator, fault: Misbehaviour, kind: type[Answer]
) -> None:
    simulator.spoil["bad"] = fault
    assert isinstance(await refresh(simulator, simulator.issue("bad"), shaam_timeout_seconds=0.3), kind)
    assert isinstance(await refresh(simulator, simulator.issue("good")), Refreshed)


def test_each_misbehaviour_is_shown() -> None:
    assert set(KINDS) == set(Misbehaviour)


@pytest.mark.parametrize("fault", sorted(set(Misbehaviour) - WITHOUT_ROTATION))
async def test_it_rotates_and_spoils_what_it_says_of_it(simulator: ShaamSimulator, fault: Misbehaviour) -> None:
    simulator.spoil["a"] = fault
    token = simulator.issue("a")
    await refresh(simulator, token, shaam_timeout_seconds=0.3)
    assert simulator.honours(simulator.current("a"))
    assert not simulator.honours(token)


async def test_a_consent_that_was_withdrawn_is_honoured_no_more(simulator: ShaamSimulator) -> None:
    token = simulator.issue("a")
    assert simulator.honours(token)
    simulator.withdraw("a")
    assert not simulator.honours(token)
    assert isinstance(await refresh(simulator, token), NeedsReauth)
