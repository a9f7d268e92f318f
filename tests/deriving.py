"""What statements need of BON's tables, found by trying, as the lines of `bon_scheduler/database/contract.py`."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import groupby

import asyncpg

from bon_scheduler.database.contract import COLUMNS, Kind, Privilege
from tests.conftest import Connection
from tests.roles import Role, grant, revoke

May = Callable[[str], Awaitable[bool]]
"""Whether the role may execute a statement."""
OF_COLUMNS = ("select", "update", "insert")
# Until the transaction ends, a session holds a lock on each table that a statement it has prepared names.
LOCKED = """
    select c.relname
      from pg_locks l
      join pg_class c on c.oid = l.relation
     where l.pid = pg_backend_pid()
       and c.relnamespace = 'public'::regnamespace
       and c.relkind in ('r', 'p')
"""
ALL_COLUMNS = """
    select c.relname as tab, a.attname as col, format_type(t.oid, null) as type, t.typtype = 'e' as is_enum
      from pg_class c
      join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
      join pg_type t on t.oid = a.atttypid
     where c.relnamespace = 'public'::regnamespace
       and c.relkind in ('r', 'p')
     order by 1, a.attnum
"""


async def tables_of(connection: Connection, sql: str) -> set[str]:
    """Return the tables of schema `public` that a statement names; none of one that cannot be prepared."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.prepare(sql)
        return {row["relname"] for row in await connection.fetch(LOCKED)}
    except asyncpg.PostgresError:
        return set()
    finally:
        await transaction.rollback()


async def columns_of(connection: Connection) -> dict[str, dict[str, asyncpg.Record]]:
    """Return the columns of schema `public`, by table and name."""
    rows = await connection.fetch(ALL_COLUMNS)
    return {table: {row["col"]: row for row in those} for table, those in groupby(rows, lambda row: str(row["tab"]))}


async def is_needed(
    connection: Connection, role: Role, those: Sequence[Privilege], statements: Sequence[str], may: May
) -> bool:
    """Return whether some statement fails without these privileges of the role."""
    for privilege in those:
        await revoke(connection, role, privilege)
    needed = not all([await may(sql) for sql in statements])
    await grant(connection, role, those)
    return needed


async def advise(connection: Connection, role: Role, user: str, statements: Sequence[str], may: May) -> str:
    """Return which lines to write for a job's statements; the role may nothing yet."""
    existing = await columns_of(connection)
    tables = sorted(set().union(*[await tables_of(connection, sql) for sql in statements]))
    if not tables:
        return f'take "{user}" out of USES: no statement of its own is on BON\'s tables'
    needed = await _needed(connection, role, {table: list(existing[table]) for table in tables}, statements, may)
    uses = ", ".join(f'"{table}": {_uses([each for each in needed if each.table == table])}' for table in tables)
    lines = [f'write in USES\n    "{user}": {{{uses}}},']
    for table in tables:
        named = dict.fromkeys(each.column for each in needed if each.table == table and each.column is not None)
        if names := [column for column in named if column not in COLUMNS.get(table, {})]:
            kinds = ", ".join(f'"{column}": {_kind(existing[table][column])}' for column in names)
            beside = ", beside what it has of that table" if table in COLUMNS else ""
            lines.append(f'and in COLUMNS{beside}\n    "{table}": {{{kinds}}},')
    return "\n".join([*lines, "then run: python -m tests.tools.reference"])


async def _needed(
    connection: Connection, role: Role, existing: Mapping[str, list[str]], statements: Sequence[str], may: May
) -> list[Privilege]:
    """Return the privileges without which some statement fails, whatever else the role may."""
    every = [
        Privilege(table, kind, column) for table, names in existing.items() for kind in OF_COLUMNS for column in names
    ]
    every += [Privilege(table, "delete", None) for table in existing]
    await grant(connection, role, every)
    needed = [each for each in every if await is_needed(connection, role, [each], statements, may)]
    for table, names in existing.items():
        # Some column, whichever: `count(*)` reads one, `for update` locks by one.
        for kind, told in (("select", "select"), ("update", "lock")):
            those = [Privilege(table, kind, column) for column in names]
            if not {*those} & {*needed} and await is_needed(connection, role, those, statements, may):
                needed.append(Privilege(table, told, names[0]))
    return needed


def _uses(needed: Iterable[Privilege]) -> str:
    """Return how `Uses` is written for the privileges on one table."""
    of: dict[str, list[str]] = {}
    for each in needed:
        of.setdefault(each.kind, []).append(f'"{each.column}"')
    named = [
        f"{name}=({', '.join(of[kind])}{',' * (len(of[kind]) == 1)})"
        for kind, name in (("select", "reads"), ("update", "changes"), ("insert", "inserts"))
        if kind in of
    ]
    named += ["deletes=True"] if "delete" in of else []
    named += [f"locks={of['lock'][0]}"] if "lock" in of else []
    return f"Uses({', '.join(named)})"


def _kind(column: asyncpg.Record) -> str:
    """Return how the type of a column is written."""
    kinds = (kind for kind in Kind if kind.takes(column["type"], is_enum=column["is_enum"]))
    return next((f"Kind.{kind.name}" for kind in kinds), f'Kind("{column["type"]}")')
