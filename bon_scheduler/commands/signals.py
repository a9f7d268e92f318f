"""
SIGTERM and SIGINT: the first asks the service to stop, the second ends it at once.

They must work whatever the event loop is doing, so they are taken by the interpreter and not by the loop; and what
was asked to stop does stop, whatever a handler does: when its time is over the process ends.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import structlog

__all__ = ["INTERRUPTED", "end_now", "stopping_on_signals"]

log = structlog.get_logger()
INTERRUPTED = 130
FORCED = 1
STOPPING = (signal.SIGTERM, signal.SIGINT)


def end_now(status: int) -> None:
    """End this process, whatever still runs in it."""
    os._exit(status)


@contextmanager
def stopping_on_signals(patience: timedelta) -> Iterator[asyncio.Event]:
    """
    Yield the event that the first signal sets.

    A second signal ends the process with status 130; so does, with status 1, being still here `patience` after
    the first.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    forcing = threading.Timer(patience.total_seconds(), _force)
    forcing.daemon = True

    def take(_: int, __: FrameType | None) -> None:
        if forcing.ident is not None:
            end_now(INTERRUPTED)
        forcing.start()
        loop.call_soon_threadsafe(stop.set)

    before = {number: signal.signal(number, take) for number in STOPPING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        forcing.cancel()


def _force() -> None:
    log.error("service.forced", remedy="a handler or the database kept the process from draining")
    end_now(FORCED)
