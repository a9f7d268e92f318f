"""What the ledger says and what is so are brought together, by the whole service."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from bon_scheduler import Counts, JobContext, NoPayload, Retry, job, ledger, service
from bon_scheduler.database import connections
from bon_scheduler.engine import runner
from bon_scheduler.jobs import AnyJob
from bon_scheduler.ledger import attempts, changes, claims
from bon_scheduler.ledger.workers import Worker
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
       set run_at = run_at + interval '2 hours', enqueued_at = enqueued_at + interval '2 hours';
    update bon_scheduler.attempts
       set started_at = started_at + interval '2 hours', ended_at = ended_at + interval '2 hours';
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


async def test_a_run_whose_claim_was_never_answered_is_given_back_and_run(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim committed and its answer was lost: the ledger says it is ours, and we know nothing of it."""
    real, cut = claims.claim, list[bool]()

    async def claim_without_answer(*arguments: Any, **options: Any) -> Any:
        answer = await real(*arguments, **options)
        if answer.taken and not cut:
            cut.append(True)
            raise ConnectionResetError("cut after the commit")
        return answer

    monkeypatch.setattr(ledger, "claim", claim_without_answer)

    @job("a-test", retry=Retry(attempts=1))
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    async with service.serving(make_settings(LEASE_SECONDS="2"), jobs=[quick]):
        await connection.execute(ASK)
        assert await until_state(connection, "succeeded", "dead") == "succeeded"
    # At no cost: it had one attempt only.
    assert await outcomes(connection) == ["given_back", "succeeded"]
    assert await connection.fetchval("select given_back from bon_scheduler.runs") == 1


