"""The heartbeat keeps the lease whatever the event loop and the network do."""

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from bon_scheduler import Counts, JobContext, NoPayload, job, service
from bon_scheduler.engine import heartbeat
from bon_scheduler.engine.heartbeat import Heartbeat
from bon_scheduler.ledger.workers import Worker, register_worker
from tests.chaos.proxy import in_front_of
from tests.conftest import Connection, MakeSettings
from tests.waiting import until

LEASE = timedelta(seconds=2)
SILENT_SECONDS = "select extract(epoch from clock_timestamp() - seen_at)::float8 from bon_scheduler.workers"


@asynccontextmanager
async def beating(connection: Connection, url: str, lease: timedelta = LEASE) -> AsyncIterator[Heartbeat]:
    worker = Worker(lease=lease)
    await register_worker(connection, worker)
    async with Heartbeat(url=url, worker=worker).running() as beat:
        yield beat


async def test_a_handler_that_blocks_the_event_loop_neither_loses_its_lease_nor_goes_unnoticed(
    make_settings: MakeSettings, connection: Connection, logged: Callable[[], str]
) -> None:
    silent: list[float] = []

    @job("a-test")
    async def block(ctx: JobContext, _: NoPayload) -> Counts:
        time.sleep(2 * LEASE.total_seconds())  # noqa: ASYNC251 - this is the fault
        async with ctx.transaction() as tx:
            silent.append(await tx.fetchval(SILENT_SECONDS))
            return await ctx.finish({}, on=tx)

    async def ended() -> bool:
        return bool(await connection.fetchval("select state = 'succeeded' from bon_scheduler.runs"))

    async with service.serving(make_settings(LEASE_SECONDS="2"), jobs=[block]):
        await connection.execute("select bon_scheduler.enqueue('a-test')")
        await until(ended)
    assert silent[0] < LEASE.total_seconds()
    assert await connection.fetchval("select max(attempt) from bon_scheduler.runs") == 1
    events = [json.loads(line) for line in logged().splitlines()]
    told = [event for event in events if event["event"] == "loop.blocked"]
    assert told
    assert any(f"{__file__}:" in frame and frame.endswith(" block") for frame in told[0]["frames"])


async def test_an_event_loop_that_will_not_turn_again_is_not_vouched_for(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], str]
) -> None:
    monkeypatch.setattr(heartbeat, "WEDGED_AFTER_SECONDS", 0.5)
    async with beating(connection, database_url):
        time.sleep(LEASE.total_seconds() + 1.5)  # noqa: ASYNC251 - this is the fault

        async def resumed() -> bool:
            return "heartbeat.resumed" in logged()

        await until(resumed)
    [silent] = [json.loads(line)["silent_seconds"] for line in logged().splitlines() if "resumed" in line]
    assert silent > LEASE.total_seconds()


async def test_a_slow_database_does_not_have_a_wedged_event_loop_vouched_for(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beat that takes longer than a second is no sign that the whole process was frozen."""
    monkeypatch.setattr(heartbeat, "WEDGED_AFTER_SECONDS", 2.0)
    await connection.execute(
        "create function public.slow() returns trigger language plpgsql as"
        " 'begin perform pg_sleep(1.2); return new; end';"
        "create trigger slow before update on bon_scheduler.workers for each row execute function public.slow()"
    )
    async with beating(connection, database_url, timedelta(seconds=12)):
        time.sleep(9)  # noqa: ASYNC251 - this is the fault
        silent = await connection.fetchval(SILENT_SECONDS)
    assert silent > 4.5


async def test_a_worker_whose_row_was_deleted_is_registered_again(connection: Connection, database_url: str) -> None:
    async with beating(connection, database_url):
        await connection.execute("delete from bon_scheduler.workers")

        async def back() -> bool:
            return bool(await connection.fetchval("select count(*) from bon_scheduler.workers"))

        await until(back)


async def test_a_network_that_swallowed_a_connection_attempt_costs_the_heartbeat_little(
    connection: Connection, database_url: str
) -> None:
    """Otherwise an outage shorter than the lease robs a living worker."""
    async with in_front_of(database_url) as (proxy, url), beating(connection, url):

        async def word() -> object:
            return await connection.fetchval("select last_word from bon_scheduler.workers")

        async with proxy.swallowing():

            async def trying_again() -> bool:
                return proxy.swallowed > 0

            await until(trying_again, seconds=3)
        before = await word()

        async def speaks() -> bool:
            return await word() != before

        await until(speaks, seconds=2)


async def test_a_heartbeat_whose_connection_is_cut_goes_on(connection: Connection, database_url: str) -> None:
    async with beating(connection, database_url) as beat:
        seen = "select seen_at from bon_scheduler.workers"
        for _ in range(2):
            await connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and pid <> pg_backend_pid()"
            )
            before = await connection.fetchval(seen)

            async def later(than: object = before) -> bool:
                return bool(await connection.fetchval(seen) > than)

            await until(later)
        assert beat.alive
    assert not beat.alive
