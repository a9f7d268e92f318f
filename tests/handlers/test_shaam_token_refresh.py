"""
What becomes of stored tokens: the handler on a real PostgreSQL, against a real server that spends tokens.

The context here is the smallest that fits the protocol; the runner's own tests cover the rest.
"""

import asyncio
import importlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, TypeVar, cast
from uuid import UUID, uuid4

import asyncpg
import pytest
from pydantic import SecretStr

from bon_scheduler.config import Settings, ShaamMode
from bon_scheduler.db import Pool
from bon_scheduler.demo.shaam_simulator import Misbehaviour, ShaamSimulator, shaam_simulator
from bon_scheduler.jobs import BusinessOutcome, Connection, Counts, NeverRetryError, NoPayload
from bon_scheduler.shaam import Answer, NeedsReauth, Shaam, TokenCipher
from handlers.shaam_token_refresh import ASK_FOR_CONSENT, DUE, SAVE_TOKENS, shaam_token_refresh

# The package's attribute of this name is the job, not the module.
module = importlib.import_module("handlers.shaam_token_refresh")

T = TypeVar("T")
KEY = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
CIPHER = TokenCipher(KEY)
NOW = datetime.now(UTC)
NOTHING = {"due": 0, "refreshed": 0, "needs_reauth": 0, "deferred": 0, "failed": 0}


@dataclass
class Context:
    """The smallest `JobContext` over a pool; nothing is fenced."""

    pool: Pool
    settings: Settings
    shaam: Shaam | None = None
    fire_time: datetime = NOW
    now: datetime = NOW
    next_fire_time: datetime | None = NOW + timedelta(minutes=15)
    run_id: UUID = field(default_factory=uuid4)
    attempt: int = 1
    replay: bool = False
    business_date = NOW.date()
    today = NOW.date()
    recorded: dict[UUID, BusinessOutcome] = field(default_factory=dict)
    finished: Counts | None = None

    def get(self, kind: type[T]) -> T:
        objects: dict[type, object | None] = {
            Settings: self.settings,
            Shaam: self.shaam,
            TokenCipher: CIPHER if self.shaam else None,
        }
        found = objects[kind]
        assert found is not None, f"{kind.__name__} was asked for"
        return cast("T", found)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        async with self.pool.acquire() as connection:
            yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        async with self.pool.acquire() as connection, connection.transaction():
            yield connection

    async def enqueue(self, *_: object, **__: object) -> NoReturn:
        raise AssertionError("this job enqueues nothing")

    enqueue_many = enqueue

    async def record(self, outcomes: Iterable[BusinessOutcome], *, on: Connection) -> None:
        assert on is not None
        self.recorded |= {outcome.business_id: outcome for outcome in outcomes}

    async def finish(self, counts: Counts, *, on: Connection) -> Counts:
        assert on is not None
        self.finished = counts
        return counts


@pytest.fixture
async def simulator() -> AsyncIterator[ShaamSimulator]:
    async with shaam_simulator(client_id="bon", client_secret="s3cret") as simulator:
        yield simulator


def shaam_settings(simulator: ShaamSimulator | None, **changes: object) -> Settings:
    values: dict[str, object] = {"database_url": SecretStr("postgresql://nobody@localhost/none")}
    if simulator is not None:
        values |= {
            "shaam_mode": ShaamMode.SANDBOX,
            "shaam_encryption_key": SecretStr(KEY),
            "shaam_client_id": SecretStr("bon"),
            "shaam_client_secret": SecretStr("s3cret"),
            "shaam_token_url": simulator.token_url,
            "shaam_timeout_seconds": 5,
        }
    return Settings.model_validate(values | changes)


@pytest.fixture
async def ctx(pool: Pool, simulator: ShaamSimulator) -> AsyncIterator[Context]:
    chosen = shaam_settings(simulator)
    async with Shaam(chosen) as shaam:
        yield Context(pool, chosen, shaam)


