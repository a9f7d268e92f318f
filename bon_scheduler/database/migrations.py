"""
The schema `bon_scheduler` as it is now, in `schema/`, and the way there from an earlier version.

Tables are in numbered files that are applied once. `NNNN_from_MMMM.sql` leads a database at version MMMM to NNNN, whose
own file is for an empty one. Functions are in files of their own names and are replaced whenever a text has changed,
so that whoever reads a file reads what runs. Functions that have no file any more are dropped.
"""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

import asyncpg

from bon_scheduler.database.patience import LOCK_TIMEOUT
from bon_scheduler.jobs import Connection

__all__ = ["NEEDED", "SchemaBehindError", "apply", "function_texts", "migration_sql", "require_schema"]

FIRST = 10
"""The version of the first file for an empty database."""
SCHEMA = resources.files("bon_scheduler.database") / "schema"
CREATE_HISTORY = """
    create schema if not exists bon_scheduler;
    create table if not exists bon_scheduler.migrations (
        version    integer primary key,
        name       text not null,
        applied_at timestamptz not null default now()
    );
    comment on table bon_scheduler.migrations is 'The versions of the tables that this database has had.';
    create table if not exists bon_scheduler.functions (
        name text primary key,
        hash text not null
    );
    comment on table bon_scheduler.functions is 'The hash of each function''s file, as it was last applied.';
"""
APPLIED_VERSIONS = "select version from bon_scheduler.migrations"
# $1 version: int, $2 name: text.
RECORD_MIGRATION = "insert into bon_scheduler.migrations (version, name) values ($1, $2)"
APPLIED_FUNCTIONS = "select name, hash from bon_scheduler.functions"
# $1 name: text, $2 hash: text.
RECORD_FUNCTION = """
    insert into bon_scheduler.functions (name, hash) values ($1, $2)
    on conflict (name) do update set hash = excluded.hash
"""
# $1 names that have a file: text[].
FORGET_FUNCTIONS = "delete from bon_scheduler.functions where name <> all ($1)"
# $1 name: text.
FUNCTIONS_NAMED = """
    select p.oid::regprocedure::text as signature
      from pg_proc p
     where p.pronamespace = 'bon_scheduler'::regnamespace and p.proname = $1
"""
# $1 names that have a file: text[].
FUNCTIONS_WITHOUT_FILE = """
    select p.oid::regprocedure::text as signature
      from pg_proc p
     where p.pronamespace = 'bon_scheduler'::regnamespace and p.proname <> all ($1)
"""
# In the order of locks, see 0010_ledger.sql.
TABLES_IN_ORDER = """
    select c.oid::regclass::text as name
      from pg_class c
     where c.relnamespace = 'bon_scheduler'::regnamespace and c.relkind = 'r'
     order by array_position(array['jobs', 'runs', 'attempts'], c.relname::text), c.relname
"""
HAS_HISTORY = "select to_regclass('bon_scheduler.migrations') is not null"
NEWEST_VERSION = "select coalesce(max(version), 0) from bon_scheduler.migrations"
IN_OUR_SCHEMA = "set local search_path = bon_scheduler, pg_temp;\nset local check_function_bodies = off;\n"


class SchemaBehindError(Exception):
    """Schema `bon_scheduler` is missing or older than this version needs, or too old to be upgraded."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file of `schema/`."""

    name: str
    sql: str

    @property
    def version(self) -> int:
        """What the database is at once it is applied."""
        return int(self.name[:4])

    @property
    def upgrades(self) -> int | None:
        """The version it upgrades; None where it does not begin from one."""
        _, from_there, version = self.name.partition("_from_")
        return int(version) if from_there else None

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def _read(folder: Traversable) -> list[_File]:
    files = (file for file in folder.iterdir() if file.name.endswith(".sql"))
    return sorted((_File(file.name[:-4], file.read_text("utf-8")) for file in files), key=lambda file: file.name)


def _tables() -> list[_File]:
    return _read(SCHEMA)


def _functions() -> list[_File]:
    return _read(SCHEMA / "functions")


def function_texts() -> dict[str, str]:
    """Return the file of each SQL function, by its name."""
    return {file.name: file.sql for file in _functions()}


NEEDED = max(file.version for file in _tables())
"""The version that this code needs."""


def _steps(version: int) -> Iterator[_File]:
    """Return what leads from a version to NEEDED; 0 is an empty database."""
    files = _tables()
    while version < NEEDED:
        step = next((file for file in files if _begins_at(file, version)), None)
        if step is None:
            raise SchemaBehindError(
                f"Schema bon_scheduler is at version {version}, from which no upgrade leads to {NEEDED}. "
                "Upgrade it with the version before this one first."
            )
        version = step.version
        if step.upgrades is not None:
            whole = next(file for file in files if file.version == version and file.upgrades is None)
            step = _File(step.name, step.sql + _comments(whole.sql))
        yield step


