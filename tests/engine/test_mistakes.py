"""What an author did wrong in a handler is told by the run's error: where, and what to write instead."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from bon_scheduler import Counts, JobContext, NoPayload, Payload, Retry, job, service
from bon_scheduler.config import Settings
from bon_scheduler.engine import Order
from bon_scheduler.jobs import AnyJob, HeldError, NotNowError, RetryLaterError, declared_at
from tests.conftest import Connection, RunJob

Body = Callable[[JobContext], Awaitable[Counts]]
HERE = f"tests/engine/{Path(__file__).name}"
SOURCE = Path(__file__).read_text("utf-8").splitlines()
MAKE_NOTES = "create table notes (note text)"
ADD_NOTE = "insert into notes values ('secret')"
NO_SUCH_COLUMN = """
    select note,
           nothing
      from notes
"""
NO_SYNTAX = """
    select note
      form notes
     where note = 'secret'
"""
TOO_MUCH = "insert into notes (note) values ($1::text::int::text)"


def job_of(body: Body, *, name: str = "a-test") -> AnyJob:
    @job(name, timeout=timedelta(seconds=30), retry=Retry(attempts=1))
    async def handler(ctx: JobContext, _: NoPayload) -> Counts:
        return await body(ctx)

    return handler


def line_of(body: Any, after: int) -> int:
    return int(body.__code__.co_firstlineno) + after


@pytest.fixture
async def error_of(run_job: RunJob, connection: Connection) -> Callable[[Body], Awaitable[str]]:
    """Run a handler that must end its run `dead`, having kept nothing; return the error."""
    await connection.execute(MAKE_NOTES)

    async def run(body: Body) -> str:
        each = job_of(body)
        report = await run_job(each, jobs=[each])
        assert report.run["state"] == "dead", report.run
        assert await connection.fetchval("select count(*) from notes") == 0
        assert "secret" not in report.run["error"]
        return cast("str", report.run["error"])

    return run


ErrorOf = Callable[[Body], Awaitable[str]]


async def test_a_forgotten_await_of_a_statement_is_named_and_nothing_commits(error_of: ErrorOf) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute(ADD_NOTE)
            tx.execute(ADD_NOTE)  # type: ignore[unused-coroutine]
            return await ctx.finish({"notes": 2}, on=tx)

    told = await error_of(body)
    assert f"Never awaited, so not done: Connection.execute at {HERE}:{line_of(body, 3)}" in told


async def test_a_forgotten_await_of_finish_is_named_and_nothing_commits(error_of: ErrorOf) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute(ADD_NOTE)
            ctx.finish({"notes": 1}, on=tx)  # type: ignore[unused-coroutine]
            return {"notes": 1}

    assert f"AttemptContext.finish at {HERE}:{line_of(body, 3)}" in await error_of(body)


async def test_a_coroutine_that_is_kept_and_never_awaited_is_named(error_of: ErrorOf) -> None:
    async def body(ctx: JobContext) -> Counts:
        kept = asyncio.sleep(0)
        del ctx
        return {"kept": int(asyncio.iscoroutine(kept))}

    assert "Never awaited, so not done: sleep" in await error_of(body)


async def test_a_coroutine_as_counts_is_named(run_job: RunJob) -> None:
    @job("a-test")
    async def forgetful(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.transaction() as tx:
            return cast("Counts", ctx.finish({"notes": 1}, on=tx))

    report = await run_job(forgetful, jobs=[forgetful])
    assert report.run["state"] == "dead"
    assert "returned AttemptContext.finish and did not await it" in report.run["error"]
    assert f"{HERE}:" in report.run["error"]


async def test_what_is_forgotten_in_a_dry_run_is_told_too(settings: Settings, connection: Connection) -> None:
    await connection.execute(MAKE_NOTES)

    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            tx.execute(ADD_NOTE)  # type: ignore[unused-coroutine]
        return {}

    order = Order(
        job=job_of(body, name="session-cleanup"), payload=NoPayload(), fire_time=datetime.now(UTC), asked_by="a test"
    )
    async with service.dry_runner(settings) as dry_runner:
        report = await dry_runner.run(order)
    assert report.run["state"] == "dead"
    assert "Never awaited" in report.run["error"]


async def test_finish_twice_is_told_and_nothing_commits(error_of: ErrorOf) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute(ADD_NOTE)
            await ctx.finish({"notes": 1}, on=tx)
            return await ctx.finish({"notes": 1}, on=tx)

    told = await error_of(body)
    assert "ctx.finish was called twice" in told
    assert f"(at {HERE}:{line_of(body, 4)})" in told


async def test_finish_after_finish_has_committed_is_logged(run_job: RunJob, logged: Callable[[], str]) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await ctx.finish({"notes": 1}, on=tx)
        async with ctx.transaction() as tx:
            return await ctx.finish({"notes": 1}, on=tx)

    each = job_of(body)
    report = await run_job(each, jobs=[each])
    assert report.run["state"] == "succeeded"
    events = [json.loads(line) for line in logged().splitlines()]
    told = [event["error"] for event in events if event["event"] == "handler.raised_after_finish"]
    assert len(told) == 1
    assert "called twice" in told[0]


@pytest.mark.parametrize("counts", [{"notes": -1}, {"notes": 2**63}, {"notes": "1"}, {1: 1}])
async def test_finish_without_counts_is_told_and_nothing_commits(error_of: ErrorOf, counts: Any) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute(ADD_NOTE)
            return await ctx.finish(counts, on=tx)

    told = await error_of(body)
    assert "ctx.finish was not given counts" in told
    assert f"(at {HERE}:{line_of(body, 3)})" in told


async def test_finish_outside_a_transaction_is_told(error_of: ErrorOf) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.connection() as connection:
            return await ctx.finish({"notes": 1}, on=connection)

    told = await error_of(body)
    assert "outside a transaction" in told
    assert f"(at {HERE}:{line_of(body, 2)})" in told


@pytest.mark.parametrize(
    ("statement", "value", "types"),
    [
        ("select $1::date", "secret", "expected a date, got 'str'"),
        ("select $1::timestamptz", "secret", "expected a datetime.date or datetime.datetime instance, got 'str'"),
        ("select $1::int", "secret", "'str' object cannot be interpreted as an integer"),
        ("select $1::text", 1, "expected str, got int"),
        ("select $1::int", 2**40, "value out of int32 range"),
        ("select $1::int[]", 5, "a sized iterable container expected (got type 'int')"),
        ("select $1::bool", "secret", "a boolean is required (got type str)"),
        ("select $1::bytea", "secret", "a bytes-like object is required, not 'str'"),
        ("select $1::float8", "secret", "must be real number, not str"),
        ("select $1::interval", "secret", "'str' object has no attribute 'days'"),
        ("select $1::uuid", "secret", None),
        ("select $1::numeric", "secret", None),
        ("select $1::date", "secret (expected secret, got 'secret')", "got 'str'"),
        ("select $1::uuid", "x (expected secret, got 'secret')", None),
        ("select $1::inet", "secret", None),
    ],
)
@pytest.mark.samples(5)
async def test_a_parameter_of_another_type_is_told_by_its_types_alone(
    error_of: ErrorOf, statement: str, value: object, types: str | None
) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.connection() as connection:
            await connection.fetchval(statement, value)
        return {}

    told = await error_of(body)
    assert "invalid input for query argument $1" in told
    assert f"{HERE}:{line_of(body, 2)}" in told
    assert types is None or types in told, told


@pytest.mark.parametrize(
    ("name", "line"), [("NO_SUCH_COLUMN", 2), ("NO_SYNTAX", 2)], ids=["no such column", "no syntax"]
)
async def test_sql_that_does_not_prepare_is_told_with_its_name_and_its_line(
    error_of: ErrorOf, name: str, line: int
) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await tx.fetch(globals()[name])
        return {}

    expected = SOURCE.index(f'{name} = """') + 1 + line
    assert f"at {HERE}:{line_of(body, 2)}, in {name} at {HERE}:{expected})" in await error_of(body)


