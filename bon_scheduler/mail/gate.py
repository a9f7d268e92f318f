"""
The gate that the letters of all replicas pass, one row in PostgreSQL: it spaces them, and it closes while the
mail server is away.

Claims read it: a run that begins with a letter is taken only when one may go, and brings the place of its first letter
(`admit`). A place for another letter of the same run is reserved in one short statement, and waited for without a
connection. While the gate is closed one run at a time is taken to try the server; the others wait in the ledger. One
event of level error says that the server is away, whatever the number of letters and replicas, and one says that it is
back.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeAlias
from uuid import UUID

import asyncpg
import structlog

from bon_scheduler.database import TRANSIENT_ERRORS
from bon_scheduler.jobs import Connection, NotNowError
from bon_scheduler.ledger import MailSlot
from bon_scheduler.log import describe_error

__all__ = ["GateState", "MailGate", "MailUnavailableError", "Slot", "gate_state"]

Wait: TypeAlias = Callable[[float], Awaitable[None]]
"""Waits for so many seconds."""
log = structlog.get_logger()

TRIAL = timedelta(minutes=3)
"""How long the one letter that tries a server may take, before another does."""
TOLERATED = 3
"""Failures in a row that close the gate: one lost connection is no outage."""
FIRST_WAIT = timedelta(seconds=30)
LONGEST_WAIT = timedelta(minutes=5)

# $1 between letters: interval, $2 trial: interval.
TAKE_TURN = "select verdict, wait, failures, trouble from bon_scheduler.pass_mail_gate($1, $2)"
# $1 what happened: text, $2 whether the letter was the one that tries: boolean, $3 tolerated: int, $4 first
# wait: interval, $5 longest wait: interval.
CLOSE_GATE = "select bon_scheduler.close_mail_gate($1, $2, $3, $4, $5)"
# $1 between letters: interval, $2 whether it was the one that tries: boolean.
RETURN_SLOT = "select bon_scheduler.return_letter_slot($1, $2)"
OPEN_GATE = """
    select since, extract(epoch from clock_timestamp() - since)::float8 as seconds
      from bon_scheduler.open_mail_gate() as since
"""
GATE_STATE = "select closed_since, trouble from bon_scheduler.mail_gate"


class MailUnavailableError(NotNowError):
    """The mail server is away, or refuses us whoever the letter is for; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The leave to send one letter now."""

    trial: bool
    """Whether this letter tries a server that was away."""
    after_failures: bool
    """Whether a success is worth reporting."""


@dataclass(frozen=True, slots=True)
class GateState:
    """Since when the mail server is away (UTC, aware), and what it said last; None when it is not."""

    closed_since: datetime | None
    trouble: str | None


async def gate_state(connection: Connection) -> GateState:
    """Read whether the mail server is away."""
    row = await connection.fetchrow(GATE_STATE)
    return GateState(row["closed_since"], row["trouble"]) if row else GateState(None, None)


class MailGate:
    """The gate as one process sees it."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", *, rate_per_second: float) -> None:
        self.apart = timedelta(seconds=1 / rate_per_second)
        self._pool = pool
        self._admitted: dict[UUID, tuple[float, Slot]] = {}

    def admit(self, run_id: UUID, slot: MailSlot) -> None:
        """Note the place of the run's first letter, which came with its claim just now."""
        opens = asyncio.get_running_loop().time() + slot.wait.total_seconds()
        self._admitted[run_id] = (opens, Slot(slot.trial, slot.after_failures))

    async def dismiss(self, run_id: UUID) -> None:
        """Give back the run's place, if it sent no letter: the next may go at once, and a trial is anybody's."""
        if unused := self._admitted.pop(run_id, None):
            await self.give_back(unused[1])

    async def give_back(self, slot: Slot) -> None:
        """Give back a place that no letter used."""
        try:
            await self._pool.execute(RETURN_SLOT, self.apart, slot.trial)
        except TRANSIENT_ERRORS as error:
            log.info("mail.slot_not_returned", error=describe_error(error))  # it is lost: a letter's time, or a trial's

    async def pass_through(self, run_id: UUID | None = None, *, wait: Wait = asyncio.sleep) -> Slot:
        """
        Wait, by `wait`, for this letter's turn: the one its run came with, or another. Raises MailUnavailableError
        while the server is away, and NotNowError while more letters wait than the rate lets go in two minutes. What
        `wait` raises gives the place back.
        """
        admitted = self._admitted.pop(run_id, None) if run_id else None
        seconds, slot = await self._reserve() if admitted is None else _left(*admitted)
        try:
            await wait(seconds)
        except BaseException:
            await self.give_back(slot)
            raise
        return slot

    async def _reserve(self) -> tuple[float, Slot]:
        """Reserve a place; return in how many seconds it comes."""
        gate = await self._pool.fetchrow(TAKE_TURN, self.apart, TRIAL)
        if gate is None:
            raise LookupError("pass_mail_gate always returns one row")
        if gate["verdict"] == "closed":
            raise _full() if gate["trouble"] is None else _unavailable(gate["trouble"], gate["wait"])
        return gate["wait"].total_seconds(), Slot(gate["verdict"] == "trial", gate["failures"] > 0)

    async def report_away(self, slot: Slot, trouble: str) -> MailUnavailableError:
        """Report that the server was away for a letter; return what to raise. `trouble` names no address."""
        closing = await self._pool.fetchval(CLOSE_GATE, trouble, slot.trial, TOLERATED, FIRST_WAIT, LONGEST_WAIT)
        if closing:
            log.error("mail.unavailable", reply=trouble)
        elif slot.trial:
            log.info("mail.still_unavailable", reply=trouble)
        return _unavailable(trouble, FIRST_WAIT)

    async def report_back(self, slot: Slot) -> None:
        """Report that the server took part in a conversation to its end."""
        if not (slot.after_failures or slot.trial):
            return
        away = await self._pool.fetchrow(OPEN_GATE)
        if away is not None and away["since"] is not None:
            seconds = round(away["seconds"], 1)
            log.warning("mail.available", unavailable_since=away["since"].isoformat(), seconds=seconds)


def _left(opens: float, slot: Slot) -> tuple[float, Slot]:
    return opens - asyncio.get_running_loop().time(), slot


def _full() -> NotNowError:
    return NotNowError(
        "More letters wait for their turn than EMAIL_RATE_PER_SECOND lets go in two minutes. It comes again by "
        "itself; if digests come late every day, raise the rate.",
        after=_spread(FIRST_WAIT),
    )


def _unavailable(trouble: str, wait: timedelta) -> MailUnavailableError:
    return MailUnavailableError(
        f"The mail server is away: {trouble}. Nothing was sent; it is tried again by itself. "
        "If this lasts, find out why with: bon-scheduler check",
        after=_spread(wait),
    )


def _spread(wait: timedelta) -> timedelta:
    """Lengthen a wait by up to half, so that what waited together does not come back together."""
    return wait * random.uniform(1.0, 1.5)  # noqa: S311 - jitter, not a secret
