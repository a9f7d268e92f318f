"""
A letter that is being sent: where it may be stopped, and where it goes on to its end whoever is cancelled.

It may be stopped while it waits (for its turn, for a connection) and during the conversation before DATA. It is not
stopped while a statement is under way, whose effect nobody would know, and not once the server may have the letter.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

from bon_scheduler.mail.message import Letter, Written

__all__ = ["Sending"]


@dataclass(slots=True, eq=False)
class Sending:
    """One letter on its way."""

    letter: Letter
    written: Written | None
    """None for one that cannot be sent."""
    key: bytes
    """By which recipients are named."""
    run_id: UUID
    attempt: int
    talking: bool = False
    """Whether the conversation about this letter has begun."""
    data_begun: bool = False
    """Whether the server may have accepted it."""
    recorded: bool = False
    """Whether what became of it is in the ledger."""
    slowest_seconds: float = 0.0
    """The longest that the server has taken to answer."""
    _stopped: bool = False
    _interruptible: bool = False

    @property
    def unanswered(self) -> bool:
        """Whether the server may have accepted it, and nobody knows yet."""
        return self.data_begun and not self.recorded

    def stop(self, task: "asyncio.Task[object]") -> None:
        """Stop the letter's task, now or at the next place where nothing is lost by it."""
        self._stopped = True
        if self._interruptible and not self.data_begun:
            task.cancel()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Allow the task to be stopped within the block; raises CancelledError if it was stopped before."""
        if self._stopped:
            raise asyncio.CancelledError
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    async def wait(self, seconds: float) -> None:
        """Wait, unless the letter is stopped."""
        with self.interruptible():
            await asyncio.sleep(seconds)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Note how long the server takes to answer within the block."""
        began = time.monotonic()
        yield
        self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - began)