async def test_a_refusal_of_the_server_names_the_statement(error_of: ErrorOf) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute(TOO_MUCH, "secret")
        return {}

    told = await error_of(body)
    assert f"in TOO_MUCH at {HERE}:" in told


async def test_a_mistake_in_python_is_told_with_its_line(error_of: ErrorOf) -> None:
    async def body(ctx: JobContext) -> Counts:
        del ctx
        return {"n": cast("Any", date(2026, 1, 1)) + 1}

    assert f"(at {HERE}:{line_of(body, 2)})" in await error_of(body)


async def test_debug_tells_how_long_connections_were_waited_for_and_no_sql(
    run_job: RunJob, connection: Connection, logged: Callable[[], str]
) -> None:
    await connection.execute(MAKE_NOTES)

    async def body(ctx: JobContext) -> Counts:
        for _ in range(60):
            async with ctx.transaction() as tx:
                await tx.execute(ADD_NOTE)
        return {}

    each = job_of(body)
    report = await run_job(each, jobs=[each])
    assert report.run["state"] == "succeeded"
    events = [json.loads(line) for line in logged().splitlines()]
    lines = [event for event in events if event["event"] == "connection.returned"]
    assert len(lines) == 50
    assert all(event["statements"] >= 2 and event["job"] == "a-test" for event in lines)
    (whole,) = [event for event in events if event["event"] == "run.timings"]
    assert whole["connections"] == 60
    assert whole["statements"] >= 120
    assert whole["statements_ms"] > 0
    assert "insert" not in logged()


