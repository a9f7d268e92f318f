"""
What becomes of stored tokens: whole runs on a real PostgreSQL, against a real server that spends tokens.

What cannot be seen from outside a run is asked of the handler, in a real attempt at a real run (`ctx`).
"""

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bon_scheduler import attempts, history, ledger
from bon_scheduler.config import Settings
from bon_scheduler.context import AttemptContext
from bon_scheduler.db import Pool
from bon_scheduler.demo.shaam_simulator import Misbehaviour, ShaamSimulator, shaam_simulator
from bon_scheduler.jobs import BusinessOutcome, Counts, NoPayload
from bon_scheduler.ledger import Request
from bon_scheduler.once import RunReport
from bon_scheduler.shaam import Answer, Shaam, TokenCipher
from bon_scheduler.workers import Worker, register_worker
from handlers.shaam_token_refresh import ASK_FOR_CONSENT, DUE, SAVE_TOKENS, shaam_token_refresh
from tests import arrange
from tests.conftest import Connection, MakeSettings, RunJob

# The package's attribute of this name is the job, not the module.
module = importlib.import_module("handlers.shaam_token_refresh")

Refresh: TypeAlias = Callable[..., Coroutine[Any, Any, RunReport]]

KEY = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
CIPHER = TokenCipher(KEY)
NOW = datetime.now(UTC)
FIRED = datetime(2026, 11, 23, 4, tzinfo=UTC)
"""A quarter of an hour before the next run, to the second."""
EVERY_QUARTER = "*/15 * * * *"
NOTHING = {"due": 0, "refreshed": 0, "needs_reauth": 0, "deferred": 0, "failed": 0}


@pytest.fixture
async def simulator() -> AsyncIterator[ShaamSimulator]:
    async with shaam_simulator(client_id="bon", client_secret="s3cret") as simulator:
        yield simulator


def environ(token_url: str) -> dict[str, str]:
    return {
        "SHAAM_MODE": "sandbox",
        "SHAAM_ENCRYPTION_KEY": KEY,
        "SHAAM_CLIENT_ID": "bon",
        "SHAAM_CLIENT_SECRET": "s3cret",
        "SHAAM_TOKEN_URL": token_url,
        "SHAAM_TIMEOUT_SECONDS": "5",
    }


@pytest.fixture
def refresh(run_job: RunJob, simulator: ShaamSimulator) -> Refresh:
    """Run the job whole, at NOW, against the simulator; keyword arguments are `run_job`'s."""

    async def run(**changes: Any) -> RunReport:
        return await run_job(shaam_token_refresh, **({"fire_time": NOW} | environ(simulator.token_url) | changes))

    return run


@dataclass
class Gate:
    """The authority as one whose answers are long on their way: `answered`, but not before `proceed`."""

    url: str = ""
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    proceed: asyncio.Event = field(default_factory=asyncio.Event)


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


@dataclass
class Bon:
    """BON's rows, made and read by a test."""

    connection: Connection
    simulator: ShaamSimulator

    async def business(
        self,
        subject: str,
        *,
        expires_at: datetime = NOW + timedelta(minutes=1),
        needs_reauth: bool = False,
        active: bool = True,
        stored: str | None = None,
    ) -> UUID:
        business_id = await arrange.business(
            self.connection, name=subject, is_active=active, deleted_at=None if active else NOW
        )
        credentials = {
            "business_id": business_id,
            "encrypted_access_token": CIPHER.encrypt("old-access"),
            "encrypted_refresh_token": stored or CIPHER.encrypt(self.simulator.issue(subject)),
            "token_expires_at": expires_at,
            "needs_reauth": needs_reauth,
            "scope": "kept",
            "updated_at": arrange.LONG_AGO,
        }
        await arrange.insert(self.connection, "business_shaam_credentials", credentials)
        return business_id

    async def row(self, business_id: UUID) -> dict[str, Any]:
        query = "select * from business_shaam_credentials where business_id = $1"
        row = await self.connection.fetchrow(query, business_id)
        assert row is not None
        return dict(row)

    async def refresh_token(self, business_id: UUID) -> str:
        return CIPHER.decrypt((await self.row(business_id))["encrypted_refresh_token"])

    async def flagged(self) -> set[UUID]:
        """Whose owner is asked to consent again."""
        query = "select business_id from business_shaam_credentials where needs_reauth"
        return {row["business_id"] for row in await self.connection.fetch(query)}

    async def outcomes(self, run_id: UUID) -> dict[UUID, BusinessOutcome]:
        """What the ledger holds of each business."""
        rows = await history.businesses_of(self.connection, run_id)
        return {row["business_id"]: BusinessOutcome(**row) for row in rows}


@pytest.fixture
async def bon(connection: Connection, simulator: ShaamSimulator) -> Bon:
    return Bon(connection, simulator)


def ended(report: RunReport) -> tuple[str, Counts]:
    return report.run["state"], report.run["counts"]


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
    for hours in range(3):
        report = await refresh(fire_time=NOW + timedelta(hours=hours))
        assert report.run["counts"]["refreshed"] == 1
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
    assert ended(await refresh(SHAAM_MODE="mock")) == ("succeeded", NOTHING | {"due": 1})
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


