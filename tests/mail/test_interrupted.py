"""A letter whose handler is cancelled, wherever that is."""

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP

from bon_scheduler.database import connections
from bon_scheduler.jobs import NotNowError
from bon_scheduler.mail.mailer import Delivery, Mailer
from bon_scheduler.mail.message import Letter
from tests.conftest import MakeSettings
from tests.fated import Fate, FatedPool
from tests.interrupting import interrupted_everywhere
from tests.mailworld import World, a_run, another
from tests.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")
STATES = "select state::text from bon_scheduler.deliveries where business_id = $1"
OPEN = "update bon_scheduler.mail_gate set next_slot = '-infinity'"
MANY_WAIT = "select next_slot > now() + interval '15 s' from bon_scheduler.mail_gate"
HALF_OPEN = """
    update bon_scheduler.mail_gate
       set failures = 3, trouble = 'away', closed_since = now(), closed_until = now(), trying_until = '-infinity'
"""
GATE = """
    select closed_since is null as open, next_slot <= now() as free, trying_until <= now() as idle
      from bon_scheduler.mail_gate
"""


@dataclass(slots=True)
class Letters:
    """One letter after another, each of another business."""

    world: World
    mailer: Mailer
    gate: str
    letter: Letter
    sent_before: int = 0

    async def begin(self) -> Coroutine[Any, Any, Delivery]:
        await self.world.pool.execute(self.gate)
        self.letter, self.sent_before = another(), len(self.world.server.received)
        return self.mailer.deliver(self.letter, run_id=await a_run(self.world.pool), attempt=1)

    async def became(self) -> tuple[list[str], int]:
        """Wait for its end; return the states of its deliveries, and how often it was sent."""
        while self.mailer._sending:
            await asyncio.wait(self.mailer._sending)
        rows = await self.world.pool.fetch(STATES, self.letter.business_id)
        return [row["state"] for row in rows], len(self.world.server.received) - self.sent_before


@pytest.mark.parametrize("gate", [OPEN, HALF_OPEN], ids=["open", "half-open"])
async def test_a_letter_is_sent_and_recorded_or_nothing_is_left_of_it(world: World, gate: str) -> None:
    letters = Letters(world, await world.mailer(email_rate_per_second=0.5), gate, another())
    became = set()
    async for step, outcome in interrupted_everywhere(letters.begin):
        states, sent = await letters.became()
        at = f"at step {step}: {outcome!r}"
        assert (states, sent) in [([], 0), (["sent"], 1)], at
        row = await world.pool.fetchrow(GATE)
        assert row is not None
        if sent:
            assert row["open"], at
        else:
            assert row["free"], f"its turn is not given back, {at}"
            assert row["idle"], f"the trial is not given back, {at}"
        became.add((sent, isinstance(outcome, asyncio.CancelledError)))
    assert became == {(0, True), (1, True), (1, False)}


@pytest.mark.parametrize(("left_seconds", "sent"), [(0.5, False), (30, True)])
async def test_a_process_that_stops_begins_no_data_that_it_may_not_see_to_its_end(
    world: World, left_seconds: float, sent: bool
) -> None:
    """Its conversation was under way, and its server takes 0.3 s for each answer."""
    mailer = await world.mailer()

    async def stop(_: SMTP) -> str:
        mailer.stop(timedelta(seconds=left_seconds))
        await asyncio.sleep(0.3)
        return "250 OK"

    world.server.on["MAIL"] = stop
    if sent:
        assert await world.deliver(mailer) is Delivery.SENT
    else:
        with pytest.raises(NotNowError, match="stopping"):
            await world.deliver(mailer)
    assert (len(await world.rows()), len(world.server.received)) == (sent, sent)


async def test_a_process_that_stops_begins_no_letter_and_keeps_no_turn(world: World) -> None:
    mailer = await world.mailer(email_rate_per_second=0.1)
    assert await world.deliver(mailer) is Delivery.SENT
    waiting = asyncio.create_task(world.deliver(mailer, another()))

    async def waits() -> bool:
        return bool(
            await world.pool.fetchval("select next_slot > now() + interval '15 s' from bon_scheduler.mail_gate")
        )

    await until(waits)
    mailer.stop(timedelta(seconds=30))
    for letter in (waiting, world.deliver(mailer, another())):
        with pytest.raises(NotNowError, match="stopping"):
            await asyncio.wait_for(letter, 2)
    assert len(world.server.received) == 1
    assert not await waits()


async def test_an_intention_whose_answer_was_lost_is_withdrawn(world: World) -> None:
    """Committed, and the connection is cut before anybody reads so."""
    mailer = await world.mailer()
    letters = Letters(world, mailer, OPEN, another())
    work = await letters.begin()
    lossy: Any = FatedPool(world.pool, Fate(outage=range(2, 3), answers_are_lost=True))
    lossy.fetchrow, lossy.fetchval = world.pool.fetchrow, world.pool.fetchval
    mailer._pool = lossy
    with pytest.raises(ConnectionResetError):
        await work
    assert await letters.became() == ([], 0)


async def test_an_answer_waits_for_no_handler(world: World, make_settings: MakeSettings) -> None:
    """Handlers take every connection of theirs while the server answers."""
    mailer, run_id = await world.mailer(), await a_run(world.pool)
    async with AsyncExitStack() as busy:
        answers = await busy.enter_async_context(connections.open_pool(make_settings()))
        mailer._answers = answers

        async def take_all(__: SMTP) -> str:
            for _ in range(world.pool.get_max_size()):
                await busy.enter_async_context(world.pool.acquire())
            return "250 OK"

        world.server.on["DATA"] = take_all
        letter = another()
        assert await asyncio.wait_for(mailer.deliver(letter, run_id=run_id, attempt=1), 5) is Delivery.SENT
        assert await answers.fetchval(STATES, letter.business_id) == "sent"
