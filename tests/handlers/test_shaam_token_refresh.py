"""
What becomes of stored tokens: whole runs on a real PostgreSQL, against a real server that spends tokens.

What cannot be seen from outside a run is asked of the handler, in a real attempt at a real run (`ctx`).
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from bon_scheduler.clock import SystemClock
from bon_scheduler.config import Settings
from bon_scheduler.database.connections import Pool, Pools
from bon_scheduler.demo.shaam_simulator import Misbehaviour
from bon_scheduler.engine.context import AttemptContext
from bon_scheduler.engine.run_once import RunReport
from bon_scheduler.jobs import BusinessOutcome, Counts
from bon_scheduler.ledger import entries, history
from bon_scheduler.ledger.entries import Request
from bon_scheduler.ledger.workers import Worker, register_worker
from bon_scheduler.metrics import Metrics
from bon_scheduler.shaam import rotation
from bon_scheduler.shaam.breaker import HANDFUL
from bon_scheduler.shaam.cipher import TokenCipher
from bon_scheduler.shaam.client import Answer, Shaam
from bon_scheduler.shaam.rotation import Rotator
from bon_scheduler.shaam.unsaved import UnsavedTokens
from handlers.shaam_token_refresh import RefreshTokens, shaam_token_refresh
from tests.attempting import hold
from tests.conftest import Connection, MakeSettings
from tests.tax import CIPHER, NOTHING, NOW, Bon, Gate, Refresh, ended, environ

FIRED = datetime(2026, 11, 23, 4, tzinfo=UTC)
"""A quarter of an hour before the next run, to the second."""
EVERY_QUARTER = "*/15 * * * *"


# What is refreshed


async def test_a_due_token_is_rotated_and_saved(refresh: Refresh, bon: Bon) -> None:
    business = await bon.business("a")
    report = await refresh()
    assert ended(report) == ("succeeded", NOTHING | {"due": 1, "refreshed": 1})
    row = await bon.row(business)
    assert await bon.refresh_token(business) == bon.simulator.current("a")
    assert CIPHER.decrypt(row["encrypted_access_token"]) != "old-access"
    assert timedelta(minutes=9) < row["token_expires_at"] - datetime.now(UTC) <= timedelta(seconds=601)
    assert row["scope"] == "scope"
    assert row["updated_at"] > NOW - timedelta(minutes=5)
    assert await bon.outcomes(report.run["run_id"]) == {business: BusinessOutcome(business, "done", {"refreshed": 1})}


async def test_a_second_run_works_with_what_the_first_has_saved(refresh: Refresh, bon: Bon) -> None:
    await bon.business("a")
    for _ in range(3):
        report = await refresh(fire_time=NOW)
        assert report.run["counts"]["refreshed"] == 1
        await bon.connection.execute("update business_shaam_credentials set token_expires_at = now()")
    assert bon.simulator.reuses == []


@pytest.mark.parametrize(
    ("schedule", "clock_behind", "expires_in", "due"),
    [
        (EVERY_QUARTER, timedelta(0), timedelta(minutes=19, seconds=59), 1),
        (EVERY_QUARTER, timedelta(0), timedelta(minutes=20), 0),
        ("", timedelta(0), timedelta(minutes=4, seconds=59), 1),
        ("", timedelta(0), timedelta(minutes=5), 0),
        (EVERY_QUARTER, timedelta(minutes=45), timedelta(minutes=4, seconds=59), 1),
    ],
)
async def test_due_is_what_expires_within_five_minutes_of_the_next_run(
    refresh: Refresh, bon: Bon, schedule: str, clock_behind: timedelta, expires_in: timedelta, due: int
) -> None:
    await bon.business("a", expires_at=FIRED + expires_in)
    report = await refresh(fire_time=FIRED, now=FIRED - clock_behind, SCHEDULE_SHAAM_TOKEN_REFRESH=schedule)
    assert ended(report) == ("succeeded", NOTHING | {"due": due, "refreshed": due})


async def test_a_flagged_or_inactive_business_is_not_called(refresh: Refresh, bon: Bon) -> None:
    await bon.business("flagged", needs_reauth=True)
    await bon.business("inactive", active=False)
    assert ended(await refresh()) == ("succeeded", NOTHING)
    assert bon.simulator.requests == 0


async def test_mock_mode_counts_and_calls_nobody(refresh: Refresh, bon: Bon) -> None:
    business = await bon.business("a")
    before = await bon.row(business)
    assert ended(await refresh(SHAAM_MODE="mock")) == ("succeeded", NOTHING | {"due": 1, "mocked": 1})
    assert await bon.row(business) == before
    assert bon.simulator.requests == 0


async def test_many_businesses_each_get_their_own_token(refresh: Refresh, bon: Bon) -> None:
    businesses = {f"b{n}": await bon.business(f"b{n}") for n in range(300)}
    assert (await refresh()).run["counts"]["refreshed"] == 300
    for subject, business in businesses.items():
        assert await bon.refresh_token(business) == bon.simulator.current(subject)


# What the authority refuses


async def test_a_run_with_one_spoiled_business_is_partial_and_names_it(refresh: Refresh, bon: Bon) -> None:
    bad, *good = [await bon.business(subject) for subject in ("bad", "good", "better")]
    bon.simulator.spoil["bad"] = Misbehaviour.UNAVAILABLE
    report = await refresh()
    assert (report.run["state"], report.businesses) == ("partial", {"touched": 3, "failed": 1})
    outcomes = await bon.outcomes(report.run["run_id"])
    assert {business: outcome.outcome for business, outcome in outcomes.items()} == {
        bad: "failed",
        **dict.fromkeys(good, "done"),
    }


async def test_a_refused_token_asks_its_owner_and_nobody_else(refresh: Refresh, bon: Bon) -> None:
    bad, _ = await bon.business("bad"), await bon.business("good")
    bon.simulator.spoil["bad"] = Misbehaviour.INVALID_GRANT
    report = await refresh()
    assert ended(report) == ("partial", NOTHING | {"due": 2, "refreshed": 1, "needs_reauth": 1})
    assert await bon.flagged() == {bad}
    refused = (await bon.outcomes(report.run["run_id"]))[bad]
    assert refused.outcome == "failed"
    assert "was used before" in (refused.error or "")


@pytest.mark.parametrize(
    ("fault", "count"),
    [
        (Misbehaviour.UNAVAILABLE, "deferred"),
        (Misbehaviour.TOO_MANY, "deferred"),
        (Misbehaviour.DROP, "deferred"),
        (Misbehaviour.GARBAGE, "failed"),
    ],
)
async def test_the_networks_fault_changes_nothing_and_flags_nobody(
    refresh: Refresh, bon: Bon, fault: Misbehaviour, count: str
) -> None:
    bad, _ = await bon.business("bad"), await bon.business("good")
    before = await bon.row(bad)
    bon.simulator.spoil["bad"] = fault
    report = await refresh()
    assert ended(report) == ("partial", NOTHING | {"due": 2, "refreshed": 1, count: 1})
    assert await bon.row(bad) == before
    assert (await bon.outcomes(report.run["run_id"]))[bad].outcome == "failed"


async def test_a_slow_business_does_not_hold_up_the_others(refresh: Refresh, bon: Bon) -> None:
    slow, good = await bon.business("slow"), await bon.business("good")
    bon.simulator.spoil["slow"] = Misbehaviour.SLOW
    before = await bon.row(good)
    running = asyncio.create_task(refresh())
    async with asyncio.timeout(4):  # less than the slow one's own time-out
        while await bon.row(good) == before:  # noqa: ASYNC110 - BON's tables notify nobody
            await asyncio.sleep(0.01)
    assert not running.done()
    bon.simulator._closing.set()  # the slow one gets its 503
    report = await running
    assert ended(report) == ("partial", NOTHING | {"due": 2, "refreshed": 1, "deferred": 1})
    assert (await bon.outcomes(report.run["run_id"]))[slow].outcome == "failed"


async def never_retried(bon: Bon, report: RunReport) -> bool:
    """Whether the run is dead because it said so, and not because no attempt was left."""
    (attempt,) = await history.attempts_of(bon.connection, report.run["run_id"])
    return (report.run["state"], attempt["outcome"]) == ("dead", "dead")


@dataclass
class AfterTheFirst(dict[str, Misbehaviour]):
    """What goes wrong for every business but the first one that comes."""

    fault: Misbehaviour
    came: bool = False

    def get(self, *_: object) -> Misbehaviour | None:  # type: ignore[override] # no default is asked for
        came, self.came = self.came, True
        return self.fault if came else None


@pytest.mark.parametrize("fault", [Misbehaviour.INVALID_CLIENT, Misbehaviour.GATEWAY_401, Misbehaviour.FORBIDDEN])
async def test_a_refused_application_is_tried_a_handful_of_times_and_flags_nobody(
    refresh: Refresh, bon: Bon, fault: Misbehaviour
) -> None:
    for n in range(21):
        await bon.business(f"b{n}")
    bon.simulator.spoil = AfterTheFirst(fault)
    report = await refresh(SHAAM_CONCURRENCY="1")
    assert await never_retried(bon, report)
    assert "Refreshed 1 of 21, left 20" in report.run["error"]
    assert bon.simulator.requests == 1 + HANDFUL
    (done,) = (await bon.outcomes(report.run["run_id"])).values()
    assert done.counts == {"refreshed": 1}
    assert await bon.flagged() == set()


async def test_what_refuses_one_business_is_its_own_failure(refresh: Refresh, bon: Bon) -> None:
    """Where the application is accepted for others, it is not the application that is at fault."""
    bad, _ = await bon.business("bad"), await bon.business("good")
    bon.simulator.spoil["bad"] = Misbehaviour.FORBIDDEN
    report = await refresh()
    assert ended(report) == ("partial", NOTHING | {"due": 2, "refreshed": 1, "failed": 1})
    assert (await bon.outcomes(report.run["run_id"]))[bad].error == "HTTP 403: no JSON object, but 0 bytes"
    assert await bon.flagged() == set()


@pytest.mark.parametrize(("due", "requests"), [(3, 3), (100, HANDFUL)])
async def test_a_wrong_client_secret_ends_the_run_dead_and_flags_nobody(
    refresh: Refresh, bon: Bon, due: int, requests: int
) -> None:
    for n in range(due):
        await bon.business(f"b{n}")
    bon.simulator.delay_seconds = 0.1  # as long as others are on their way
    report = await refresh(SHAAM_CLIENT_SECRET="wrong")
    assert await never_retried(bon, report)
    assert "HTTP 401: invalid_client" in report.run["error"]
    assert bon.simulator.requests == requests
    assert await bon.flagged() == set()


async def test_a_few_that_are_always_refused_do_not_speak_for_all_others(refresh: Refresh, bon: Bon) -> None:
    """Those that fail are the first to expire: in that order no other would have its turn, run after run."""
    for n in range(HANDFUL):
        await bon.business(f"bad{n}", expires_at=NOW - timedelta(minutes=3))
        bon.simulator.spoil[f"bad{n}"] = Misbehaviour.FORBIDDEN
    for n in range(HANDFUL * 20):
        await bon.business(f"good{n}")
    report = await refresh(SHAAM_CONCURRENCY="1")
    assert ended(report) == ("partial", NOTHING | {"due": 105, "refreshed": 100, "failed": 5})


async def test_a_failing_endpoint_is_not_asked_for_everybody(refresh: Refresh, bon: Bon) -> None:
    for n in range(50):
        await bon.business(f"b{n}")
        bon.simulator.spoil[f"b{n}"] = Misbehaviour.UNAVAILABLE
    report = await refresh(SHAAM_CONCURRENCY="2")
    assert ended(report) == ("partial", NOTHING | {"due": 50, "deferred": 50})
    assert bon.simulator.requests <= 22


# What is stored but cannot be read


async def test_an_unreadable_token_is_that_businesss_failure_alone(refresh: Refresh, bon: Bon) -> None:
    bad, _ = await bon.business("bad", stored="AAAA"), await bon.business("good")
    report = await refresh()
    assert ended(report) == ("partial", NOTHING | {"due": 2, "refreshed": 1, "failed": 1})
    assert await bon.flagged() == set()
    assert "AAAA" not in ((await bon.outcomes(report.run["run_id"]))[bad].error or "")


async def test_an_unreadable_token_alone_is_told_from_a_wrong_key_by_those_that_are_not_due(
    refresh: Refresh, bon: Bon
) -> None:
    await bon.business("bad", stored="AAAA")
    await bon.business("resting", expires_at=NOW + timedelta(days=1))
    assert ended(await refresh()) == ("partial", NOTHING | {"due": 1, "failed": 1})


@pytest.mark.parametrize("count", [1, 3])
async def test_a_wrong_key_stops_the_run_and_flags_nobody(refresh: Refresh, bon: Bon, count: int) -> None:
    other = TokenCipher("ff" * 32)
    for n in range(count):
        await bon.business(f"b{n}", stored=other.encrypt("x"))
    report = await refresh()
    assert await never_retried(bon, report)
    assert "SHAAM_ENCRYPTION_KEY" in report.run["error"]
    assert bon.simulator.requests == 0
    assert await bon.flagged() == set()


# What happens between the authority's answer and its save


@pytest.mark.parametrize("fault", [None, Misbehaviour.INVALID_GRANT])
async def test_a_consent_given_meanwhile_is_never_overwritten(
    refresh: Refresh, bon: Bon, gate: Gate, fault: Misbehaviour | None
) -> None:
    business = await bon.business("a")
    if fault:
        bon.simulator.spoil["a"] = fault
    running = asyncio.create_task(refresh(SHAAM_TOKEN_URL=gate.url))
    await gate.answered.wait()
    await bon.connection.execute(
        "update business_shaam_credentials set encrypted_refresh_token = $1", CIPHER.encrypt("consented")
    )
    before = await bon.row(business)
    gate.proceed.set()
    report = await running
    assert ended(report) == ("succeeded", NOTHING | {"due": 1, "deferred": 1})
    assert await bon.row(business) == before
    assert (await bon.outcomes(report.run["run_id"]))[business].outcome == "kept"


async def test_a_cancelled_run_still_saves_what_was_rotated(refresh: Refresh, bon: Bon, gate: Gate) -> None:
    business = await bon.business("a")
    running = asyncio.create_task(refresh(SHAAM_TOKEN_URL=gate.url))
    await gate.answered.wait()
    for _ in range(10):
        running.cancel()
        await asyncio.sleep(0)
    assert not running.done()  # the save is still to come
    gate.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await bon.refresh_token(business) == bon.simulator.current("a")
    (run,) = await history.list_runs(bon.connection, job=None, state=None, since=None, limit=2)
    assert (run["state"], run["counts"]) == ("cancelled", {})


async def test_a_cancelled_run_calls_nobody_new(refresh: Refresh, bon: Bon, gate: Gate) -> None:
    for n in range(5):
        await bon.business(f"b{n}")
    running = asyncio.create_task(refresh(SHAAM_TOKEN_URL=gate.url, SHAAM_CONCURRENCY="1"))
    await gate.answered.wait()
    running.cancel()
    gate.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert bon.simulator.requests == 1


# What the database refuses


@pytest.mark.parametrize("odd", [Misbehaviour.REFRESH_EXPIRES_HUGE, Misbehaviour.SCOPE_NUL])
async def test_tokens_are_saved_whatever_is_said_beside_them(refresh: Refresh, bon: Bon, odd: Misbehaviour) -> None:
    business = await bon.business("a")
    bon.simulator.spoil["a"] = odd
    assert ended(await refresh()) == ("succeeded", NOTHING | {"due": 1, "refreshed": 1})
    assert await bon.refresh_token(business) == bon.simulator.current("a")


async def test_a_save_is_tried_again_until_the_database_takes_it(
    refresh: Refresh, bon: Bon, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    business = await bon.business("a")
    save = UnsavedTokens.save

    async def mend_after_failing(unsaved: UnsavedTokens, *args: Any) -> Any:
        try:
            return await save(unsaved, *args)
        except asyncpg.PostgresError:
            await bon.connection.execute("alter table elsewhere rename to business_shaam_credentials")
            raise

    monkeypatch.setattr(UnsavedTokens, "save", mend_after_failing)
    running = asyncio.create_task(refresh(SHAAM_TOKEN_URL=gate.url))
    await gate.answered.wait()
    await bon.connection.execute("alter table business_shaam_credentials rename to elsewhere")
    gate.proceed.set()
    assert (await running).run["counts"]["refreshed"] == 1
    assert await bon.refresh_token(business) == bon.simulator.current("a")


async def test_a_save_whose_reply_was_lost_is_not_mistaken_for_another(
    refresh: Refresh, bon: Bon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first save commits and its connection drops: the repeated one must know its own row."""
    business = await bon.business("a")
    save = UnsavedTokens.save
    failed: list[bool] = []

    async def commit_then_break(unsaved: UnsavedTokens, *args: Any) -> Any:
        value = await save(unsaved, *args)
        if value and not failed:  # the dry_runner saves nothing
            failed.append(True)
            raise ConnectionResetError
        return value

    monkeypatch.setattr(UnsavedTokens, "save", commit_then_break)
    assert (await refresh()).run["counts"]["refreshed"] == 1
    assert failed
    assert await bon.refresh_token(business) == bon.simulator.current("a")


