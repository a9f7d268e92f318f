"""What an outsider writes costs what it is long, and is cut before it is looked at."""

import re
import time
from collections.abc import Callable
from datetime import date, timedelta

import aiohttp
import pytest
import structlog

from bon_scheduler import Counts, JobContext, NoPayload, addresses, config, job, log, service
from bon_scheduler.cli import ids, parsing
from bon_scheduler.log import LONGEST_LINE, cut, describe_error, mask
from bon_scheduler.mail import message, replies
from bon_scheduler.mail.replies import clean_reply
from bon_scheduler.shaam import client
from handlers.digest import render_digest
from handlers.digest.statement import read_statement
from tests import arrange
from tests.conftest import Connection, MakeSettings
from tests.mailworld import LETTER
from tests.waiting import until

NASTY: dict[str, Callable[[int], str]] = {
    "one word": lambda n: "a" * n,
    "one word before a sign": lambda n: "a" * n + "@",
    "one Hebrew word": lambda n: "\u05d0" * n,
    "one Hebrew word before a sign": lambda n: "\u05d0" * n + "@",
    "signs": lambda n: "@" * n,
    "dots": lambda n: "." * n,
    "dots after a sign": lambda n: "a@" + "." * n,
    "a domain without end": lambda n: "a@" + "b." * (n // 2),
    "digits": lambda n: "1" * n,
    "thousands": lambda n: "1,000" * (n // 5) + "x",
    "schemes": lambda n: "://" * (n // 3),
    "credentials without end": lambda n: "://" + "a" * n,
    "quotes": lambda n: "'\"" * (n // 2),
    "combining marks": lambda n: "e" + "\u0301" * n,
    "encoded words": lambda n: "=?" * (n // 2),
    "backslashes": lambda n: "\\\\" * (n // 2) + "u0000",
    "spaces": lambda n: " " * n,
}
PATTERNS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": value
    for module in (addresses, client, config, ids, log, message, parsing, replies)
    for name, value in vars(module).items()
    if isinstance(value, re.Pattern)
}
WHOLE = {"config._ADDRESS", "parsing.SPAN"}
"""Matched against a whole text only."""
LONG = 100_000
SECONDS = 2.0
"""Far above what a linear pattern takes for so long a text, and far below what the square of its length takes."""


def took(call: Callable[[], object]) -> float:
    before = time.process_time()
    call()
    return time.process_time() - before


@pytest.mark.parametrize("nasty", NASTY)
@pytest.mark.parametrize("name", PATTERNS)
def test_each_pattern_of_ours_takes_what_a_text_is_long(name: str, nasty: str) -> None:
    text, pattern = NASTY[nasty](LONG), PATTERNS[name]
    look: Callable[[], object] = (lambda: pattern.fullmatch(text)) if name in WHOLE else (lambda: pattern.sub("", text))
    assert took(look) < SECONDS


@pytest.mark.parametrize("nasty", NASTY)
def test_what_is_logged_told_or_kept_of_a_long_text_is_short_and_takes_no_time(nasty: str) -> None:
    text = NASTY[nasty](1_000_000)
    letter = LETTER
    assert took(lambda: mask(cut(text))) < SECONDS
    assert took(lambda: describe_error(ValueError(text))) < SECONDS
    assert len(describe_error(ValueError(text))) <= 500
    assert took(lambda: clean_reply(550, text, letter)) < SECONDS
    assert len(clean_reply(550, text, letter)) <= 200


@pytest.mark.parametrize("before", ["", "x" * 50, "word " * 500, "z" * 1990 + " "])
def test_a_cut_leaves_no_half_of_an_address(before: str) -> None:
    text = before + "owner.of.a.shop@shop.example " * 300
    assert "owner" not in mask(cut(text))
    assert "shop" not in mask(cut(text))


def test_an_address_is_masked_as_before() -> None:
    told = "to owner@shop.example, postgresql://bon:secret@db/bon and א@ב.ישראל!"
    assert mask(told) == "to [address], postgresql://[credentials]@db/bon and [address]!"


def test_a_line_of_the_log_has_a_bound(logged: Callable[[], str]) -> None:
    structlog.get_logger().info(
        "something", **{f"field_{n}": "x" * 10_000 for n in range(100)}, many=["y" * 100] * 1000
    )
    line = logged().splitlines()[-1]
    assert len(line) <= LONGEST_LINE
    assert "something" in line


async def test_a_payload_of_long_names_and_a_hostile_request_keep_nobody_waiting(
    make_settings: MakeSettings, connection: Connection
) -> None:
    @job("a-test")
    async def a_test(_: JobContext, __: NoPayload) -> Counts:
        return {}

    async with service.serving(make_settings(), jobs=[a_test]) as serving, aiohttp.ClientSession() as session:
        await connection.execute("select bon_scheduler.enqueue('a-test', jsonb_build_object(repeat('a', 200000), 1))")
        for _ in range(40):
            await connection.execute("select pg_notify('bon_scheduler_runs', repeat('a', 7900))")

        async def dead() -> bool:
            return bool(await connection.fetchval("select state = 'dead' from bon_scheduler.runs"))

        before = time.process_time()
        await until(dead)
        async with session.get(f"http://127.0.0.1:{serving.port}/livez", headers={"X": "a" * 8000 + "@"}) as answer:
            assert answer.status in {200, 400}
        async with session.get(f"http://127.0.0.1:{serving.port}/livez") as answer:
            assert answer.status == 200
        assert time.process_time() - before < SECONDS
    error = await connection.fetchval("select error from bon_scheduler.runs")
    assert len(error) < 1000


async def test_names_without_end_make_a_letter_of_some_size(connection: Connection) -> None:
    business = await arrange.business(connection)
    await connection.execute("update businesses set name = repeat('\u05d0', 5000000) where id = $1", business)
    due = date.today() - timedelta(days=3)  # noqa: DTZ011 - any recent day will do
    for _ in range(20):
        await arrange.invoice(connection, business, due_date=due)
    await connection.execute("update invoices set customer_name = repeat('\u05d1', 500000)")
    statement = await read_statement(connection, business, due + timedelta(days=3))
    assert statement is not None
    before = time.process_time()
    subject, text, html = render_digest(statement, language="he", app_origin=None)
    assert time.process_time() - before < SECONDS
    assert len(subject) < 300
    assert len(text.encode()) + len(html.encode()) < 100_000


@pytest.mark.parametrize("due", ["-infinity", "0044-03-15 BC"])
async def test_an_invoice_due_before_any_calendar_silences_nobody(connection: Connection, due: str) -> None:
    business = await arrange.business(connection)
    today = date.today()  # noqa: DTZ011 - any recent day will do
    await arrange.invoice(connection, business, due_date=today - timedelta(days=3))
    odd = await arrange.invoice(connection, business, due_date=today - timedelta(days=3))
    await connection.execute("update invoices set due_date = $2::text::date where id = $1", odd, due)
    statement = await read_statement(connection, business, today)
    assert statement is not None
    assert len(statement.invoices) == 2
    assert render_digest(statement, language="he", app_origin=None)
