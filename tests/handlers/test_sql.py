"""Every statement of the service, against the real schema: it is valid, and finds its index whatever its parameters."""

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import asyncpg
import pytest

import bon_scheduler
import handlers
import health
from bon_scheduler.ledger.history import ACTIONS_ON
from handlers.draft_cleanup import COUNT_STALE, FIND_STALE, LEFT_STALE
from handlers.overdue_detection import COUNT_OVERDUE, FIND_OVERDUE, FIND_PIECES, FIND_SETTLED, LEFT_OVERDUE
from handlers.session_cleanup import COUNT_EXPIRED, DELETE_RANGE, END_OF_RANGE, FIND_EXPIRED, LEFT_EXPIRED
from tests.conftest import Connection

STATEMENT = re.compile(r"\b(select|update|insert|delete)\b", re.IGNORECASE)
LITERALS_ONLY = re.compile(r"\b(status|is_overdue)\s*(=|<>|!=|(not\s+)?in\b|is\b)\s*(any\s*)?\(?\s*\$", re.IGNORECASE)


def statements(*packages: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield each SQL constant of the packages as (`module.NAME`, text)."""
    for package in packages:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for name, value in vars(importlib.import_module(found.name)).items():
                several = value if isinstance(value, Mapping) and name[0] != "_" else {None: value}
                for key, sql in several.items():
                    if name.isupper() and isinstance(sql, str) and STATEMENT.search(sql):
                        yield f"{found.name}.{name}{f'[{key}]' if key else ''}", sql


async def fault_of(connection: Connection, sql: str) -> str | None:
    try:
        await connection.prepare(sql)
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError) as error:
        return f"{error}. Where BON has it, say so in bon_scheduler/demo/bon.sql, as in: create table public.notes (…);"
    except asyncpg.PostgresError as error:
        return str(error)
    return None


def searched(plan: Any) -> set[str]:
    """The indexes that are searched by a condition, or hold just what is looked for: not read for their order alone."""
    if isinstance(plan, list):
        return set().union(*map(searched, plan))
    if not isinstance(plan, dict):
        return set()
    finds = "Index Cond" in plan or plan.get("Node Type") == "Bitmap Index Scan"
    here = {plan["Index Name"]} if finds else set()
    return here | searched(list(plan.values()))


async def test_every_statement_is_valid_in_the_real_schema(connection: Connection) -> None:
    found = dict(statements(bon_scheduler, handlers, health))
    faults = {name: await fault_of(connection, sql) for name, sql in found.items()}
    assert [f"{name}: {fault}" for name, fault in faults.items() if fault] == []


def test_the_search_for_statements_finds_those_of_every_kind_of_module() -> None:
    names = {name for name, _ in statements(bon_scheduler, handlers, health)}
    assert names >= {
        "bon_scheduler.ledger.entries.ENQUEUE",
        "bon_scheduler.mail.mailer.INTEND",
        "handlers.digest.statement.READ_STATEMENT",
        "handlers.draft_cleanup.FIND_STALE",
    }


def test_a_handler_never_takes_a_status_or_a_mark_as_a_parameter() -> None:
    assert [name for name, sql in statements(handlers) if LITERALS_ONLY.search(sql)] == []


@pytest.mark.parametrize(
    "condition",
    ["status = $1", "i.status=$2", "status = any ($1)", "status in ($1, $2)", "is_overdue = $3", "status <> $1"],
)
def test_the_search_for_parameters_finds_them_however_they_are_written(condition: str) -> None:
    assert LITERALS_ONLY.search(condition)


@pytest.mark.parametrize(
    ("sql", "arguments", "index"),
    [
        (FIND_OVERDUE, "('{}', 500, '2026-11-23')", "invoices_overdue_candidates_idx"),
        (LEFT_OVERDUE, "('{}', '2026-11-23')", "invoices_overdue_candidates_idx"),
        (FIND_PIECES, "('2026-11-23', 1000, 200000)", "invoices_overdue_candidates_idx"),
        (FIND_SETTLED, "('{}', 500)", "invoices_overdue_reset_idx"),
        (FIND_STALE, "('{}', 500, '2026-11-23')", "invoices_draft_cleanup_idx"),
        (LEFT_STALE, "('{}', '2026-11-23')", "invoices_draft_cleanup_idx"),
        (FIND_EXPIRED, "('{}', 500, '2026-11-23')", "session_expires_idx"),
        (END_OF_RANGE, "('1970-01-01', 500, '2026-11-23')", "session_expires_idx"),
        (DELETE_RANGE, "('1970-01-01', '1970-01-02', '2026-11-23')", "session_expires_idx"),
        (LEFT_EXPIRED, "('{}', '2026-11-23')", "session_expires_idx"),
        (COUNT_OVERDUE, "('2026-11-23', null)", "invoices_overdue_candidates_idx"),
        (COUNT_STALE, "('2026-11-23', '2026-11-23')", "invoices_draft_cleanup_idx"),
        (COUNT_EXPIRED, "('2026-11-23', null)", "session_expires_idx"),
        (ACTIONS_ON, "('00000000-0000-0000-0000-000000000000')", "operator_actions_target"),
    ],
    ids=[
        "FIND_OVERDUE",
        "LEFT_OVERDUE",
        "FIND_PIECES",
        "FIND_SETTLED",
        "FIND_STALE",
        "LEFT_STALE",
        "FIND_EXPIRED",
        "END_OF_RANGE",
        "DELETE_RANGE",
        "LEFT_EXPIRED",
        "COUNT_OVERDUE",
        "COUNT_STALE",
        "COUNT_EXPIRED",
        "ACTIONS_ON",
    ],
)
async def test_a_statement_finds_its_index_whatever_its_parameters(
    connection: Connection, sql: str, arguments: str, index: str
) -> None:
    await connection.execute("set enable_seqscan = off; set plan_cache_mode = force_generic_plan")
    await connection.execute(f"prepare statement as {sql}")
    plan: Any = await connection.fetchval(f"explain (format json) execute statement {arguments}")
    assert index in searched(json.loads(plan) if isinstance(plan, str) else plan)
