"""What the ledger says and what is so are brought together, by the whole service."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from bon_scheduler import Counts, JobContext, NoPayload, Retry, attempts, db, job, runner, service
from bon_scheduler.attempts import RunRef
from bon_scheduler.jobs import AnyJob
from bon_scheduler.jobs import Connection as AnyConnection
from bon_scheduler.workers import Worker
from tests.conftest import Connection, MakeSettings
from tests.waiting import until

ASK = "select bon_scheduler.enqueue('a-test')"
QUICK = Retry(attempts=3, delay=timedelta(milliseconds=20))
RECORD = (
    "insert into bon_scheduler.business_outcomes (run_id, business_id, outcome)"
    " select id, gen_random_uuid(), 'done' from bon_scheduler.runs"
)
DEAD_WORKER = """
    insert into bon_scheduler.workers (id, host, pid, version, lease, seen_at)
    values (gen_random_uuid(), 'elsewhere', 1, '0', '2 s', now() + interval '2 hours')
    returning id
"""
# The database's clock was two hours ahead when these were written.
SET_BACK = """
    update bon_scheduler.runs
       set run_at = run_at + interval '2 hours', timed_at = timed_at + interval '2 hours',
           enqueued_at = enqueued_at + interval '2 hours';
    update bon_scheduler.pgqueuer
       set heartbeat = heartbeat + interval '2 hours',
           execute_after = case when execute_after = 'epoch' then 'epoch' else execute_after + interval '2 hours' end;
"""
STATE = "select state::text from bon_scheduler.runs"
OUTCOMES = "select outcome from bon_scheduler.attempts order by attempt"


async def until_state(connection: Connection, *states: str) -> str:
    async def look() -> str | None:
        state = await connection.fetchval(STATE)
        return state if state in states else None

    return str(await until(look))


async def outcomes(connection: Connection) -> list[str]:
    return [row["outcome"] for row in await connection.fetch(OUTCOMES)]


class Endless:
    """A job that runs until it is stopped, and knows whether it was."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()

        @job("a-test", retry=QUICK)
        async def endless(_: JobContext, __: NoPayload) -> Counts:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                self.stopped.set()
                raise
            return {}

        self.job: AnyJob = endless


async def test_an_attempt_whose_run_was_taken_over_is_stopped(
    make_settings: MakeSettings, connection: Connection
) -> None:
    endless = Endless()
    async with service.serving(make_settings(LEASE_SECONDS="2", SHUTDOWN_SECONDS="0.1"), jobs=[endless.job]) as serving:
        await connection.execute(ASK)
        await until_state(connection, "running")
        await connection.execute("update bon_scheduler.runs set attempt = 2, worker = gen_random_uuid()")
        async with asyncio.timeout(5):
            await endless.stopped.wait()

        async def counted() -> bool:
            fenced = serving.machinery.metrics.fenced.labels("a-test")
            return bool(fenced._value.get() == 1)

        await until(counted)
    assert (await outcomes(connection))[0] == "lost"


async def test_a_run_that_a_person_cancelled_is_stopped_and_not_counted_as_fenced(
    make_settings: MakeSettings, connection: Connection
) -> None:
    endless = Endless()
    async with service.serving(make_settings(LEASE_SECONDS="2"), jobs=[endless.job]) as serving:
        await connection.execute(ASK)
        await until_state(connection, "running")
        await connection.execute(
            "update bon_scheduler.attempts set ended_at = clock_timestamp(), outcome = 'cancelled';"
            "update bon_scheduler.runs set state = 'cancelled', finished_at = clock_timestamp()"
        )
        async with asyncio.timeout(5):
            await endless.stopped.wait()

        async def forgotten() -> bool:
            return not serving.machinery.runner.under_way

        await until(forgotten)
        assert serving.machinery.metrics.fenced.labels("a-test")._value.get() == 0
    assert (await connection.fetchval(STATE), await outcomes(connection)) == ("cancelled", ["cancelled"])