@pytest.mark.parametrize("fault", [Misbehaviour.INVALID_CLIENT, Misbehaviour.GATEWAY_401, Misbehaviour.FORBIDDEN])
async def test_a_refused_application_stops_the_run_and_flags_nobody(
    refresh: Refresh, bon: Bon, fault: Misbehaviour
) -> None:
    first = await bon.business("first", expires_at=NOW - timedelta(minutes=3))
    await bon.business("bad", expires_at=NOW - timedelta(minutes=2))
    for n in range(5):
        await bon.business(f"rest-{n}")
    bon.simulator.spoil["bad"] = fault
    report = await refresh(SHAAM_CONCURRENCY="1")
    assert await never_retried(bon, report)
    assert "Refreshed 1 of 7, left 6" in report.run["error"]
    assert bon.simulator.requests == 2
    assert set(await bon.outcomes(report.run["run_id"])) == {first}
    assert await bon.flagged() == set()


async def test_a_wrong_client_secret_ends_the_run_dead_and_flags_nobody(refresh: Refresh, bon: Bon) -> None:
    for n in range(3):
        await bon.business(f"b{n}")
    report = await refresh(SHAAM_CLIENT_SECRET="wrong")
    assert await never_retried(bon, report)
    assert "HTTP 401: invalid_client" in report.run["error"]
    assert await bon.flagged() == set()


# What is stored but cannot be read


async def test_an_unreadable_token_is_that_businesss_failure_alone(refresh: Refresh, bon: Bon) -> None:
    bad, _ = await bon.business("bad", stored="AAAA"), await bon.business("good")
    report = await refresh()
    assert ended(report) == ("partial", NOTHING | {"due": 2, "refreshed": 1, "failed": 1})
    assert await bon.flagged() == set()
    assert "AAAA" not in ((await bon.outcomes(report.run["run_id"]))[bad].error or "")


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


async def test_a_save_is_tried_again_until_the_database_takes_it(
    refresh: Refresh, bon: Bon, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    business = await bon.business("a")
    write = module._write

    async def mend_after_failing(*args: Any) -> Any:
        try:
            return await write(*args)
        except asyncpg.PostgresError:
            await bon.connection.execute("alter table elsewhere rename to business_shaam_credentials")
            raise

    monkeypatch.setattr(module, "_write", mend_after_failing)
    monkeypatch.setattr(module, "FIRST_SAVE_WAIT_SECONDS", 0)
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
    write = module._write
    failed: list[bool] = []

    async def commit_then_break(*args: Any) -> Any:
        value = await write(*args)
        if not failed:
            failed.append(True)
            raise ConnectionResetError
        return value

    monkeypatch.setattr(module, "_write", commit_then_break)
    monkeypatch.setattr(module, "FIRST_SAVE_WAIT_SECONDS", 0)
    assert (await refresh()).run["counts"]["refreshed"] == 1
    assert await bon.refresh_token(business) == bon.simulator.current("a")


async def test_after_a_lost_token_nobody_else_is_called(
    refresh: Refresh, bon: Bon, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(4):
        await bon.business(f"b{n}")

    async def refuse(*_: object) -> NoReturn:
        raise asyncpg.ReadOnlySQLTransactionError

    monkeypatch.setattr(module, "_write", refuse)
    monkeypatch.setattr(module, "FIRST_SAVE_WAIT_SECONDS", 0)
    report = await refresh(SHAAM_CONCURRENCY="1")
    assert ended(report) == ("partial", NOTHING | {"due": 4, "failed": 1, "deferred": 3})
    assert bon.simulator.requests == 1


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


@pytest.fixture
async def ctx(
    pool: Pool, connection: Connection, make_settings: MakeSettings, gate: Gate
) -> AsyncIterator[AttemptContext]:
    """An attempt at a run, claimed by a living worker; the authority's answers wait at the gate."""
    settings, worker = make_settings(**environ(gate.url)), Worker()
    await register_worker(connection, worker)
    run_id = await ledger.enqueue(connection, Request(shaam_token_refresh.name, {}, fire_time=NOW))
    assert run_id is not None
    claim = await attempts.claim(
        connection,
        run_id,
        worker=worker.id,
        host=worker.host,
        lease=timedelta(seconds=settings.lease_seconds),
        allowed=shaam_token_refresh.retry.attempts,
        exclusive=True,
    )
    assert claim.ref is not None
    async with Shaam(settings) as shaam:
        yield AttemptContext(
            ref=claim.ref,
            job_name=shaam_token_refresh.name,
            fire_time=NOW,
            now=NOW,
            next_fire_time=NOW + timedelta(minutes=15),
            replay=False,
            zone=settings.bon_timezone,
            pool=pool,
            resources={Settings: settings, Shaam: shaam, TokenCipher: CIPHER},
        )


async def handle(ctx: AttemptContext) -> Counts:
    return await shaam_token_refresh.handler(ctx, NoPayload())


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
    try:
        async with asyncpg.create_pool(database_url, min_size=1, max_size=2, server_settings={"role": role}) as pool:
            ctx.pool = pool
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await handle(ctx)
    finally:
        await bon.connection.execute(f"drop owned by {role}; drop role {role}")
    assert bon.simulator.requests == 0


# What the handler takes for granted


async def test_every_statement_is_valid_against_bons_schema(connection: Connection) -> None:
    for statement in (DUE, SAVE_TOKENS, ASK_FOR_CONSENT):
        await connection.prepare(statement)


def test_the_answers_are_those_the_handler_knows() -> None:
    """`match` in the handler falls through silently on a sixth kind of answer."""
    assert {kind.__name__ for kind in Answer.__args__} == {
        "Refreshed",
        "NeedsReauth",
        "Misconfigured",
        "Transient",
        "Ambiguous",
    }
