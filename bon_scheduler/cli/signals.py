"""
SIGTERM, SIGINT and SIGHUP: the first asks the service to stop, the second ends it at once.

A second SIGTERM or SIGHUP within a second is the same request: `timeout` and `tini -g` send two. A SIGHUP that whoever
started the process has it ignore (`nohup`) stays ignored.

They must work whatever the event loop is doing, so they are taken by the interpreter and not by the loop; and what
was asked to stop does stop, whatever a handler does: when its time is over the process ends.

The interpreter takes a signal between two steps of the main thread. One that arrives just before the loop goes to
sleep would be taken when something else wakes the loop, which may be never; `run` has every signal wake it.
"""

import asyncio
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import structlog

from bon_scheduler.cli.usage import INTERRUPTED

__all__ = ["LEAVING_SECONDS", "end_now", "run", "stopping_on_signals", "unless", "waking_on_signals"]

T = TypeVar("T")
log = structlog.get_logger()
FORCED = 1
SAME_REQUEST_SECONDS = 1.0
ANSWERS_SECONDS = 60.0
"""Longer than a mail server or the authority is waited for, and the database for what they said; leaving is in it."""
LOOK_SECONDS = 0.1
LEAVING_SECONDS = 3.0
"""How long leaving may take once nothing is left to do."""


def _stopping() -> list[signal.Signals]:
    """Return the signals that ask a process to stop."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def run(command: Coroutine[Any, Any, int]) -> int:
    """
    Run a command to its end on an event loop that signals wake; return its exit status.

    SIGTERM and SIGHUP interrupt it as Ctrl-C does, unless it takes them itself.
    """

    async def awake() -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        for number in _stopping():
            if number is not signal.SIGINT:
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(task.cancel) if task else None)
        with waking_on_signals():
            return await command

    try:
        return asyncio.run(awake())
    except asyncio.CancelledError:
        return INTERRUPTED


@contextmanager
def waking_on_signals() -> Iterator[None]:
    """Have each signal wake the running event loop, whichever thread it arrives in; the main thread only."""
    loop = asyncio.get_running_loop()
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        loop.add_reader(reader, reader.recv, 4096)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            loop.remove_reader(reader)


def end_now(status: int) -> None:
    """End this process, whatever still runs in it."""
    os._exit(status)


@contextmanager
def stopping_on_signals(patience: timedelta, unanswered: Callable[[], int]) -> Iterator[asyncio.Event]:
    """
    Yield the event that the first signal sets.

    A second signal ends the process with status 130. A process that is still here `patience` after the first ends with
    status 1, even when this block is over: a thread or a task that does not end holds it as well. It is given a minute
    more while letters or tokens that it has sent are `unanswered`.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    forcing = threading.Timer(patience.total_seconds(), _force, [unanswered])
    forcing.daemon = True

    began = math.inf

    def take(number: int, _: FrameType | None) -> None:
        nonlocal began
        if forcing.ident is not None:
            if number == signal.SIGINT or time.monotonic() - began > SAME_REQUEST_SECONDS:
                end_now(INTERRUPTED)
            return
        began = time.monotonic()
        forcing.start()
        loop.call_soon_threadsafe(stop.set)

    before = {number: signal.signal(number, take) for number in _stopping()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def unless(stop: asyncio.Event, awaited: Awaitable[T]) -> T | None:
    """Wait for something, in this task; cancel it and return None once `stop` is set."""
    limit = asyncio.timeout(None)

    async def watch() -> None:
        await stop.wait()
        limit.reschedule(0)

    watching = asyncio.create_task(watch())
    try:
        async with limit:
            return await awaited
    except TimeoutError:
        if not limit.expired():
            raise
        return None
    finally:
        watching.cancel()


def _force(unanswered: Callable[[], int]) -> None:
    if count := unanswered():
        log.warning("service.waits_for_answers", unanswered=count)
        until = time.monotonic() + ANSWERS_SECONDS - LEAVING_SECONDS
        while unanswered() and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
        time.sleep(LEAVING_SECONDS)
    log.error("service.forced", remedy="a handler or the database kept the process from draining")
    end_now(FORCED)
