"""
Reconciliation: what the ledger says and what is so, compared every two seconds.

It must find what nobody else would notice: a worker that was silent for its lease (declared dead, and its runs
released in the same transaction); an attempt of ours whose run another took over or a person cancelled (stopped); a run
the ledger says is ours and that we know nothing of, because the answer to its claim was lost (given back); a wait that
only a clock which was set back explains (ended); a letter whose sender ended before the answer was recorded
(`unknown`, for a person to decide).
"""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import structlog

from bon_scheduler import ledger, mail
from bon_scheduler.clock import seconds_since_boot
from bon_scheduler.database import TRANSIENT_ERRORS, Pool
from bon_scheduler.engine.runner import Runner
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import (
    CALL_TIMEOUT_SECONDS,
    Watch,
    Worker,
    database_seconds,
    declare_dead,
    last_beats,
    make_overtaken_ready,
)

__all__ = ["Reconciler", "pass_seconds"]

log = structlog.get_logger()
LONGEST_WAIT_SECONDS = 2.0
"""A heartbeat is noticed one pass late, and its silence another: rescue takes the lease and 5 s."""
AFTER_FAILURE_SECONDS = 0.5
LAST_LOOK_SECONDS = 1.0
SET_BACK_SECONDS = 30.0
"""Less than what makes a wait overtaken, more than an answer takes."""
PASSES_AFTER = 5
"""Waits that only a clock explains are looked for in so many passes once it was set back: some rows may be locked."""


def pass_seconds(lease: timedelta) -> float:
    """Return how long a worker waits between two passes."""
    return min(lease.total_seconds() / 4, LONGEST_WAIT_SECONDS)


class Reconciler:
    """The pass of one worker."""

    def __init__(self, *, pool: Pool, runner: Runner, worker: Worker) -> None:
        self._pool = pool
        self._runner = runner
        self._worker = worker
        self._watch = Watch(worker)
        self._ahead_seconds = math.inf
        self._looks = 0
        self._loop: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether the pass goes on; it outlives every fault."""
        return self._loop is not None and not self._loop.done()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Reconciler"]:
        """Reconcile for the duration of the context."""
        self._loop = asyncio.create_task(self._repeat(), name="reconcile")
        try:
            yield self
        finally:
            self._loop.cancel()
            await asyncio.wait([self._loop])
            await self._give_back_the_last()

    async def _give_back_the_last(self) -> None:
        """Give back what a claim that was cut short has taken, BEFORE this worker leaves and they count as lost."""
        try:
            async with (
                asyncio.timeout(LAST_LOOK_SECONDS),
                self._pool.acquire(timeout=LAST_LOOK_SECONDS) as connection,
            ):
                await self._compare(connection)
        except TRANSIENT_ERRORS as error:
            self._worker.outage.failed("reconcile", error)

    async def _repeat(self) -> None:
        while True:
            wait = pass_seconds(self._worker.lease)
            try:
                await self.make_pass()
                self._worker.outage.answered("reconcile")
            except Exception as error:  # noqa: BLE001 - whatever failed, the next pass is made: without it runs are lost
                self._worker.outage.failed("reconcile", error)
                wait = min(wait, AFTER_FAILURE_SECONDS)
            await asyncio.sleep(wait)

    async def make_pass(self) -> None:
        """Compare once, and mend."""
        async with self._pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
            await self._compare(connection)
            if self._runner.quarantined is not None:
                return  # the workers of a copy are silent because they live elsewhere
            await self._release(connection)
            await self._end_overtaken_waits(connection)

    async def _end_overtaken_waits(self, connection: Connection) -> None:
        """End waits since an instant that the database's clock has yet to reach; it reads all that is put off."""
        ahead = await database_seconds(connection) - seconds_since_boot()
        if ahead < self._ahead_seconds - SET_BACK_SECONDS:  # also in the first pass
            self._ahead_seconds, self._looks = ahead, PASSES_AFTER
        self._ahead_seconds = max(ahead, self._ahead_seconds)
        if self._looks:
            self._looks -= 1
            if overtaken := await make_overtaken_ready(connection):
                log.warning("runs.overtaken", runs=overtaken)

    async def _compare(self, connection: Connection) -> None:
        # BEFORE the query, otherwise a run that ended meanwhile would look unknown.
        before, unrecorded = self._runner.under_way, self._runner.unrecorded
        held = await ledger.held_by(connection, self._worker.id)
        lost = await ledger.lost_by(connection, self._worker.id, before) if before else set()
        for ref in lost:
            self._runner.drop(ref)
        async with self._runner.claiming:  # what was claimed before the query has its answer now, or never
            known = before | self._runner.under_way
        unknown = held - known
        if unknown & unrecorded:
            await ledger.let_go(connection, self._worker.id, unknown & unrecorded)
        for ref in await ledger.give_back_all(connection, self._worker.id, unknown - unrecorded):
            log.warning("claim.unanswered", run_id=str(ref.run_id), attempt=ref.attempt)
        self._runner.forget_unrecorded(unrecorded)

    async def _release(self, connection: Connection) -> None:
        async with connection.transaction():
            silent = self._watch.silent(await last_beats(connection))
            dead = await declare_dead(connection, silent) if silent else []
            released = await ledger.release_lost(connection)
            unanswered = await mail.give_up_unanswered(connection)
        for worker in dead:
            log.warning("worker.taken_for_dead", worker=str(worker.id), host=worker.host, pid=worker.pid)
        for run in released:
            self._runner.report_released(run)
        for delivery in unanswered:
            log.warning(
                "delivery.unknown",
                kind=delivery.kind,
                business_id=str(delivery.business_id),
                delivery_id=str(delivery.id),
            )
