"""What enters is bounded: each door refuses what no run could be judged by, and what lies in a table hurts nobody."""

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bon_scheduler import Counts, JobContext, NoPayload, Payload, job, ledger, service
from bon_scheduler.database import UnreadableJsonError, read_json, write_json
from bon_scheduler.ledger import Origin, Request
from bon_scheduler.report import show_controls
from tests import arrange
from tests.conftest import Connection, MakeSettings, RunJob
from tests.pooler import answers, needs_pgbouncer, pgbouncer
from tests.process import run_command
from tests.waiting import until

DEEP = '{"a":' * 1200 + "1" + "}" * 1200
STATE = "select state::text, error from bon_scheduler.runs where job = $1 order by enqueued_at desc limit 1"


@job("a-test")
async def a_test(_: JobContext, __: NoPayload) -> Counts:
    return {}


class Number(Payload):
    """A number of any length."""

    n: int


seen: list[int] = []


@job("counts")
async def counts(_: JobContext, payload: Number) -> Counts:
    seen.append(payload.n)
    return {}


# The door of producers


@pytest.mark.parametrize(
    "forged", ["fire_time => now()", "origin => 'schedule'", "asked_by => 'dana'", "caused_by => null"]
)
async def test_a_producer_cannot_say_who_asks_or_for_which_fire_time(connection: Connection, forged: str) -> None:
    with pytest.raises(asyncpg.UndefinedFunctionError):
        await connection.execute(f"select bon_scheduler.enqueue('session-cleanup', {forged})")


async def test_a_producer_without_any_right_on_the_tables_asks_and_is_named(connection: Connection) -> None:
    await connection.execute("create role producer")
    try:
        await connection.execute("grant usage on schema bon_scheduler to producer; set role producer")
        for forbidden in (
            "select bon_scheduler.enqueue_run('session-cleanup')",
            "select bon_scheduler.enqueue_many('session-cleanup', '{}', '{}', 0, 'run', null, null)",
            "insert into bon_scheduler.runs (job, origin) values ('session-cleanup', 'schedule')",
            "select * from bon_scheduler.runs",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(forbidden)
        run_id = await connection.fetchval("select bon_scheduler.enqueue('session-cleanup')")
        await connection.execute("reset role")
        asked = "select origin, fire_time, starts_with(asked_by, session_user) from bon_scheduler.runs where id = $1"
        assert tuple(await connection.fetchrow(asked, run_id) or ()) == ("program", None, True)
    finally:
        await connection.execute("reset role; drop owned by producer; drop role producer")


REFUSED = [
    ("run_at => 'infinity'", "no instant within ten years"),
    ("run_at => '-infinity'", "no instant within ten years"),
    ("run_at => now() + interval '11 years'", "no instant within ten years"),
    ("run_at => '294000-01-01'", "no instant within ten years"),
    ("priority => 101", "between -100 and 100"),
    ("priority => -2147483648", "between -100 and 100"),
    ("priority => null", "between -100 and 100"),
    ("dedupe_key => ''", "1 to 1000 bytes"),
    ("dedupe_key => repeat('א', 501)", "1 to 1000 bytes"),
    ("payload => '[]'", "must be a JSON object"),
    ("payload => 'null'", "must be a JSON object"),
    ("payload => null", "must be a JSON object"),
    ("payload => jsonb_build_object('a', repeat('x', 300000))", "has 300"),
    ("payload => (repeat('{\"a\":', 200) || '1' || repeat('}', 200))::jsonb", "nested 200 levels"),
    ("payload => jsonb_build_object('a', (repeat('[', 250) || repeat(']', 250))::jsonb)", "nested 200 levels"),
]


@pytest.mark.parametrize(("argument", "says"), REFUSED)
async def test_the_door_refuses_what_is_out_of_bounds_with_a_remedy(
    connection: Connection, argument: str, says: str
) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match=says) as refused:
        await connection.execute(f"select bon_scheduler.enqueue('session-cleanup', {argument})")
    assert refused.value.hint
    assert await connection.fetchval("select count(*) from bon_scheduler.runs") == 0


