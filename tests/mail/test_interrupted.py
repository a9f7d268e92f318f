"""A letter whose handler is cancelled, wherever that is."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from bon_scheduler.mail.mailer import Delivery, Mailer
from bon_scheduler.mail.message import Letter
from tests.interrupting import interrupted_everywhere
from tests.mailworld import World, a_run, another

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")
STATES = "select state::text from bon_scheduler.deliveries where business_id = $1"
OPEN = "update bon_scheduler.mail_gate set next_slot = '-infinity'"
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
