"""The queue's connection is lost in every way, and runs are brought again."""

import time
from uuid import UUID

import pytest

from bon_scheduler import Counts, JobContext, NoPayload, db, job, service
from bon_scheduler.engine import LONGEST_REBUILD_WAIT_SECONDS, LOOK_SECONDS, QUERY_LIMIT_SECONDS
from bon_scheduler.service import Serving
from tests.chaos.proxy import in_front_of
from tests.conftest import Connection, MakeSettings
from tests.server import backends, frozen
from tests.waiting import until

NOTICED_SECONDS = 10
SILENT = "select pg_terminate_backend(pid) from pg_stat_activity where pid = any ($1)"


@job("a-test")
async def quick(_: JobContext, __: NoPayload) -> Counts:
    return {}


async def until_connected(serving: Serving) -> None:
    async def look() -> bool:
        return serving.engine.connected

    await until(look, seconds=20)


async def brought(connection: Connection) -> float:
    """Ask for a run; return the seconds until it has ended."""
    run_id: UUID = await connection.fetchval("select bon_scheduler.enqueue('a-test')")
    before = time.monotonic()

    async def ended() -> bool:
        return bool(
            await connection.fetchval("select state = 'succeeded' from bon_scheduler.runs where id = $1", run_id)
        )

    await until(ended, seconds=30)
    return time.monotonic() - before


async def test_a_listen_that_was_taken_away_is_noticed_and_renewed(
    make_settings: MakeSettings, connection: Connection
) -> None:
    async with service.serving(make_settings(), jobs=[quick]) as serving:
        await until_connected(serving)
        driver = serving.engine._driver
        assert driver is not None
        await driver.execute("unlisten *")
        before = time.monotonic()

        async def renewed() -> bool:
            return serving.engine._driver is not driver and serving.engine.connected

        await until(renewed, seconds=20)
        assert time.monotonic() - before < NOTICED_SECONDS
        assert await brought(connection) < 2


async def test_a_queue_connection_that_hangs_is_noticed_and_replaced(
    make_settings: MakeSettings, connection: Connection
) -> None:
    """Its backend stands still: nothing fails, and nothing answers."""
    async with service.serving(make_settings(), jobs=[quick]) as serving:
        await until_connected(serving)
        driver = serving.engine._driver
        assert driver is not None
        [row] = await driver.fetch("select pg_backend_pid() as pid")
        async with frozen([pid for pid in await backends(connection) if pid == row["pid"]]):
            assert await brought(connection) < NOTICED_SECONDS + 2
    assert LOOK_SECONDS + QUERY_LIMIT_SECONDS < NOTICED_SECONDS


async def test_connections_that_are_cut_again_and_again_delay_nothing_for_long(
    make_settings: MakeSettings, connection: Connection
) -> None:
    async with service.serving(make_settings(), jobs=[quick]) as serving:
        await until_connected(serving)
        for _ in range(3):
            await connection.execute(SILENT, await backends(connection))
            assert await brought(connection) < 5


async def test_a_network_that_swallowed_a_connection_attempt_delays_the_queue_little(
    make_settings: MakeSettings, database_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "SERVICE_CONNECT_SECONDS", 0.5)
    async with (
        in_front_of(database_url) as (proxy, url),
        service.serving(make_settings(DATABASE_URL=url), jobs=[quick]) as serving,
    ):
        await until_connected(serving)
        async with proxy.swallowing():
            proxy.reset()

            async def rebuilding() -> bool:
                return serving.engine._driver is None

            await until(rebuilding)
            before = proxy.swallowed

            async def tried() -> bool:
                return proxy.swallowed > before + 1  # the heartbeat's is one

            await until(tried)
        assert await brought(connection) < 0.5 + LONGEST_REBUILD_WAIT_SECONDS + 1