async def test_what_a_claim_that_was_cut_short_took_is_given_back_when_the_process_stops(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = claims.claim, asyncio.Event()

    async def claim_without_answer(*arguments: Any, **options: Any) -> Any:
        answer = await real(*arguments, **options)
        if answer.taken:
            taken.set()
            raise ConnectionResetError("cut after the commit")
        return answer

    monkeypatch.setattr(ledger, "claim", claim_without_answer)

    @job("a-test", retry=QUICK)
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    async with service.serving(make_settings(LEASE_SECONDS="600"), jobs=[quick]):
        await connection.execute(ASK)
        await taken.wait()
    row = await connection.fetchrow("select state::text, given_back, attempt from bon_scheduler.runs")
    assert row is not None
    assert (row["state"], row["given_back"] == row["attempt"]) == ("queued", True)


async def test_a_claim_whose_answer_comes_while_the_process_stops_is_given_back_at_once(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked, go_on = claims.claim, asyncio.Event(), asyncio.Event()

    async def slow_claim(*arguments: Any, **options: Any) -> Any:
        answer = await real(*arguments, **options)
        if answer.taken:
            asked.set()
            await go_on.wait()
        return answer

    monkeypatch.setattr(ledger, "claim", slow_claim)
    begun: list[int] = []

    @job("a-test", retry=QUICK)
    async def count(ctx: JobContext, __: NoPayload) -> Counts:
        begun.append(ctx.attempt)
        return {}

    async with service.serving(make_settings(LEASE_SECONDS="600"), jobs=[count]) as serving:
        await connection.execute(ASK)
        await asked.wait()
        serving.engine._stopping.set()
        go_on.set()
        assert await until_state(connection, "queued") == "queued"
    assert (begun, await outcomes(connection)) == ([], ["given_back"])


async def test_a_letters_place_is_given_back_with_a_claim_whose_answer_comes_while_the_process_stops(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise nobody would try a mail server that was away, for as long as a trial may take."""
    real, asked, go_on = claims.claim, asyncio.Event(), asyncio.Event()

    async def slow_claim(*arguments: Any, **options: Any) -> Any:
        answer = await real(*arguments, **options)
        if answer.taken:
            asked.set()
            await go_on.wait()
        return answer

    monkeypatch.setattr(ledger, "claim", slow_claim)

    @job("a-test", retry=QUICK, sends_mail=True)
    async def letter(_: JobContext, __: NoPayload) -> Counts:
        raise AssertionError

    await connection.execute(
        "update bon_scheduler.mail_gate"
        " set failures = 9, closed_since = now() - interval '1 hour', closed_until = now() - interval '1 second'"
    )
    trying = "select trying_until > now() from bon_scheduler.mail_gate"
    async with service.serving(make_settings(SMTP_HOST="127.0.0.1"), jobs=[letter]) as serving:
        await connection.execute(ASK)
        await asked.wait()
        assert await connection.fetchval(trying)
        serving.engine._stopping.set()
        go_on.set()
        assert await until_state(connection, "queued") == "queued"
    assert not await connection.fetchval(trying)


async def test_a_run_that_is_cancelled_and_retried_is_stopped_and_begun_anew_by_one_worker(
    make_settings: MakeSettings, connection: Connection
) -> None:
    """It begins anew before the first attempt is known to have lost it, so that two of one run are under way."""
    begun: list[int] = []
    stopped, over = asyncio.Event(), asyncio.Event()

    @job("a-test", retry=QUICK)
    async def work(ctx: JobContext, __: NoPayload) -> Counts:
        begun.append(ctx.attempt)
        try:
            await over.wait()
        except asyncio.CancelledError:
            assert ctx.attempt == 1
            stopped.set()
            raise
        return {}

    async with service.serving(make_settings(LEASE_SECONDS="2"), jobs=[work]) as serving:
        run_id = await connection.fetchval(ASK)
        await until_state(connection, "running")
        async with connection.transaction():
            for action in (changes.Action.CANCEL, changes.Action.RETRY):
                await changes.change_all(connection, action, [run_id], by="dana", reason="on second thoughts")
        async with asyncio.timeout(5):
            await stopped.wait()
        for _ in range(2):
            await serving.machinery.reconciler.make_pass()
        over.set()
        assert await until_state(connection, "succeeded", "dead") == "succeeded"
        await until(lambda: nothing_under_way(serving))
    assert (begun, await outcomes(connection)) == ([1, 2], ["cancelled", "succeeded"])


async def nothing_under_way(serving: service.Serving) -> bool:
    return not serving.engine.active and not serving.machinery.runner.under_way


async def test_a_worker_is_declared_dead_together_with_the_release_of_what_it_had_or_not_at_all(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried, go_on = attempts.release_lost, asyncio.Semaphore(0), asyncio.Event()

    async def release(on: Any) -> Any:
        released = await real(on)
        if released and not go_on.is_set():
            tried.release()
            raise ConnectionResetError("cut before the commit")
        return released

    monkeypatch.setattr(ledger, "release_lost", release)

    @job("a-test", retry=QUICK)
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    settings = make_settings(LEASE_SECONDS="2")
    await service.prepare(settings, jobs=[quick])
    worker = await connection.fetchval(DEAD_WORKER)
    await connection.execute(ASK)
    await connection.execute("update bon_scheduler.runs set state = 'running', attempt = 1, worker = $1", worker)
    async with service.serving(settings, jobs=[quick]):
        for _ in range(2):
            await tried.acquire()
            alive = "select last_word is not null from bon_scheduler.workers where id = $1"
            assert (await connection.fetchval(alive, worker), await connection.fetchval(STATE)) == (True, "running")
        go_on.set()
        assert await until_state(connection, "succeeded") == "succeeded"


async def test_an_attempt_whose_end_cannot_be_recorded_counts(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its handler would be called for ever."""

    async def refuse(*_: Any, **__: Any) -> Any:
        raise asyncpg.CheckViolationError("no")

    monkeypatch.setattr(ledger, "finish_many", refuse)
    monkeypatch.setattr(ledger, "fail", refuse)
    begun: list[int] = []

    @job("a-test", retry=QUICK)
    async def count(ctx: JobContext, __: NoPayload) -> Counts:
        begun.append(ctx.attempt)
        return {}

    async with service.serving(make_settings(LEASE_SECONDS="2"), jobs=[count]):
        await connection.execute(ASK)
        assert await until_state(connection, "dead") == "dead"
    assert (begun, await outcomes(connection)) == ([1, 2, 3], ["lost"] * 3)


@pytest.mark.parametrize(
    ("write", "fails", "states", "expected"),
    [
        ("finish_many", False, {"succeeded": 1}, ["succeeded"]),
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
    real: Callable[..., Awaitable[Any]] = getattr(attempts, write)
    answered: set[str] = set()

    async def without_answer(*arguments: Any, **options: Any) -> Any:
        answer = await real(*arguments, **options)
        attempt = str(options.get("ref") or arguments[1])
        if attempt not in answered:
            answered.add(attempt)
            raise ConnectionResetError("cut after the commit")
        return answer

    monkeypatch.setattr(ledger, write, without_answer)

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
    async with connections.open_control_pool(settings, 1, worker=frozen.id) as pool, pool.acquire() as held:
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
        "update bon_scheduler.runs set run_at = now() - interval '1 minute'",  # it was put off, and its time has come
        "update bon_scheduler.runs set attempt = 1, state = 'retrying', ready = false,"
        " run_at = now() + interval '5 minutes'; insert into bon_scheduler.attempts (run_id, attempt, worker, host,"
        " started_at, ended_at, outcome) select id, 1, gen_random_uuid(), 'here', now(), now(), 'failed'"
        " from bon_scheduler.runs",
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


async def test_runs_whose_rows_somebody_has_locked_keep_neither_runs_nor_ticks_nor_probes_waiting(
    make_settings: MakeSettings, connection: Connection, database_url: str
) -> None:
    @job("a-test", retry=QUICK)
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    settings = make_settings()
    await service.prepare(settings, jobs=[quick])
    await connection.execute(f"{ASK} from generate_series(1, 6)")
    async with connections.connect(database_url) as other:
        locking = other.transaction()
        await locking.start()
        await other.execute("select from bon_scheduler.runs for update")
        async with service.serving(settings, jobs=[quick]) as serving:
            free = await connection.fetchval(ASK)

            async def free_ended() -> bool:
                state = await connection.fetchval("select state::text from bon_scheduler.runs where id = $1", free)
                return bool(state == "succeeded")

            await until(free_ended)
            for _ in range(20):
                async with asyncio.timeout(0.4), serving.machinery.control.acquire() as control:
                    await control.execute("select pg_sleep(0.05)")
            await locking.rollback()
            await until(lambda: all_succeeded(connection))


async def all_succeeded(connection: Connection) -> bool:
    return not await connection.fetchval("select count(*) from bon_scheduler.runs where state <> 'succeeded'")


async def test_released_runs_are_counted_as_rescued_and_nothing_else_is(
    make_settings: MakeSettings, connection: Connection
) -> None:
    begun = 0

    @job("a-test", retry=QUICK)
    async def flaky(ctx: JobContext, __: NoPayload) -> Counts:
        nonlocal begun
        begun += 1
        if ctx.attempt == 1:
            raise ConnectionError("once")
        return {}

    settings = make_settings(LEASE_SECONDS="2")
    await service.prepare(settings, jobs=[flaky])
    worker = await connection.fetchval(DEAD_WORKER)
    await connection.execute(f"{ASK} from generate_series(1, 12)")
    await connection.execute(
        "update bon_scheduler.runs set state = 'running', attempt = 1, worker = $1"
        " where id in (select id from bon_scheduler.runs limit 5)",
        worker,
    )
    async with service.serving(settings, jobs=[flaky]) as serving:
        await until(lambda: all_succeeded(connection))
        assert serving.machinery.metrics.rescued.labels("a-test")._value.get() == 5
    assert begun == 7 * 2 + 5
