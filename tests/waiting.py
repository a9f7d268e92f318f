"""Wait for the thing itself, never for time to pass."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
LOOK_AGAIN_SECONDS = 0.02


async def until(look: Callable[[], Awaitable[T]], *, seconds: float = 15) -> T:
    """Return what `look` returns as soon as that is true; fail after `seconds`."""
    async with asyncio.timeout(seconds):
        while not (found := await look()):  # noqa: ASYNC110 - nobody would set an event for another process
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
        return found