@dataclass
class Bon:
    """BON's rows, made and read by a test."""

    pool: Pool
    simulator: ShaamSimulator

    async def business(
        self,
        subject: str,
        *,
        expires_in: timedelta = timedelta(minutes=1),
        needs_reauth: bool = False,
        active: bool = True,
        stored: str | None = None,
    ) -> UUID:
        business_id: UUID = await self.pool.fetchval(
            "insert into businesses (name, business_type, registration_number, is_active, deleted_at, "
            "created_by_user_id) values ($1, 'limited_company', $1, $2, $3, (select id from users)) "
            "returning id",
            subject,
            active,
            None if active else NOW,
        )
        await self.pool.execute(
            "insert into business_shaam_credentials (business_id, encrypted_access_token, "
            "encrypted_refresh_token, token_expires_at, needs_reauth, scope, updated_at) "
            "values ($1, $2, $3, $4, $5, 'kept', '2020-01-01Z')",
            business_id,
            CIPHER.encrypt("old-access"),
            stored if stored is not None else CIPHER.encrypt(self.simulator.issue(subject)),
            NOW + expires_in,
            needs_reauth,
        )
        return business_id

    async def row(self, business_id: UUID) -> dict[str, Any]:
        row = await self.pool.fetchrow("select * from business_shaam_credentials where business_id = $1", business_id)
        assert row is not None
        return dict(row)

    async def refresh_token(self, business_id: UUID) -> str:
        return CIPHER.decrypt((await self.row(business_id))["encrypted_refresh_token"])


@pytest.fixture
async def bon(pool: Pool, simulator: ShaamSimulator) -> Bon:
    await pool.execute("insert into users (email, name) values ('owner@example.com', 'Owner')")
    return Bon(pool, simulator)


async def run(ctx: Context) -> Counts:
    return await shaam_token_refresh.handler(ctx, NoPayload())


async def test_a_due_token_is_rotated_and_saved(ctx: Context, bon: Bon) -> None:
    business = await bon.business("a")
    assert await run(ctx) == NOTHING | {"due": 1, "refreshed": 1} == ctx.finished
    row = await bon.row(business)
    assert await bon.refresh_token(business) == bon.simulator.current("a")
    assert CIPHER.decrypt(row["encrypted_access_token"]) != "old-access"
    assert timedelta(minutes=9) < row["token_expires_at"] - datetime.now(UTC) <= timedelta(seconds=601)
    assert row["scope"] == "scope"
    assert row["updated_at"] > NOW - timedelta(minutes=5)
    assert ctx.recorded[business] == BusinessOutcome(business, "done", {"refreshed": 1})


async def test_a_second_run_works_with_what_the_first_has_saved(ctx: Context, bon: Bon) -> None:
    await bon.business("a")
    for _ in range(3):
        assert (await run(ctx))["refreshed"] == 1
    assert bon.simulator.reuses == []


@pytest.mark.parametrize(
    ("next_fire", "expires_in", "due"),
    [
        (timedelta(minutes=15), timedelta(minutes=19, seconds=59), 1),
        (timedelta(minutes=15), timedelta(minutes=20), 0),
        (None, timedelta(minutes=4, seconds=59), 1),
        (None, timedelta(minutes=5), 0),
        (timedelta(minutes=-30), timedelta(minutes=4, seconds=59), 1),
    ],
)
async def test_due_is_what_expires_within_five_minutes_of_the_next_run(
    ctx: Context, bon: Bon, next_fire: timedelta | None, expires_in: timedelta, due: int
) -> None:
    await bon.business("a", expires_in=expires_in)
    ctx.next_fire_time = NOW + next_fire if next_fire is not None else None
    assert (await run(ctx))["due"] == due


async def test_a_flagged_or_inactive_business_is_not_called(ctx: Context, bon: Bon) -> None:
    await bon.business("flagged", needs_reauth=True)
    await bon.business("inactive", active=False)
    assert await run(ctx) == NOTHING
    assert bon.simulator.requests == 0


async def test_mock_mode_counts_and_calls_nobody(pool: Pool, bon: Bon) -> None:
    business = await bon.business("a")
    before = await bon.row(business)
    assert await run(Context(pool, shaam_settings(None))) == NOTHING | {"due": 1}
    assert await bon.row(business) == before
    assert bon.simulator.requests == 0


async def test_a_refused_token_asks_its_owner_and_nobody_else(ctx: Context, bon: Bon) -> None:
    bad, good = await bon.business("bad"), await bon.business("good")
    bon.simulator.spoil["bad"] = Misbehaviour.INVALID_GRANT
    assert await run(ctx) == NOTHING | {"due": 2, "refreshed": 1, "needs_reauth": 1}
    assert (await bon.row(bad))["needs_reauth"] is True
    assert (await bon.row(good))["needs_reauth"] is False
    assert ctx.recorded[bad].outcome == "failed"
    assert "was used before" in (ctx.recorded[bad].error or "")


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
    ctx: Context, bon: Bon, fault: Misbehaviour, count: str
) -> None:
    bad, _ = await bon.business("bad"), await bon.business("good")
    before = await bon.row(bad)
    bon.simulator.spoil["bad"] = fault
    assert await run(ctx) == NOTHING | {"due": 2, "refreshed": 1, count: 1}
    assert await bon.row(bad) == before
    assert ctx.recorded[bad].outcome == "failed"