RETURNED = {
    "a text": ("done", "something of type str"),
    "None": (None, "None"),
    "a float": (1.5, "something of type float"),
    "a generator": ((number for number in range(3)), "something of type generator"),
    "a float in it": ({"notes": 1.5}, 'a mapping whose "notes" is of type float'),
    "a negative number": ({"notes": -1}, 'a mapping whose "notes" is below 0'),
    "a name with a blank": ({"notes deleted": 1}, "a name is empty, longer than 100 or has blanks"),
    "an empty name": ({"": 1}, "a name is empty"),
}


@pytest.mark.parametrize("what", RETURNED)
async def test_what_is_no_counts_is_told_with_its_type_and_the_handler(run_job: RunJob, what: str) -> None:
    value, expected = RETURNED[what]

    async def body(ctx: JobContext) -> Counts:
        del ctx
        return cast("Counts", value)

    each = job_of(body)
    report = await run_job(each, jobs=[each])
    assert report.run["state"] == "dead"
    begins = f'The handler of "a-test" at {declared_at(each.handler)} did not return counts, but '
    assert begins in report.run["error"]
    assert expected in report.run["error"]
    assert 'as in {"deleted": 2}' in report.run["error"]


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt()], ids=["exit", "interrupt"])
async def test_an_end_of_the_process_is_told_with_its_line_and_ends_nothing(
    error_of: ErrorOf, settings: Settings, raised: BaseException
) -> None:
    async def body(ctx: JobContext) -> Counts:
        del ctx
        raise raised

    told = await error_of(body)
    assert "A handler does not end the process. To end its run for good, raise NeverRetryError" in told
    assert f"(at {HERE}:{line_of(body, 2)})" in told
    assert told == await dry_error_of(settings, body)


async def dry_error_of(settings: Settings, body: Body) -> str:
    order = Order(job=job_of(body), payload=NoPayload(), fire_time=datetime.now(UTC), asked_by="a test")
    async with service.dry_runner(settings) as dry_runner:
        report = await dry_runner.run(order)
    assert report.run["state"] == "dead"
    return cast("str", report.run["error"])


async def test_each_error_of_a_group_is_told_with_its_line(error_of: ErrorOf) -> None:
    async def fail() -> None:
        raise ValueError("no")

    async def body(ctx: JobContext) -> Counts:
        del ctx
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
        return {}

    assert f"ExceptionGroup of 1: ValueError: no (at {HERE}:{line_of(fail, 1)})" in await error_of(body)


TWO_PARAMETERS = "select 1 where $1::int = 1 and $2::text = 'x'"


@pytest.mark.parametrize(
    ("statement", "arguments", "expected"),
    [
        (TWO_PARAMETERS, ["secret"], f"in TWO_PARAMETERS at {HERE}:"),
        ("insert into notes values ('secret' || $1)", [], 'in "insert into notes …"'),
        ("select 'secret', $1::int", [], 'in "select …"'),
        ("/* secret */ select $1::int", [], "in its statement"),
    ],
)
async def test_a_wrong_number_of_arguments_names_the_statement(
    error_of: ErrorOf, statement: str, arguments: list[str], expected: str
) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.connection() as connection:
            await connection.fetch(statement, *arguments)
        return {}

    told = await error_of(body)
    assert "the server expects" in told
    assert f"at {HERE}:{line_of(body, 2)}, {expected}" in told


