"""
This process as a worker: its heartbeat, and the pass that finds runs nobody works on.

A worker is alive while its row in `workers` is younger than the lease. The heartbeat renews it
every quarter lease; the same pass delivers again every run that has not ended, that no living
worker holds, and that no queue row would bring to anybody.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID, uuid4

import structlog

from bon_scheduler import __version__, ledger
from bon_scheduler.db import TRANSIENT_ERRORS, Pool
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS
from bon_scheduler.log import describe_error
from bon_scheduler.metrics import Metrics

__all__ = ["Worker", "working"]

log = structlog.get_logger()

# $1 worker, $2 host, $3 process id, $4 version, $5 whether it is a `serve`: boolean.
REGISTER_WORKER = """
    insert into bon_scheduler.workers (id, host, pid, version, serves) values ($1, $2, $3, $4, $5)
    on conflict (id) do update set seen_at = clock_timestamp()
"""
# $1 worker.
BEAT = "update bon_scheduler.workers set seen_at = clock_timestamp() where id = $1 returning id"
# A worker that leaves holds nothing, and neither does one that was silent for a day.
RETIRE_WORKER = """
    delete from bon_scheduler.workers where id = $1 or seen_at < clock_timestamp() - interval '1 day'
"""


@dataclass(frozen=True, slots=True)
class Worker:
    """This process, as the ledger knows it."""

    id: UUID = field(default_factory=uuid4)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    version: str = __version__
    serves: bool = False
    """Whether it is a `serve`, which declares schedules, or works on one run in the foreground."""


async def register_worker(connection: Connection, worker: Worker) -> None:
    """Make this process a living worker."""
    await connection.execute(
        REGISTER_WORKER, worker.id, worker.host, worker.pid, worker.version, worker.serves, timeout=CALL_TIMEOUT_SECONDS
    )


async def beat(connection: Connection, worker: UUID) -> bool:
    """Renew the worker's lease; False when its row is gone."""
    return await connection.fetchval(BEAT, worker, timeout=CALL_TIMEOUT_SECONDS) is not None


async def retire_worker(connection: Connection, worker: UUID) -> None:
    """Take the worker off the list, so that whatever it still held is free at once."""
    await connection.execute(RETIRE_WORKER, worker, timeout=CALL_TIMEOUT_SECONDS)


@asynccontextmanager
async def working(
    pool: Pool, worker: Worker, *, lease: timedelta, metrics: Metrics, rescue: Sequence[str] = ()
) -> AsyncIterator[None]:
    """
    Be a living worker inside the block: heartbeat every quarter lease, and deliver again the
    runs of the jobs in `rescue` that nobody works on.
    """
    async with pool.acquire() as connection:
        await register_worker(connection, worker)
    beating = asyncio.create_task(_keep_alive(pool, worker, lease, metrics, rescue), name="heartbeat")
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.wait([beating])
        try:
            async with pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
                await retire_worker(connection, worker.id)
        except TRANSIENT_ERRORS as error:
            log.warning("worker.not_retired", error=describe_error(error))


async def _keep_alive(pool: Pool, worker: Worker, lease: timedelta, metrics: Metrics, rescue: Sequence[str]) -> None:
    while True:
        try:
            async with pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
                if not await beat(connection, worker.id):
                    await register_worker(connection, worker)
                await _rescue(connection, lease, metrics, rescue)
        except Exception as error:  # noqa: BLE001 - whatever failed, the next beat is tried: without it runs are lost
            log.warning("heartbeat.failed", error=describe_error(error))
        await asyncio.sleep(lease.total_seconds() / 4)


async def _rescue(connection: Connection, lease: timedelta, metrics: Metrics, jobs: Sequence[str]) -> None:
    if not jobs:
        return
    for run_id, job in await ledger.orphans(connection, jobs, lease):
        if await ledger.redeliver(connection, run_id):
            log.warning("run.rescued", job=job, run_id=str(run_id))
            metrics.rescued.labels(job).inc()
