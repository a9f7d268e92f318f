"""What becomes of an answer that the database does not take, step by step."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from bon_scheduler.database.connections import Pool
from bon_scheduler.demo.shaam_simulator import ShaamSimulator, shaam_simulator
from bon_scheduler.jobs import Connection as AnyConnection
from bon_scheduler.shaam import rotation, unsaved
from bon_scheduler.shaam.refreshes import Credential, Rotated, save
from bon_scheduler.shaam.spool import Spool, SpoolCounts, count_files
from handlers.shaam_token_refresh import RefreshTokens
from tests.conftest import Connection, MakeSettings
from tests.fated import Replica, Sendings
from tests.shaam.test_spool import only_entry
from tests.tax import CIPHER, CLIENT_ID, CLIENT_SECRET, NOTHING, Bon, environ
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
    monkeypatch.setattr(unsaved, "OFFER_SECONDS", 0.05)
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


REFUSE = """
    create function refuse() returns trigger language plpgsql as $$ begin raise 'not this one'; end $$;
    create trigger refuse before update of encrypted_refresh_token on business_shaam_credentials
       for each row when (old.scope = 'refused') execute function refuse()
"""
DUE_AGAIN = """
    update business_shaam_credentials set token_expires_at = now();
    update bon_scheduler.shaam_refreshes set next_attempt_at = null
