"""
The heartbeat: a thread with a connection of its own that keeps this process's lease.

It must survive a handler that blocks the event loop (it runs beside it, and says where the loop stands still), a
busy pool, a full server (its connection is held, never borrowed), an outage (it reconnects until it is stopped),
a process that was frozen. It does not vouch for an event loop that will not turn again: after `WEDGED_AFTER_SECONDS`
it lets the lease lapse, so that another replica takes the runs over.
"""

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from bon_scheduler import database
from bon_scheduler.clock import seconds_since_boot
from bon_scheduler.ledger import Worker, beat, register_worker

__all__ = ["Heartbeat"]

log = structlog.get_logger()
LOOK_SECONDS = 0.25
SHORTEST_LOOK_SECONDS = 0.01
RECONNECT_SECONDS = 0.5
BLOCKED_AFTER_SECONDS = 1.0
WEDGED_AFTER_SECONDS = 300.0
STOP_SECONDS = 2.0
BEATS_A_LEASE = 8
"""A beat, and what may be waited for an answer: an outage of two thirds of the lease must not cost it."""
SHORTEST_WAIT_SECONDS = 0.5
STACK_LINES = 6


class Heartbeat:
    """Keeps `worker` alive in the ledger, eight times a lease, from a thread of its own."""

    def __init__(self, *, url: str, worker: Worker) -> None:
        self._url = url
        self._worker = worker
        self._seconds = worker.lease.total_seconds()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._pulse = self._looked = time.monotonic()
        self._told_seconds = 0.0
        self._beaten = seconds_since_boot()
        self._loop_thread = threading.get_ident()

    @property
    def alive(self) -> bool:
        """Whether the thread lives; it outlives every fault, or this process is of no use."""
        return self._thread.is_alive()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Heartbeat"]:
        """Beat for the duration of the context. The worker is registered before."""
        self._beaten, self._loop_thread = seconds_since_boot(), threading.get_ident()
        self._thread.start()
        pulse = asyncio.create_task(self._show_pulse(), name="pulse")
        try:
            yield self
        finally:
            self._stopping.set()
            pulse.cancel()
            await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    async def _show_pulse(self) -> None:
        while True:
            self._pulse = time.monotonic()
            await asyncio.sleep(LOOK_SECONDS)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                asyncio.run(self._beat())
            except Exception as error:  # noqa: BLE001 - whatever failed, it is tried again: without it runs are lost
                self._worker.outage.failed("heartbeat", error)
                self._stopping.wait(RECONNECT_SECONDS)

    async def _beat(self) -> None:
        looking = asyncio.create_task(self._look(), name="look")
        try:
            await self._beat_on()
        finally:
            looking.cancel()

    async def _beat_on(self) -> None:
        seconds = self._seconds / BEATS_A_LEASE
        limit = max(seconds, SHORTEST_WAIT_SECONDS)
        await self._wait(0)
        async with database.connect(self._url, codecs=False, limits=database.Limits(limit, limit)) as connection:
            while not self._stopping.is_set():
                if not await beat(connection, self._worker.id):
                    await register_worker(connection, self._worker)
                self._note_beat()
                self._worker.outage.answered("heartbeat")
                await self._wait(seconds)

    def _note_beat(self) -> None:
        now = seconds_since_boot()
        if now - self._beaten > self._seconds and not self._worker.outage.lasts:  # which says it itself
            log.warning("heartbeat.resumed", silent_seconds=round(now - self._beaten, 1))
        self._beaten = now

    async def _wait(self, seconds: float) -> None:
        """Wait for the next beat; while the event loop is wedged there is no next."""
        until = time.monotonic() + seconds
        while not self._stopping.is_set():
            now = time.monotonic()
            if now >= until and now - self._pulse <= WEDGED_AFTER_SECONDS:
                return
            await asyncio.sleep(min(LOOK_SECONDS, max(until - now, SHORTEST_LOOK_SECONDS)))

    async def _look(self) -> None:
        """Have an eye on the event loop, also while a slow database keeps a beat waiting."""
        self._looked = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            if now - self._looked > BLOCKED_AFTER_SECONDS:
                self._pulse = now  # this thread stood still as well: the whole process was frozen
            self._looked = now
            self._tell(now - self._pulse)

    def _tell(self, still_seconds: float) -> None:
        """Log where the event loop stands still: after a second, and whenever that has doubled."""
        if still_seconds < BLOCKED_AFTER_SECONDS:
            self._told_seconds = 0.0
        elif still_seconds >= max(BLOCKED_AFTER_SECONDS, 2 * self._told_seconds):
            self._told_seconds = still_seconds
            frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - the documented way to another stack
            stack = traceback.extract_stack(frame)[-STACK_LINES:] if frame else []
            level = log.error if still_seconds > self._seconds else log.warning
            level(
                "loop.blocked",
                seconds=round(still_seconds, 1),
                frames=[f"{entry.filename}:{entry.lineno} {entry.name}" for entry in stack],
            )
