"""
Whether the role of a connection can use BON's tables and ours, asked of the database.

Reads catalogues only. Names are looked up without `to_regclass`, which a role without USAGE on a schema may not call.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import asyncpg

from bon_scheduler.database import contract, migrations
from bon_scheduler.database.contract import COLUMNS, USES, WORDS
from bon_scheduler.jobs import Connection

__all__ = [
    "Function",
    "OtherColumn",
    "Refusal",
    "existing_tables",
    "hidden_tables",
    "missing_columns",
    "missing_tables",
    "name_of",
    "other_columns",
    "own_functions",
    "own_refusals",
    "refusals",
]

# $1 tables: text[], $2 columns: text[] beside them. What schema `public` does not have.
MISSING_COLUMNS = """
    select wanted.tab as table_name, wanted.col as column_name, c.oid is null as no_table
      from unnest($1::text[], $2::text[]) as wanted (tab, col)
      left join pg_class c on c.relname = wanted.tab
                          and c.relnamespace = (select oid from pg_namespace where nspname = 'public')
     where not exists (select from pg_attribute a
                        where a.attrelid = c.oid
                          and a.attname = wanted.col
                          and a.attnum > 0
                          and not a.attisdropped)
     order by 1, 2
"""
# $1 tables: text[]. Those that schema `public` has.
EXISTING_TABLES = """
    select c.relname::text
      from pg_class c
     where c.relname = any ($1) and c.relnamespace = (select oid from pg_namespace where nspname = 'public')
     order by 1
"""
# $1 tables: text[], $2 columns: text[] beside them. A domain is what it is made of.
TYPES = """
    select wanted.tab as table_name, wanted.col as column_name, format_type(t.oid, null) as type,
           t.typtype = 'e' as is_enum,
           array(select e.enumlabel::text from pg_enum e where e.enumtypid = t.oid) as labels
      from unnest($1::text[], $2::text[]) as wanted (tab, col)
      join pg_class c on c.relname = wanted.tab
                     and c.relnamespace = (select oid from pg_namespace where nspname = 'public')
      join pg_attribute a on a.attrelid = c.oid and a.attname = wanted.col and a.attnum > 0
      join pg_type declared on declared.oid = a.atttypid
      join pg_type t on t.oid = case when declared.typtype = 'd' then declared.typbasetype else declared.oid end
     order by 1, 2
"""
# $1 tables: text[], $2 columns: text[], null for the whole table, $3 privileges: text[] beside them. What the role may
# not do, of what exists.
REFUSED = """
    select wanted.tab as table_name, wanted.col as column_name, wanted.kind
      from unnest($1::text[], $2::text[], $3::text[]) as wanted (tab, col, kind)
      join pg_class c on c.relname = wanted.tab
                     and c.relnamespace = (select oid from pg_namespace where nspname = 'public')
      left join pg_attribute a on a.attrelid = c.oid and a.attname = wanted.col and a.attnum > 0
     where not case when wanted.kind = 'lock' then has_any_column_privilege(c.oid, 'update')
                    when wanted.col is null then has_table_privilege(c.oid, wanted.kind)
                    when a.attnum is null then true
                    else has_column_privilege(c.oid, a.attnum, wanted.kind)
                end
"""
SCHEMAS_REFUSED = """
    select nspname as name
      from pg_namespace
     where nspname in ('public', 'bon_scheduler') and not has_schema_privilege(oid, 'usage')
     order by 1
"""
ROLE = "select quote_ident(current_user)"
# Who applies migrations writes the history of the schema; nobody else reads that of its functions.
OWN_REFUSED = """
    select kinds, string_agg('bon_scheduler.' || table_name, ', ' order by table_name) as tables
      from (select c.relname as table_name, string_agg(p.kind, ', ' order by p.place) as kinds
              from pg_class c
             cross join unnest(array['select', 'insert', 'update', 'delete']) with ordinality as p (kind, place)
             where c.relnamespace = (select oid from pg_namespace where nspname = 'bon_scheduler')
               and c.relkind in ('r', 'p')
               and c.relname <> 'functions'
               and (p.kind = 'select' or c.relname <> 'migrations')
               and not has_table_privilege(c.oid, p.kind)
             group by c.relname) refused
     group by 1
     order by 1
"""
# $1 tables of BON's: text[].
HIDDEN = """
    select n.nspname || '.' || c.relname as name
      from pg_class c
      join pg_namespace n on n.oid = c.relnamespace
     where (n.nspname = 'bon_scheduler' or n.nspname = 'public' and c.relname = any ($1))
       and c.relrowsecurity
       and row_security_active(c.oid)
     order by 1
"""
OWN_FUNCTIONS = """
    select p.proname as name, p.oid::regprocedure::text as signature, p.prosrc as text,
           p.prorettype = 'trigger'::regtype or has_function_privilege(p.oid, 'execute') as executable
      from pg_proc p
     where p.pronamespace = (select oid from pg_namespace where nspname = 'bon_scheduler')
     order by 1
