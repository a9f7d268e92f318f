"""
The limiter: how many exchanges of tokens are under way at once, and how many of them wait for the authority.

A limiter that was empty lets a handful of requests out, and no more before one of them has shown that the application
is accepted. The breaker alone could not see to it that a wrong secret is tried a handful of times: it counts answers,
and by the first of them all other requests would be on their way. Whatever is no refusal of the application opens
the limiter, a time-out too: the authority's slowness must not make a run slower than it has to be.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bon_scheduler.shaam.breaker import HANDFUL

__all__ = ["Limiter", "Slot"]


@dataclass(slots=True)
class Slot:
    """Leave to send one request; whoever has it says whether the application was `refused`."""

    refused: bool = False


class Limiter:
    """The slots of one process's exchanges."""

    def __init__(self, requests: int) -> None:
        """Allow so many requests; some exchanges more, so that no request waits for the database."""
        self._exchanges = asyncio.Semaphore(requests + requests // 3 + 1)
        self._requests = asyncio.Semaphore(requests)
        self._inside = 0
        self._sent = 0
        self._refused = 0
        self._open = asyncio.Event()

    async def __aenter__(self) -> None:
        """Wait for a slot to exchange a token, and hold it for the duration of the context."""
        # Not a generator: ten thousand may wait here, and each of theirs would be one more for the collector.
        if self._inside == 0:
            self._sent = self._refused = 0
            self._open.clear()
        self._inside += 1
        try:
            await self._exchanges.acquire()
        except BaseException:
            self._inside -= 1
            raise

    async def __aexit__(self, *_: object) -> None:
        self._exchanges.release()
        self._inside -= 1

    @asynccontextmanager
    async def request(self) -> AsyncIterator[Slot]:
        """Wait for a slot to send a request, and hold it for the duration of the context."""
        async with self._requests:
            if self._sent < HANDFUL:
                self._sent += 1
            else:
                await self._open.wait()
            slot = Slot()
            try:
                yield slot
            finally:
                self._refused += slot.refused
                # Once all of the handful are refused the breaker decides; nobody may be left waiting here.
                if not slot.refused or self._refused >= HANDFUL:
                    self._open.set()
