"""What a process remembers of its ledger, and what is claimed from one that is behind."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bon_scheduler import Counts, JobContext, NoPayload, job, ledger
from bon_scheduler.database import Outage
from bon_scheduler.database.connections import Pool
from bon_scheduler.engine import Quarantine, QuarantinedError
from bon_scheduler.ledger.claims import Claimant, claim_new
from bon_scheduler.ledger.workers import Worker, register_worker
from tests.conftest import Connection, MakeSettings

SET_BACK = "update bon_scheduler.place set mark = mark - $1"
"""As a restore of rows does."""
BEHIND = "select behind from bon_scheduler.place"


class Elapsed:
    """A clock since boot that a test moves."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def elapsed() -> Elapsed:
    return Elapsed()


async def looked(quarantine: Quarantine, elapsed: Elapsed, times: int) -> None:
    """Look so often, five seconds apart."""
    for _ in range(times):
        elapsed.seconds += 5
        await quarantine.look()
        assert quarantine.reason is None


@pytest.fixture
def quarantine(make_settings: MakeSettings, pool: Pool, elapsed: Elapsed) -> Quarantine:
    return Quarantine(make_settings(), pool, serves=True, elapsed=elapsed)


async def test_a_lower_mark_quarantines_everybody_until_it_is_adopted(
    quarantine: Quarantine, connection: Connection, make_settings: MakeSettings, pool: Pool, elapsed: Elapsed
) -> None:
    await looked(quarantine, elapsed, 4)
    seen = quarantine.seen
    await connection.execute(SET_BACK, 1)
    assert await quarantine.allows() is False
    assert await connection.fetchval(BEHIND) == seen
    newcomer = Quarantine(make_settings(), pool, serves=False)
    with pytest.raises(QuarantinedError, match="went back in time"):
        await newcomer.require()
    await ledger.adopt(connection, ledger.Caller.of(make_settings()), by="a test", reason="a test")
    for each in (quarantine, newcomer):
        assert await each.allows()
    await looked(quarantine, elapsed, 3)


async def test_a_ledger_that_forgot_its_place_is_noticed_by_who_worked_with_it(
    quarantine: Quarantine, connection: Connection, elapsed: Elapsed
) -> None:
    await looked(quarantine, elapsed, 2)
    await connection.execute("delete from bon_scheduler.place")
    assert await quarantine.allows() is False
    assert "went back in time" in str(quarantine.reason)


@pytest.mark.parametrize(("lost", "another_timeline", "noticed"), [(2, True, False), (9, True, True), (2, False, True)])
async def test_a_fail_over_may_lose_half_a_minute_and_a_restore_nothing(
    quarantine: Quarantine,
    connection: Connection,
    elapsed: Elapsed,
    lost: int,
    another_timeline: bool,
    noticed: bool,
) -> None:
    await looked(quarantine, elapsed, 20)
    if another_timeline:
        quarantine._memory._timeline = "00000000"  # what this server was on before it was promoted
    await connection.execute(SET_BACK, lost)
    assert await quarantine.allows() is not noticed
    assert (await connection.fetchval(BEHIND) is not None) is noticed


async def test_nothing_is_claimed_from_a_ledger_that_is_behind_even_before_anybody_looked(
    connection: Connection, elapsed: Elapsed, quarantine: Quarantine
) -> None:
    @job("a-test")
    async def a_test(_: JobContext, __: NoPayload) -> Counts:
        return {}

    await ledger.register_jobs(connection, [a_test])
    await looked(quarantine, elapsed, 3)
    worker = Worker()
    await register_worker(connection, worker)

    async def verdict(seen: int) -> str:
        wanted = ledger.NewRun(a_test, {}, datetime.now(UTC), "a test", None)
        return (await claim_new(connection, wanted, by=Claimant(worker.id, worker.host, None, seen))).verdict

    async def taken(seen: int) -> int:
        wanted = [ledger.Wanted("a-test", 5, 0, None, sends_mail=False)]
        demand = ledger.Demand(
            worker=worker.id,
            host=worker.host,
            room=5,
            reserve=0,
            wanted=wanted,
            letters_apart=None,
            look_at_clock=True,
            oldest_first=False,
            seen=seen,
        )
        return len((await ledger.claim(connection, demand)).taken)

    assert await verdict(quarantine.seen) == "claimed"
    await connection.execute("select bon_scheduler.enqueue('a-test')")
    await connection.execute(SET_BACK, 1)
    assert (await verdict(quarantine.seen), await taken(quarantine.seen)) == ("waits", 0)
    await connection.execute("update bon_scheduler.place set mark = mark + 5, ledger = 1")
    assert (await verdict(quarantine.seen), await taken(quarantine.seen)) == ("waits", 0)
    await connection.execute("update bon_scheduler.place set ledger = tableoid")
    assert await taken(quarantine.seen) == 1


async def test_a_damaged_file_in_the_spool_is_no_reason(
    make_settings: MakeSettings, pool: Pool, tmp_path: Path, logged: Callable[[], str], elapsed: Elapsed
) -> None:
    settings = make_settings(SPOOL_DIR=str(tmp_path))
    for content in (b"", b"\xff\xfe", b"bon_scheduler-mark-1 x 99999\n", b"9" * 1000):
        (tmp_path / "ledger.mark").write_bytes(content)
        quarantine = Quarantine(settings, pool, serves=True, elapsed=elapsed)
        async with quarantine.watching(Outage()):
            assert quarantine.reason is None
    assert "place.unread" in logged()