"""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a role may not do in one place, for whom it would, and the statement that grants it."""

    what: str
    users: tuple[str, ...]
    grant: str


@dataclass(frozen=True, slots=True)
class OtherColumn:
    """A column of BON's that is not as statements take it, and why."""

    name: str
    fault: str


@dataclass(frozen=True, slots=True)
class Function:
    """A function of ours."""

    name: str
    signature: str | None
    """None: it is missing."""
    executable: bool
    ours: bool
    """Whether its text is this version's."""


def _columns() -> tuple[list[str], list[str]]:
    pairs = [(table, column) for table, columns in COLUMNS.items() for column in columns]
    return [table for table, _ in pairs], [column for _, column in pairs]


async def existing_tables(connection: Connection, tables: Collection[str]) -> list[str]:
    """Return which of these tables of BON's exist."""
    return [row[0] for row in await connection.fetch(EXISTING_TABLES, list(tables))]


async def missing_tables(connection: Connection) -> list[str]:
    """Return the tables of BON's that do not exist."""
    return sorted(COLUMNS.keys() - set(await existing_tables(connection, list(COLUMNS))))


async def name_of(connection: Connection) -> str:
    """Return the name of the database that a connection leads to."""
    return str(await connection.fetchval("select current_database()"))


async def missing_columns(connection: Connection) -> list[asyncpg.Record]:
    """Return `table_name`, `column_name` and `no_table` of each column of BON's that does not exist."""
    return list(await connection.fetch(MISSING_COLUMNS, *_columns()))


async def other_columns(connection: Connection) -> list[OtherColumn]:
    """Return the columns of BON's whose type is another, or whose enumeration lacks a word."""
    found = []
    for row in await connection.fetch(TYPES, *_columns()):
        table, column = row["table_name"], row["column_name"]
        kind = COLUMNS[table][column]
        if not kind.takes(row["type"], is_enum=row["is_enum"]):
            found.append(OtherColumn(f"{table}.{column}", f"is {row['type']}, and this version takes it for {kind}"))
        elif row["is_enum"] and (lacks := WORDS.get((table, column), frozenset()) - set(row["labels"])):
            found.append(OtherColumn(f"{table}.{column}", f"cannot hold {', '.join(sorted(lacks))} any more"))
    return found


async def refusals(connection: Connection) -> list[Refusal]:
    """Return what the connection's role may not do in BON's tables, one a table and privilege."""
    role = await connection.fetchval(ROLE)
    needed: dict[contract.Privilege, list[str]] = defaultdict(list)
    for user in USES:
        for privilege in contract.privileges(user):
            needed[privilege].append(user)
    rows = await connection.fetch(
        REFUSED, [p.table for p in needed], [p.column for p in needed], [p.kind for p in needed]
    )
    refused: dict[tuple[str, str], list[contract.Privilege]] = defaultdict(list)
    for row in rows:
        privilege = contract.Privilege(row["table_name"], row["kind"], row["column_name"])
        refused[privilege.table, "update" if privilege.kind == "lock" else privilege.kind].append(privilege)
    schemas = [
        Refusal(f"use schema {row['name']}", (), f"grant usage on schema {row['name']} to {role};")
        for row in await connection.fetch(SCHEMAS_REFUSED)
    ]
    return schemas + [
        _refusal(table, kind, those, tuple(dict.fromkeys(user for each in those for user in needed[each])), role)
        for (table, kind), those in sorted(refused.items())
    ]


def _refusal(table: str, kind: str, those: list[contract.Privilege], users: tuple[str, ...], role: str) -> Refusal:
    columns = ", ".join(sorted({each.column for each in those if each.column}))
    named = f" ({columns})" if columns else ""
    what = f"lock rows of {table}" if all(each.kind == "lock" for each in those) else f"{kind} {table}{named}"
    return Refusal(what, users, f"grant {kind}{named} on public.{table} to {role};")


async def own_refusals(connection: Connection) -> list[Refusal]:
    """Return what the connection's role may not do in the tables of schema `bon_scheduler`."""
    role = await connection.fetchval(ROLE)
    return [
        Refusal(f"{row['kinds']} {row['tables']}", (), f"grant {row['kinds']} on {row['tables']} to {role};")
        for row in await connection.fetch(OWN_REFUSED)
    ]


async def hidden_tables(connection: Connection) -> list[str]:
    """Return the tables of BON's and of ours where row level security applies to the connection's role."""
    return [row["name"] for row in await connection.fetch(HIDDEN, list(COLUMNS))]


async def own_functions(connection: Connection) -> list[Function]:
    """Return each function that this version has, as the database has it; those of one name singly."""
    texts = migrations.function_texts()
    rows = await connection.fetch(OWN_FUNCTIONS)
    missing = [Function(name, None, executable=False, ours=False) for name in texts.keys() - {r["name"] for r in rows}]
    return sorted(missing, key=lambda each: each.name) + [
        Function(row["name"], row["signature"], row["executable"], row["text"] in texts[row["name"]])
        for row in rows
        if row["name"] in texts
    ]
