"""On a ledger as after a year, each statement searches the index that its comment names, and reads little."""

import importlib
import inspect
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import bon_scheduler
import handlers
import health
from bon_scheduler.database import connections
from tests.conftest import Connection, copy_of
from tests.handlers.test_sql import statements
from tests.plans.cases import BUSINESSES, CASES, DIGEST, EITHER, THROUGH
from tests.plans.measuring import comment_above, indexes_in, measure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FULL = Path(__file__).parent / "full.sql"
GROWING = (
    "runs|attempts|business_outcomes|changed_rows|deliveries|operator_actions|shaam_refreshes|shaam_tokens"
    "|invoices|invoice_items|invoice_payments|sessions|businesses|users|user_businesses|business_shaam_credentials"
    "|enqueue_run|enqueue_many|claim|claim_one|claim_new|record_tick|release_lost|make_overtaken_ready|read_queue"
)
READS_WHAT_GROWS = re.compile(rf"\b(bon_scheduler|public)\.({GROWING})\b")
FEW_ROWS = re.compile(
    r"^(jobs|workers|pauses|business_pauses|schedules|mail_gate|pruning|consent_brake|businesses|rehearsals)_"
)
OURS = """
    select c.relname, t.relname as of
      from pg_class c
      join pg_index i on i.indexrelid = c.oid
      join pg_class t on t.oid = i.indrelid
     where c.relnamespace = 'bon_scheduler'::regnamespace and not i.indisprimary
"""


@cache
def growing() -> Mapping[str, str]:
    """The statements that read what grows, by module and name, without the package's."""
    found = dict(statements(bon_scheduler, handlers, health))
    return {name.removeprefix("bon_scheduler."): sql for name, sql in found.items() if READS_WHAT_GROWS.search(sql)}


def comment_of(name: str) -> str:
    module, _, constant = name.partition("[")[0].rpartition(".")
    package = "" if module.startswith("handlers.") else "bon_scheduler."
    return comment_above(inspect.getsource(importlib.import_module(package + module)), constant)


@pytest.fixture(scope="session")
def full_url(server_url: str) -> Iterator[str]:
    """A database with a full ledger, for all tests of a session: they change nothing."""
    with copy_of(server_url, "full", FULL.read_text(), "vacuum analyze") as url:
        yield url


@pytest.fixture
async def full(full_url: str) -> AsyncIterator[Connection]:
    async with connections.connect(full_url) as connection:
        await connection.execute("set plan_cache_mode = force_generic_plan")
        yield connection


def test_each_statement_that_reads_what_grows_is_measured() -> None:
    assert set(growing()) == CASES.keys() | THROUGH.keys()


async def our_indexes(connection: Connection) -> set[str]:
    rows = await connection.fetch("select indexname from pg_indexes where schemaname = 'bon_scheduler'")
    return {row[0] for row in rows if not FEW_ROWS.match(row[0])}


@pytest.mark.parametrize("name", CASES)
async def test_a_statement_searches_the_indexes_that_its_comment_names(full: Connection, name: str) -> None:
    arguments, limit = CASES[name]
    reading = await measure(full, growing()[name], arguments)
    ours = await our_indexes(full)
    searched, comment = reading.planned | reading.used, indexes_in(comment_of(name))
    few = {each for each in comment if FEW_ROWS.match(each)}
    assert comment - few - EITHER.get(name, set()) <= searched
    assert reading.planned & ours <= comment | EITHER.get(name, set())
    assert reading.rows <= limit


async def test_each_index_serves_a_statement_or_keeps_a_rule(full: Connection) -> None:
    """The others cost a write a run and a disk, and serve nobody."""
    served = set().union(*(indexes_in(comment_of(name)) for name in (*CASES, *THROUGH)))
    served |= {
        index
        for path in (Path(bon_scheduler.__file__).parent / "database/schema/functions").glob("*.sql")
        for index in indexes_in(" ".join(re.findall(r"^-- (.*)$", path.read_text(), re.MULTILINE)))
    }
    indexes = {row["relname"] for row in await full.fetch(OURS)}
    assert {index for index in indexes - served if not FEW_ROWS.match(index)} == set()


@pytest.mark.parametrize(
    ("name", "arguments", "limit"),
    [
        ("ledger.history.LIST_CERTAIN_RUNS", (None, "50", "shaam-token-refresh", None), 1_300),
        ("ledger.history.LIST_CERTAIN_RUNS", (None, "50", "shaam-token-refresh", "held"), 150),
        ("ledger.history.LIST_CERTAIN_RUNS", (None, "50", None, "succeeded"), 2_000),
        ("ledger.history.LIST_CERTAIN_RUNS", (None, "50", None, "paused"), 50),
        ("ledger.history.LIST_RUNS", ("yesterday", "50"), 150),
        ("ledger.retention.PRUNE_RUNS", ("infinity", "300 days", "2000"), 40_000),
        ("ledger.retention.PRUNE_DELIVERIES", ("infinity", "300 days", "2000"), 10_000),
        ("ledger.retention.PRUNE_OUTCOMES", ("infinity", "300 days", "2000"), 10_000),
        ("ledger.retention.PRUNE_TOKENS", ("infinity", "7 days", "2000"), 3 * BUSINESSES + 10_000),
        ("ledger.retention.PRUNE_ACTIONS", ("infinity", "7 years", "2000"), 10_000),
        ("ledger.history.DESCENDANTS", (DIGEST,), 600_000),
    ],
)
async def test_it_reads_little_whatever_is_asked_for(
    full: Connection, name: str, arguments: tuple[str | None, ...], limit: int
) -> None:
    assert (await measure(full, growing()[name], arguments)).rows <= limit
