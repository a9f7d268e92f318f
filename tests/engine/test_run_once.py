"""A run in the foreground, interrupted at every step."""

import asyncio
import time
import types
from collections.abc import Coroutine, Generator
from datetime import UTC, datetime
from itertools import count
from typing import Any, TypeVar

import pytest

from bon_scheduler import engine, service
from bon_scheduler.jobs import Counts, Cron, JobContext, NoPayload, job
from tests.conftest import Connection, MakeSettings, RunJob

T = TypeVar("T")
STATES = "select state::text, reason, count(*) as runs from bon_scheduler.runs group by 1, 2"
GIVEN_BACK = "select count(*) from bon_scheduler.attempts where outcome = 'given_back'"
ACTIONS = "select count(*) from bon_scheduler.operator_actions where action = 'cancel' and reason = 'interrupted'"


@types.coroutine
def interrupted_at(step: int, work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Await `work`; cancel the task when it waits for the `step`th time."""
    waits = 0
    while True:
        try:
            waiting = work.send(None)
            while True:
                waits += 1
                if waits == step:
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                try:
                    yield waiting
                except asyncio.CancelledError as error:
                    waiting = work.throw(error)
                else:
                    waiting = work.send(None)
        except StopIteration as ended:
            result: T = ended.value
            return result


@job("linger")
async def linger(ctx: JobContext, _: NoPayload) -> Counts:
    """Take a while, and end with the last transaction."""
    async with ctx.transaction() as tx:
        await tx.execute("select pg_sleep(0.02)")
        return await ctx.finish({"lingered": 1}, on=tx)


async def test_an_interruption_at_any_step_leaves_no_run_that_another_replica_would_go_on_with(
    make_settings: MakeSettings, connection: Connection
) -> None:
    """However near it was to the commit of the claim: the run is cancelled, has ended, or never was."""
    async with service.machinery(make_settings(), jobs=[linger]) as parts:

        async def run(step: int) -> engine.RunReport:
            return await interrupted_at(
                step,
                engine.run_once(
                    parts.pool,
                    parts.runner,
                    parts.jobs,
                    engine.Order(job=linger, payload=NoPayload(), fire_time=datetime.now(UTC), asked_by="a test"),
                    concurrency=1,
                ),
            )

        for _ in range(2):  # the first time statements are prepared, and steps come that do not come again
            for step in count(1):
                (outcome,) = await asyncio.gather(asyncio.create_task(run(step)), return_exceptions=True)
                if isinstance(outcome, engine.RunReport):
                    break
                assert isinstance(outcome, asyncio.CancelledError)
                left = {(row["state"], row["reason"]) for row in await connection.fetch(STATES)}
                assert left <= {("cancelled", "interrupted"), ("succeeded", None)}, f"at step {step}"
    assert await connection.fetchval(ACTIONS) > 2
    assert await connection.fetchval(GIVEN_BACK) == 0


@job("nightly", schedule=Cron("0 3 * * *"))
async def nightly(_: JobContext, __: NoPayload) -> Counts:
    """Be exclusive."""
    return {}


async def hold_nightly(connection: Connection, seen_at: str, *, lease_seconds: int = 2) -> None:
    """Have a worker that was last seen then be at a run of it."""
    await connection.execute(f"""
        insert into bon_scheduler.jobs (name, exclusive) values ('nightly', 'job');
        insert into bon_scheduler.workers (id, host, pid, version, lease, seen_at)
        values (gen_random_uuid(), 'elsewhere', 1, '0', '{lease_seconds} s', {seen_at});
        insert into bon_scheduler.runs (job, concurrency_key, origin, state, attempt, worker)
        select 'nightly', 'nightly', 'person', 'running', 1, id from bon_scheduler.workers;
        insert into bon_scheduler.attempts (run_id, attempt, worker, host, started_at)
        select id, attempt, worker, 'elsewhere', now() from bon_scheduler.runs;
    """)


@pytest.mark.parametrize("seen_at", ["now() - interval '1 hour'", "now() + interval '1 hour'"])
async def test_who_looks_silent_is_watched_for_a_lease_by_the_only_process_there_is(
    run_job: RunJob, connection: Connection, seen_at: str
) -> None:
    await hold_nightly(connection, seen_at)
    before = time.monotonic()
    report = await run_job(nightly, jobs=[nightly], LEASE_SECONDS="2")
    assert report.went_well
    assert time.monotonic() - before >= 2


async def test_who_was_heard_within_its_lease_is_not_waited_for(run_job: RunJob, connection: Connection) -> None:
    await hold_nightly(connection, "now()", lease_seconds=600)
    with pytest.raises(engine.AlreadyRunningError, match="already running on elsewhere"):
        await run_job(nightly, jobs=[nightly])


async def test_a_claim_whose_commit_is_slow_is_not_taken_for_lost(run_job: RunJob, connection: Connection) -> None:
    """Longer than the time between two passes of the reconciliation, which looks for runs it knows nothing of."""
    await connection.execute("""
        create function slow_commit() returns trigger language plpgsql
            as $$ begin perform pg_sleep(0.7); return null; end $$;
        create constraint trigger slow after insert or update on bon_scheduler.runs
            deferrable initially deferred for each row when (new.state = 'running') execute function slow_commit()
    """)
    for _ in range(2):
        report = await run_job(linger, jobs=[linger], LEASE_SECONDS="2")
        assert (report.run["state"], report.run["attempt"]) == ("succeeded", 1)
    assert await connection.fetchval(GIVEN_BACK) == 0


async def test_what_a_run_that_has_ended_caused_is_worked_through_as_well(
    run_job: RunJob, connection: Connection
) -> None:
    """The look at what has not ended passes over an ended run, and so over what that caused."""

    @job("last")
    async def last(_: JobContext, __: NoPayload) -> Counts:
        return {}

    @job("middle")
    async def middle(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.transaction() as tx:
            await ctx.enqueue(last, NoPayload(), on=tx)
            return await ctx.finish({}, on=tx)

    @job("first")
    async def first(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.transaction() as tx:
            await ctx.enqueue(middle, NoPayload(), on=tx)
            return await ctx.finish({}, on=tx)

    report = await run_job(first, jobs=[first, middle, last])
    assert [(run["job"], run["state"]) for run in report.caused] == [("middle", "succeeded"), ("last", "succeeded")]
    assert await connection.fetchval("select count(*) from bon_scheduler.runs") == 3


@pytest.mark.parametrize("given", ["now", "fire_time"])
async def test_a_test_that_gives_one_instant_has_the_other_by_it(run_job: RunJob, given: str) -> None:
    """`run_job` of a test: what is listed in docs/testing.md works one by one."""
    instant = datetime(2025, 3, 28, 3, 30, tzinfo=UTC)
    seen = []

    @job("look-at-the-clock")
    async def look(ctx: JobContext, _: NoPayload) -> Counts:
        seen.append((ctx.fire_time, ctx.now))
        return {}

    report = await run_job(look, jobs=[look], **{given: instant})
    assert report.run["state"] == "succeeded", report.run["error"]
    assert seen == [(instant, instant)]