async def test_a_run_whose_claim_was_never_answered_is_let_go_of_and_run(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim committed and its answer was lost: the ledger says it is ours, and we know nothing of it."""
    claim = attempts.claim
    cut = iter([True])

    async def claim_without_answer(*arguments: Any, **options: Any) -> Any:
        answer = await claim(*arguments, **options)
        if next(cut, False):
            raise ConnectionResetError("cut after the commit")
        return answer

    monkeypatch.setattr(attempts, "claim", claim_without_answer)

    @job("a-test", retry=QUICK)
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    async with service.serving(make_settings(LEASE_SECONDS="2"), jobs=[quick]):
        await connection.execute(ASK)
        assert await until_state(connection, "succeeded", "dead") == "succeeded"
    assert await outcomes(connection) == ["lost", "succeeded"]


async def test_a_run_whose_claims_connection_is_lost_after_the_answer_is_run_all_the_same(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool finds the connection dead when it is given back: the run must not stay claimed and untouched."""
    claim, release = attempts.claim, asyncpg.Pool.release
    claimed = asyncio.Event()

    async def note_claim(*arguments: Any, **options: Any) -> Any:
        answer = await claim(*arguments, **options)
        claimed.set()
        return answer

    async def release_of_a_dead_connection(pool: Any, *arguments: Any, **options: Any) -> None:
        await release(pool, *arguments, **options)
        if claimed.is_set():
            monkeypatch.setattr(asyncpg.Pool, "release", release)
            raise asyncpg.ConnectionDoesNotExistError("terminated before it was given back")

    monkeypatch.setattr(attempts, "claim", note_claim)
    monkeypatch.setattr(asyncpg.Pool, "release", release_of_a_dead_connection)

    @job("a-test", retry=QUICK)
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    async with service.serving(make_settings(LEASE_SECONDS="2"), jobs=[quick]):
        await connection.execute(ASK)
        assert await until_state(connection, "succeeded", "dead") == "succeeded"
    assert await outcomes(connection) == ["succeeded"]


@pytest.mark.parametrize(
    ("write", "fails", "states", "expected"),
    [
        ("finish", False, {"succeeded": 1}, ["succeeded"]),
        ("fail", True, {"retrying": 2, "dead": 1}, ["failed", "failed", "failed"]),
    ],
)
async def test_a_recording_whose_answer_was_lost_took_effect_once(
    make_settings: MakeSettings,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    write: str,
    fails: bool,
    states: dict[str, int],
    expected: list[str],
) -> None:
    real: Callable[..., Awaitable[str]] = getattr(attempts, write)
    answered: set[RunRef] = set()

    async def without_answer(on: AnyConnection, ref: RunRef, *arguments: Any, **options: Any) -> str:
        answer = await real(on, ref, *arguments, **options)
        if ref not in answered:
            answered.add(ref)
            raise ConnectionResetError("cut after the commit")
        return answer

    monkeypatch.setattr(attempts, write, without_answer)

    @job("a-test", retry=QUICK)
    async def handler(_: JobContext, __: NoPayload) -> Counts:
        if fails:
            raise ValueError("no")
        return {}

    async with service.serving(make_settings(), jobs=[handler]) as serving:
        await connection.execute(ASK)
        await until_state(connection, "succeeded", "dead")

        async def recorded() -> bool:
            return not serving.machinery.runner.under_way

        await until(recorded)
        counted = serving.machinery.metrics._runs
        assert {state: counted.labels("a-test", state)._value.get() for state in states} == states
        assert serving.machinery.metrics.fenced.labels("a-test")._value.get() == 0
    assert await outcomes(connection) == expected


async def test_a_read_only_database_delays_a_recording_and_loses_nothing(
    make_settings: MakeSettings, connection: Connection
) -> None:
    """A primary that failed over: it answers, and refuses every write."""
    await connection.execute("""
        create table read_only ();
        create function refuse() returns trigger language plpgsql as $$
        begin raise exception 'cannot execute UPDATE in a read-only transaction' using errcode = '25006'; end $$;
    """)
    refused = asyncio.Event()

    @job("a-test", retry=QUICK)
    async def handler(ctx: JobContext, __: NoPayload) -> Counts:
        await connection.execute("create trigger refuse before update on bon_scheduler.runs execute function refuse()")
        refused.set()
        return {"attempt": ctx.attempt}

    async with service.serving(make_settings(LEASE_SECONDS="2"), jobs=[handler]):
        await connection.execute(ASK)
        await refused.wait()
        await asyncio.sleep(1)  # several tries at recording fail
        assert await connection.fetchval(STATE) == "running"
        await connection.execute("drop trigger refuse on bon_scheduler.runs")
        assert await until_state(connection, "succeeded", "dead") == "succeeded"
    assert await outcomes(connection) == ["succeeded"]


async def test_a_queue_row_in_a_dead_hand_makes_room(make_settings: MakeSettings, connection: Connection) -> None:
    @job("a-test", retry=QUICK)
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    await service.prepare(make_settings(), jobs=[quick])
    await connection.execute(ASK)
    await connection.execute(
        "update bon_scheduler.pgqueuer set status = 'picked', queue_manager_id = gen_random_uuid(),"
        " heartbeat = clock_timestamp() - interval '1 minute', execute_after = clock_timestamp() + interval '1 hour'"
    )
    async with service.serving(make_settings(LEASE_SECONDS="2"), jobs=[quick]):
        assert await until_state(connection, "succeeded") == "succeeded"


async def test_a_handler_that_swallows_its_cancellation_is_abandoned_and_its_transaction_cut(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "DEADLINE_GRACE_SECONDS", 0.2)
    await connection.execute("create table counter (n int); insert into counter values (0)")
    let_go = asyncio.Event()

    @job("a-test", retry=QUICK, timeout=timedelta(seconds=0.5))
    async def stubborn(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute("update counter set n = n + 1")
            while ctx.attempt == 1 and not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue
            return await ctx.finish({}, on=tx)

    async with service.serving(make_settings(), jobs=[stubborn]) as serving:
        await connection.execute(ASK)
        # The second attempt updates the same row: it could not while the first still held it.
        assert await until_state(connection, "succeeded", "dead") == "succeeded"
        assert serving.machinery.runner.abandoned == 1
        let_go.set()

        async def buried() -> bool:
            return serving.machinery.runner.abandoned == 0

        await until(buried)
    assert await outcomes(connection) == ["timed_out", "succeeded"]
    assert await connection.fetchval("select n from counter") == 1


async def test_a_handler_that_has_more_to_do_after_its_end_committed_is_let_do_it(
    make_settings: MakeSettings, connection: Connection
) -> None:
    done = asyncio.Event()

    @job("a-test", retry=QUICK)
    async def handler(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.transaction() as tx:
            counts = await ctx.finish({}, on=tx)
        await asyncio.sleep(1.5)  # three passes of a lease of two seconds
        done.set()
        return counts

    async with service.serving(make_settings(LEASE_SECONDS="2"), jobs=[handler]):
        await connection.execute(ASK)
        await until_state(connection, "succeeded")
        async with asyncio.timeout(5):
            await done.wait()


@pytest.mark.parametrize("touch", [RECORD, "select from bon_scheduler.runs for share", "select 1"])
async def test_whoever_takes_a_run_over_ends_the_connections_of_the_worker_that_had_it(
    make_settings: MakeSettings, connection: Connection, touch: str
) -> None:
    """
    A worker that was frozen between asking for a statement's plan and executing it: to the server it is active,
    so no limit of idleness ends it, and it has rows locked that its successor needs: BON's, and its run's own.
    """
    await connection.execute("create table counter (n int); insert into counter values (0)")

    @job("a-test", retry=QUICK)
    async def count(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute("update counter set n = n + 1")
            return await ctx.finish({}, on=tx)

    settings = make_settings(LEASE_SECONDS="2")
    await service.prepare(settings, jobs=[count])
    frozen = Worker()
    async with db.open_control_pool(settings, 1, worker=frozen.id) as pool, pool.acquire() as held:
        await held.execute("set idle_in_transaction_session_timeout = 0")
        await connection.execute(ASK)
        await connection.execute("update bon_scheduler.runs set state = 'running', attempt = 1, worker = $1", frozen.id)
        await held.execute("begin; update counter set n = n + 100")
        await held.execute(touch)
        async with service.serving(settings, jobs=[count]):
            assert await until_state(connection, "succeeded", "dead") == "succeeded"
    assert await connection.fetchval("select n from counter") == 1


@pytest.mark.parametrize(
    "left",
    [
        "select 1",  # it waits, due at once
        "truncate bon_scheduler.pgqueuer",
        "update bon_scheduler.pgqueuer set status = 'picked', queue_manager_id = gen_random_uuid()",
        "update bon_scheduler.pgqueuer set execute_after = now() + interval '1 second'",  # as a busy job's is
        "truncate bon_scheduler.pgqueuer; update bon_scheduler.runs set attempt = 1, state = 'retrying',"
        " run_at = now() + interval '5 minutes'",
        "update bon_scheduler.runs set attempt = 1, state = 'running', worker = (select id from bon_scheduler.workers)",
    ],
)
async def test_a_clock_that_was_set_back_neither_delays_a_run_that_is_due_nor_keeps_a_dead_workers(
    make_settings: MakeSettings, connection: Connection, left: str
) -> None:
    @job("a-test", retry=QUICK)
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    settings = make_settings(LEASE_SECONDS="2")
    await service.prepare(settings, jobs=[quick])
    await connection.execute(DEAD_WORKER)
    await connection.execute(ASK)
    await connection.execute(left)
    await connection.execute(SET_BACK)
    async with service.serving(settings, jobs=[quick]):

        async def ended() -> bool:
            return bool(await connection.fetchval(STATE) == "succeeded")

        await until(ended, seconds=2 + 5)


async def test_runs_whose_rows_somebody_has_locked_keep_neither_ticks_nor_probes_waiting(
    make_settings: MakeSettings, connection: Connection, database_url: str
) -> None:
    @job("a-test", retry=QUICK)
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%claim%'"
    settings = make_settings()
    await service.prepare(settings, jobs=[quick])
    await connection.execute(f"{ASK} from generate_series(1, 6)")
    async with db.connect(database_url) as other:
        locking = other.transaction()
        await locking.start()
        await other.execute("select from bon_scheduler.runs for update")
        async with service.serving(settings, jobs=[quick]) as serving:

            async def claims_wait() -> bool:
                return bool(await connection.fetchval(waiting) > 1)

            await until(claims_wait)
            for _ in range(20):
                async with asyncio.timeout(0.4), serving.machinery.control.acquire() as control:
                    await control.execute("select pg_sleep(0.05)")
            await locking.rollback()

            async def ended() -> bool:
                return not await connection.fetchval(
                    "select count(*) from bon_scheduler.runs where state <> 'succeeded'"
                )

            await until(ended)
