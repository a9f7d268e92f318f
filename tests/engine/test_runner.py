"""One attempt at a time: what a handler may do wrong, and what the ledger then says."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import pytest

from bon_scheduler import Counts, JobContext, NeverRetryError, NoPayload, Payload, Retry, RetryLaterError, job
from bon_scheduler.jobs import AnyJob, BusinessOutcome, NotNowError
from tests.conftest import Connection, RunJob

Body = Callable[[JobContext], Awaitable[Counts]]
MAKE_WITNESS = "create table if not exists witness (run_id uuid, attempt int)"
WITNESS = "insert into witness values ($1, $2)"


def job_of(body: Body, *, timeout: timedelta = timedelta(seconds=30)) -> AnyJob:
    @job("a-test", timeout=timeout)
    async def handler(ctx: JobContext, _: NoPayload) -> Counts:
        return await body(ctx)

    return handler


async def test_counts_of_a_handler_are_the_runs(run_job: RunJob) -> None:
    async def body(_: JobContext) -> Counts:
        return {"zebra": 1, "ant": 2}

    a_test = job_of(body)
    report = await run_job(a_test, jobs=[a_test])
    assert (report.run["state"], list(report.run["counts"].items())) == ("succeeded", [("zebra", 1), ("ant", 2)])


@pytest.mark.parametrize(
    "raised", [ValueError("no"), NeverRetryError("no"), SystemExit("no"), asyncio.CancelledError("no")]
)
async def test_whatever_a_handler_raises_ends_its_run_and_nothing_else(run_job: RunJob, raised: BaseException) -> None:
    async def body(_: JobContext) -> Counts:
        raise raised

    a_test = job_of(body)
    report = await run_job(a_test, jobs=[a_test])
    assert report.run["state"] == "dead"
    remedy = r"\. A handler does not end the process\. [\w ,]+" if isinstance(raised, SystemExit) else ""
    assert re.fullmatch(
        rf"{type(raised).__name__}: no{remedy}( \(at tests/engine/test_runner.py:\d+\))?", report.run["error"]
    )


@pytest.mark.parametrize("result", [None, 3, {"n": 2**70}, {"n": -1}, {"n": "two"}, {2: 2}], ids=repr)
async def test_a_result_that_is_no_counts_ends_its_run_and_says_what_to_return(run_job: RunJob, result: Any) -> None:
    async def body(_: JobContext) -> Counts:
        return cast("Counts", result)

    a_test = job_of(body)
    report = await run_job(a_test, jobs=[a_test])
    assert report.run["state"] == "dead"
    assert re.match(
        r'NeverRetryError: The handler of "a-test" at tests/\S+ did not return counts, but', report.run["error"]
    )
    assert 'as in {"deleted": 2}, or what ctx.finish returned.' in report.run["error"]


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"], ids=ascii)
async def test_an_error_that_no_text_column_takes_is_recorded_without_what_it_cannot_hold(
    run_job: RunJob, text: str
) -> None:
    async def body(_: JobContext) -> Counts:
        raise ValueError(text)

    a_test = job_of(body)
    report = await run_job(a_test, jobs=[a_test])
    assert report.run["state"] == "dead"
    assert report.run["error"].partition(" (at ")[0] in {"ValueError: a\ufffdb", "ValueError: a?b"}


async def test_an_end_that_the_database_refuses_is_recorded_as_such(run_job: RunJob) -> None:
    """Otherwise the run would be made again and again, and its worker be blamed."""

    async def body(_: JobContext) -> Counts:
        raise NotNowError("not now", after=timedelta.max)

    a_test = job_of(body)
    report = await run_job(a_test, jobs=[a_test])
    assert report.run["state"] == "dead"
    assert report.run["error"].startswith("how it ended (given_back) cannot be recorded: ")


async def test_a_handler_past_its_deadline_is_cancelled_and_rolled_back(
    run_job: RunJob, connection: Connection
) -> None:
    await connection.execute(MAKE_WITNESS)

    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute(WITNESS, ctx.run_id, ctx.attempt)
            await asyncio.sleep(60)
        return {}

    a_test = job_of(body, timeout=timedelta(seconds=0.2))
    report = await run_job(a_test, jobs=[a_test])
    line = body.__code__.co_firstlineno + 3
    place = f"tests/engine/test_runner.py:{line}, in sleep"
    assert report.run["error"] == f"timed out after 0:00:00.200000, waiting at {place}"
    assert await connection.fetchval("select outcome from bon_scheduler.attempts") == "timed_out"
    assert await connection.fetchval("select count(*) from witness") == 0


async def test_an_effect_and_the_runs_success_commit_together(run_job: RunJob, connection: Connection) -> None:
    """Were the handler killed right after the commit, the run must not be open any more."""
    await connection.execute(MAKE_WITNESS)
    seen: list[tuple[int, str]] = []

    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute(WITNESS, ctx.run_id, ctx.attempt)
            await ctx.finish({"rows": 1}, on=tx)
        query = "select (select count(*) from witness), (select state::text from bon_scheduler.runs)"
        row = await connection.fetchrow(query)
        assert row is not None
        seen.append(tuple(row))
        return {"rows": 1}

    a_test = job_of(body)
    await run_job(a_test, jobs=[a_test])
    assert seen == [(1, "succeeded")]


@pytest.mark.parametrize("way", ["transaction", "savepoint"])
async def test_a_finish_that_was_rolled_back_fences_nothing_and_ends_nothing(run_job: RunJob, way: str) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            with suppress(ZeroDivisionError):
                if way == "savepoint":
                    async with tx.transaction():
                        await ctx.finish({"n": 1}, on=tx)
                        1 / 0  # noqa: B018 - this is the fault
                async with ctx.transaction() as other:
                    await ctx.finish({"n": 1}, on=other)
                    1 / 0  # noqa: B018 - this is the fault
        return {"n": 2}

    a_test = job_of(body)
    report = await run_job(a_test, jobs=[a_test])
    assert (report.run["state"], dict(report.run["counts"])) == ("succeeded", {"n": 2})


async def test_a_transaction_after_a_finish_that_was_rolled_back_is_fenced(
    run_job: RunJob, connection: Connection
) -> None:
    await connection.execute(MAKE_WITNESS)

    async def body(ctx: JobContext) -> Counts:
        with suppress(ZeroDivisionError):
            async with ctx.transaction() as tx:
                await ctx.finish({}, on=tx)
                1 / 0  # noqa: B018 - this is the fault
        async with ctx.transaction() as tx:
            await connection.execute("update bon_scheduler.runs set attempt = attempt + 1")
            await tx.execute(WITNESS, ctx.run_id, ctx.attempt)
        return {}

    a_test = job_of(body)
    await run_job(a_test, jobs=[a_test])
    assert await connection.fetchval("select count(*) from witness") == 0


async def test_a_transaction_whose_finish_was_rolled_back_with_its_savepoint_is_fenced(
    run_job: RunJob, connection: Connection
) -> None:
    await connection.execute(MAKE_WITNESS)

    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            with suppress(ZeroDivisionError):
                async with tx.transaction():
                    await ctx.finish({}, on=tx)
                    1 / 0  # noqa: B018 - this is the fault
            await connection.execute("update bon_scheduler.runs set attempt = attempt + 1")  # a successor
            await tx.execute(WITNESS, ctx.run_id, ctx.attempt)
        return {}

    a_test = job_of(body)
    assert await run_job_until_lost(run_job, a_test, connection) == "lost"
    assert await connection.fetchval("select count(*) from witness") == 0


async def test_an_effect_whose_run_cannot_finish_is_rolled_back(run_job: RunJob, connection: Connection) -> None:
    await connection.execute(MAKE_WITNESS)

    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute(WITNESS, ctx.run_id, ctx.attempt)
            await connection.execute("update bon_scheduler.runs set attempt = attempt + 1")  # a successor
            return await ctx.finish({}, on=tx)

    a_test = job_of(body)
    report = await run_job_until_lost(run_job, a_test, connection)
    assert report == "lost"
    assert await connection.fetchval("select count(*) from witness") == 0


async def test_a_transaction_of_an_attempt_that_lost_its_run_is_rolled_back(
    run_job: RunJob, connection: Connection
) -> None:
    await connection.execute(MAKE_WITNESS)

    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute(WITNESS, ctx.run_id, ctx.attempt)
            await connection.execute("update bon_scheduler.runs set attempt = attempt + 1")  # a successor
        return {}

    a_test = job_of(body)
    assert await run_job_until_lost(run_job, a_test, connection) == "lost"
    assert await connection.fetchval("select count(*) from witness") == 0


async def run_job_until_lost(run_job: RunJob, a_test: AnyJob, connection: Connection) -> str:
    """Run once; return the attempt's outcome. The run itself stays with its imagined successor."""
    await run_job(a_test, jobs=[a_test])
    return str(await connection.fetchval("select outcome from bon_scheduler.attempts"))