async def test_while_a_token_is_in_memory_alone_nobody_else_is_called(
    refresh: Refresh, bon: Bon, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(6):
        await bon.business(f"b{n}")
    save = UnsavedTokens.save

    async def refuse(unsaved: UnsavedTokens, rotated: Any) -> bool:
        if not rotated.credential.stored:  # the dry_runner
            return await save(unsaved, rotated)
        raise asyncpg.ReadOnlySQLTransactionError("read only")

    monkeypatch.setattr(UnsavedTokens, "save", refuse)
    monkeypatch.setattr(rotation, "SAVE_WAITS_SECONDS", (0,))
    report = await refresh(SHAAM_CONCURRENCY="1")
    called = bon.simulator.requests
    assert called in (1, 2)  # a second may have been next when the first was answered
    assert ended(report) == ("partial", NOTHING | {"due": 6, "failed": called, "deferred": 6 - called})


async def test_one_businesss_defect_is_its_own(refresh: Refresh, bon: Bon, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception nobody foresaw, with a secret in its text, stays with its business and untold."""
    await bon.business("good")
    bad = await bon.business("bad")
    token, exchange = bon.simulator.current("bad"), Shaam.refresh

    async def break_for_bad(shaam: Shaam, refresh_token: str) -> Answer:
        if refresh_token == token:
            raise LookupError(refresh_token)
        return await exchange(shaam, refresh_token)

    monkeypatch.setattr(Shaam, "refresh", break_for_bad)
    report = await refresh()
    assert ended(report) == ("partial", NOTHING | {"due": 2, "refreshed": 1, "failed": 1})
    assert (await bon.outcomes(report.run["run_id"]))[bad].error == "LookupError"


# What cannot be seen from outside a run


def rotating(settings: Settings, pool: Pool, shaam: Shaam) -> AbstractAsyncContextManager[Rotator]:
    rotator = Rotator(
        settings=settings,
        pools=Pools(pool, pool),
        shaam=shaam,
        metrics=Metrics(),
        clock=SystemClock(),
        stopping=asyncio.Event(),
    )
    return rotator.running()


@pytest.fixture
async def ctx(
    pool: Pool, connection: Connection, make_settings: MakeSettings, gate: Gate
) -> AsyncIterator[AttemptContext]:
    """An attempt at a run, claimed by a living worker; the authority's answers wait at the gate."""
    settings, worker = make_settings(**environ(gate.url)), Worker()
    await register_worker(connection, worker)
    run_id = await entries.enqueue(connection, Request(shaam_token_refresh.name, {}, fire_time=NOW))
    assert run_id is not None
    ref = await hold(connection, run_id, worker)
    async with Shaam(settings) as shaam, rotating(settings, pool, shaam) as rotator:
        yield AttemptContext(
            ref=ref,
            job_name=shaam_token_refresh.name,
            fire_time=NOW,
            now=NOW,
            next_fire_time=NOW + timedelta(minutes=15),
            replay=False,
            retried=False,
            released=False,
            zone=settings.bon_timezone,
            pool=pool,
            resources={Settings: settings, Shaam: shaam, Rotator: rotator},
        )


async def handle(ctx: AttemptContext) -> Counts:
    return await shaam_token_refresh.handler(ctx, RefreshTokens())


async def test_nobody_is_called_while_the_ledger_is_quarantined(ctx: AttemptContext, bon: Bon, gate: Gate) -> None:
    await bon.business("a")
    gate.proceed.set()
    ctx.get(Rotator).unsaved.waits = lambda: True
    await handle(ctx)
    assert bon.simulator.requests == 0


async def test_the_outcomes_and_the_end_of_the_run_commit_together(ctx: AttemptContext, bon: Bon, gate: Gate) -> None:
    """Were the run's end left to the runner, a worker that died in between would leave it open."""
    business = await bon.business("a")
    gate.proceed.set()
    counts = await handle(ctx)
    run = await history.find_run(bon.connection, ctx.run_id)
    assert run is not None
    assert (run["state"], run["counts"]) == (ctx.ended, counts) == ("succeeded", NOTHING | {"due": 1, "refreshed": 1})
    assert set(await bon.outcomes(ctx.run_id)) == {business}


async def test_no_connection_is_held_while_the_authority_is_asked(ctx: AttemptContext, bon: Bon, gate: Gate) -> None:
    await bon.business("a")
    running = asyncio.create_task(handle(ctx))
    await gate.answered.wait()
    assert ctx.pool.get_idle_size() == ctx.pool.get_size()
    gate.proceed.set()
    await running


async def test_no_token_is_spent_where_its_successor_could_not_be_saved(
    ctx: AttemptContext, bon: Bon, database_url: str
) -> None:
    await bon.business("a")
    role = f"reader_{uuid4().hex}"  # roles belong to the server, not to the test's database
    await bon.connection.execute(f"create role {role}")
    await bon.connection.execute(f"grant select on all tables in schema public to {role}")
    await bon.connection.execute(f"grant usage on schema bon_scheduler to {role}")
    await bon.connection.execute(f"grant all on all tables in schema bon_scheduler to {role}")
    try:
        async with asyncpg.create_pool(database_url, min_size=1, max_size=2, server_settings={"role": role}) as pool:
            settings, shaam = ctx.get(Settings), ctx.get(Shaam)
            async with rotating(settings, pool, shaam) as rotator:
                ctx.resources = {**ctx.resources, Rotator: rotator}
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await handle(ctx)
    finally:
        await bon.connection.execute(f"drop owned by {role}; drop role {role}")
    assert bon.simulator.requests == 0


# What the handler takes for granted


def test_the_answers_are_those_the_handler_knows() -> None:
    """`match` in the handler falls through silently on a sixth kind of answer."""
    assert {kind.__name__ for kind in Answer.__args__} == {
        "Refreshed",
        "NeedsReauth",
        "Misconfigured",
        "Transient",
        "Ambiguous",
    }
