"""
How long 10,000 SHAAM refreshes take on one replica, what they cost in memory, and what one that stalls costs others.

    python -m benchmarks.shaam [--businesses 10000] [--answer-ms 200]

A real `serve` process on a real PostgreSQL (embedded, fsync off), the simulator in a process of its own. The ideal is
businesses x answer / SHAAM_CONCURRENCY. Memory is the process's resident set, from idle to its peak.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import asyncpg

from bon_scheduler import database, declared, service
from bon_scheduler.demo.postgres import find_binaries, running_postgres
from bon_scheduler.demo.sample import create_tables
from bon_scheduler.demo.shaam_simulator import Misbehaviour
from tests import arrange
from tests.authority import Authority, authority
from tests.process import Service, serve
from tests.tax import CIPHER, environ

CONCURRENCY = 50
TIMEOUT_SECONDS = 20
STALLED = "stalls"
MAKE_BUSINESSES = """
    insert into businesses (name, business_type, registration_number, created_by_user_id)
    select 'Studio', 'limited_company', 'b' || n, $1 from generate_series(1, $2::int) n
    returning id
"""
ASK = "select bon_scheduler.enqueue('shaam-token-refresh')"
LEFT = """
    select count(*) from bon_scheduler.runs
     where job in ('shaam-token-refresh', 'shaam-refresh-batch') and finished_at is null
"""
# From the first start to the last end of a successful refresh: what a business that stalls adds to the others.
REFRESHED = "select count(*), max(changed_at) from bon_scheduler.shaam_refreshes where state = 'refreshed'"


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of all businesses."""

    refreshed: int
    seconds: float
    idle_mib: float
    peak_mib: float


def _resident_mib(pid: int, name: str = "VmRSS") -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"{name} of process {pid}")


async def _load(connection: "asyncpg.Connection[asyncpg.Record]", one: Authority, businesses: int) -> None:
    user = await arrange.user(connection)
    ids: list[UUID] = [row["id"] for row in await connection.fetch(MAKE_BUSINESSES, user, businesses)]
    subjects = [STALLED, *(f"s{n}" for n in range(1, businesses))]
    tokens = await one.issue_many(subjects)
    rows = [
        (business, CIPHER.encrypt("a" * 300), CIPHER.encrypt(token), arrange.LONG_AGO)
        for business, token in zip(ids, tokens, strict=True)
    ]
    columns = ["business_id", "encrypted_access_token", "encrypted_refresh_token", "token_expires_at"]
    await connection.copy_records_to_table("business_shaam_credentials", records=rows, columns=columns)


async def _measure(connection: "asyncpg.Connection[asyncpg.Record]", running: Service, ideal: float) -> Measured:
    pid = running.process.pid
    await asyncio.sleep(2)
    idle = _resident_mib(pid)
    peak = idle
    began = await connection.fetchval("select clock_timestamp()")
    await connection.execute(ASK)
    deadline = time.monotonic() + ideal * 5 + 120
    while await connection.fetchval(LEFT):
        peak = max(peak, _resident_mib(pid))
        if time.monotonic() > deadline:
            raise TimeoutError("the runs do not come to their end")
        await asyncio.sleep(0.25)
    refreshed, last = await connection.fetchrow(REFRESHED) or (0, began)
    return Measured(refreshed, (last - began).total_seconds(), idle, peak)


@asynccontextmanager
async def _world(
    url: str, businesses: int, answer_ms: int
) -> AsyncIterator[tuple["asyncpg.Connection[asyncpg.Record]", Authority, Mapping[str, str]]]:
    async with database.connect(url) as connection:
        await connection.execute("drop database if exists benchmark with (force)")
        await connection.execute("create database benchmark")
    url = f"{url.rpartition('/')[0]}/benchmark"
    async with authority(answer_ms / 1000) as one, database.connect(url) as connection:
        await create_tables(connection)
        settings = {
            "DATABASE_URL": url,
            "SCHEDULE_SHAAM_TOKEN_REFRESH": "",
            **environ(one.token_url),
            "SHAAM_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS),
            "SHAAM_CONCURRENCY": str(CONCURRENCY),
        }
        await service.prepare(declared.read_settings(settings))
        await _load(connection, one, businesses)
        yield connection, one, settings


async def _run(url: str, businesses: int, answer_ms: int, *, stalls: bool) -> Measured:
    ideal = businesses * answer_ms / 1000 / CONCURRENCY
    async with _world(url, businesses, answer_ms) as (connection, one, settings):
        if stalls:
            await one.spoil(STALLED, Misbehaviour.SLOW)
        async with serve(**settings) as running:
            return await _measure(connection, running, ideal)


def main() -> None:
    """Measure, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--businesses", type=int, default=10_000)
    parser.add_argument("--answer-ms", type=int, default=200)
    given = parser.parse_args()
    ideal = given.businesses * given.answer_ms / 1000 / CONCURRENCY
    with running_postgres(find_binaries()) as url:
        for stalls in (False, True):
            measured = asyncio.run(_run(url, given.businesses, given.answer_ms, stalls=stalls))
            report = {
                "one_stalls": stalls,
                "refreshed": measured.refreshed,
                "seconds": round(measured.seconds, 1),
                "ideal_seconds": ideal,
                "times_ideal": round(measured.seconds / ideal, 3),
                "mib_above_idle": round(measured.peak_mib - measured.idle_mib, 1),
            }
            sys.stdout.write(json.dumps(report) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