"""


async def have_refused(connection: Connection, *businesses: UUID) -> None:
    """Let the database refuse whatever is saved of these businesses."""
    marking = "update business_shaam_credentials set scope = 'refused' where business_id = any ($1)"
    await connection.execute(marking, businesses)
    await connection.execute(REFUSE)


@pytest.mark.parametrize("spooled", [False, True])
async def test_tokens_that_the_database_refuses_stop_nobody_else_and_are_saved_once_it_takes_them(
    replicas: Replicas,
    connection: Connection,
    simulator: ShaamSimulator,
    tmp_path: Path,
    logged: Callable[[], str],
    spooled: bool,
) -> None:
    bon = Bon(connection, simulator)
    bad, good = await bon.business("bad"), await bon.business("good")
    await have_refused(connection, bad)
    replica = await replicas.start(tmp_path if spooled else None)
    await replica.run(RefreshTokens(business_id=bad), fire_time=datetime.now(UTC))
    await replica.offer()
    if spooled:
        await replica.restart()
    await bon.age(timedelta(hours=2))  # the lease is over
    for _ in range(2):
        await connection.execute(DUE_AGAIN)
        counts = await replica.run(RefreshTokens(), fire_time=datetime.now(UTC))
        assert counts == NOTHING | {"due": 2, "refreshed": 1, "failed": 1}
    assert simulator.honours(await bon.refresh_token(good))
    assert simulator.reuses == []
    standing = await bon.standing(bad)
    assert (standing["state"], standing["error"]) == ("failed", rotation.REFUSED)
    assert "token.refused" in logged()
    await connection.execute("drop trigger refuse on business_shaam_credentials")
    await replica.offer()
    assert simulator.honours(await bon.refresh_token(bad))
    assert (await bon.standing(bad))["state"] == "refreshed"
    await replica.stop()


async def test_more_than_a_few_that_are_refused_and_in_memory_alone_stop_everybody(
    replicas: Replicas, connection: Connection, simulator: ShaamSimulator
) -> None:
    """Then it is the database that is odd, and each further call would risk one more token."""
    bon = Bon(connection, simulator)
    businesses = [await bon.business(f"b{n}") for n in range(unsaved.FEW + 3)]
    await have_refused(connection, *businesses)
    replica = await replicas.start(None)
    for business in businesses:
        await replica.run(RefreshTokens(business_id=business), fire_time=datetime.now(UTC))
        await replica.offer()
    assert simulator.requests == unsaved.FEW + 1
    await replica.stop()


async def test_a_database_that_refuses_whoever_asks_is_not_taken_to_refuse_one(
    replicas: Replicas, connection: Connection, simulator: ShaamSimulator
) -> None:
    bon = Bon(connection, simulator)
    business = await bon.business("a")
    replica = await replicas.start(None)
    await rotate_in_an_outage(replica)
    replica.fate.outage = range(0)
    await connection.execute("alter table business_shaam_credentials rename to elsewhere")
    with pytest.raises(asyncpg.UndefinedTableError):
        await replica.offer()
    assert replica._rotator is not None
    assert replica._rotator.unsaved.unsafe
    await connection.execute("alter table elsewhere rename to business_shaam_credentials")
    await replica.stop()
    assert simulator.honours(await bon.refresh_token(business))


async def test_a_replica_that_holds_refused_tokens_keeps_the_others_from_sending_the_old_one(
    replicas: Replicas, connection: Connection, simulator: ShaamSimulator, tmp_path: Path
) -> None:
    """Their patience begins anew as long as it is there."""
    bon = Bon(connection, simulator)
    bad = await bon.business("bad")
    await have_refused(connection, bad)
    mine, other = tmp_path / "mine", tmp_path / "other"
    for directory in (mine, other):
        directory.mkdir()
    holder, another = await replicas.start(mine), await replicas.start(other)
    for _ in range(3):
        await holder.run(RefreshTokens(), fire_time=datetime.now(UTC))
        await another.run(RefreshTokens(), fire_time=datetime.now(UTC))
        await connection.execute(DUE_AGAIN)
        await bon.age(timedelta(minutes=50))
    assert simulator.requests == 1
    for replica in (holder, another):
        await replica.stop()


async def test_what_an_entry_says_beside_its_tokens_does_not_keep_them_from_being_saved(
    replicas: Replicas, connection: Connection, simulator: ShaamSimulator, tmp_path: Path
) -> None:
    """As an earlier version wrote them, or in a field whose type has changed."""
    bon = Bon(connection, simulator)
    business = await bon.business("a")
    spent = Credential(business, (await bon.row(business))["encrypted_refresh_token"])
    await connection.execute(
        "insert into bon_scheduler.shaam_refreshes (business_id, state, token_fingerprint) values ($1, 'sending', 'x')",
        business,
    )
    new = CIPHER.encrypt("new")
    odd = Rotated(
        spent, b"x", b"y", new, new, "a\0b", timedelta(minutes=10), timedelta(seconds=10**13), datetime.now(UTC)
    )
    replica = await replicas.start(tmp_path)
    assert replica._rotator is not None
    await replica._rotator.unsaved.keep(odd)
    await replica.offer()
    row = await bon.row(business)
    assert (await bon.refresh_token(business), row["scope"]) == ("new", "kept")
    assert count_files(tmp_path) == SpoolCounts(0, 0)
    await replica.stop()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"refresh_expires_in": null, "credential": {"business_id": 5, "stored": ""}}']
)
async def test_a_file_that_says_nothing_usable_is_kept_aside_and_stops_nobody(
    replicas: Replicas, connection: Connection, simulator: ShaamSimulator, tmp_path: Path, text: str
) -> None:
    bon = Bon(connection, simulator)
    business = await bon.business("a")
    Spool(tmp_path, CIPHER).write(text)
    replica = await replicas.start(tmp_path)
    await replica.run(RefreshTokens(), fire_time=datetime.now(UTC))
    assert simulator.honours(await bon.refresh_token(business))
    assert count_files(tmp_path) == SpoolCounts(waiting=0, corrupt=1)
    await replica.stop()


async def test_a_business_that_vanished_leaves_nothing_in_the_spool(
    replicas: Replicas, connection: Connection, simulator: ShaamSimulator, tmp_path: Path
) -> None:
    business = await Bon(connection, simulator).business("a")
    replica = await replicas.start(tmp_path)
    await rotate_in_an_outage(replica)
    await connection.execute("delete from business_shaam_credentials where business_id = $1", business)
    replica.fate.outage = range(0)
    await replica.offer()
    assert count_files(tmp_path) == SpoolCounts(0, 0)
    await replica.stop()


async def test_while_a_file_cannot_be_read_no_token_is_sent_again_and_others_are_refreshed(
    replicas: Replicas, connection: Connection, simulator: ShaamSimulator, tmp_path: Path
) -> None:
    bon = Bon(connection, simulator)
    lost = await bon.business("lost")
    replica = await replicas.start(tmp_path)
    await rotate_in_an_outage(replica)
    replica.unreadable.add(only_entry(tmp_path))
    await replica.restart()
    good = await bon.business("good")
    await bon.age(timedelta(hours=2))
    counts = await replica.run(RefreshTokens(), fire_time=datetime.now(UTC))
    assert counts == NOTHING | {"due": 2, "refreshed": 1, "deferred": 1}
    assert simulator.honours(await bon.refresh_token(good))
    replica.unreadable.clear()
    await replica.offer()
    assert simulator.honours(await bon.refresh_token(lost))
    await replica.stop()


async def test_a_save_whose_answer_was_lost_is_known_again_when_it_is_repeated(
    connection: Connection, simulator: ShaamSimulator
) -> None:
    """Otherwise the row would seem to hold somebody else's token, and the one that is saved be thrown away."""
    bon = Bon(connection, simulator)
    business = await bon.business("a")
    old = Credential(business, (await bon.row(business))["encrypted_refresh_token"])
    now, hour = datetime.now(UTC), timedelta(hours=1)
    rotated = Rotated(old, b"old", b"new", "new access", "new refresh", None, hour, hour, now)
    assert [await save(connection, rotated, now) for _ in range(2)] == [True, True]
    other = Rotated(old, b"old", b"third", "other access", "other refresh", None, hour, hour, now)
    assert not await save(connection, other, now)
    assert (await bon.row(business))["encrypted_refresh_token"] == "new refresh"


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