class Days(Payload):
    days: int


@job("never-declared")
async def never_declared(ctx: JobContext, payload: Days) -> Counts:
    return {"attempt": ctx.attempt + payload.days}


ASKED_FOR = {
    "a name": ("never-declared", Days(days=1), "something of type str in place of a job"),
    "a function": (never_declared.handler, Days(days=1), "something of type function in place of a job"),
    "a payload of another job": (never_declared, NoPayload(), "with a NoPayload as its payload. Give it a Days"),
    "a dict": (never_declared, {"days": 1}, "with a dict as its payload. Give it a Days"),
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("what", ASKED_FOR)
async def test_a_run_that_cannot_be_is_told_where_it_is_asked_for(
    error_of: ErrorOf, settings: Settings, what: str, several: bool
) -> None:
    asked: Any = ASKED_FOR[what][0]
    payload: Any = ASKED_FOR[what][1]

    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            if several:
                await ctx.enqueue_many(asked, [(payload, "a key")], on=tx)
            await ctx.enqueue(asked, payload, on=tx)
        return {}

    told = await error_of(body)
    assert ASKED_FOR[what][2] in told
    assert f"(at {HERE}:{line_of(body, 3 if several else 4)})" in told
    assert told == await dry_error_of(settings, body)


async def test_many_runs_of_a_job_that_is_not_declared_are_refused_with_its_name(error_of: ErrorOf) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await ctx.enqueue_many(never_declared, [(Days(days=1), "a key")], on=tx)
        return {}

    told = await error_of(body)
    assert 'unknown job "never-declared". It is known once it is in handlers.JOBS' in told
    assert f"(at {HERE}:{line_of(body, 2)})" in told


async def test_what_this_process_does_not_have_is_told_with_what_it_has(error_of: ErrorOf) -> None:
    async def body(ctx: JobContext) -> Counts:
        return {"n": ctx.get(int)}

    told = await error_of(body)
    assert "ctx.get was asked for int, of which there is none here. There are: " in told
    assert f"(at {HERE}:{line_of(body, 1)})" in told


async def test_a_connection_that_was_given_back_is_told(error_of: ErrorOf) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.connection() as connection:
            pass
        return {"n": await connection.fetchval("select 1")}

    told = await error_of(body)
    assert "released back to the pool. Use it inside of its `async with`" in told
    assert f"at {HERE}:{line_of(body, 3)}" in told


@pytest.mark.parametrize("statement", ["commit", "rollback"])
async def test_a_transaction_that_a_handler_ends_itself_is_told(
    run_job: RunJob, settings: Settings, statement: str
) -> None:
    async def body(ctx: JobContext) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute(statement)
        return {}

    each = job_of(body)
    report = await run_job(each, jobs=[each])
    assert report.run["state"] == "dead"
    assert "The handler has ended its transaction by a statement of its own" in report.run["error"]
    assert f"(at {HERE}:{line_of(body, 1)})" in report.run["error"]
    if statement == "rollback":
        assert report.run["error"] == await dry_error_of(settings, body)


NOT_AS_TYPED: dict[str, tuple[Callable[[], Exception], str]] = {
    "seconds": (lambda: NotNowError("no", after=cast("timedelta", 3)), "Write after=timedelta("),
    "seconds of a retry": (lambda: RetryLaterError("no", after=cast("timedelta", 3)), "Write after=timedelta("),
    "a text as figure": (lambda: HeldError("no", figures={"n": cast("int", "two")}), '"n" is of type str'),
}


@pytest.mark.parametrize("what", NOT_AS_TYPED)
async def test_what_an_error_is_given_is_told_where_it_is_raised(error_of: ErrorOf, what: str) -> None:
    make, expected = NOT_AS_TYPED[what]

    async def body(ctx: JobContext) -> Counts:
        del ctx
        raise make()

    told = await error_of(body)
    assert expected in told
    assert f"(at {HERE}:" in told
