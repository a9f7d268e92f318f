"""Retry and cancel on real PostgreSQL: budgets, fences, failures of businesses, locks, and under a living service."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest

from bon_scheduler import Counts, JobContext, NoPayload, Retry, job, service
from bon_scheduler.database import connections
from bon_scheduler.database.connections import Pool
from bon_scheduler.jobs import BusinessOutcome, LostRunError
from bon_scheduler.jobs import Connection as AnyConnection
from bon_scheduler.ledger import attempts, changes, entries, history
from bon_scheduler.ledger.attempts import RunRef
from bon_scheduler.ledger.changes import RefusedError
from bon_scheduler.ledger.claims import Verdict
from bon_scheduler.ledger.entries import Request
from bon_scheduler.ledger.workers import Worker, register_worker
from tests.attempting import claim_one, take_any
from tests.conftest import Connection, MakeSettings
from tests.waiting import until

JOB = "draft-cleanup"
LEASE = timedelta(seconds=15)
BY = {"by": "dana", "reason": "the disk was full"}
MAKE_DEAD = """
    insert into bon_scheduler.runs (job, origin, state, attempt, error, finished_at)
    select $1, 'program', 'dead', 3, 'away', now() from generate_series(1, $2)
    returning id
"""


@pytest.fixture(autouse=True)
async def free(connection: Connection) -> None:
    """Runs of the job may work beside each other, and be tried for ever."""
    await connection.execute("update bon_scheduler.jobs set exclusive = 'no', attempts = 100000")


async def ask(connection: Connection, **fields: object) -> UUID:
    run_id = await entries.enqueue(connection, Request(JOB, {}, **fields))  # type: ignore[arg-type] # a test's shorthand
    assert run_id is not None
    return run_id


async def be_worker(connection: Connection) -> Worker:
    worker = Worker()
    await register_worker(connection, worker)
    return worker


async def take(connection: AnyConnection, run_id: UUID, worker: Worker) -> RunRef | None:
    answer = await claim_one(connection, run_id, worker)
    return answer.claim.ref if answer.claim else None


async def start(connection: Connection) -> tuple[UUID, RunRef]:
    run_id = await ask(connection)
    ref = await take(connection, run_id, await be_worker(connection))
    assert ref is not None
    return run_id, ref


async def die(connection: Connection) -> UUID:
    run_id, ref = await start(connection)
    await attempts.fail(connection, ref, outcome="failed", error="away", wait=None)
    return run_id


async def retry(connection: Connection, *run_ids: UUID) -> None:
    await changes.change_all(connection, changes.Action.RETRY, run_ids, **BY)


async def cancel(connection: Connection, *run_ids: UUID) -> None:
    await changes.change_all(connection, changes.Action.CANCEL, run_ids, **BY)


async def run_of(connection: Connection, run_id: UUID) -> asyncpg.Record:
    row = await connection.fetchrow("select *, state::text as is_in from bon_scheduler.runs where id = $1", run_id)
    assert row is not None
    return row


async def state_of(connection: Connection, run_id: UUID) -> str:
    return str((await run_of(connection, run_id))["is_in"])


async def until_state(connection: Connection, run_id: UUID, *states: str) -> str:
    async def look() -> str | None:
        state = await state_of(connection, run_id)
        return state if state in states else None

    return str(await until(look))


async def actions(connection: Connection) -> list[tuple[str, ...]]:
    rows = await connection.fetch("select by, action, target, reason from bon_scheduler.operator_actions order by id")
    return [tuple(row) for row in rows]


async def test_a_retried_run_goes_on_with_the_next_attempt_and_keeps_what_went_wrong(connection: Connection) -> None:
    run_id = await die(connection)
    await retry(connection, run_id)
    run = await run_of(connection, run_id)
    assert (run["is_in"], run["attempt"], run["error"], run["finished_at"]) == ("queued", 1, None, None)
    ref = await take(connection, run_id, await be_worker(connection))
    assert ref is not None
    assert ref.attempt == 2
    tried = await history.attempts_of(connection, run_id)
    assert [(row["outcome"], row["error"]) for row in tried] == [("failed", "away"), (None, None)]


async def test_a_retried_run_has_as_many_attempts_as_a_new_one(connection: Connection) -> None:
    run_id = await die(connection)
    await retry(connection, run_id)
    await connection.execute("update bon_scheduler.jobs set attempts = 3 where name = $1", JOB)
    for _ in range(3):
        worker = await be_worker(connection)
        assert await take(connection, run_id, worker) is not None
        await connection.execute("delete from bon_scheduler.workers")
        await attempts.release_lost(connection)
    assert await take(connection, run_id, await be_worker(connection)) is None
    assert await state_of(connection, run_id) == "dead"


async def test_a_retried_run_may_be_taken_at_once_though_it_was_meant_for_later(
    connection: Connection,
) -> None:
    run_id = await ask(connection, run_at=await connection.fetchval("select now() + interval '30 days'"))
    await cancel(connection, run_id)
    await retry(connection, run_id)
    assert await take(connection, run_id, await be_worker(connection)) is not None


async def test_a_failure_from_before_a_retry_is_shown_and_decides_nothing(connection: Connection) -> None:
    run_id, ref = await start(connection)
    business = uuid4()
    await attempts.record_outcomes(connection, run_id, [BusinessOutcome(business, "failed", error="refused")])
    assert (await attempts.finish(connection, ref, {})).state == "partial"
    await retry(connection, run_id)
    again = await take(connection, run_id, await be_worker(connection))
    assert again is not None
    assert (await attempts.finish(connection, again, {})).state == "succeeded"
    (shown,) = await history.businesses_of(connection, run_id)
    assert (shown["business_id"], shown["outcome"], shown["error"]) == (business, "failed_before", "refused")


@pytest.mark.parametrize(("outcome", "state"), [("failed", "partial"), ("done", "succeeded")])
async def test_a_business_that_a_retried_run_touches_again_decides_anew(
    connection: Connection, outcome: str, state: str
) -> None:
    run_id, ref = await start(connection)
    business = uuid4()
    await attempts.record_outcomes(connection, run_id, [BusinessOutcome(business, "failed", error="refused")])
    await attempts.finish(connection, ref, {})
    await retry(connection, run_id)
    again = await take(connection, run_id, await be_worker(connection))
    assert again is not None
    await attempts.record_outcomes(connection, run_id, [BusinessOutcome(business, outcome)])  # type: ignore[arg-type]
    assert (await attempts.finish(connection, again, {})).state == state
    assert [row["outcome"] for row in await history.businesses_of(connection, run_id)] == [outcome]


async def test_an_attempt_whose_run_was_cancelled_finds_itself_lost(connection: Connection) -> None:
    run_id, ref = await start(connection)
    await cancel(connection, run_id)
    writes: list[Callable[[], Awaitable[object]]] = [
        lambda: attempts.fence(connection, ref),
        lambda: attempts.finish(connection, ref, {}),
        lambda: attempts.fail(connection, ref, outcome="failed", error="", wait=None),
    ]
    for write in writes:
        with pytest.raises(LostRunError):
            await write()
    assert not await attempts.give_back(connection, ref)
    await attempts.lose(connection, ref, "another attempt owns the run")
    run = await run_of(connection, run_id)
    assert (run["is_in"], run["reason"]) == ("cancelled", BY["reason"])
    assert run["finished_at"] is not None
    (attempt,) = await history.attempts_of(connection, run_id)
    assert (attempt["outcome"], attempt["error"], attempt["ended_at"] is not None) == ("cancelled", None, True)


async def test_an_attempt_that_was_cancelled_is_still_lost_when_its_run_was_retried(connection: Connection) -> None:
    run_id, ref = await start(connection)
    await cancel(connection, run_id)
    await retry(connection, run_id)
    with pytest.raises(LostRunError):
        await attempts.fence(connection, ref)
    assert await take(connection, run_id, await be_worker(connection)) is not None
    with pytest.raises(LostRunError):
        await attempts.finish(connection, ref, {})


async def test_a_dead_run_that_is_let_go_keeps_when_and_why_it_died(connection: Connection) -> None:
    run_id = await die(connection)
    before = await run_of(connection, run_id)
    await cancel(connection, run_id)
    after = await run_of(connection, run_id)
    assert after["is_in"] == "cancelled"
    assert (after["finished_at"], after["error"]) == (before["finished_at"], "away")


async def test_a_cancelled_run_is_taken_by_nobody(connection: Connection) -> None:
    kept, gone = await ask(connection), await ask(connection)
    await cancel(connection, gone)
    assert await take_any(connection, await be_worker(connection), JOB) == [kept]


async def test_each_changed_run_is_audited(connection: Connection) -> None:
    first, second = await die(connection), await die(connection)
    await retry(connection, first, second)
    await cancel(connection, first)
    assert sorted((await actions(connection))[:2]) == sorted(
        ("dana", "retry", str(run_id), BY["reason"]) for run_id in (first, second)
    )
    assert (await actions(connection))[2:] == [("dana", "cancel", str(first), BY["reason"])]
    shown = await history.actions_on(connection, first)
    assert [(row["action"], row["by"], row["reason"]) for row in shown] == [
        ("retry", "dana", BY["reason"]),
        ("cancel", "dana", BY["reason"]),
    ]


async def test_a_change_that_cannot_be_audited_is_not_made(connection: Connection) -> None:
    run_id = await die(connection)
    with pytest.raises(asyncpg.CheckViolationError):
        await changes.change_all(connection, changes.Action.RETRY, [run_id], by="dana", reason="")
    assert await state_of(connection, run_id) == "dead"


async def test_all_named_runs_are_changed_or_none_and_each_fault_is_named(connection: Connection) -> None:
    dead, queued, unknown = await die(connection), await ask(connection), uuid4()
    running, _ = await start(connection)
    with pytest.raises(RefusedError) as refused:
        await retry(connection, dead, queued, unknown, running)
    first, *faults = str(refused.value).splitlines()
    assert first == "Nothing was changed."
    named = (f"Run {queued} is queued", f"No run {unknown}", f"Run {running} is running")
    assert [fault.startswith(f"- {name}") for fault, name in zip(faults, named, strict=True)] == [True] * 3
    assert await state_of(connection, dead) == "dead"
    assert await actions(connection) == []


@pytest.mark.parametrize(
    ("change", "state", "says"),
    [
        (retry, "missed", "run-once draft-cleanup --fire-time 2026-11-23T01:00:00+00:00"),
        (retry, "paused", "run-once draft-cleanup --fire-time 2026-11-23T01:00:00+00:00"),
        (retry, "queued", "is queued"),
        (retry, "running", "stop it first with: bon-scheduler cancel"),
        (retry, "retrying", "runs again by itself at once"),
        (retry, "succeeded", "do it anew with: bon-scheduler run-once draft-cleanup"),
        (retry, "held", "have it go on with: bon-scheduler release"),
        (cancel, "succeeded", "what it did stays"),
        (cancel, "partial", "what it did stays"),
        (cancel, "cancelled", "is cancelled already"),
        (cancel, "missed", "never was to run"),
        (cancel, "paused", "never was to run"),
    ],
)
async def test_a_run_in_a_state_that_cannot_change_is_refused_with_why(
    connection: Connection, change: object, state: str, says: str
) -> None:
    run_id = await connection.fetchval(
        "insert into bon_scheduler.runs (job, fire_time, origin, state)"
        " values ($1, '2026-11-23T01:00Z', 'schedule', $2::text::bon_scheduler.run_state) returning id",
        JOB,
        state,
    )
    with pytest.raises(RefusedError) as refused:
        await change(connection, run_id)  # type: ignore[operator] # retry or cancel
    assert says in str(refused.value)
    assert await state_of(connection, run_id) == state


@pytest.mark.parametrize("state", ["queued", "retrying", "held", "dead", "running"])
async def test_a_run_that_has_not_gone_well_yet_may_be_cancelled(connection: Connection, state: str) -> None:
    run_id = await ask(connection)
    await connection.execute("update bon_scheduler.runs set state = $1::text::bon_scheduler.run_state", state)
    (changed,) = await changes.change_all(connection, changes.Action.CANCEL, [run_id], **BY)
    assert (changed.was, await state_of(connection, run_id)) == (state, "cancelled")


@pytest.mark.parametrize("state", ["dead", "partial", "cancelled"])
async def test_a_tick_that_ended_badly_may_be_retried(connection: Connection, state: str) -> None:
    run_id = await ask(connection, origin=entries.Origin.SCHEDULE)
    await connection.execute("update bon_scheduler.runs set state = $1::text::bon_scheduler.run_state", state)
    (changed,) = await changes.change_all(connection, changes.Action.RETRY, [run_id], **BY)
    assert (changed.was, await state_of(connection, run_id)) == (state, "queued")


async def test_2500_dead_runs_are_retried_in_seconds_and_audited_one_by_one(connection: Connection) -> None:
    await connection.fetch(MAKE_DEAD, JOB, 2500)
    (other,) = await connection.fetch(MAKE_DEAD, "session-cleanup", 1)
    started = time.perf_counter()
    changed = await changes.retry_dead(connection, JOB, **BY)
    seconds = time.perf_counter() - started
    assert len({run.run_id for run in changed}) == 2500
    assert await connection.fetchval("select count(*) from bon_scheduler.runs where state = 'queued'") == 2500
    assert await connection.fetchval("select count(distinct target) from bon_scheduler.operator_actions") == 2500
    assert await connection.fetchval("select count(*) from bon_scheduler.operator_actions") == 2500
    assert await state_of(connection, other["id"]) == "dead"
    assert seconds < 5
    assert len(await take_any(connection, await be_worker(connection), JOB, room=3000)) == 2500


async def test_two_people_who_retry_all_dead_runs_at_once_retry_each_once(pool: Pool, connection: Connection) -> None:
    await connection.fetch(MAKE_DEAD, JOB, 1500)

    async def retry_all() -> int:
        async with pool.acquire() as mine:
            return len(await changes.retry_dead(mine, None, **BY))

    assert sum(await asyncio.gather(retry_all(), retry_all())) == 1500
    assert await connection.fetchval("select count(*) from bon_scheduler.operator_actions") == 1500


async def test_all_that_wait_of_one_job_are_cancelled_and_nothing_else(connection: Connection) -> None:
    queued, later = await ask(connection), await start(connection)
    await attempts.fail(connection, later[1], outcome="failed", error="away", wait=timedelta(minutes=5))
    running, dead = (await start(connection))[0], await die(connection)
    other = await connection.fetchval("select bon_scheduler.enqueue('session-cleanup')")
    changed = await changes.cancel_waiting(connection, JOB, **BY)
    assert {run.run_id for run in changed} == {queued, later[0]}
    assert [await state_of(connection, run_id) for run_id in (running, dead, other)] == ["running", "dead", "queued"]


async def test_a_cancel_waits_for_a_fence_that_is_about_to_commit(database_url: str, connection: Connection) -> None:
    """Otherwise a run could be cancelled whose effects are committed a moment later."""
    run_id, ref = await start(connection)
    async with connections.connect(database_url) as committing:
        transaction = committing.transaction()
        await transaction.start()
        await attempts.finish(committing, ref, {})
        cancelling = asyncio.create_task(cancel(connection, run_id))
        done, _ = await asyncio.wait([cancelling], timeout=0.3)
        assert not done
        await transaction.commit()
    with pytest.raises(RefusedError, match="has succeeded"):
        await cancelling
    (attempt,) = await history.attempts_of(connection, run_id)
    assert attempt["outcome"] == "succeeded"


async def test_a_cancel_does_not_wait_for_a_handler_that_has_recorded_a_business(
    database_url: str, connection: Connection
) -> None:
    run_id, _ = await start(connection)
    async with connections.connect(database_url) as working:
        transaction = working.transaction()
        await transaction.start()
        await attempts.record_outcomes(working, run_id, [BusinessOutcome(uuid4())])
        async with asyncio.timeout(5):
            await cancel(connection, run_id)
        await transaction.rollback()


async def test_a_retry_and_the_fence_of_a_handler_that_both_wait_for_a_cancel_do_not_deadlock(
    database_url: str, connection: Connection
) -> None:
    """The handler holds a business that failed before, and comes to its run last."""
    run_id, ref = await start(connection)
    business = uuid4()
    await attempts.record_outcomes(connection, run_id, [BusinessOutcome(business, "failed", error="refused")])

    async def until_waiting(count: int) -> None:
        async def look() -> bool:
            waiting = "select count(distinct pid) from pg_locks where not granted"
            return bool(await connection.fetchval(waiting) == count)

        await until(look)

    async with (
        connections.connect(database_url) as working,
        connections.connect(database_url) as cancelling,
        connections.connect(database_url) as retrying,
    ):
        handler, canceller = working.transaction(), cancelling.transaction()
        await handler.start()
        await attempts.record_outcomes(working, run_id, [BusinessOutcome(business)])
        await canceller.start()
        await cancel(cancelling, run_id)
        retried = asyncio.create_task(retry(retrying, run_id))
        await until_waiting(1)
        fenced = asyncio.create_task(attempts.fence(working, ref))
        await until_waiting(2)
        await canceller.commit()
        with pytest.raises(LostRunError):
            await fenced
        await handler.rollback()
        await retried
    assert await state_of(connection, run_id) == "queued"
    assert [row["outcome"] for row in await history.businesses_of(connection, run_id)] == ["failed_before"]


async def test_retries_cancels_claims_and_ends_of_the_same_runs_never_deadlock(
    pool: Pool, connection: Connection
) -> None:
    chance = random.Random(7)
    runs = [await ask(connection) for _ in range(6)]
    worker = await be_worker(connection)
    changes = 0

    async def operator(change: object) -> None:
        nonlocal changes
        for _ in range(150):
            some = chance.sample(runs, 3)
            async with pool.acquire() as mine:
                try:
                    await change(mine, *some[: chance.choice([1, 1, 3])])  # type: ignore[operator]
                    changes += 1
                except RefusedError:
                    pass

    async def work() -> None:
        for _ in range(300):
            async with pool.acquire() as mine:
                ref = await take(mine, chance.choice(runs), worker)
                if ref is None:
                    continue
                try:
                    if chance.random() < 0.5:
                        await attempts.record_outcomes(mine, ref.run_id, [BusinessOutcome(uuid4(), "failed")])
                        await attempts.finish(mine, ref, {})
                    else:
                        wait = chance.choice([None, timedelta(0)])
                        await attempts.fail(mine, ref, outcome="failed", error="away", wait=wait)
                except LostRunError:
                    pass

    await asyncio.gather(operator(retry), operator(retry), operator(cancel), operator(cancel), work(), work())
    assert changes > 20
    unended = await connection.fetchval(
        "select count(*) from bon_scheduler.attempts a join bon_scheduler.runs r on r.id = a.run_id"
        " where a.ended_at is null and r.state <> 'running'"
    )
    assert unended == 0


def failing(times: int, started: list[int]) -> Sequence[object]:
    @job("a-test", retry=Retry(attempts=2, delay=timedelta(milliseconds=20)))
    async def fail(ctx: JobContext, _: NoPayload) -> Counts:
        started.append(ctx.attempt)
        if ctx.attempt <= times:
            raise ConnectionError("away")
        return {}

    return [fail]


async def test_a_dead_run_that_is_retried_under_a_living_service_succeeds_in_its_next_attempts(
    make_settings: MakeSettings, connection: Connection
) -> None:
    started: list[int] = []
    async with service.serving(make_settings(), jobs=failing(3, started)):  # type: ignore[arg-type] # one job
        run_id = await connection.fetchval("select bon_scheduler.enqueue('a-test')")
        assert await until_state(connection, run_id, "dead", "succeeded") == "dead"
        await retry(connection, run_id)
        assert await until_state(connection, run_id, "dead", "succeeded") == "succeeded"
    assert started == [1, 2, 3, 4]


async def test_a_claim_of_a_cancelled_run_says_that_it_has_ended(connection: Connection) -> None:
    run_id = await ask(connection)
    await cancel(connection, run_id)
    worker = await be_worker(connection)
    assert (await claim_one(connection, run_id, worker)).verdict is Verdict.ENDED