async def test_a_run_with_a_failed_business_is_partial(run_job: RunJob) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await ctx.record([BusinessOutcome(ctx.run_id, "failed", error="refused")], on=tx)
            return await ctx.finish({}, on=tx)

    a_test = job_of(body)
    report = await run_job(a_test, jobs=[a_test])
    assert (report.run["state"], report.businesses) == ("partial", {"touched": 1, "failed": 1})


class Whom(Payload):
    name: str


async def test_a_stored_payload_that_is_not_the_jobs_ends_dead_at_once_without_its_values(
    run_job: RunJob,
) -> None:
    @job("a-test")
    async def handler(_: JobContext, payload: Whom) -> Counts:
        raise AssertionError(payload)

    unchecked = Whom.model_construct(name=7)
    with pytest.warns(UserWarning, match="serialized value may not be as expected"):
        report = await run_job(handler, unchecked, jobs=[handler])
    assert report.run["state"] == "dead"
    assert "name: input should be a valid string" in report.run["error"]
    assert "7" not in report.run["error"]


async def test_a_fault_that_passes_is_retried_and_then_succeeds(run_job: RunJob, connection: Connection) -> None:
    """The run that causes it makes one attempt; what it causes follows its own policy."""

    async def pass_on(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await ctx.enqueue(flaky, NoPayload(), on=tx)
            return await ctx.finish({}, on=tx)

    @job("a-flaky-test", retry=Retry(attempts=3, delay=timedelta(milliseconds=50)))
    async def flaky(ctx: JobContext, _: NoPayload) -> Counts:
        if ctx.attempt < 3:
            raise ConnectionError("away")
        return {"attempt": ctx.attempt}

    parent = job_of(pass_on)
    report = await run_job(parent, jobs=[parent, flaky])
    assert [(run["state"], run["counts"]) for run in report.caused] == [("succeeded", {"attempt": 3})]
    outcomes = await connection.fetch(
        "select outcome from bon_scheduler.attempts join bon_scheduler.runs on id = run_id"
        " where job = 'a-flaky-test' order by bon_scheduler.attempts.attempt"
    )
    assert [row["outcome"] for row in outcomes] == ["failed", "failed", "succeeded"]


async def test_a_run_out_of_attempts_is_dead_with_the_last_error(run_job: RunJob) -> None:
    async def pass_on(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await ctx.enqueue(failing, NoPayload(), on=tx)
            return await ctx.finish({}, on=tx)

    @job("a-failing-test", retry=Retry(attempts=2, delay=timedelta(milliseconds=10)))
    async def failing(ctx: JobContext, _: NoPayload) -> Counts:
        raise RetryLaterError(f"attempt {ctx.attempt}", after=timedelta(milliseconds=10))

    parent = job_of(pass_on)
    report = await run_job(parent, jobs=[parent, failing])
    assert [(run["state"], run["error"]) for run in report.caused] == [("dead", "RetryLaterError: attempt 2")]
    assert not report.went_well


async def test_a_run_is_logged_at_its_start_and_once_at_its_end_with_what_binds_it(
    run_job: RunJob, logged: Callable[[], str]
) -> None:
    async def body(_: JobContext) -> Counts:
        return {"marked": 2}

    a_test = job_of(body)
    report = await run_job(a_test, jobs=[a_test])
    events = [json.loads(line) for line in logged().splitlines()]
    assert [event["event"] for event in events] == ["run.started", "run.ended"]
    for event in events:
        assert event["job"] == "a-test"
        assert event["run_id"] == str(report.run["run_id"])
        assert event["attempt"] == 1
        assert event["fire_time"] == report.run["fire_time"].isoformat()
    assert (events[1]["outcome"], events[1]["counts"]) == ("succeeded", {"marked": 2})
    assert events[1]["duration_ms"] >= 0


async def test_an_error_is_recorded_and_logged_without_the_row_it_quotes(
    run_job: RunJob, connection: Connection, logged: Callable[[], str]
) -> None:
    await connection.execute("create table people (name text primary key check (name <> 'כהן'))")

    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute("insert into people values ('כהן')")
        return {}

    a_test = job_of(body)
    report = await run_job(a_test, jobs=[a_test])
    assert "CheckViolationError" in report.run["error"]
    assert "כהן" not in report.run["error"] + logged()


@pytest.mark.parametrize("sql", ["select $1::text::uuid", "select $1::text::date", "select $1::text::int"])
async def test_an_error_is_recorded_and_logged_without_the_value_it_quotes(
    run_job: RunJob, logged: Callable[[], str], sql: str
) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.connection() as connection:
            await connection.fetchval(sql, 'כהן\'s "shop", 054-1234567')
        return {}

    a_test = job_of(body)
    report = await run_job(a_test, jobs=[a_test])
    assert report.run["state"] == "dead"
    assert not any(word in report.run["error"] + logged() for word in ("כהן", "shop", "054-1234567"))


async def test_a_parameter_of_the_wrong_type_is_recorded_without_its_value(run_job: RunJob) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.connection() as connection:
            await connection.fetchval("select $1::int", "כהן")
        return {}

    a_test = job_of(body)
    report = await run_job(a_test, jobs=[a_test])
    told = "DataError: invalid input for query argument $1 ('str' object cannot be interpreted as an integer) (at "
    assert report.run["error"].startswith(told)


def test_waits_grow_and_are_spread() -> None:
    policy = Retry(delay=timedelta(seconds=10), factor=2, longest=timedelta(seconds=60))
    for attempt, whole in ((1, 10), (2, 20), (3, 40), (4, 60), (1000, 60)):
        waits = {policy.wait(attempt).total_seconds() for _ in range(50)}
        assert len(waits) > 1
        assert all(whole / 2 <= wait <= whole for wait in waits)


def test_a_job_reads_its_payloads_type_and_its_summary_from_the_handler() -> None:
    @job("a-test")
    async def handler(_: JobContext, payload: Whom) -> Counts:
        """Greet somebody."""
        return {"letters": len(payload.name)}

    assert (handler.payload, handler.summary) == (Whom, "Greet somebody")
    assert replace(handler, name="b").name == "b"
