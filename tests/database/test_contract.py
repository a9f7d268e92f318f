"""What the contract says that jobs do in BON's tables is what their statements do: no less and no more."""

import sys
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import asyncpg
import pytest

import bon_scheduler
import handlers
from bon_scheduler.cli import ids
from bon_scheduler.database.contract import COLUMNS, USES, WORDS, privileges
from bon_scheduler.jobs import Job
from tests.conftest import Connection
from tests.deriving import advise, columns_of, is_needed, tables_of
from tests.handlers.test_sql import statements
from tests.roles import columns, grant, limited_role, revoke

SHAAM_JOBS = ("shaam-token-refresh", "shaam-refresh-batch")
USERS = {
    "handlers.batches": ("overdue-detection", "draft-cleanup"),
    **{
        f"handlers.{module}.{name}": (job, "rehearsal")
        for module, job, names in (
            ("overdue_detection", "overdue-detection", ("COUNT_OVERDUE", "COUNT_UNMARKED")),
            ("overdue_digest", "overdue-digest", ("FIND_OWED", "COUNT_OWNERS")),
            ("draft_cleanup", "draft-cleanup", ("COUNT_STALE", "COUNT_DRAFTS")),
            ("session_cleanup", "session-cleanup", ("COUNT_EXPIRED", "COUNT_SESSIONS")),
        )
        for name in names
    },
    "handlers.digest.statement": ("send-overdue-digest",),
    "handlers.digest.statement.READ_RECIPIENTS": ("send-overdue-digest", "notify-reauth"),
    "handlers.shaam_refresh_batch": SHAAM_JOBS,
    "bon_scheduler.shaam.refreshes": SHAAM_JOBS,
    "bon_scheduler.shaam.consent": SHAAM_JOBS,
    "bon_scheduler.shaam.ownership": SHAAM_JOBS,
    "bon_scheduler.shaam.standing": ("metrics",),
    "bon_scheduler.ledger.retention": ("ledger-pruning",),
    "bon_scheduler.ledger.pauses": ("commands",),
    "bon_scheduler.cli.ids": ("commands",),
}
"""Whose the statements of a module are, or one of them; else those of the jobs that the module declares."""
SERVICE = {"metrics", "commands"}
HERE, CONTRACT = "tests/database/test_contract.py", "bon_scheduler/database/contract.py"
SOME = {
    "uuid": UUID(int=1),
    "text": "-infinity",  # also an instant and a date
    "bytea": b"x",
    "varchar": "x",
    "bool": False,
    "int2": 1,
    "int4": 1,
    "int8": 1,
    "float8": 1.0,
    "numeric": Decimal(1),
    "json": "{}",
    "jsonb": "{}",
    "date": date(2026, 11, 1),
    "timestamptz": datetime(2026, 11, 1, tzinfo=UTC),
    "interval": timedelta(days=1),
}
"""A value of each type. With nulls the planner leaves out what it need not read, and asks for no privilege on it."""


async def of_bons(connection: Connection) -> dict[str, str]:
    """Return each statement that names a table of schema `public`; what does not prepare is told by `test_sql`."""
    found = dict(statements(bon_scheduler, handlers))
    found |= {f"bon_scheduler.cli.ids.{kind}": sql for kind, sql in ids.FIND.items()}
    return {
        name: sql
        for name, sql in found.items()
        if "bon_scheduler.demo" not in name and await tables_of(connection, sql)
    }


def users(name: str) -> tuple[str, ...]:
    """Return whose a statement is."""
    module = name.rpartition(".")[0]
    declared_there = (
        each.name
        for each in vars(sys.modules.get(module, handlers)).values()
        if isinstance(each, Job) and each.handler.__module__ == module
    )
    return USERS.get(name) or USERS.get(module) or tuple(declared_there)


async def fault(connection: Connection, role: str, sql: str) -> str | None:
    """Execute it as the role, and undo it; return why the role may not."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(f"set local role {role}")
        statement = await connection.prepare(sql)
        types = ["array" if of.kind == "array" else of.name for of in statement.get_parameters()]
        unknown = set(types) - {*SOME, "array"}
        assert not unknown, f"{HERE}: give SOME a value of type {', '.join(unknown)}"
        some = SOME | ({"text": "{}"} if "::text::uuid[]" in sql else {})
        await statement.fetch(*([] if each == "array" else some[each] for each in types))
    except asyncpg.InsufficientPrivilegeError as error:
        return str(error)
    except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError):
        return None  # it was executed: privileges are asked for BEFORE
    finally:
        await transaction.rollback()
    return None


async def test_each_statement_on_bons_tables_is_somebodys(connection: Connection) -> None:
    nobodys = [name for name in await of_bons(connection) if not users(name)]
    remedy = f'{HERE}: add to USERS whose these are, as in "handlers.notes": ("old-notes",)'
    assert not nobodys, f"{remedy}: {', '.join(nobodys)}"


def test_each_entry_is_of_a_job() -> None:
    gone = set(USES) - SERVICE - {job.name for job in handlers.JOBS}
    assert not gone, f"{CONTRACT}: take out of USES what is no job: {', '.join(gone)}"


def test_each_column_that_is_used_has_a_type_and_the_other_way_round() -> None:
    used = {pair for user in USES for pair in columns(privileges(user))}
    typed = {(table, column) for table, names in COLUMNS.items() for column in names}
    assert used == typed, f"{CONTRACT}: COLUMNS lacks {used - typed or 'nothing'}; no job uses {typed - used or 'none'}"
    assert set(WORDS) <= used


@pytest.mark.parametrize("user", dict.fromkeys([*USES, *(job.name for job in handlers.JOBS)]))
async def test_a_role_with_these_privileges_executes_each_statement_and_with_one_less_it_does_not(
    connection: Connection, database_url: str, user: str
) -> None:
    theirs = [sql for name, sql in (await of_bons(connection)).items() if user in users(name)]
    needed = list(privileges(user)) if user in USES else []
    absent = {each.table for each in needed} - set(await columns_of(connection))
    assert not absent, f"bon_scheduler/demo/bon.sql: make what {user} uses: {', '.join(absent)}"
    async with limited_role(connection, database_url) as role:

        async def may(sql: str) -> bool:
            return await fault(connection, role.name, sql) is None

        await grant(connection, role, needed)
        lacks = not all([await may(sql) for sql in theirs])
        idle = [privilege for privilege in needed if not await is_needed(connection, role, [privilege], theirs, may)]
        if lacks or idle:
            for privilege in needed:
                await revoke(connection, role, privilege)
            pytest.fail(f"{CONTRACT}: {await advise(connection, role, user, theirs, may)}", pytrace=False)


async def test_what_statements_need_is_told_as_it_is_to_be_written(connection: Connection, database_url: str) -> None:
    await connection.execute("create table public.notes (id uuid primary key, day date not null, note text)")
    statements_of_a_job = [
        "insert into notes (id, day) values ($1, $2)",
        "select count(*) from notes",
        "select id from notes where day < $1 for update",
        "update invoices set updated_at = now() where id = $1",
    ]
    async with limited_role(connection, database_url) as role:

        async def may(sql: str) -> bool:
            return await fault(connection, role.name, sql) is None

        told = await advise(connection, role, "a-test", statements_of_a_job, may)
    assert told.splitlines()[:4] == [
        "write in USES",
        '    "a-test": {"invoices": Uses(reads=("id",), changes=("updated_at",)), '
        '"notes": Uses(reads=("id", "day"), inserts=("id", "day"), locks="id")},',
        "and in COLUMNS",
        '    "notes": {"id": Kind.ID, "day": Kind.DAY},',
    ]
