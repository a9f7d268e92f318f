"""
Work that is cancelled at its n-th step: wherever it, or a task that it started, waits for something or has just ended.

With n = 1, 2, … until the work ends by itself, a test meets every place where a cancellation may come. Tasks of the
servers that the work talks to are not counted.
"""

import asyncio
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

T = TypeVar("T")
Loop = asyncio.AbstractEventLoop


@dataclass(slots=True)
class Interruption:
    """When a task is cancelled."""

    step: int
    task: "asyncio.Task[Any] | None" = None
    steps: int = 0

    def note(self) -> None:
        self.steps += 1
        if self.steps == self.step and self.task is not None:
            self.task.cancel()


COMING: ContextVar[Interruption | None] = ContextVar("COMING", default=None)


@types.coroutine
def _counted(coming: Interruption, work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Await `work`, noting each of its waits, and its end before anybody who waits for it wakes."""
    send: Callable[[Any], Any] = work.send
    value: Any = None
    while True:
        try:
            waiting = send(value)
        except StopIteration as ended:
            coming.note()
            result: T = ended.value
            return result
        coming.note()
        try:
            send, value = work.send, (yield waiting)
        except BaseException as error:  # noqa: BLE001 - it is the work's
            send, value = work.throw, error


async def _awaited(coming: Interruption, work: Coroutine[Any, Any, T]) -> T:
    return await _counted(coming, work)


def _factory(loop: Loop, work: Coroutine[Any, Any, T], **options: Any) -> "asyncio.Task[T]":
    coming = COMING.get()
    return asyncio.Task(_awaited(coming, work) if coming and asyncio.iscoroutine(work) else work, loop=loop, **options)


@contextmanager
def _counting(loop: Loop) -> Any:
    before = loop.get_task_factory()
    loop.set_task_factory(_factory)  # type: ignore[arg-type] # its protocol is generic
    try:
        yield
    finally:
        loop.set_task_factory(before)


async def interrupted_at(step: int, work: Coroutine[Any, Any, T]) -> T | BaseException:
    """Cancel `work` at its `step`th step; return what it returned or raised."""
    coming = Interruption(step)
    token = COMING.set(coming)
    with _counting(asyncio.get_running_loop()):
        task: asyncio.Task[T] = asyncio.create_task(work)
        coming.task = task
        COMING.reset(token)
        await asyncio.wait({task})
        return asyncio.CancelledError() if task.cancelled() else task.exception() or task.result()


async def interrupted_everywhere(
    begin: Callable[[], Awaitable[Coroutine[Any, Any, T]]], rounds: int = 2
) -> AsyncIterator[tuple[int, T | BaseException]]:
    """
    Begin work again and again, cancelled one step later each time; yield the step and what became of it, until it
    ended before it was cancelled. The first round prepares statements and connections, and has more steps.
    """
    for _ in range(rounds):
        for step in count(1):
            outcome = await interrupted_at(step, await begin())
            yield step, outcome
            if not isinstance(outcome, asyncio.CancelledError):
                break
