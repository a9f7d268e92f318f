"""The engine's connection is lost in every way, and runs are claimed again; what it claims it begins or gives back."""

import asyncio
import time
from collections.abc import Callable
from uuid import UUID

import pytest

from bon_scheduler import Counts, JobContext, NoPayload, job, service
from bon_scheduler.database import connections
from bon_scheduler.engine.claiming import CLAIM_SECONDS, LONGEST_RECONNECT_WAIT_SECONDS, POLL_SECONDS
from bon_scheduler.service import Serving
from tests.chaos.proxy import in_front_of
from tests.conftest import Connection, MakeSettings
from tests.server import backends, frozen
from tests.waiting import until

NOTICED_SECONDS = 10
ROOM = 4
SILENT = "select pg_terminate_backend(pid) from pg_stat_activity where pid = any ($1)"


@job("a-test")
async def quick(_: JobContext, __: NoPayload) -> Counts:
    return {}


async def until_connected(serving: Serving) -> None:
    async def look() -> bool:
        return serving.engine.connected

    await until(look, seconds=20)


def engines_connection(serving: Serving) -> Connection:
    """The connection that listens and claims."""
    connection = serving.engine._connection
    assert connection is not None
    return connection


def engines_backend(serving: Serving) -> int:
    """The server's process that serves it."""
    return int(engines_connection(serving).get_server_pid())


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
        old = engines_connection(serving)
        async with serving.machinery.runner.claiming:  # no claim is under way on it
            await old.execute("unlisten *")
        before = time.monotonic()

        async def renewed() -> bool:
            return serving.engine._connection is not old and serving.engine.connected

        await until(renewed, seconds=20)
        assert time.monotonic() - before < NOTICED_SECONDS
        assert await brought(connection) < 2


async def test_a_claim_that_waits_too_long_for_another_is_repeated_on_its_connection(
    make_settings: MakeSettings, connection: Connection, logged: Callable[[], str]
) -> None:
    async with service.serving(make_settings(), jobs=[quick]) as serving:
        await until_connected(serving)
        old = engines_connection(serving)
        async with connection.transaction():
            await connection.execute("lock table bon_scheduler.one_claim in share row exclusive mode")

            async def repeated() -> bool:
                return "claim.repeated" in logged()

            await until(repeated)
        assert await brought(connection) < 2
        assert serving.engine._connection is old


async def test_a_connection_that_hangs_is_noticed_and_replaced(
    make_settings: MakeSettings, connection: Connection
) -> None:
    """Its backend stands still: nothing fails, and nothing answers."""
    async with service.serving(make_settings(), jobs=[quick]) as serving:
        await until_connected(serving)
        pid = engines_backend(serving)
        async with frozen([backend for backend in await backends(connection) if backend == pid]):
            assert await brought(connection) < NOTICED_SECONDS + 2
    assert POLL_SECONDS + CLAIM_SECONDS < NOTICED_SECONDS


async def test_attempts_that_outlive_the_engines_connection_take_their_room_and_give_it_back(
    make_settings: MakeSettings, connection: Connection
) -> None:
    under_way, over = 0, asyncio.Event()

    @job("a-test")
    async def hold(_: JobContext, __: NoPayload) -> Counts:
        nonlocal under_way
        under_way += 1
        await over.wait()
        under_way -= 1
        return {}

    async def full() -> bool:
        return under_way >= ROOM

    async with service.serving(make_settings(WORKER_CONCURRENCY=str(ROOM)), jobs=[hold]) as serving:
        await connection.execute("select bon_scheduler.enqueue('a-test') from generate_series(1, 30)")
        await until(full)
        for _ in range(3):
            old = engines_connection(serving)
            await connection.execute(SILENT, [engines_backend(serving)])

            async def renewed(old: Connection = old) -> bool:
                return serving.engine._connection is not old and serving.engine.connected

            await until(renewed)
            await asyncio.sleep(0.3)  # what could be brought too much would be now
        assert under_way == ROOM
        over.set()
        over.clear()
        await until(full, seconds=20)
        over.set()


async def test_a_slow_jobs_many_runs_keep_no_other_job_from_starting(
    make_settings: MakeSettings, connection: Connection
) -> None:
    over = asyncio.Event()

    @job("slow")
    async def slow(_: JobContext, __: NoPayload) -> Counts:
        await over.wait()
        return {}

    async with service.serving(make_settings(WORKER_CONCURRENCY=str(ROOM)), jobs=[slow, quick]) as serving:
        await connection.execute("select bon_scheduler.enqueue('slow') from generate_series(1, 30)")

        async def filled() -> bool:
            return serving.engine.active == ROOM - 1

        await until(filled)
        for _ in range(3):
            assert await brought(connection) < 2
        assert serving.engine.active == ROOM - 1
        over.set()


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
    monkeypatch.setattr(connections, "SERVICE_CONNECT_SECONDS", 0.5)
    async with (
        in_front_of(database_url) as (proxy, url),
        service.serving(make_settings(DATABASE_URL=url), jobs=[quick]) as serving,
    ):
        await until_connected(serving)
        async with proxy.swallowing():
            proxy.reset()

            async def rebuilding() -> bool:
                return not serving.engine.connected

            await until(rebuilding)
            before = proxy.swallowed

            async def tried() -> bool:
                return proxy.swallowed > before + 1  # the heartbeat's is one

            await until(tried)
        assert await brought(connection) < 0.5 + LONGEST_RECONNECT_WAIT_SECONDS + 1
