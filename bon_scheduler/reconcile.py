"""
Reconciliation: what the ledger says and what is so, compared every two seconds.

It must find what nobody else would notice: a worker that was silent for its lease (taken for dead); a run whose
worker died or whose queue row vanished (delivered again); an attempt of ours whose run another took over or a person
cancelled (stopped); a run the ledger says is ours and that we know nothing of, because the answer to its claim was
lost (let go of, so that it is delivered again); a letter whose sender ended before the answer was recorded
(`unknown`, for a person to decide).
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

import structlog

from bon_scheduler import attempts, deliveries, ledger
from bon_scheduler.db import Pool
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS
from bon_scheduler.log import describe_error
from bon_scheduler.metrics import Metrics
from bon_scheduler.runner import Runner
from bon_scheduler.workers import Watch, Worker, bury, signs_of_life

__all__ = ["Reconciler", "pass_seconds"]

log = structlog.get_logger()
LONGEST_WAIT_SECONDS = 2.0
"""A worker's last word is noticed one pass late, and its silence another: rescue takes the lease and 5 s."""
AFTER_FAILURE_SECONDS = 0.5


def pass_seconds(lease: timedelta) -> float:
    """Return how long a worker waits between two passes."""
    return min(lease.total_seconds() / 4, LONGEST_WAIT_SECONDS)


class Reconciler:
    """The pass of one worker; one that names jobs to `rescue` also delivers their orphans again."""

    def __init__(
        self,
        *,
        pool: Pool,
        runner: Runner,
        worker: Worker,
        metrics: Metrics,
        rescue: Sequence[str] = (),
    ) -> None:
        self._pool = pool
        self._runner = runner
        self._worker = worker
        self._watch = Watch(worker)
        self._metrics = metrics
        self._rescued_jobs = rescue
        self._loop: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether the pass goes on; it outlives every fault."""
        return self._loop is not None and not self._loop.done()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Reconciler"]:
        """Reconcile inside the block."""
        self._loop = asyncio.create_task(self._repeat(), name="reconcile")
        try:
            yield self
        finally:
            self._loop.cancel()
            await asyncio.wait([self._loop])

    async def _repeat(self) -> None:
        while True:
            wait = pass_seconds(self._worker.lease)
            try:
                await self.make_pass()
            except Exception as error:  # noqa: BLE001 - whatever failed, the next pass is made: without it runs are lost
                log.warning("reconcile.failed", error=describe_error(error))
                wait = min(wait, AFTER_FAILURE_SECONDS)
            await asyncio.sleep(wait)

    async def make_pass(self) -> None:
        """Compare once, and mend."""
        async with self._pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
            await self._compare(connection)
            await self._bury(connection)
            if self._rescued_jobs:
                await self._rescue(connection)

    async def _compare(self, connection: Connection) -> None:
        # BEFORE the query, otherwise a run that was claimed meanwhile would look lost.
        before = self._runner.under_way
        held = await attempts.held_by(connection, self._worker.id)
        ours = [ref for ref in before.values() if ref is not None]
        for ref in await attempts.lost_by(connection, self._worker.id, ours):
            self._runner.drop(ref)
        for ref in held:
            # Neither before nor after, otherwise one whose claim is on the way would be let go of.
            if ref.run_id in before or ref.run_id in self._runner.under_way:
                continue
            if await attempts.forsake(connection, ref):
                log.warning("run.forsaken", run_id=str(ref.run_id), attempt=ref.attempt)

    async def _bury(self, connection: Connection) -> None:
        silent = self._watch.silent(await signs_of_life(connection))
        for dead in await bury(connection, silent) if silent else ():
            log.warning("worker.taken_for_dead", worker=str(dead.id), host=dead.host, pid=dead.pid)

    async def _rescue(self, connection: Connection) -> None:
        # After an outage whatever was picked looks forgotten.
        lease = self._worker.lease if self._watch.steady else None
        for run_id, job in await ledger.orphans(connection, self._rescued_jobs):
            if await ledger.redeliver(connection, run_id, lease):
                log.warning("run.rescued", job=job, run_id=str(run_id))
                self._metrics.rescued.labels(job).inc()
        for delivery in await deliveries.give_up_forsaken(connection):
            log.warning(
                "delivery.unknown",
                kind=delivery.kind,
                business_id=str(delivery.business_id),
                delivery_id=str(delivery.id),
            )
