"""The database's own clock is set, while everything runs (PostgreSQL under libfaketime)."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from bon_scheduler import Counts, JobContext, NoPayload, Retry, declared, job, service
from bon_scheduler.database import connections
from bon_scheduler.demo.postgres import find_binaries, running_postgres
from tests.faketime import WallClock, needs_faketime, wall_clock
from tests.waiting import until

pytestmark = needs_faketime
UNFINISHED = "select count(*) from bon_scheduler.runs where state in ('queued', 'running', 'retrying')"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[tuple[str, WallClock]]:
    """A server, and its clock."""
    with wall_clock(tmp_path) as clock, running_postgres(find_binaries("any"), environ=clock.environ) as url:
        yield url, clock


async def test_a_step_forwards_takes_no_run_from_a_living_worker(world: tuple[str, WallClock]) -> None:
    """And the step back does not keep what was queued meanwhile waiting."""
    url, clock = world
    started = 0

    @job("a-test", retry=Retry(attempts=1))
    async def slow(_: JobContext, __: NoPayload) -> Counts:
        nonlocal started
        started += 1
        await asyncio.sleep(2.5)
        return {}

    settings = declared.read_settings(
        {"DATABASE_URL": url, "HEALTH_PORT": "0", "HEALTH_HOST": "127.0.0.1", "LEASE_SECONDS": "2"}
    )
    await service.prepare(settings, jobs=[slow])
    async with (
        connections.connect(url) as connection,
        service.serving(settings, jobs=[slow]),
        service.serving(settings, jobs=[slow]),
    ):

        async def all_started() -> bool:
            return started == 8

        async def ended() -> bool:
            return not await connection.fetchval(UNFINISHED)

        await connection.execute("select bon_scheduler.enqueue('a-test') from generate_series(1, 8)")
        await until(all_started)
        clock.set(timedelta(hours=2))
        await until(ended)
        await connection.execute("select bon_scheduler.enqueue('a-test')")
        clock.set(timedelta(0))
        await until(ended)
        rows = await connection.fetch("select state::text, attempt from bon_scheduler.runs")
    assert [tuple(row) for row in rows] == [("succeeded", 1)] * 9
