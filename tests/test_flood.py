"""A role that may only connect floods the channel that wakes workers: one wake-up is pending, however many come."""

import asyncio
import time
from pathlib import Path

import pytest

from bon_scheduler.database import connections
from bon_scheduler.engine.claiming import CHANNEL
from tests.conftest import Connection
from tests.process import Service, serve
from tests.test_health_port import SOON_SECONDS, seconds_of_livez
from tests.waiting import until

FLOOD = 300_000
AT_ONCE = 50_000
MIB = 1024 * 1024
MOST_GROWTH = 48 * MIB
SINGLES = 5_000
"""Notifications with a transaction each."""
MOST_CLAIMS_A_SECOND = 220
"""A claim that found nothing is followed by a pause of five milliseconds."""
SENT = f"select count(pg_notify('{CHANNEL}', n::text)) from generate_series($1::int, $2::int) as n"
COUNT_CALLS = """
    do $$ begin execute format('alter database %I set track_functions = pl', current_database()); end $$
"""
CLAIMS = "select coalesce(sum(calls), 0) from pg_stat_user_functions where funcname = 'claim'"
NO_SCHEDULES = {"SCHEDULE_OVERDUE_DETECTION": "", "SCHEDULE_SHAAM_TOKEN_REFRESH": ""}


def memory_of(process: Service) -> int:
    """Return its resident memory in bytes."""
    return int(Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
async def test_a_flood_of_wake_ups_costs_a_few_claims_and_no_memory(database_url: str, connection: Connection) -> None:
    await connection.execute("create role flooder")
    await connection.execute(COUNT_CALLS)
    try:
        async with (
            serve(DATABASE_URL=database_url, **NO_SCHEDULES) as service,
            connections.connect(database_url) as neighbour,
        ):
            await neighbour.execute("set session authorization flooder")
            await seconds_of_livez(service)
            memory, began = memory_of(service), time.monotonic()
            slowest = 0.0
            for first in range(1, FLOOD, AT_ONCE):
                await neighbour.execute(
                    f"select 1; {SENT}".replace("$1", str(first)).replace("$2", str(first + AT_ONCE))
                )
                slowest = max(slowest, await seconds_of_livez(service))
            for n in range(SINGLES):
                await neighbour.execute(f"select pg_notify('{CHANNEL}', '{n}')")
            run_id = await connection.fetchval("select bon_scheduler.enqueue('session-cleanup')")
            ended = "select state = 'succeeded' from bon_scheduler.runs where id = $1"
            await until(lambda: connection.fetchval(ended, run_id))
            seconds = time.monotonic() - began
            await asyncio.sleep(2)  # what a session counted is told a second later
            claims = await connection.fetchval(CLAIMS)
            growth = memory_of(service) - memory
    finally:
        await connection.execute("drop role flooder")
    assert slowest < SOON_SECONDS
    assert growth < MOST_GROWTH
    assert 0 < claims < MOST_CLAIMS_A_SECOND * (seconds + 1)
