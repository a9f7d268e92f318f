"""The limiter: few go first, and nobody is left waiting whatever becomes of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from bon_scheduler.shaam.breaker import HANDFUL
from bon_scheduler.shaam.limiter import Limiter

WIDTH = 20


@dataclass
class Crowd:
    """Exchanges in one limiter, each of which waits for its answer."""

    limiter: Limiter = field(default_factory=lambda: Limiter(WIDTH))
    sent: list["asyncio.Future[bool]"] = field(default_factory=list)
    """By request, the answer that it waits for: whether the application is refused."""

    async def exchange(self) -> None:
        async with self.limiter, self.limiter.request() as slot:
            answer = asyncio.get_running_loop().create_future()
            self.sent.append(answer)
            slot.refused = await answer

    @asynccontextmanager
    async def coming(self, count: int) -> AsyncIterator[None]:
        """Let so many come, as far as they get; at the end of the block all have left."""
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.exchange()) for _ in range(count)]
            await settled()
            yield
            while not all(task.done() for task in tasks):
                self.answer(refused=False)
                await settled()

    def answer(self, *, refused: bool) -> None:
        for future in self.sent:
            if not future.done():
                future.set_result(refused)


async def settled() -> None:
    """Let every task go as far as it gets."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_no_more_than_a_handful_go_before_the_first_answer() -> None:
    crowd = Crowd()
    async with crowd.coming(WIDTH):
        assert len(crowd.sent) == HANDFUL
        crowd.sent[0].set_result(False)
        await settled()
        assert len(crowd.sent) == WIDTH


async def test_a_refusal_lets_nobody_follow() -> None:
    crowd = Crowd()
    async with crowd.coming(WIDTH):
        for answer in crowd.sent[: HANDFUL - 1]:
            answer.set_result(True)
        await settled()
        assert len(crowd.sent) == HANDFUL


async def test_once_all_of_them_are_refused_nobody_is_left_waiting() -> None:
    """Another limiter's success may have begun the breaker's count anew: then it stops nobody."""
    crowd = Crowd()
    async with crowd.coming(WIDTH):
        crowd.answer(refused=True)
        await settled()
        assert len(crowd.sent) == WIDTH


@pytest.mark.parametrize("fault", [TimeoutError(), LookupError("nobody foresaw it")])
async def test_one_that_comes_to_grief_without_a_refusal_opens_the_lane(fault: Exception) -> None:
    crowd = Crowd()
    lonely = asyncio.create_task(crowd.exchange())
    async with crowd.coming(WIDTH - 1):
        crowd.sent[0].set_exception(fault)
        await asyncio.wait([lonely])
        await settled()
        assert len(crowd.sent) == WIDTH
    assert lonely.exception() is fault


async def test_a_lane_that_was_empty_begins_with_a_handful_again() -> None:
    crowd = Crowd()
    async with crowd.coming(WIDTH):
        crowd.answer(refused=False)
    crowd.sent.clear()
    async with crowd.coming(WIDTH):
        assert len(crowd.sent) == HANDFUL


async def test_a_lane_takes_no_more_requests_at_once_than_it_was_made_for() -> None:
    crowd = Crowd(Limiter(2))
    async with crowd.coming(WIDTH):
        assert len(crowd.sent) == 2
