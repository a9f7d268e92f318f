"""The ledger on real PostgreSQL: asking, ticks, claims, fences, endings."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest

from bon_scheduler import attempts, db, ledger, operate, revise
from bon_scheduler.attempts import Claim, RunRef, Verdict
from bon_scheduler.db import Pool
from bon_scheduler.jobs import BusinessOutcome, LostRunError
from bon_scheduler.jobs import Connection as AnyConnection
from bon_scheduler.ledger import Request, TickVerdict, UnknownJobError
from bon_scheduler.revise import Action
from bon_scheduler.workers import Worker, beat, bury, register_worker, retire_worker, signs_of_life
from tests.conftest import Connection

LEASE = timedelta(seconds=15)
TICK = datetime(2026, 11, 23, 4, tzinfo=UTC)


async def ask(connection: Connection, job: str = "draft-cleanup", **fields: object) -> UUID:
    run_id = await ledger.enqueue(connection, Request(job, {}, **fields))  # type: ignore[arg-type] # a test's shorthand
    assert run_id is not None
    return run_id


async def be_worker(connection: Connection) -> Worker:
    worker = Worker()
    await register_worker(connection, worker)
    return worker


async def take(
    connection: AnyConnection, run_id: UUID, worker: Worker, *, allowed: int = 3, exclusive: bool = False
) -> Claim:
    return await attempts.claim(
        connection,
        run_id,
        worker=worker.id,
        host=worker.host,
        allowed=allowed,
        exclusive=exclusive,
    )


async def take_hold(connection: Connection, run_id: UUID, worker: Worker) -> RunRef:
    ref = (await take(connection, run_id, worker)).ref
    assert ref is not None
    return ref


async def state_of(connection: Connection, run_id: UUID) -> str:
    state: str = await connection.fetchval("select state::text from bon_scheduler.runs where id = $1", run_id)
    return state


async def queued(connection: Connection) -> int:
    count: int = await connection.fetchval("select count(*) from bon_scheduler.pgqueuer where status = 'queued'")
    return count


async def test_a_request_that_is_rolled_back_never_existed(connection: Connection) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await ask(connection)
    await transaction.rollback()
    assert await connection.fetchval("select count(*) from bon_scheduler.runs") == 0
    assert await queued(connection) == 0


async def test_a_request_is_one_ledger_row_and_one_queue_row(connection: Connection) -> None:
    await ask(connection)
    assert await connection.fetchval("select count(*) from bon_scheduler.runs") == 1
    assert await queued(connection) == 1


async def test_a_dedupe_key_is_refused_as_long_as_its_run_is_retained(connection: Connection) -> None:
    run_id = await ask(connection, dedupe_key="once")
    ref = await take_hold(connection, run_id, await be_worker(connection))
    await attempts.finish(connection, ref, {})
    assert await ledger.enqueue(connection, Request("draft-cleanup", {}, dedupe_key="once")) is None


async def test_the_same_key_of_another_job_is_another_key(connection: Connection) -> None:
    await ask(connection, dedupe_key="once")
    assert await ledger.enqueue(connection, Request("session-cleanup", {}, dedupe_key="once")) is not None


async def test_an_unknown_job_is_refused_with_the_known_ones(connection: Connection) -> None:
    with pytest.raises(UnknownJobError, match=r'unknown job "no-such-job".*Known jobs:.*generate-pdf'):
        await ledger.enqueue(connection, Request("no-such-job", {}))


@pytest.mark.parametrize("payload", ["[]", "1", '"text"', "null"])
async def test_a_payload_that_is_no_object_is_refused(connection: Connection, payload: str) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match="must be a JSON object"):
        await connection.fetchval(f"select bon_scheduler.enqueue('generate-pdf', '{payload}'::jsonb)")


async def test_a_job_without_a_handler_waits_visibly(connection: Connection) -> None:
    run_id = await ask(connection, "generate-pdf")
    assert await state_of(connection, run_id) == "queued"


BEFORE = TICK - timedelta(days=1)


async def owe_since(connection: Connection, instant: datetime) -> None:
    await connection.execute("update bon_scheduler.jobs set last_tick = $1", instant)


async def account(
    connection: AnyConnection, fire_time: datetime = TICK, *, previous: datetime = BEFORE, missed: str | None = None
) -> TickVerdict:
    return await ledger.record_tick(
        connection, "draft-cleanup", previous=previous, in_force=None, fire_time=fire_time, missed=missed
    )


async def test_a_tick_is_recorded_once_however_many_replicas_notice_it(pool: Pool, connection: Connection) -> None:
    await owe_since(connection, BEFORE)

    async def notice() -> TickVerdict:
        async with pool.acquire() as mine:
            return await account(mine)

    verdicts = await asyncio.gather(*(notice() for _ in range(8)))
    assert sorted(verdicts) == [TickVerdict.RECORDED, *[TickVerdict.STALE] * 7]
    assert await connection.fetchval("select count(*) from bon_scheduler.runs where fire_time = $1", TICK) == 1
    assert await queued(connection) == 1


async def test_the_last_tick_only_moves_forwards(connection: Connection) -> None:
    await owe_since(connection, TICK)
    assert await account(connection, BEFORE, previous=TICK) is TickVerdict.STALE
    assert (await ledger.last_ticks(connection, ["draft-cleanup"]))["draft-cleanup"] == TICK


async def test_no_fire_time_is_passed_over_by_a_replica_that_plans_from_an_old_last_tick(
    connection: Connection,
) -> None:
    await owe_since(connection, BEFORE)
    await account(connection, TICK)
    assert await account(connection, TICK + timedelta(days=1), previous=BEFORE) is TickVerdict.STALE


async def test_a_tick_that_was_recorded_and_pruned_does_not_run_again(connection: Connection) -> None:
    await owe_since(connection, BEFORE)
    await account(connection)
    await connection.execute("delete from bon_scheduler.runs")
    assert await account(connection) is TickVerdict.STALE


async def test_a_missed_tick_is_a_row_with_its_reason_and_is_not_queued(connection: Connection) -> None:
    await owe_since(connection, BEFORE)
    assert await account(connection, missed="beyond grace") is TickVerdict.MISSED
    row = await connection.fetchrow("select state::text, reason from bon_scheduler.runs")
    assert row is not None
    assert tuple(row) == ("missed", "beyond grace")
    assert await queued(connection) == 0


async def test_a_tick_whose_request_fails_stays_owed(connection: Connection) -> None:
    await owe_since(connection, BEFORE)
    await connection.execute("drop table bon_scheduler.pgqueuer cascade")
    with pytest.raises(asyncpg.UndefinedTableError):
        await account(connection)
    assert (await ledger.last_ticks(connection, ["draft-cleanup"]))["draft-cleanup"] < TICK


async def test_a_tick_waits_while_the_one_before_it_is_active(connection: Connection) -> None:
    await owe_since(connection, BEFORE)
    await account(connection)
    following = TICK + timedelta(days=1)
    assert await account(connection, following, previous=TICK) is TickVerdict.WAITS
    await connection.execute("update bon_scheduler.runs set state = 'succeeded'")
    assert await account(connection, following, previous=TICK) is TickVerdict.RECORDED


async def test_two_replicas_that_see_nothing_active_do_not_both_record(pool: Pool, connection: Connection) -> None:
    """The second plans a later tick while the first is about to commit the earlier one."""
    await owe_since(connection, BEFORE)
    async with pool.acquire() as first, pool.acquire() as second:
        transaction = first.transaction()
        await transaction.start()
        assert await account(first) is TickVerdict.RECORDED
        later = asyncio.create_task(account(second, TICK + timedelta(days=1)))
        done, _ = await asyncio.wait([later], timeout=0.2)
        assert not done
        await transaction.commit()
        assert await later is TickVerdict.STALE


async def test_a_tick_of_a_paused_job_is_a_row_that_says_so(connection: Connection) -> None:
    await owe_since(connection, BEFORE)
    await operate.pause_job(connection, "draft-cleanup", by="dana", reason="migration")
    assert await account(connection) is TickVerdict.PAUSED
    row = await connection.fetchrow("select state::text, reason from bon_scheduler.runs")
    assert row is not None
    assert tuple(row) == ("paused", "paused by dana: migration")
    assert await queued(connection) == 0


async def test_a_run_is_claimed_by_one_of_many_workers(pool: Pool, connection: Connection) -> None:
    run_id = await ask(connection)
    workers = [await be_worker(connection) for _ in range(6)]

    async def claim(worker: Worker) -> Verdict:
        async with pool.acquire() as mine:
            return (await take(mine, run_id, worker)).verdict

    verdicts = await asyncio.gather(*(claim(worker) for worker in workers))
    assert sorted(verdicts) == [Verdict.CLAIMED, *[Verdict.HELD] * 5]


async def test_a_run_whose_worker_is_silent_is_taken_over_with_the_next_attempt(connection: Connection) -> None:
    run_id = await ask(connection)
    gone = await be_worker(connection)
    await take(connection, run_id, gone)
    await retire_worker(connection, gone.id)
    second = await take(connection, run_id, await be_worker(connection))
    assert second.ref is not None
    assert second.ref.attempt == 2
    outcomes = await connection.fetch("select outcome from bon_scheduler.attempts order by attempt")
    assert [row["outcome"] for row in outcomes] == ["lost", None]


@pytest.mark.parametrize("seen", ["-infinity", "infinity"])
async def test_a_workers_run_is_its_own_until_it_is_taken_for_dead_whatever_the_databases_clock_says(
    connection: Connection, seen: str
) -> None:
    run_id = await ask(connection)
    await take(connection, run_id, await be_worker(connection))
    [sign] = await signs_of_life(connection)
    await connection.execute(f"update bon_scheduler.workers set seen_at = '{seen}'")
    assert (await take(connection, run_id, await be_worker(connection))).verdict is Verdict.HELD
    assert [dead.id for dead in await bury(connection, [sign.word])] == [sign.worker]
    assert (await take(connection, run_id, await be_worker(connection))).verdict is Verdict.CLAIMED


async def test_a_worker_that_has_spoken_since_is_not_taken_for_dead(connection: Connection) -> None:
    worker = await be_worker(connection)
    [sign] = await signs_of_life(connection)
    await beat(connection, worker.id)
    assert not await bury(connection, [sign.word])
    [sign] = await signs_of_life(connection)
    assert await bury(connection, [sign.word])
    assert not await signs_of_life(connection)
    await beat(connection, worker.id)
    assert await signs_of_life(connection)


async def test_a_run_that_kills_every_worker_ends_dead(connection: Connection) -> None:
    run_id = await ask(connection)
    for _ in range(3):
        worker = await be_worker(connection)
        assert (await take(connection, run_id, worker)).verdict is Verdict.CLAIMED
        await retire_worker(connection, worker.id)
    last = await take(connection, run_id, await be_worker(connection))
    assert last.verdict is Verdict.EXHAUSTED
    assert await state_of(connection, run_id) == "dead"


async def test_a_run_given_back_costs_no_attempt(connection: Connection) -> None:
    run_id = await ask(connection)
    worker = await be_worker(connection)
    for _ in range(5):
        assert await attempts.give_back(connection, await take_hold(connection, run_id, worker))
    assert (await take(connection, run_id, worker, allowed=1)).verdict is Verdict.CLAIMED


async def test_an_exclusive_job_has_no_two_runs_at_once(connection: Connection) -> None:
    worker = await be_worker(connection)
    first, second = await ask(connection), await ask(connection)
    assert (await take(connection, first, worker, exclusive=True)).verdict is Verdict.CLAIMED
    assert (await take(connection, second, worker, exclusive=True)).verdict is Verdict.BUSY


async def test_a_claim_of_an_exclusive_job_waits_for_another_that_is_about_to_commit(
    database_url: str, connection: Connection
) -> None:
    worker = await be_worker(connection)
    first, second = await ask(connection), await ask(connection)
    async with db.connect(database_url) as committing:
        transaction = committing.transaction()
        await transaction.start()
        assert (await take(committing, first, worker, exclusive=True)).verdict is Verdict.CLAIMED
        claiming = asyncio.create_task(take(connection, second, worker, exclusive=True))
        done, _ = await asyncio.wait([claiming], timeout=0.3)
        assert not done
        await transaction.commit()
    assert (await claiming).verdict is Verdict.BUSY


async def test_two_claims_of_an_exclusive_job_at_once_have_one_winner(pool: Pool, connection: Connection) -> None:
    worker = await be_worker(connection)
    runs = [await ask(connection) for _ in range(6)]

    async def claim(run_id: UUID) -> Verdict:
        async with pool.acquire() as mine:
            return (await take(mine, run_id, worker, exclusive=True)).verdict

    verdicts = await asyncio.gather(*(claim(run_id) for run_id in runs))
    assert sorted(verdicts) == [*[Verdict.BUSY] * 5, Verdict.CLAIMED]


async def test_a_run_with_arguments_stands_beside_those_of_its_exclusive_job(connection: Connection) -> None:
    """One business's refresh neither waits for the schedule's run nor keeps it waiting; null is no argument."""
    worker = await be_worker(connection)

    async def claim(payload: dict[str, object]) -> Verdict:
        run_id = await ledger.enqueue(connection, Request("shaam-token-refresh", payload))
        assert run_id is not None
        return (await take(connection, run_id, worker, exclusive=True)).verdict

    for business in ("a", "a", "b"):
        assert await claim({"business_id": business}) is Verdict.CLAIMED
    assert await claim({"business_id": None}) is Verdict.CLAIMED
    assert await claim({}) is Verdict.BUSY
    assert await claim({"business_id": "c"}) is Verdict.CLAIMED


async def test_an_attempt_that_lost_its_run_can_neither_commit_nor_end_it(connection: Connection) -> None:
    run_id = await ask(connection)
    gone = await be_worker(connection)
    old = await take_hold(connection, run_id, gone)
    await retire_worker(connection, gone.id)
    await take_hold(connection, run_id, await be_worker(connection))
    writes: list[Callable[[], Awaitable[object]]] = [
        lambda: attempts.fence(connection, old),
        lambda: attempts.finish(connection, old, {}),
        lambda: attempts.fail(connection, old, outcome="failed", error="", wait=None),
    ]
    for write in writes:
        with pytest.raises(LostRunError):
            await write()
    assert not await attempts.give_back(connection, old)
    assert await state_of(connection, run_id) == "running"


async def test_a_claim_waits_for_a_fence_that_is_about_to_commit(database_url: str, connection: Connection) -> None:
    """Otherwise the successor could start between the check and the commit."""
    run_id = await ask(connection)
    gone = await be_worker(connection)
    ref = await take_hold(connection, run_id, gone)
    await retire_worker(connection, gone.id)
    successor = await be_worker(connection)
    async with db.connect(database_url) as committing:
        transaction = committing.transaction()
        await transaction.start()
        await attempts.fence(committing, ref)
        claiming = asyncio.create_task(take(connection, run_id, successor))
        done, _ = await asyncio.wait([claiming], timeout=0.3)
        assert not done
        await transaction.commit()
    assert (await claiming).verdict is Verdict.CLAIMED


async def test_a_claim_does_not_wait_for_ever_for_a_row_that_somebody_has_locked(
    database_url: str, connection: Connection
) -> None:
    run_id = await ask(connection)
    worker = await be_worker(connection)
    async with db.connect(database_url) as other:
        locking = other.transaction()
        await locking.start()
        await other.execute("select from bon_scheduler.runs for share")
        assert (await take(connection, run_id, worker)).verdict is Verdict.LOCKED
        await locking.rollback()
    assert (await take(connection, run_id, worker)).verdict is Verdict.CLAIMED


async def test_a_claim_that_waited_for_a_persons_retry_knows_its_fresh_budget(
    database_url: str, connection: Connection
) -> None:
    run_id = await ask(connection)
    await connection.execute("update bon_scheduler.runs set state = 'cancelled', attempt = 4, finished_at = now()")
    worker = await be_worker(connection)
    async with db.connect(database_url) as retrying:
        transaction = retrying.transaction()
        await transaction.start()
        await revise.revise_all(retrying, Action.RETRY, [run_id], by="dana", reason="mended")
        claiming = asyncio.create_task(take(connection, run_id, worker))
        done, _ = await asyncio.wait([claiming], timeout=0.3)
        assert not done
        await transaction.commit()
    claim = await claiming
    assert (claim.verdict, claim.given_back) == (Verdict.CLAIMED, 4)


async def test_a_failed_business_makes_the_run_partial(connection: Connection) -> None:
    run_id = await ask(connection)
    ref = await take_hold(connection, run_id, await be_worker(connection))
    outcomes = [BusinessOutcome(uuid4()), BusinessOutcome(uuid4(), "failed", error="refused")]
    await attempts.record_outcomes(connection, run_id, outcomes)
    assert await attempts.finish(connection, ref, {}) == "partial"


async def test_a_kept_business_leaves_the_run_succeeded(connection: Connection) -> None:
    run_id = await ask(connection)
    ref = await take_hold(connection, run_id, await be_worker(connection))
    await attempts.record_outcomes(connection, run_id, [BusinessOutcome(uuid4(), "kept")])
    assert await attempts.finish(connection, ref, {}) == "succeeded"


async def test_counts_of_a_business_reported_twice_add_up(connection: Connection) -> None:
    run_id, business = await ask(connection), uuid4()
    await attempts.record_outcomes(connection, run_id, [BusinessOutcome(business, counts={"deleted": 2, "kept": 1})])
    await attempts.record_outcomes(connection, run_id, [BusinessOutcome(business, counts={"deleted": 3})])
    counts = await connection.fetchval("select counts from bon_scheduler.business_outcomes")
    assert counts == {"deleted": 5, "kept": 1}


async def test_a_later_attempt_that_only_keeps_does_not_hide_what_an_earlier_one_did(connection: Connection) -> None:
    run_id, business = await ask(connection), uuid4()
    for outcome in ("done", "kept"):
        await attempts.record_outcomes(connection, run_id, [BusinessOutcome(business, outcome)])
    assert await connection.fetchval("select outcome from bon_scheduler.business_outcomes") == "done"


async def test_a_business_that_failed_and_then_went_well_is_done(connection: Connection) -> None:
    run_id, business = await ask(connection), uuid4()
    for outcome in ("failed", "done"):
        await attempts.record_outcomes(connection, run_id, [BusinessOutcome(business, outcome)])
    assert await connection.fetchval("select outcome from bon_scheduler.business_outcomes") == "done"


async def test_a_retry_is_queued_for_later(connection: Connection) -> None:
    run_id = await ask(connection)
    ref = await take_hold(connection, run_id, await be_worker(connection))
    await attempts.fail(connection, ref, outcome="failed", error="away", wait=timedelta(minutes=5))
    wait = await connection.fetchval(
        "select max(execute_after) - now() from bon_scheduler.pgqueuer where dedupe_key = $1", f"{run_id}/1"
    )
    assert timedelta(minutes=4) < wait <= timedelta(minutes=5)


async def test_a_run_whose_queue_row_vanished_is_found_and_delivered_again(connection: Connection) -> None:
    run_id = await ask(connection)
    await connection.execute("delete from bon_scheduler.pgqueuer")
    assert await ledger.orphans(connection, ["draft-cleanup"]) == [(run_id, "draft-cleanup")]
    assert await ledger.redeliver(connection, run_id, LEASE)
    assert await ledger.orphans(connection, ["draft-cleanup"]) == []


async def test_a_run_that_was_put_off_keeps_its_time_when_the_clock_is_set_back(connection: Connection) -> None:
    await ask(connection, run_at=datetime.now(UTC) + timedelta(hours=1))
    await connection.execute(
        "truncate bon_scheduler.pgqueuer;"
        "update bon_scheduler.runs set timed_at = timed_at + interval '2 hours', run_at = run_at + interval '2 hours'"
    )
    assert await ledger.orphans(connection, ["draft-cleanup"]) == []


async def test_a_run_that_a_living_worker_holds_is_no_orphan(connection: Connection) -> None:
    run_id = await ask(connection)
    await take_hold(connection, run_id, await be_worker(connection))
    await connection.execute("delete from bon_scheduler.pgqueuer")
    assert await ledger.orphans(connection, ["draft-cleanup"]) == []


async def test_delivering_again_makes_no_second_queue_row(connection: Connection) -> None:
    run_id = await ask(connection)
    assert not await ledger.redeliver(connection, run_id, LEASE)
    assert await queued(connection) == 1


async def test_another_program_may_ask_in_sql_inside_its_own_transaction(connection: Connection) -> None:
    async with connection.transaction():
        run_id = await connection.fetchval(
            "select bon_scheduler.enqueue('generate-pdf', '{\"invoice_id\": \"7\"}', dedupe_key => 'pdf:7',"
            " run_at => now() + interval '10 min', priority => 3)"
        )
    row = await connection.fetchrow("select origin, priority, payload from bon_scheduler.runs where id = $1", run_id)
    assert row is not None
    assert tuple(row) == ("program", 3, {"invoice_id": "7"})


# Many at once


async def ask_for_many(connection: Connection, keys: Iterable[int], cause: UUID) -> int:
    requests = (({"n": n}, f"key {n}") for n in keys)
    return await ledger.enqueue_many(
        connection, "draft-cleanup", requests, priority=-10, asked_by="a test", caused_by=cause
    )


@pytest.fixture
async def cause(connection: Connection) -> UUID:
    run_id = await ledger.enqueue(connection, Request("session-cleanup", {}))
    assert run_id is not None
    return run_id


async def test_many_runs_are_asked_for_each_once_and_queued_with_their_priority(
    connection: Connection, cause: UUID
) -> None:
    assert await ask_for_many(connection, [*range(2500), 7, 7], cause) == 2500
    assert await ask_for_many(connection, range(2501), cause) == 1
    row = await connection.fetchrow(
        "select count(*), count(distinct r.payload ->> 'n'), count(distinct q.id), max(q.priority), max(r.priority), "
        "count(*) filter (where r.caused_by = $1 and r.origin = 'run' and r.asked_by = 'a test') "
        "from bon_scheduler.runs r left join bon_scheduler.pgqueuer q "
        "on q.dedupe_key = r.id || '/0' and convert_from(q.payload, 'UTF8') = r.id::text and q.entrypoint = r.job "
        "where r.job = 'draft-cleanup'",
        cause,
    )
    assert row is not None
    assert tuple(row) == (2501, 2501, 2501, -10, -10, 2501)


async def test_many_runs_that_are_rolled_back_never_existed(connection: Connection, cause: UUID) -> None:
    transaction = connection.transaction()
    await transaction.start()
    assert await ask_for_many(connection, range(10), cause) == 10
    await transaction.rollback()
    assert await connection.fetchval("select count(*) from bon_scheduler.runs") == 1
    assert await connection.fetchval("select count(*) from bon_scheduler.pgqueuer") == 1


async def test_of_many_runs_no_more_than_a_thousand_are_held_at_a_time(connection: Connection, cause: UUID) -> None:
    alive = most = 0

    class Counted(dict[str, int]):
        def __init__(self, n: int) -> None:
            nonlocal alive, most
            super().__init__(n=n)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    requests = ((Counted(n), f"key {n}") for n in range(5000))
    await ledger.enqueue_many(connection, "draft-cleanup", requests, priority=0, asked_by="a test", caused_by=cause)
    assert most <= 2 * ledger.BULK + 1
