"""What an attempt has, from its claim to the record of its end."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

from bon_scheduler.engine.context import AttemptContext
from bon_scheduler.jobs import AnyJob, Connection, Counts, Retry
from bon_scheduler.ledger import Claim, RunRef

__all__ = ["Attempt", "Leave", "returned", "to_its_end"]

Leave: TypeAlias = Callable[[Connection, RunRef], Awaitable[object]]
"""What becomes of a run whose attempt is cut short because its process stops."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt under way."""

    job: AnyJob
    claim: Claim
    retry: Retry
    leave: Leave
    ctx: AttemptContext
    started: float
    """By `time.perf_counter`."""

    @property
    def wait(self) -> timedelta | None:
        """Draw the wait before the next attempt; None where there is none."""
        number = self.ctx.attempt - self.claim.given_back
        return None if number >= self.retry.attempts else self.retry.wait(number)


def returned(handler: asyncio.Task[Counts]) -> bool:
    """Return whether a handler has done all it had to do."""
    return handler.done() and not handler.cancelled() and handler.exception() is None


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await what must not be cut short, however often this task is cancelled meanwhile."""
    task = asyncio.create_task(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    task.result()