@pytest.mark.parametrize("instant", ["0044-03-15 BC", "1900-01-01", "now"])
async def test_an_instant_that_has_passed_means_at_once(connection: Connection, instant: str) -> None:
    if instant == "-infinity":
        return  # refused above
    await connection.execute(
        "select bon_scheduler.enqueue('session-cleanup', run_at => $1::text::timestamptz)", instant
    )
    assert await connection.fetchval("select ready from bon_scheduler.runs")


@pytest.mark.parametrize("fire_time", ["infinity", "-infinity", "20000-01-01", "0044-03-15 BC", "2031-01-01"])
async def test_the_inner_door_takes_no_fire_time_that_has_not_come_or_that_is_none(
    connection: Connection, fire_time: str
) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match="has not come"):
        await connection.execute(
            "select bon_scheduler.enqueue_run('session-cleanup', fire_time => $1::text::timestamptz)", fire_time
        )


# What lies in a table all the same, directly and through a pooler in transaction mode


@pytest.fixture(params=["directly", pytest.param("pooled", marks=needs_pgbouncer)])
async def through(request: pytest.FixtureRequest, tmp_path: Path, database_url: str) -> AsyncIterator[dict[str, str]]:
    """The addresses that lead to the test's database."""
    if request.param == "directly":
        yield {"DATABASE_URL": database_url}
        return
    with pgbouncer(tmp_path, database_url) as url:
        await answers(url)
        yield {"DATABASE_URL": url, "DATABASE_LISTEN_URL": database_url}


MADE_BY_HAND = """
    insert into bon_scheduler.runs (job, payload, fire_time, run_at, ready, origin)
    values ('a-test', $1::text::jsonb, $2::text::timestamptz, $3::text::timestamptz, $4, 'program')
    returning id
"""
BY_HAND = [
    ("payload nested deeply", DEEP, None, None, True, "the payload cannot be read"),
    ("payload of five thousand digits", '{"n": 1e5000}', None, None, True, "the payload cannot be read"),
    ("payload that overflows a float", '{"n": 1' + "0" * 400 + ".5}", None, None, True, "the payload cannot be read"),
    ("fire time in the year 20000", "{}", "20000-01-01", None, True, "fire_time"),
    ("fire time before Christ", "{}", "0044-03-15 BC", None, True, "fire_time"),
    ("fire time at infinity", "{}", "infinity", None, True, "fire_time"),
    ("fire time that has not come", "{}", "2031-01-01", None, True, "has not come"),
]


@pytest.mark.parametrize(
    ("payload", "fire_time", "run_at", "ready", "says"),
    [each[1:] for each in BY_HAND],
    ids=[each[0] for each in BY_HAND],
)
@pytest.mark.samples(2)
async def test_a_run_that_no_job_could_judge_ends_at_once_with_the_reason_and_is_listed_beside_the_others(
    make_settings: MakeSettings,
    connection: Connection,
    through: dict[str, str],
    payload: str,
    fire_time: str | None,
    run_at: str | None,
    ready: bool,
    says: str,
) -> None:
    async with service.serving(make_settings(**through), jobs=[a_test]) as serving:
        run_id = await connection.fetchval(MADE_BY_HAND, payload, fire_time, run_at, ready)
        other = await connection.fetchval("select bon_scheduler.enqueue('a-test')")

        async def ended() -> bool:
            count = "select count(*) from bon_scheduler.runs where state in ('dead', 'succeeded')"
            return bool(await connection.fetchval(count) == 2)

        await connection.execute("select bon_scheduler.wake_workers()")
        await until(ended)
        rows = {
            row["id"]: row
            for row in await connection.fetch("select id, state::text, error, attempt from bon_scheduler.runs")
        }
        assert rows[other]["state"] == "succeeded"
        assert (rows[run_id]["state"], rows[run_id]["attempt"]) == ("dead", 1)
        assert says in rows[run_id]["error"]
        assert serving.engine.connected
    listed = await run_command("runs", "--json", **through)
    assert {row["run_id"] for row in listed.document["runs"]} == {str(run_id), str(other)}
    shown = await run_command("show", str(run_id), "--json", **through)
    assert (shown.status, shown.document["state"]) == (0, "dead"), shown.err
    assert (await run_command("show", str(run_id), **through)).status == 0