def _begins_at(file: _File, version: int) -> bool:
    if file.version == FIRST:
        return version == (file.upgrades or 0)
    return version == file.version - 1


def _comments(sql: str) -> str:
    """Return the comments among statements: an upgraded table says the same as a new one."""
    return "".join(f"{part};\n" for part in sql.split(";\n") if part.lstrip().startswith("comment on"))


async def apply(connection: Connection) -> list[str]:
    """
    Bring an empty database or one of an earlier version to NEEDED, whole or not at all; return what was applied.

    Raises asyncpg.LockNotAvailableError where a table is held for longer than LOCK_TIMEOUT.
    """
    async with connection.transaction():
        await connection.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'")
        await connection.execute(CREATE_HISTORY)
        versions = [row["version"] for row in await connection.fetch(APPLIED_VERSIONS)]
        steps = list(_steps(max(versions, default=0)))
        if steps and versions:
            # BEFORE the first change, otherwise what was done while nobody could enqueue is done again after a wait.
            tables = ", ".join(row["name"] for row in await connection.fetch(TABLES_IN_ORDER))
            await connection.execute(f"lock table {tables} in access exclusive mode")
        for step in steps:
            await connection.execute(IN_OUR_SCHEMA + step.sql)
            await connection.execute(RECORD_MIGRATION, step.version, step.name[5:])
        replaced = await _replace_functions(connection)
    # Of a new installation nobody wants to know each function.
    functions = [f"functions {', '.join(replaced)}"] if replaced and versions else []
    return [f"{step.version:04} {step.name[5:]}" for step in steps] + functions


async def _replace_functions(connection: Connection) -> list[str]:
    """Make the functions those of the files; return the names of those that were not."""
    files = _functions()
    names = [file.name for file in files]
    # BEFORE the first signature is read, otherwise it differs from the same one that is read later, and is dropped.
    await connection.execute(IN_OUR_SCHEMA)
    applied = {row["name"]: row["hash"] for row in await connection.fetch(APPLIED_FUNCTIONS)}
    changed = [file for file in files if applied.get(file.name) != file.hash]
    for file in changed:
        before = {row["signature"] for row in await connection.fetch(FUNCTIONS_NAMED, file.name)}
        try:
            async with connection.transaction():
                await connection.execute(IN_OUR_SCHEMA + file.sql)
        except asyncpg.InvalidFunctionDefinitionError:  # another result, or other names of its arguments
            await _drop(connection, before)
            await connection.execute(IN_OUR_SCHEMA + file.sql)
        else:
            after = {row["signature"] for row in await connection.fetch(FUNCTIONS_NAMED, file.name)}
            if after != before:
                await _drop(connection, before)  # other arguments: the old one would stand beside it
        await connection.execute(RECORD_FUNCTION, file.name, file.hash)
    await _drop(connection, {row["signature"] for row in await connection.fetch(FUNCTIONS_WITHOUT_FILE, names)})
    await connection.execute(FORGET_FUNCTIONS, names)
    return [file.name for file in changed]


async def _drop(connection: Connection, signatures: Collection[str]) -> None:
    for signature in signatures:
        await connection.execute(f"drop function {signature}")


def migration_sql() -> str:
    """Return what a first `migrate` executes, for people who apply SQL by hand."""
    parts = ["begin;", CREATE_HISTORY, IN_OUR_SCHEMA]
    for step in _steps(0):
        record = RECORD_MIGRATION.replace("$1", str(step.version)).replace("$2", f"'{step.name[5:]}'")
        parts += [f"-- {step.name}", step.sql, f"{record};"]
    for file in _functions():
        record = RECORD_FUNCTION.replace("$1", f"'{file.name}'").replace("$2", f"'{file.hash}'")
        parts += [file.sql, f"{record.strip()};"]
    return "\n".join([*parts, "commit;", ""])


async def require_schema(connection: Connection) -> int:
    """Return the schema's version; raise SchemaBehindError when it is less than this code needs."""
    version = await connection.fetchval(NEWEST_VERSION) if await connection.fetchval(HAS_HISTORY) else 0
    if version < NEEDED:
        state = "is missing" if not version else f"is at version {version}"
        name = await connection.fetchval("select current_database()")
        raise SchemaBehindError(
            f"Schema bon_scheduler {state} in database {name}; this version needs {NEEDED}. Run: bon-scheduler migrate"
        )
    return int(version)
