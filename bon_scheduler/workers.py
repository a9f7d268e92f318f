"""
This process as a worker: its row in the ledger, which is younger than the lease while it is alive.

`heartbeat` renews the row; whose row is older holds nothing any more.
"""

import os
import socket
from dataclasses import dataclass, field
from uuid import UUID, uuid4

from bon_scheduler import __version__
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS

__all__ = ["Worker", "beat", "register_worker", "retire_worker"]

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
    """Renew the worker's lease; False when its row is gone. The connection's own time-out holds."""
    return await connection.fetchval(BEAT, worker) is not None


async def retire_worker(connection: Connection, worker: UUID) -> None:
    """Take the worker off the list, so that whatever it still held is free at once."""
    await connection.execute(RETIRE_WORKER, worker, timeout=CALL_TIMEOUT_SECONDS)