@pytest.mark.parametrize("run_at", ["infinity", "-infinity", "294000-01-01", "0044-03-15 BC"])
@pytest.mark.samples(4)
async def test_an_instant_that_never_comes_disturbs_nobody(
    make_settings: MakeSettings, connection: Connection, through: dict[str, str], run_at: str
) -> None:
    await ledger.register_jobs(connection, [a_test])
    await connection.fetchval(MADE_BY_HAND, "{}", None, run_at, False)
    async with service.serving(make_settings(**through), jobs=[a_test]) as serving:
        other = await connection.fetchval("select bon_scheduler.enqueue('a-test')")

        async def ended() -> bool:
            succeeded = "select state = 'succeeded' from bon_scheduler.runs where id = $1"
            return bool(await connection.fetchval(succeeded, other))

        await until(ended)
        for _ in range(3):
            assert serving.engine.connected
        assert await ledger.read_queue(connection) is not None
    for command in (["runs"], ["jobs"]):
        answer = await run_command(*command, **through)
        assert answer.status == 0, answer.err


# Whole numbers


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**70), 10**4000])
@pytest.mark.samples(4)
async def test_a_whole_number_reaches_the_handler_as_it_was_written(
    make_settings: MakeSettings, connection: Connection, through: dict[str, str], number: int
) -> None:
    seen.clear()
    async with service.serving(make_settings(**through), jobs=[counts]):
        run_id = await ledger.enqueue(connection, Request("counts", {"n": number}, origin=Origin.PROGRAM))

        async def ended() -> bool:
            return bool(seen)

        await until(ended)
    assert seen == [number]
    shown = await run_command("show", str(run_id), "--json", **through)
    assert json.loads(shown.out)["payload"] == {"n": number}


async def test_a_number_on_the_command_line_stays_exact(connection: Connection, database_url: str) -> None:
    asked = await run_command(
        "enqueue", "generate-pdf", "--payload", f'{{"n": {2**64 + 1}}}', DATABASE_URL=database_url
    )
    assert asked.status == 0, asked.err
    assert await connection.fetchval("select payload ->> 'n' from bon_scheduler.runs") == str(2**64 + 1)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(JSON_VALUES)
def test_what_is_written_is_read_as_it_was(value: Any) -> None:
    try:
        text = write_json(value)
    except UnreadableJsonError:
        return  # a lone surrogate
    assert read_json(text) == value


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "[1", "{" * 5000, '{"a":' * 5000, "1" * 5000, ""])
def test_what_is_no_json_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(UnreadableJsonError) as refused:
        read_json(text)
    assert len(str(refused.value)) < 100


# Whatever is asked, it is taken or refused with the reason, and everything can be read afterwards

INSTANTS = (
    st.none() | st.sampled_from(["infinity", "-infinity", "4714-11-24 BC", "294276-12-31"]) | st.datetimes().map(str)
)
REFUSALS = (
    asyncpg.InvalidParameterValueError,  # ours, with a hint
    asyncpg.DataError,  # PostgreSQL's own: no such text, number or instant
    asyncpg.UntranslatableCharacterError,
    UnreadableJsonError,
)


def examples(**strategies: Any) -> list[dict[str, Any]]:
    """Draw examples of everything, the simplest first."""
    drawn: list[dict[str, Any]] = []

    @settings(max_examples=120, deadline=None, database=None, phases=[Phase.generate])
    @given(st.fixed_dictionaries(strategies))
    def draw(example: dict[str, Any]) -> None:
        drawn.append(example)

    draw()
    return drawn


