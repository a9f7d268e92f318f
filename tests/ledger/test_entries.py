"""The ledger on real PostgreSQL: asking, ticks, claims, fences, endings."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest

from bon_scheduler.database import connections
from bon_scheduler.database.connections import Pool
from bon_scheduler.jobs import BusinessOutcome, LostRunError
from bon_scheduler.jobs import Connection as AnyConnection
from bon_scheduler.ledger import attempts, changes, entries, pauses
from bon_scheduler.ledger.changes import Action
from bon_scheduler.ledger.claims import Verdict
from bon_scheduler.ledger.entries import RefusedRequestError, Request, TickVerdict
from bon_scheduler.ledger.workers import Worker, beat, declare_dead, last_beats, register_worker, retire_worker
from tests.attempting import claim, claim_one, hold, take_any
from tests.conftest import Connection

LEASE = timedelta(seconds=15)
TICK = datetime(2026, 11, 23, 4, tzinfo=UTC)


async def ask(connection: Connection, job: str = "draft-cleanup", **fields: object) -> UUID:
    run_id = await entries.enqueue(connection, Request(job, {}, **fields))  # type: ignore[arg-type] # a test's shorthand
    assert run_id is not None
    return run_id


async def be_worker(connection: Connection) -> Worker:
    worker = Worker()
    await register_worker(connection, worker)
    return worker


async def state_of(connection: Connection, run_id: UUID) -> str:
    state: str = await connection.fetchval("select state::text from bon_scheduler.runs where id = $1", run_id)
    return state


async def waiting(connection: Connection) -> int:
    count: int = await connection.fetchval(
        "select count(*) from bon_scheduler.runs where ready and state in ('queued', 'retrying')"
    )
    return count


@pytest.fixture(autouse=True)
async def free(connection: Connection) -> None:
    """Runs of a job may work beside each other, unless the test says otherwise; they are tried three times."""
    await connection.execute("update bon_scheduler.jobs set exclusive = 'no', attempts = 3")


async def test_a_request_that_is_rolled_back_never_existed(connection: Connection) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await ask(connection)
    await transaction.rollback()
    assert await connection.fetchval("select count(*) from bon_scheduler.runs") == 0


async def test_a_request_is_one_row_and_may_be_taken_at_once(connection: Connection) -> None:
    run_id = await ask(connection)
    assert await connection.fetchval("select count(*) from bon_scheduler.runs") == 1
    assert await take_any(connection, await be_worker(connection), "draft-cleanup") == [run_id]


async def test_a_dedupe_key_is_refused_as_long_as_its_run_is_retained(connection: Connection) -> None:
    run_id = await ask(connection, dedupe_key="once")
    ref = await hold(connection, run_id, await be_worker(connection))
    await attempts.finish(connection, ref, {})
    assert await entries.enqueue(connection, Request("draft-cleanup", {}, dedupe_key="once")) is None


async def test_the_same_key_of_another_job_is_another_key(connection: Connection) -> None:
    await ask(connection, dedupe_key="once")
    assert await entries.enqueue(connection, Request("session-cleanup", {}, dedupe_key="once")) is not None


async def test_an_unknown_job_is_refused_with_the_known_ones(connection: Connection) -> None:
    with pytest.raises(RefusedRequestError, match=r'unknown job "no-such-job".*Known jobs:.*generate-pdf'):
        await entries.enqueue(connection, Request("no-such-job", {}))


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
    return await entries.record_tick(
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
    assert await waiting(connection) == 1


async def test_the_last_tick_only_moves_forwards(connection: Connection) -> None:
    await owe_since(connection, TICK)
    assert await account(connection, BEFORE, previous=TICK) is TickVerdict.STALE
    assert (await entries.last_ticks(connection, ["draft-cleanup"]))["draft-cleanup"] == TICK


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
    assert await waiting(connection) == 0


async def test_a_tick_whose_request_fails_stays_owed(connection: Connection) -> None:
    await owe_since(connection, BEFORE)
    await connection.execute("alter table bon_scheduler.runs add constraint full_up check (origin <> 'schedule')")
    with pytest.raises(asyncpg.CheckViolationError):
        await account(connection)
    assert (await entries.last_ticks(connection, ["draft-cleanup"]))["draft-cleanup"] < TICK


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
    await pauses.pause_job(connection, "draft-cleanup", by="dana", reason="migration")
    assert await account(connection) is TickVerdict.PAUSED
    row = await connection.fetchrow("select state::text, reason from bon_scheduler.runs")
    assert row is not None
    assert tuple(row) == ("paused", "paused by dana: migration")
    assert await waiting(connection) == 0


# Attempts and their hold on a run


async def test_a_run_is_claimed_by_one_of_many_workers(pool: Pool, connection: Connection) -> None:
    run_id = await ask(connection)
    workers = [await be_worker(connection) for _ in range(6)]

    async def take(worker: Worker) -> Verdict:
        async with pool.acquire() as mine:
            return (await claim_one(mine, run_id, worker)).verdict

    verdicts = await asyncio.gather(*(take(worker) for worker in workers))
    assert sorted(verdicts) == [Verdict.CLAIMED, *[Verdict.HELD] * 5]


async def be_exclusive(connection: Connection) -> tuple[UUID, UUID]:
    """Ask for two runs that must not work at once."""
    await connection.execute("update bon_scheduler.jobs set exclusive = 'job'")
    return await ask(connection), await ask(connection)


async def test_an_exclusive_job_has_no_two_runs_at_once(connection: Connection) -> None:
    first, second = await be_exclusive(connection)
    worker = await be_worker(connection)
    ref = await hold(connection, first, worker)
    busy = await claim_one(connection, second, worker)
    assert (busy.verdict, busy.holder_host, busy.holder_silent) == (Verdict.BUSY, worker.host, False)
    await attempts.finish(connection, ref, {})
    assert (await claim_one(connection, second, worker)).verdict is Verdict.CLAIMED


async def test_a_claim_of_an_exclusive_job_waits_for_another_that_is_about_to_commit(
    database_url: str, connection: Connection
) -> None:
    first, second = await be_exclusive(connection)
    worker = await be_worker(connection)
    async with connections.connect(database_url) as committing, connections.connect(database_url) as third:
        transaction = committing.transaction()
        await transaction.start()
        await hold(committing, first, worker)
        certain = asyncio.create_task(claim_one(connection, second, worker))
        some = asyncio.create_task(take_any(third, worker, "draft-cleanup"))
        done, _ = await asyncio.wait([certain, some], timeout=0.3)
        assert not done
        await transaction.commit()
        assert ((await certain).verdict, await some) == (Verdict.BUSY, [])


async def test_a_run_of_a_worker_that_left_waits_again_and_its_next_attempt_has_the_next_number(
    connection: Connection,
) -> None:
    run_id = await ask(connection)
    gone = await be_worker(connection)
    await hold(connection, run_id, gone)
    await retire_worker(connection, gone.id)
    assert (await claim_one(connection, run_id, await be_worker(connection))).verdict is Verdict.HELD
    (released,) = await attempts.release_lost(connection)
    assert (released.run_id, released.state) == (run_id, "retrying")
    second = await hold(connection, run_id, await be_worker(connection))
    assert second.attempt == 2
    outcomes = await connection.fetch("select outcome from bon_scheduler.attempts order by attempt")
    assert [row["outcome"] for row in outcomes] == ["lost", None]


@pytest.mark.parametrize("seen", ["-infinity", "infinity"])
async def test_a_workers_run_is_its_own_until_it_is_declared_dead_whatever_the_databases_clock_says(
    connection: Connection, seen: str
) -> None:
    run_id = await ask(connection)
    await hold(connection, run_id, await be_worker(connection))
    [last] = await last_beats(connection)
    await connection.execute(f"update bon_scheduler.workers set seen_at = '{seen}'")
    assert await attempts.release_lost(connection) == []
    assert (await claim_one(connection, run_id, await be_worker(connection))).verdict is Verdict.HELD
    assert [dead.id for dead in await declare_dead(connection, [last.id])] == [last.worker]
    await attempts.release_lost(connection)
    assert (await claim_one(connection, run_id, await be_worker(connection))).verdict is Verdict.CLAIMED


async def test_a_worker_that_was_heard_since_is_not_declared_dead(connection: Connection) -> None:
    worker = await be_worker(connection)
    [last] = await last_beats(connection)
    await beat(connection, worker.id)
    assert not await declare_dead(connection, [last.id])
    [last] = await last_beats(connection)
    assert await declare_dead(connection, [last.id])
    assert not await last_beats(connection)
    await beat(connection, worker.id)
    assert await last_beats(connection)


async def test_a_run_that_kills_every_worker_ends_dead(connection: Connection) -> None:
    run_id = await ask(connection)
    states = []
    for _ in range(3):
        worker = await be_worker(connection)
        await hold(connection, run_id, worker)
        await retire_worker(connection, worker.id)
        states += [released.state for released in await attempts.release_lost(connection)]
    assert states == ["retrying", "retrying", "dead"]
    error = await connection.fetchval("select error from bon_scheduler.runs")
    assert error.startswith("its worker stopped without a word in each of 3 attempts, the last on ")
    assert (await claim_one(connection, run_id, await be_worker(connection))).verdict is Verdict.ENDED


async def test_a_run_given_back_costs_no_attempt(connection: Connection) -> None:
    run_id = await ask(connection)
    worker = await be_worker(connection)
    for _ in range(5):
        assert await attempts.give_back(connection, await hold(connection, run_id, worker))
    await hold(connection, run_id, worker)
    await retire_worker(connection, worker.id)
    (released,) = await attempts.release_lost(connection)
    assert released.state == "retrying"


async def test_a_run_whose_row_somebody_has_locked_is_released_the_next_time(
    database_url: str, connection: Connection
) -> None:
    """And keeps no other from being released."""
    locked, other = await ask(connection), await ask(connection)
    worker = await be_worker(connection)
    for run_id in (locked, other):
        await hold(connection, run_id, worker)
    await retire_worker(connection, worker.id)
    async with connections.connect(database_url) as elsewhere:
        transaction = elsewhere.transaction()
        await transaction.start()
        await elsewhere.execute("select from bon_scheduler.runs where id = $1 for update", locked)
        assert [released.run_id for released in await attempts.release_lost(connection)] == [other]
        await transaction.rollback()
    assert [released.run_id for released in await attempts.release_lost(connection)] == [locked]


async def test_a_run_whose_attempt_is_about_to_commit_is_not_released_before(
    database_url: str, connection: Connection
) -> None:
    """Otherwise the successor could start between the check and the commit."""
    run_id = await ask(connection)
    gone = await be_worker(connection)
    ref = await hold(connection, run_id, gone)
    await retire_worker(connection, gone.id)
    async with connections.connect(database_url) as committing:
        async with committing.transaction():
            await attempts.fence(committing, ref)
            assert await attempts.release_lost(connection) == []
            assert (await claim_one(connection, run_id, await be_worker(connection))).verdict is not Verdict.CLAIMED
        assert [released.run_id for released in await attempts.release_lost(connection)] == [run_id]


async def test_an_attempt_that_lost_its_run_can_neither_commit_nor_end_it(connection: Connection) -> None:
    run_id = await ask(connection)
    gone = await be_worker(connection)
    old = await hold(connection, run_id, gone)
    await retire_worker(connection, gone.id)
    await attempts.release_lost(connection)
    for owned in (False, True):
        if owned:
            await hold(connection, run_id, await be_worker(connection))
        writes: list[Callable[[], Awaitable[object]]] = [
            lambda: attempts.fence(connection, old),
            lambda: attempts.finish(connection, old, {}),
            lambda: attempts.fail(connection, old, outcome="failed", error="", wait=None),
        ]
        for write in writes:
            with pytest.raises(LostRunError):
                await write()
        assert not await attempts.give_back(connection, old)
        assert await attempts.finish_many(connection, [(old, {})]) == {}
        assert await state_of(connection, run_id) == ("running" if owned else "retrying")


async def test_of_many_that_finish_at_once_the_one_that_lost_its_run_keeps_no_other(connection: Connection) -> None:
    worker = await be_worker(connection)
    refs = [await hold(connection, await ask(connection), worker) for _ in range(5)]
    await connection.execute("update bon_scheduler.runs set attempt = 2 where id = $1", refs[2].run_id)
    ended = await attempts.finish_many(connection, [(ref, {"n": n}) for n, ref in enumerate(refs)])
    assert ended == {ref.run_id: "succeeded" for n, ref in enumerate(refs) if n != 2}
    rows = await connection.fetch(
        "select counts from bon_scheduler.runs where state = 'succeeded' order by enqueued_at"
    )
    assert [row["counts"] for row in rows] == [{"n": n} for n in (0, 1, 3, 4)]


async def test_a_finish_says_whether_a_savepoint_may_undo_it(connection: Connection) -> None:
    worker = await be_worker(connection)
    first, second = [await hold(connection, await ask(connection), worker) for _ in range(2)]
    async with connection.transaction():
        assert not (await attempts.finish(connection, first, {})).may_be_undone
        async with connection.transaction():
            assert (await attempts.finish(connection, second, {})).may_be_undone


async def test_a_cancel_waits_for_a_fence_that_is_about_to_commit(database_url: str, connection: Connection) -> None:
    """Otherwise a run could end between the check and the commit."""
    run_id = await ask(connection)
    ref = await hold(connection, run_id, await be_worker(connection))
    async with connections.connect(database_url) as committing:
        transaction = committing.transaction()
        await transaction.start()
        await attempts.fence(committing, ref)
        cancelling = asyncio.create_task(
            changes.change_all(connection, Action.CANCEL, [run_id], by="dana", reason="wrong")
        )
        done, _ = await asyncio.wait([cancelling], timeout=0.3)
        assert not done
        await transaction.commit()
    await cancelling
    assert await state_of(connection, run_id) == "cancelled"


async def test_a_claim_waits_for_no_row(database_url: str, connection: Connection) -> None:
    locked, other = await ask(connection), await ask(connection)
    worker = await be_worker(connection)
    async with connections.connect(database_url) as elsewhere:
        locking = elsewhere.transaction()
        await locking.start()
        await elsewhere.execute("select from bon_scheduler.runs where id = $1 for share", locked)
        async with asyncio.timeout(0.5):
            assert (await claim_one(connection, locked, worker)).verdict is Verdict.WAITS
            assert await take_any(connection, worker, "draft-cleanup") == [other]
        await locking.rollback()
    assert await take_any(connection, worker, "draft-cleanup") == [locked]


async def test_a_retried_run_has_its_fresh_budget(connection: Connection) -> None:
    run_id = await ask(connection)
    await connection.execute("update bon_scheduler.runs set state = 'cancelled', attempt = 4, finished_at = now()")
    await changes.change_all(connection, Action.RETRY, [run_id], by="dana", reason="mended")
    answer = await claim_one(connection, run_id, await be_worker(connection))
    assert answer.claim is not None
    assert (answer.claim.given_back, answer.claim.retried, answer.claim.ref.attempt) == (4, True, 5)


async def test_a_failed_business_makes_the_run_partial(connection: Connection) -> None:
    run_id = await ask(connection)
    ref = await hold(connection, run_id, await be_worker(connection))
    outcomes = [BusinessOutcome(uuid4()), BusinessOutcome(uuid4(), "failed", error="refused")]
    await attempts.record_outcomes(connection, run_id, outcomes)
    assert (await attempts.finish(connection, ref, {})).state == "partial"


async def test_a_kept_business_leaves_the_run_succeeded(connection: Connection) -> None:
    run_id = await ask(connection)
    ref = await hold(connection, run_id, await be_worker(connection))
    await attempts.record_outcomes(connection, run_id, [BusinessOutcome(uuid4(), "kept")])
    assert (await attempts.finish(connection, ref, {})).state == "succeeded"


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


async def test_a_retry_waits_for_its_time(connection: Connection) -> None:
    run_id = await ask(connection)
    worker = await be_worker(connection)
    ref = await hold(connection, run_id, worker)
    await attempts.fail(connection, ref, outcome="failed", error="away", wait=timedelta(minutes=5))
    assert await take_any(connection, worker, "draft-cleanup") == []
    wait = await connection.fetchval("select run_at - now() from bon_scheduler.runs")
    assert timedelta(minutes=4) < wait <= timedelta(minutes=5)
    await connection.execute("update bon_scheduler.runs set run_at = now() - interval '1 second'")
    assert await take_any(connection, worker, "draft-cleanup") == [run_id]


async def test_a_run_that_was_put_off_keeps_its_time_when_the_clock_is_set_back(connection: Connection) -> None:
    run_id = await ask(connection, run_at=datetime.now(UTC) + timedelta(hours=1))
    await connection.execute(
        "update bon_scheduler.runs"
        " set enqueued_at = enqueued_at + interval '2 hours', run_at = run_at + interval '2 hours'"
    )
    assert await entries.make_overtaken_ready(connection) == 0
    assert (await claim_one(connection, run_id, await be_worker(connection))).verdict is Verdict.WAITS


async def test_a_run_that_was_due_before_the_clock_was_set_back_stays_due(connection: Connection) -> None:
    run_id = await ask(connection)
    await connection.execute("update bon_scheduler.runs set enqueued_at = enqueued_at + interval '2 hours'")
    assert await take_any(connection, await be_worker(connection), "draft-cleanup") == [run_id]


async def test_a_wait_since_an_attempt_ends_when_the_clock_was_set_back(connection: Connection) -> None:
    run_id = await ask(connection)
    worker = await be_worker(connection)
    ref = await hold(connection, run_id, worker)
    await attempts.fail(connection, ref, outcome="failed", error="away", wait=timedelta(minutes=5))
    assert await entries.make_overtaken_ready(connection) == 0
    await connection.execute(
        "update bon_scheduler.runs set run_at = run_at + interval '2 hours';"
        "update bon_scheduler.attempts set ended_at = ended_at + interval '2 hours'"
    )
    assert await entries.make_overtaken_ready(connection) == 1
    assert await take_any(connection, worker, "draft-cleanup") == [run_id]


async def test_what_waits_for_its_time_says_in_how_long_the_next_is_due(connection: Connection) -> None:
    await ask(connection, run_at=datetime.now(UTC) + timedelta(minutes=3))
    answer = await claim(connection, await be_worker(connection), "draft-cleanup")
    assert answer.wait_seconds == pytest.approx(180, abs=5)


@pytest.mark.parametrize("priority", ["101", "-101", "2147483647", "null"])
async def test_a_priority_out_of_bounds_is_refused_at_the_door(connection: Connection, priority: str) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match="must be between -100 and 100"):
        await connection.fetchval(f"select bon_scheduler.enqueue('generate-pdf', priority => {priority})")


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
    return await entries.enqueue_many(
        connection, "draft-cleanup", requests, priority=-10, asked_by="a test", caused_by=cause
    )


@pytest.fixture
async def cause(connection: Connection) -> UUID:
    run_id = await entries.enqueue(connection, Request("session-cleanup", {}))
    assert run_id is not None
    return run_id


async def test_many_runs_are_asked_for_each_once_with_their_priority(connection: Connection, cause: UUID) -> None:
    assert await ask_for_many(connection, [*range(2500), 7, 7], cause) == 2500
    assert await ask_for_many(connection, range(2501), cause) == 1
    row = await connection.fetchrow(
        "select count(*), count(distinct payload ->> 'n'), max(priority), "
        "count(*) filter (where caused_by = $1 and origin = 'run' and asked_by = 'a test' and ready) "
        "from bon_scheduler.runs where job = 'draft-cleanup'",
        cause,
    )
    assert row is not None
    assert tuple(row) == (2501, 2501, -10, 2501)


async def test_many_runs_that_are_rolled_back_never_existed(connection: Connection, cause: UUID) -> None:
    transaction = connection.transaction()
    await transaction.start()
    assert await ask_for_many(connection, range(10), cause) == 10
    await transaction.rollback()
    assert await connection.fetchval("select count(*) from bon_scheduler.runs") == 1


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
    await entries.enqueue_many(connection, "draft-cleanup", requests, priority=0, asked_by="a test", caused_by=cause)
    assert most <= 2 * entries.BULK + 1
