"""Replicas of the triggers that share a database, each with clocks that a test sets."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from bon_scheduler import CatchUp, Cron
from bon_scheduler.database.connections import Pool
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger.workers import Worker, register_worker, retire_worker
from bon_scheduler.metrics import Metrics
from bon_scheduler.schedule.clocks import Clocks
from bon_scheduler.schedule.triggers import Triggers
from tests.conftest import SetClock

ISRAEL = ZoneInfo("Asia/Jerusalem")
LEASE = timedelta(hours=1)
JOB = "session-cleanup"
QUARTERS = Cron("*/15 * * * *", CatchUp.LATEST, timedelta(minutes=40))


class BelievedClocks(Clocks):
    """Clocks that agree on an instant of the test's choice."""

    def __init__(self, instant: datetime) -> None:
        super().__init__(SetClock(instant))
        self.instant = instant

    @property
    def database(self) -> datetime:
        return self.instant

    async def read(self, connection: Connection) -> datetime:
        del connection
        return self.instant


class Replica:
    """One `serve` process, as far as its triggers go."""

    def __init__(self, pool: Pool, declared: Mapping[str, Cron | None], now: datetime, version: str = "1.0") -> None:
        self.pool = pool
        self.worker = Worker(version=version, serves=True)
        self.clocks = BelievedClocks(now)
        self.triggers = Triggers(
            pool=pool,
            declared=declared,
            zone=ISRAEL,
            clocks=self.clocks,
            worker=self.worker,
            metrics=Metrics(),
        )

    async def start(self) -> "Replica":
        async with self.pool.acquire() as connection:
            await register_worker(connection, self.worker)
        return self

    async def stop(self) -> None:
        async with self.pool.acquire() as connection:
            await retire_worker(connection, self.worker.id)

    async def look(self, now: datetime) -> None:
        """Make passes at an instant until there is nothing more to account for."""
        self.clocks.instant = now
        while await self.triggers.make_pass() == 0:
            pass
