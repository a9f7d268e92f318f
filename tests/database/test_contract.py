"""What the contract says that jobs do in BON's tables is what their statements do: no less and no more."""

from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import asyncpg
import pytest

import bon_scheduler
import handlers
from bon_scheduler.cli import ids
from bon_scheduler.database.contract import COLUMNS, USES, WORDS, privileges
from tests.conftest import Connection
from tests.handlers.test_sql import statements
from tests.roles import columns, grant, limited_role, revoke

SHAAM_JOBS = ("shaam-token-refresh", "shaam-refresh-batch")
USERS = {
    "handlers.overdue_detection": ("overdue-detection",),
    "handlers.overdue_digest": ("overdue-digest",),
    "handlers.draft_cleanup": ("draft-cleanup",),
    "handlers.session_cleanup": ("session-cleanup",),
    "handlers.batches": ("overdue-detection", "draft-cleanup"),
    "handlers.notify_reauth": ("notify-reauth",),
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
    "handlers.shaam_token_refresh": ("shaam-token-refresh",),
    "handlers.shaam_refresh_batch": SHAAM_JOBS,
    "bon_scheduler.shaam.refreshes": SHAAM_JOBS,
    "bon_scheduler.shaam.consent": SHAAM_JOBS,
    "bon_scheduler.shaam.ownership": SHAAM_JOBS,
    "bon_scheduler.shaam.standing": ("metrics",),
    "bon_scheduler.ledger.retention": ("ledger-pruning",),
    "bon_scheduler.ledger.pauses": ("commands",),
    "bon_scheduler.cli.ids": ("commands",),
}
"""Whose the statements of a module are, or one of them."""
SOME = {
    "uuid": UUID(int=1),
    "text": "-infinity",  # also an instant and a date
    "bytea": b"x",
    "bool": False,
    "int4": 1,
    "int8": 1,
    "date": date(2026, 11, 1),
    "timestamptz": datetime(2026, 11, 1, tzinfo=UTC),
    "interval": timedelta(days=1),
}
"""A value of each type. With nulls the planner leaves out what it need not read, and asks for no privilege on it."""


def of_bons() -> dict[str, str]:
    """Each statement that names a table of BON's."""
    found = dict(statements(bon_scheduler, handlers))
    found |= {f"bon_scheduler.cli.ids.{kind}": sql for kind, sql in ids.FIND.items()}
    return {name: sql for name, sql in found.items() if "public." in sql and "bon_scheduler.demo" not in name}


def users(name: str) -> tuple[str, ...]:
    return USERS.get(name) or USERS[name.rpartition(".")[0]]


async def fault(connection: Connection, role: str, sql: str) -> str | None:
    """Execute it as the role, and undo it; return why the role may not."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(f"set local role {role}")
        statement = await connection.prepare(sql)
        await statement.fetch(*([] if of.kind == "array" else SOME[of.name] for of in statement.get_parameters()))
    except asyncpg.InsufficientPrivilegeError as error:
        return str(error)
    finally:
        await transaction.rollback()
    return None


def test_each_statement_on_bons_tables_is_somebodys_and_each_job_is_known() -> None:
    assert {user for name in of_bons() for user in users(name)} == set(USES)
    assert {job.name for job in handlers.JOBS} == set(USES) - {"metrics", "commands"}


def test_each_column_that_is_used_has_a_type_and_the_other_way_round() -> None:
    used = {pair for user in USES for pair in columns(privileges(user))}
    assert used == {(table, column) for table, names in COLUMNS.items() for column in names}
    assert set(WORDS) <= used


@pytest.mark.parametrize("user", USES)
async def test_a_role_with_these_privileges_executes_each_statement_and_with_one_less_it_does_not(
    connection: Connection, database_url: str, user: str
) -> None:
    theirs = [sql for name, sql in of_bons().items() if user in users(name)]
    needed = list(privileges(user))
    async with limited_role(connection, database_url) as role:
        await grant(connection, role, needed)
        assert [await fault(connection, role.name, sql) for sql in theirs] == [None] * len(theirs)
        for privilege in needed:
            await revoke(connection, role, privilege)
            faults = [await fault(connection, role.name, sql) for sql in theirs]
            assert any(faults), privilege
            await grant(connection, role, [privilege])