async def test_a_slow_business_does_not_hold_up_the_others(ctx: Context, bon: Bon) -> None:
    slow, good = await bon.business("slow"), await bon.business("good")
    bon.simulator.spoil["slow"] = Misbehaviour.SLOW
    before = await bon.row(good)
    running = asyncio.create_task(run(ctx))
    async with asyncio.timeout(4):  # less than the slow one's own time-out
        while await bon.row(good) == before:  # noqa: ASYNC110 - BON's tables notify nobody
            await asyncio.sleep(0.01)
    assert not running.done()
    bon.simulator._closing.set()  # the slow one gets its 503
    assert await running == NOTHING | {"due": 2, "refreshed": 1, "deferred": 1}
    assert ctx.recorded[slow].outcome == "failed"


@pytest.mark.parametrize("fault", [Misbehaviour.INVALID_CLIENT, Misbehaviour.GATEWAY_401, Misbehaviour.FORBIDDEN])
async def test_a_refused_application_stops_the_run_and_flags_nobody(
    ctx: Context, bon: Bon, fault: Misbehaviour
) -> None:
    ctx.settings = shaam_settings(bon.simulator, shaam_concurrency=1)
    first = await bon.business("first", expires_in=timedelta(minutes=-3))
    await bon.business("bad", expires_in=timedelta(minutes=-2))
    rest = [await bon.business(f"rest-{n}") for n in range(5)]
    bon.simulator.spoil["bad"] = fault
    with pytest.raises(NeverRetryError, match="Refreshed 1 of 7, left 6"):
        await run(ctx)
    assert bon.simulator.requests == 2
    assert set(ctx.recorded) == {first}
    assert not any([(await bon.row(business))["needs_reauth"] for business in rest])


async def test_an_unreadable_token_is_that_businesss_failure_alone(ctx: Context, bon: Bon) -> None:
    bad, _ = await bon.business("bad", stored="AAAA"), await bon.business("good")
    assert await run(ctx) == NOTHING | {"due": 2, "refreshed": 1, "failed": 1}
    assert (await bon.row(bad))["needs_reauth"] is False
    assert "AAAA" not in (ctx.recorded[bad].error or "")


@pytest.mark.parametrize("count", [1, 3])
async def test_a_wrong_key_stops_the_run_and_flags_nobody(ctx: Context, bon: Bon, count: int) -> None:
    other = TokenCipher("ff" * 32)
    rows = [await bon.business(f"b{n}", stored=other.encrypt("x")) for n in range(count)]
    with pytest.raises(NeverRetryError, match="SHAAM_ENCRYPTION_KEY"):
        await run(ctx)
    assert bon.simulator.requests == 0
    assert not any([(await bon.row(business))["needs_reauth"] for business in rows])


