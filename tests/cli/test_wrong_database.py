"""A database that is not BON's, or not yet: who works with it is told which it is and what is missing."""

import json
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from bon_scheduler import declared, service
from bon_scheduler.cli.check import check_deployment
from bon_scheduler.cli.checks.findings import Level
from bon_scheduler.clock import SystemClock
from bon_scheduler.config import Settings
from bon_scheduler.database import connections
from bon_scheduler.database.contract import COLUMNS
from bon_scheduler.demo.sample import create_tables
from tests.conftest import Connection
from tests.process import run_command
from tests.test_service import get, until_ready
from tests.waiting import until


@pytest.fixture
def settings(empty_database_url: str) -> Settings:
    return declared.read_settings(
        {
            "DATABASE_URL": empty_database_url,
            "HEALTH_PORT": "0",
            "HEALTH_HOST": "127.0.0.1",
            "SHAAM_MODE": "mock",
            "EMAIL_MODE": "log",
        }
    )


async def test_migrate_names_the_database_and_warns_that_bons_tables_are_not_there(empty_database_url: str) -> None:
    name, host = urlsplit(empty_database_url).path.removeprefix("/"), urlsplit(empty_database_url).hostname
    first = await run_command("migrate", DATABASE_URL=empty_database_url)
    assert first.status == 0
    assert f"Applied in the database {name} at {host}" in first.out
    assert "Warning: none of BON's tables is there yet" in first.out
    again = await run_command("migrate", DATABASE_URL=empty_database_url)
    assert f"up to date in the database {name} at {host}" in again.out
    async with connections.connect(empty_database_url) as connection:
        await create_tables(connection)
        await connection.execute("drop table sessions")
    document = (await run_command("migrate", "--json", DATABASE_URL=empty_database_url)).document
    assert (document["applied"], document["database"], document["missing_tables"]) == ([], name, ["sessions"])
    assert "sessions of BON are not there yet" in (await run_command("migrate", DATABASE_URL=empty_database_url)).out
    async with connections.connect(empty_database_url) as connection:
        await create_tables_anew(connection)
    assert "Warning" not in (await run_command("migrate", DATABASE_URL=empty_database_url)).out


async def create_tables_anew(connection: Connection) -> None:
    await connection.execute("drop schema public cascade; create schema public")
    await create_tables(connection)


async def test_a_command_names_the_database_that_is_to_be_migrated(empty_database_url: str) -> None:
    name = urlsplit(empty_database_url).path.removeprefix("/")
    listed = await run_command("runs", DATABASE_URL=empty_database_url)
    assert listed.status == 1
    assert f"is missing in database {name}; this version needs" in listed.err
    checked = (await run_command("check", "--json", DATABASE_URL=empty_database_url)).document
    (schema,) = [each for each in checked["findings"] if each["name"] == "schema"]
    assert name in schema["what"]
    assert schema["remedy"].startswith("Run: ")
    (found,) = [each for each in checked["findings"] if each["name"] == "database"]
    assert found["what"].endswith(f"the database is {name}")


async def test_a_service_without_bons_tables_is_not_ready_says_why_and_becomes_so_by_itself(
    settings: Settings, empty_database_url: str, logged: Callable[[], str]
) -> None:
    name = urlsplit(empty_database_url).path.removeprefix("/")
    await service.prepare(settings)
    async with service.serving(settings) as serving:
        (told,) = [line for line in map(json.loads, logged().splitlines()) if line["event"] == "tables.missing"]
        assert (told["level"], told["database"], told["tables"]) == ("warning", name, sorted(COLUMNS))

        async def answers() -> bool:
            return bool(serving.engine.connected)

        await until(answers)
        status, body = await get(serving, "/readyz")
        assert (status, f"none of BON's tables that its jobs need is in database {name}" in body) == (503, True)
        assert (await get(serving, "/livez"))[0] == 200
        async with connections.connect(empty_database_url) as connection:
            await create_tables(connection)
        await until_ready(serving)


async def test_what_is_missing_cannot_be_judged(settings: Settings, empty_database_url: str) -> None:
    await service.prepare(settings)
    looks = {"privileges", "indexes", "row security"}
    found = [each for each in await check_deployment(settings, SystemClock()) if each.name in looks]
    assert {each.name for each in found} == looks
    for each in found:
        assert (each.level, each.what) == (Level.WARNING, "could not be judged: none of BON's tables is there")
    async with connections.connect(empty_database_url) as connection:
        await create_tables(connection)
        await connection.execute("drop table sessions")
    some = [each for each in await check_deployment(settings, SystemClock()) if each.name in looks]
    assert [each.what for each in some].count("could not be judged: not there: sessions") == len(looks)