async def test_whatever_a_producer_asks_is_taken_or_refused_and_can_be_read(
    connection: Connection, make_settings: MakeSettings, database_url: str
) -> None:
    ask = "select bon_scheduler.enqueue($1, $2, dedupe_key => $3, run_at => $4::text::timestamptz, priority => $5)"
    taken = longest = 0
    for example in examples(
        job=st.sampled_from(["generate-pdf", "session-cleanup"]) | st.text(max_size=20),
        payload=JSON_VALUES | st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3),
        key=st.none() | st.text(max_size=1200),
        run_at=INSTANTS,
        priority=st.none() | st.integers(-(2**31), 2**31 - 1),
    ):
        try:
            taken += await connection.fetchval(ask, *example.values()) is not None
        except (*REFUSALS, UnicodeEncodeError) as refused:  # a lone surrogate never leaves this process
            longest = max(longest, len(str(refused)))
    for example in examples(key=st.text("abc", min_size=1), run_at=st.none() | st.datetimes().map(str)):
        with suppress(*REFUSALS):
            await connection.execute(ask, "generate-pdf", {"n": 1}, example["key"], example["run_at"], 0)
            taken += 1
    assert taken > 10
    assert (
        len((await run_command("runs", "--limit", "1000", "--json", DATABASE_URL=database_url)).document["runs"]) > 10
    )
    async with service.machinery(make_settings()) as parts, parts.control.acquire() as reading:
        assert sum((await ledger.read_queue(reading)).depths.values()) > 10


# What a wrong clock would destroy


async def test_a_session_that_is_valid_by_the_databases_clock_is_never_deleted(
    connection: Connection, run_job: RunJob
) -> None:
    from handlers.session_cleanup import session_cleanup  # noqa: PLC0415 - beside its test

    business = await arrange.business(connection)
    owner = await arrange.owner(connection, business, "owner@shop.example")
    now = datetime.now(UTC)
    await arrange.session(connection, owner, now + timedelta(hours=1))
    await arrange.session(connection, owner, now - timedelta(hours=1))
    await connection.execute("insert into bon_scheduler.jobs (name) values ('session-cleanup') on conflict do nothing")
    ahead = now + timedelta(days=40)
    with pytest.raises(asyncpg.InvalidParameterValueError, match="has not come"):
        await run_job(session_cleanup, fire_time=ahead, now=ahead)
    assert await connection.fetchval("select count(*) from sessions") == 2


# What leaves


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("a\x9b31mb", "a\\x9b31mb"),
        ("one\rtwo", "one\\x0dtwo"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("two\nlines", "two\nlines"),
        ("שלום, עולם", "שלום, עולם"),
        ("e\u0301 \u00a0", "e\u0301 \u00a0"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(text: str, shown: str) -> None:
    assert show_controls(text) == shown


async def test_what_somebody_wrote_reaches_a_terminal_harmless_and_json_exact(
    connection: Connection, database_url: str
) -> None:
    evil = "\x1b]0;owned\x07\u202e"
    run_id = await connection.fetchval(
        "insert into bon_scheduler.runs (job, origin, state, asked_by, reason, error)"
        " values ('draft-cleanup', 'program', 'dead', $1, $1, $1) returning id",
        evil,
    )
    await ledger.change_all(connection, ledger.Action.CANCEL, [run_id], by=evil, reason=evil)
    for command in (["show", str(run_id)], ["runs"]):
        answer = await run_command(*command, DATABASE_URL=database_url)
        assert "owned" in answer.out
        assert not {"\x1b", "\x07", "\u202e"} & set(answer.out)
    exact = await run_command("show", str(run_id), "--json", DATABASE_URL=database_url)
    assert orjson.loads(exact.out)["asked_by"] == evil
