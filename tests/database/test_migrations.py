"""`migrate` brings a database to the schema of the files, functions included, and says what it did."""

import pytest

from bon_scheduler import declared, service
from bon_scheduler.config import Settings
from tests.conftest import Connection

DEFINITIONS = """
    select p.oid::regprocedure::text as signature, pg_get_functiondef(p.oid) as definition
      from pg_proc p
     where p.pronamespace = 'bon_scheduler'::regnamespace
"""
# As a version that had another text of the function left it.
BE_OLD = "update bon_scheduler.functions set hash = 'of an older text' where name = 'is_alive'"


async def definitions(connection: Connection) -> dict[str, str]:
    return {row["signature"]: row["definition"] for row in await connection.fetch(DEFINITIONS)}


async def test_a_new_installation_lists_its_tables_alone(empty_database_url: str) -> None:
    settings = declared.read_settings({"DATABASE_URL": empty_database_url})
    assert await service.prepare(settings) == ["0010 ledger"]
    assert await service.prepare(settings) == []


@pytest.mark.parametrize(
    "old",
    [
        # Another text, other names of its arguments, another result, other arguments.
        "create or replace function bon_scheduler.is_alive(worker uuid) returns boolean language sql as 'select true'",
        "drop function bon_scheduler.is_alive; "
        "create function bon_scheduler.is_alive(id uuid) returns boolean language sql as 'select true'",
        "drop function bon_scheduler.is_alive; "
        "create function bon_scheduler.is_alive(worker uuid) returns text language sql as 'select null'",
        "drop function bon_scheduler.is_alive; "
        "create function bon_scheduler.is_alive(worker text, since date) returns boolean language sql as 'select true'",
    ],
)
async def test_a_function_of_an_older_version_is_replaced_and_named(
    settings: Settings, connection: Connection, old: str
) -> None:
    new = await definitions(connection)
    await connection.execute(old)
    await connection.execute(BE_OLD)
    assert await definitions(connection) != new
    assert await service.prepare(settings) == ["functions is_alive"]
    assert await definitions(connection) == new
    assert await service.prepare(settings) == []


async def test_a_function_that_has_no_file_any_more_is_dropped(settings: Settings, connection: Connection) -> None:
    new = await definitions(connection)
    await connection.execute("create function bon_scheduler.redeliver(run uuid) returns void language sql as 'select'")
    await connection.execute("insert into bon_scheduler.functions values ('redeliver', 'of an older text')")
    await service.prepare(settings)
    assert await definitions(connection) == new
    assert not await connection.fetchval("select exists (select from bon_scheduler.functions where name = 'redeliver')")
