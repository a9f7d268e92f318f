"""`migrate` beside those who hold what it needs: it says who they are, stops nobody, and gives up at last."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from bon_scheduler.cli.statuses import EXIT_STATUS
from bon_scheduler.database import connections, migrations, patience
from bon_scheduler.database.connections import MIGRATION_LOCK
from bon_scheduler.database.patience import MigrationBlockedError
from tests.conftest import Connection
from tests.database.test_upgrade import FILL, OLD_SCHEMA, OLD_WORKER
from tests.process import Finished, run_command
from tests.waiting import until

ASK = "select bon_scheduler.enqueue('a-test')"
LONGEST_WAIT_SECONDS = 1.5
"""The time-out of a lock, and what two busy cores add to it."""
VERSION = "select max(version) from bon_scheduler.migrations"


@pytest.fixture
async def version_nine(empty_database_url: str) -> AsyncIterator[Connection]:
    """A database of the version before."""
    async with connections.connect(empty_database_url) as opened:
        await opened.execute(OLD_SCHEMA.read_text())
        yield opened


def waits_told(ended: Finished) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in ended.err.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "migrate.waiting"]


async def ask_until(connection: Connection, done: asyncio.Event) -> list[float]:
    """Ask for runs as BON does; return how long each request took, in seconds."""
    took = []
    while not done.is_set():
        before = time.monotonic()
        await connection.fetchval(ASK)
        took.append(time.monotonic() - before)
        await asyncio.sleep(0.02)
    return took


@pytest.mark.slow
async def test_beside_a_dump_a_migration_waits_and_enqueue_does_not(
    version_nine: Connection,
    empty_database_url: str,
) -> None:
    await version_nine.execute(FILL.format(worker=OLD_WORKER))
    done = asyncio.Event()
    async with connections.connect(empty_database_url) as dump, connections.connect(empty_database_url) as bon:
        await dump.execute("set application_name = 'pg_dump'")
        asking = asyncio.create_task(ask_until(bon, done))
        async with dump.transaction(readonly=True):
            await dump.execute("lock table bon_scheduler.runs in access share mode")
            migrating = asyncio.create_task(run_command("migrate", DATABASE_URL=empty_database_url))
            await asyncio.sleep(9)  # the dump takes its time, several tries of the migration
            assert not migrating.done()
            assert await version_nine.fetchval(VERSION) == 9
        ended = await migrating
        done.set()
        took = await asking
    assert ended.status == 0, ended.err
    odd = "select count(*) from bon_scheduler.runs where payload = '{}' and (not ready or run_at is not null)"
    assert await version_nine.fetchval(odd) == 0
    assert await version_nine.fetchval(VERSION) == 10
    assert max(took) < LONGEST_WAIT_SECONDS
    assert len([seconds for seconds in took if seconds < 0.2]) > 50
    told = waits_told(ended)
    assert told
    assert all('"pg_dump"' in line["held_by"] and "runs" in line["held_by"] for line in told)
    assert len(told) <= 3


async def test_a_request_that_waited_for_the_migration_is_one_of_the_new_version(
    version_nine: Connection, empty_database_url: str
) -> None:
    """The old function goes on in a schema that it does not know."""
    await version_nine.execute("insert into bon_scheduler.jobs (name) values ('a-test')")
    later = "select bon_scheduler.enqueue('a-test', '{\"business_id\": \"b\"}', run_at => now() + interval '1 hour')"
    async with (
        connections.connect(empty_database_url) as bon,
        connections.connect(empty_database_url) as migrating,
        connections.connect(empty_database_url) as too,
    ):
        async with migrating.transaction():
            await migrating.execute("lock table bon_scheduler.jobs in access exclusive mode")
            asked = [asyncio.create_task(bon.fetchval(ASK)), asyncio.create_task(too.fetchval(later))]
            waiting = "select count(*) = 2 from pg_locks where not granted and database is not null"
            await until(lambda: version_nine.fetchval(waiting))
            await migrations.apply(migrating)
        now, put_off = await asyncio.gather(*asked)
    rows = {row["id"]: row for row in await version_nine.fetch("select * from bon_scheduler.runs")}
    assert (rows[now]["ready"], rows[now]["run_at"], rows[now]["turn"] > 0) == (True, None, True)
    assert (rows[put_off]["ready"], rows[put_off]["run_at"] is None) == (False, False)
    assert (rows[put_off]["business"], rows[put_off]["concurrency_key"]) == ("b", None)


async def test_the_turn_of_another_migrate_is_waited_for_and_told(database_url: str) -> None:
    async with connections.connect(database_url) as other:
        await other.execute("set application_name = 'somebody'")
        await other.execute("select pg_advisory_lock($1)", MIGRATION_LOCK)
        migrating = asyncio.create_task(run_command("migrate", DATABASE_URL=database_url))
        pid = other.get_server_pid()

        async def looked() -> bool:
            sql = "select count(*) from pg_stat_activity where query like '%pg_locks%' and pid <> pg_backend_pid()"
            return bool(await other.fetchval(sql)) or migrating.done()

        await until(looked, seconds=30)
        await asyncio.sleep(0.5)
        assert not migrating.done()
        await other.execute("select pg_advisory_unlock($1)", MIGRATION_LOCK)
        ended = await migrating
    assert ended.status == 0
    (told,) = waits_told(ended)
    assert told["held_by"].startswith(f'process {pid} "somebody"')


async def test_a_lock_that_is_never_given_is_given_up_with_who_holds_it(
    database_url: str, connection: Connection
) -> None:
    async with connections.connect(database_url) as other:
        await other.execute("select pg_advisory_lock($1)", MIGRATION_LOCK)
        with pytest.raises(MigrationBlockedError, match=rf"another migrate, held by process {other.get_server_pid()} "):
            async with patience.holding(connection, MIGRATION_LOCK, patience=timedelta(seconds=0.3)):
                pass
    assert EXIT_STATUS[MigrationBlockedError] == 1


async def test_tables_that_are_never_free_are_given_up_and_nothing_is_changed(
    version_nine: Connection,
    empty_database_url: str,
) -> None:
    async with connections.connect(empty_database_url) as reader, reader.transaction():
        await reader.execute("select from bon_scheduler.runs")
        with pytest.raises(MigrationBlockedError, match=r"tables of schema bon_scheduler, held by process \d+ .*runs"):
            await patience.once_tables_are_free(version_nine, migrations.apply, patience=timedelta(seconds=0.3))
    assert await version_nine.fetchval(VERSION) == 9
    assert not await version_nine.fetchval(
        "select exists (select from pg_locks where pid = pg_backend_pid() and mode = 'AccessExclusiveLock')"
    )


async def test_what_is_up_to_date_waits_for_no_table(database_url: str, connection: Connection) -> None:
    async with connections.connect(database_url) as reader, reader.transaction():
        await reader.execute("select from bon_scheduler.runs, bon_scheduler.jobs, bon_scheduler.migrations")
        await patience.once_tables_are_free(connection, migrations.apply, patience=timedelta(0))
