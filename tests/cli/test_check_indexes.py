"""What `check` says of BON's indexes: missing ones, those that keep marks from being HOT, and that its advice helps."""

from datetime import UTC, datetime
from typing import Any

import pytest

from bon_scheduler.cli.checks.bon import check_indexes
from bon_scheduler.cli.checks.findings import Finding
from handlers.overdue_detection import overdue_detection
from tests.conftest import Connection, RunJob
from tests.handlers.test_brake import invoices
from tests.process import run_command

MARKING = "no HOT update"
FIRED = datetime(2026, 11, 23, 4, tzinfo=UTC)
HOT = "select n_tup_hot_upd, n_tup_upd from pg_stat_user_tables where relname = 'invoices'"


def statements(finding: Finding) -> list[str]:
    """The statements of a remedy."""
    text = (finding.remedy or "").removeprefix("Have BON run: ")
    lines = text.splitlines() if "\n" in text else [text]
    return [line for line in lines if line.startswith(("CREATE ", "DROP ", "ALTER "))]


async def follow(connection: Connection) -> list[str]:
    """Do all that is recommended; return the statements."""
    done = [statement for finding in await check_indexes(connection) for statement in statements(finding)]
    for statement in done:
        await connection.execute(statement)
    return done


async def marking(connection: Connection) -> Finding | None:
    found = [each for each in await check_indexes(connection) if MARKING in each.what]
    return found[0] if found else None


async def test_what_it_recommends_leaves_nothing_to_recommend(connection: Connection) -> None:
    done = await follow(connection)
    assert sum(statement.startswith("CREATE INDEX CONCURRENTLY") for statement in done) == 4
    assert sum(statement.startswith("DROP INDEX CONCURRENTLY") for statement in done) == 3
    (finding,) = await check_indexes(connection)
    assert (finding.level, finding.remedy) == ("ok", None)


async def test_it_names_each_index_its_column_and_what_was_measured(connection: Connection) -> None:
    finding = await marking(connection)
    assert finding is not None
    for index, column in (
        ("overdue_candidates_idx", "is_overdue"),
        ("overdue_reset_idx", "is_overdue"),
        ("draft_cleanup_idx", "updated_at"),
    ):
        assert f"public.invoices_{index} names {column}" in finding.what
    assert "0.23 times the time and 0.30 times the WAL" in (finding.remedy or "")


@pytest.mark.parametrize("followed", [False, True])
async def test_marks_are_hot_once_all_of_it_is_done_and_not_before(
    connection: Connection, run_job: RunJob, followed: bool
) -> None:
    if followed:
        await follow(connection)
    await invoices(connection, 30, 0)
    await run_job(overdue_detection, fire_time=FIRED)
    await connection.execute("select pg_stat_force_next_flush()")
    row = await connection.fetchrow(HOT)
    assert row is not None
    assert (row["n_tup_hot_upd"] > 25, row["n_tup_upd"]) == (followed, 30)


@pytest.mark.parametrize(
    "part",
    [
        "drop index public.invoices_overdue_candidates_idx, public.invoices_overdue_reset_idx;"
        " create index on public.invoices (due_date)",
        "drop index public.invoices_draft_cleanup_idx; create index on public.invoices (id) where status = 'draft'",
        "alter table public.invoices set (fillfactor = 85)",
    ],
)
async def test_a_part_of_it_is_not_enough(connection: Connection, part: str) -> None:
    await connection.execute(part)
    assert await marking(connection) is not None


@pytest.mark.parametrize(
    "index",
    [
        "(business_id, is_overdue)",
        "(business_id) include (is_overdue)",
        "(business_id) where is_overdue",
        "((not is_overdue))",
        "(business_id, updated_at)",
    ],
)
async def test_any_index_that_holds_what_marking_changes_is_found(connection: Connection, index: str) -> None:
    await follow(connection)
    await connection.execute(f"create index of_bons on public.invoices {index}")
    finding = await marking(connection)
    assert finding is not None
    assert statements(finding) == ["DROP INDEX CONCURRENTLY public.of_bons;"]


@pytest.mark.parametrize("index", ["(business_id, sent_at)", "(business_id) where status = 'draft'"])
async def test_an_index_that_holds_nothing_of_it_is_left_alone(connection: Connection, index: str) -> None:
    await follow(connection)
    await connection.execute(f"create index of_bons on public.invoices {index}")
    assert await marking(connection) is None


async def test_brin_is_no_obstacle_where_the_server_says_so(connection: Connection) -> None:
    await follow(connection)
    await connection.execute("create index of_bons on public.invoices using brin (updated_at)")
    version = await connection.fetchval("select current_setting('server_version_num')::int")
    assert (await marking(connection) is None) is (version >= 160000)


@pytest.mark.parametrize(
    ("dropped", "what"),
    [
        ("invoices_overdue_candidates_idx", "no index on invoices.due_date: overdue-detection"),
        ("invoices_draft_cleanup_idx", "no index of drafts: draft-cleanup"),
        ("session_expires_idx", "no index on sessions.expires_at: session-cleanup"),
    ],
)
async def test_what_the_jobs_search_by_is_missed(connection: Connection, dropped: str, what: str) -> None:
    await connection.execute(f"drop index public.{dropped}")
    (finding,) = [each for each in await check_indexes(connection) if what in each.what]
    for statement in statements(finding):
        await connection.execute(statement)
    assert not any(what in each.what for each in await check_indexes(connection))


async def test_an_index_that_was_left_invalid_does_not_count(connection: Connection) -> None:
    """As where CREATE INDEX CONCURRENTLY failed."""
    await follow(connection)
    await connection.execute(
        "update pg_index set indisvalid = false where indrelid = 'public.sessions'::regclass"
        " and indexrelid = 'public.session_expires_idx'::regclass"
    )
    assert [each.what for each in await check_indexes(connection)] == [
        "no index on sessions.expires_at: session-cleanup reads all sessions for each batch"
    ]


async def test_the_command_shows_the_statements_whole(database_url: str) -> None:
    checked = await run_command("check", DATABASE_URL=database_url)
    assert checked.status == 0
    document: Any = (await run_command("check", "--json", DATABASE_URL=database_url)).document
    (finding,) = [each for each in document["findings"] if MARKING in each["what"]]
    assert finding["level"] == "warning"
    assert "DROP INDEX CONCURRENTLY public.invoices_overdue_reset_idx;" in finding["remedy"].splitlines()