class Meddler(Shaam):
    """Lets something happen between the authority's answer and its save."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.answered = asyncio.Event()
        self.proceed = asyncio.Event()
        self.instead: Answer | None = None

    async def refresh(self, refresh_token: str) -> Answer:
        answer = self.instead or await super().refresh(refresh_token)
        self.answered.set()
        await self.proceed.wait()
        return answer


@pytest.fixture
async def meddler(ctx: Context) -> AsyncIterator[Meddler]:
    async with Meddler(ctx.settings) as meddler:
        ctx.shaam = meddler
        yield meddler


@pytest.mark.parametrize("answer", [None, NeedsReauth("HTTP 400: invalid_grant")])
async def test_a_consent_given_meanwhile_is_never_overwritten(
    ctx: Context, bon: Bon, meddler: Meddler, answer: Answer | None
) -> None:
    business = await bon.business("a")
    meddler.instead = answer
    running = asyncio.create_task(run(ctx))
    await meddler.answered.wait()
    await bon.pool.execute(
        "update business_shaam_credentials set encrypted_refresh_token = $1", CIPHER.encrypt("consented")
    )
    before = await bon.row(business)
    meddler.proceed.set()
    assert await running == NOTHING | {"due": 1, "deferred": 1}
    assert await bon.row(business) == before
    assert ctx.recorded[business].outcome == "kept"


async def test_a_cancelled_run_still_saves_what_was_rotated(ctx: Context, bon: Bon, meddler: Meddler) -> None:
    business = await bon.business("a")
    running = asyncio.create_task(run(ctx))
    await meddler.answered.wait()
    for _ in range(10):
        running.cancel()
        await asyncio.sleep(0)
    assert not running.done()  # the save is still to come
    meddler.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await bon.refresh_token(business) == bon.simulator.current("a")
    assert ctx.finished is None


async def test_a_cancelled_run_calls_nobody_new(ctx: Context, bon: Bon, meddler: Meddler) -> None:
    ctx.settings = shaam_settings(bon.simulator, shaam_concurrency=1)
    for n in range(5):
        await bon.business(f"b{n}")
    running = asyncio.create_task(run(ctx))
    await meddler.answered.wait()
    running.cancel()
    meddler.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert bon.simulator.requests == 1


async def test_no_connection_is_held_while_the_authority_is_asked(ctx: Context, bon: Bon, meddler: Meddler) -> None:
    await bon.business("a")
    running = asyncio.create_task(run(ctx))
    await meddler.answered.wait()
    assert ctx.pool.get_idle_size() == ctx.pool.get_size()
    meddler.proceed.set()
    await running


async def test_a_save_is_tried_again_until_the_database_takes_it(
    ctx: Context, bon: Bon, meddler: Meddler, monkeypatch: pytest.MonkeyPatch
) -> None:
    business = await bon.business("a")
    write = module._write

    async def mend_after_failing(*args: Any) -> Any:
        try:
            return await write(*args)
        except asyncpg.PostgresError:
            await bon.pool.execute("alter table elsewhere rename to business_shaam_credentials")
            raise

    monkeypatch.setattr(module, "_write", mend_after_failing)
    monkeypatch.setattr(module, "FIRST_SAVE_WAIT_SECONDS", 0)
    running = asyncio.create_task(run(ctx))
    await meddler.answered.wait()
    await bon.pool.execute("alter table business_shaam_credentials rename to elsewhere")
    meddler.proceed.set()
    assert (await running)["refreshed"] == 1
    assert await bon.refresh_token(business) == bon.simulator.current("a")


async def test_a_save_whose_reply_was_lost_is_not_mistaken_for_another(
    ctx: Context, bon: Bon, monkeypatch: pytest.MonkeyPatch
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
    assert (await run(ctx))["refreshed"] == 1
    assert await bon.refresh_token(business) == bon.simulator.current("a")


async def test_after_a_lost_token_nobody_else_is_called(
    ctx: Context, bon: Bon, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx.settings = shaam_settings(bon.simulator, shaam_concurrency=1)
    for n in range(4):
        await bon.business(f"b{n}")

    async def refuse(*_: object) -> NoReturn:
        raise asyncpg.ReadOnlySQLTransactionError

    monkeypatch.setattr(module, "_write", refuse)
    monkeypatch.setattr(module, "FIRST_SAVE_WAIT_SECONDS", 0)
    assert await run(ctx) == NOTHING | {"due": 4, "failed": 1, "deferred": 3}
    assert bon.simulator.requests == 1


async def test_no_token_is_spent_where_its_successor_could_not_be_saved(
    ctx: Context, bon: Bon, database_url: str
) -> None:
    await bon.business("a")
    role = f"reader_{uuid4().hex}"  # roles belong to the server, not to the test's database
    await bon.pool.execute(f"create role {role}")
    await bon.pool.execute(f"grant select on all tables in schema public to {role}")
    try:
        async with asyncpg.create_pool(database_url, min_size=1, max_size=2, server_settings={"role": role}) as pool:
            ctx.pool = pool
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await run(ctx)
    finally:
        await bon.pool.execute(f"drop owned by {role}; drop role {role}")
    assert bon.simulator.requests == 0


async def test_one_businesss_defect_is_its_own(ctx: Context, bon: Bon) -> None:
    """An exception nobody foresaw, with a secret in its text, stays with its business and untold."""
    await bon.business("good")
    bad = await bon.business("bad")
    token = bon.simulator.current("bad")

    class Broken(Shaam):
        async def refresh(self, refresh_token: str) -> Answer:
            if refresh_token == token:
                raise LookupError(refresh_token)
            return await super().refresh(refresh_token)

    async with Broken(ctx.settings) as shaam:
        ctx.shaam = shaam
        assert await run(ctx) == NOTHING | {"due": 2, "refreshed": 1, "failed": 1}
    assert ctx.recorded[bad].error == "LookupError"


async def test_many_businesses_each_get_their_own_token(ctx: Context, bon: Bon) -> None:
    businesses = {f"b{n}": await bon.business(f"b{n}") for n in range(300)}
    assert (await run(ctx))["refreshed"] == 300
    for subject, business in businesses.items():
        assert await bon.refresh_token(business) == bon.simulator.current(subject)


async def test_every_statement_is_valid_against_bons_schema(pool: Pool) -> None:
    async with pool.acquire() as connection:
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
