"""
How attempts ended, written to the ledger through outages and cancellation: what happened must be known.

Successes that come while one is being written are written together, by one statement; each stands or falls by itself.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from bon_scheduler import ledger
from bon_scheduler.database import TRANSIENT_ERRORS, Outage, Pool
from bon_scheduler.jobs import Connection, Counts, LostRunError
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS, RunRef

__all__ = ["Recorder"]

T = TypeVar("T")
LONGEST_WAIT_SECONDS = 2.0
MOST_AT_ONCE = 200


class Recorder:
    """Writes for the attempts of one process, on `pool`."""

    def __init__(self, pool: Pool, outage: Outage) -> None:
        self._pool = pool
        self._outage = outage
        self._writes: dict[RunRef, asyncio.Future[Any]] = {}
        self._finished: list[tuple[RunRef, Counts, asyncio.Future[str]]] = []
        self._finishing: asyncio.Task[None] | None = None

    def pending(self, ref: RunRef) -> "asyncio.Future[Any] | None":
        """Return what is being written of an attempt, None when all is."""
        return self._writes.get(ref)

    async def settled(self) -> None:
        """Wait until everything that was being written is written."""
        while self._writes:
            await asyncio.wait(set(self._writes.values()))

    async def write(self, ref: RunRef, write: Callable[[Connection], Awaitable[T]]) -> T:
        """Call `write` with a connection until the database takes it; goes on when the caller is cancelled."""
        return await self._keep(ref, asyncio.create_task(self._persist(write)))

    async def finish(self, ref: RunRef, counts: Counts) -> str:
        """End a run as `succeeded` or `partial`; return which. Raises LostRunError."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._finished.append((ref, counts, future))
        if self._finishing is None:
            self._finishing = asyncio.create_task(self._finish_all(), name="finish")
        return await self._keep(ref, future)

    async def _keep(self, ref: RunRef, future: "asyncio.Future[T]") -> T:
        self._writes[ref] = future
        future.add_done_callback(lambda _: self._writes.pop(ref, None))
        future.add_done_callback(lambda f: f.cancelled() or f.exception())  # whoever waits may be cancelled meanwhile
        return await asyncio.shield(future)

    async def _finish_all(self) -> None:
        while self._finished:
            batch, self._finished = self._finished[:MOST_AT_ONCE], self._finished[MOST_AT_ONCE:]
            await self._finish_batch(batch)
        self._finishing = None

    async def _finish_batch(self, batch: "list[tuple[RunRef, Counts, asyncio.Future[str]]]") -> None:
        try:
            states = await self._persist(
                lambda connection: ledger.finish_many(connection, [(ref, counts) for ref, counts, _ in batch])
            )
        except Exception as error:  # noqa: BLE001 - whoever waits is told
            if len(batch) > 1 and not isinstance(error, TRANSIENT_ERRORS):
                for item in batch:  # what the database refuses of one is not refused to the others
                    await self._finish_batch([item])
                return
            for _, _, future in batch:
                future.set_exception(error)
            return
        for ref, _, future in batch:
            if state := states.get(ref.run_id):
                future.set_result(state)
            else:
                future.set_exception(LostRunError(f"attempt {ref.attempt} no longer owns run {ref.run_id}"))

    async def _persist(self, write: Callable[[Connection], Awaitable[T]]) -> T:
        wait = 0.1
        while True:
            try:
                async with self._pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
                    result = await write(connection)
            except TRANSIENT_ERRORS as error:
                if self._pool.is_closing():
                    raise
                self._outage.failed("recorder", error)
            except Exception:
                self._outage.answered("recorder")  # with a refusal
                raise
            else:
                self._outage.answered("recorder")
                return result
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)
