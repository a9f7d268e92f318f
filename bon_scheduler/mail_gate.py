"""
The gate that the letters of all replicas pass, one row in PostgreSQL: it spaces them, and it closes while the
mail server is away.

A place in the row of letters is reserved in one short statement, and waited for without a connection. The row is
two minutes long at most: who finds it full comes again, as at a closed gate. While that is closed one letter at a
time tries the server; the others wait here for a while before their runs are given back, so that a hundred thousand
runs do not circulate through the queue. One event of level error says that the server is away, whatever the number of
letters and replicas, and one says that it is back.
"""

import asyncio
import random
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg
import structlog

from bon_scheduler.jobs import Connection, NotNowError

__all__ = ["GateState", "MailGate", "MailUnavailableError", "Passage", "gate_state"]

log = structlog.get_logger()

TRIAL = timedelta(minutes=3)
"""How long the one letter that tries a server may take, before another does."""
TOLERATED = 3
"""Failures in a row that close the gate: one lost connection is no outage."""
FIRST_WAIT = timedelta(seconds=30)
LONGEST_WAIT = timedelta(minutes=5)
PATIENCE = timedelta(seconds=20)
"""How long a letter waits at a closed gate before its run is given back."""

# $1 between letters: interval, $2 trial: interval.
TAKE_TURN = "select verdict, wait, failures, trouble from bon_scheduler.pass_mail_gate($1, $2)"
# $1 what happened: text, $2 whether the letter was the one that tries: boolean, $3 tolerated: int, $4 first
# wait: interval, $5 longest wait: interval.
CLOSE_GATE = "select bon_scheduler.close_mail_gate($1, $2, $3, $4, $5)"
OPEN_GATE = "select bon_scheduler.open_mail_gate()"
GATE_STATE = "select closed_since, trouble from bon_scheduler.mail_gate"


class MailUnavailableError(NotNowError):
    """The mail server is away, or refuses us whoever the letter is for; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Passage:
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
        self._pool = pool
        self._apart = timedelta(seconds=1 / rate_per_second)

    async def pass_through(self) -> Passage:
        """
        Wait for this letter's turn; raises MailUnavailableError while the server is away, and NotNowError while
        more letters wait than the rate lets go in two minutes.
        """
        patience = PATIENCE.total_seconds() * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
        while True:
            gate = await self._pool.fetchrow(TAKE_TURN, self._apart, TRIAL)
            if gate is None:
                raise LookupError("pass_mail_gate always returns one row")
            wait_seconds = gate["wait"].total_seconds()
            if gate["verdict"] != "closed":
                await asyncio.sleep(wait_seconds)
                return Passage(gate["verdict"] == "trial", gate["failures"] > 0)
            await asyncio.sleep(min(wait_seconds, patience))
            patience -= wait_seconds
            if patience <= 0:
                raise (
                    _full() if gate["trouble"] is None else _unavailable(gate["trouble"], timedelta(seconds=-patience))
                )

    async def report_away(self, passage: Passage, trouble: str) -> MailUnavailableError:
        """Report that the server was away for a letter; return what to raise. `trouble` names no address."""
        closing = await self._pool.fetchval(CLOSE_GATE, trouble, passage.trial, TOLERATED, FIRST_WAIT, LONGEST_WAIT)
        if closing:
            log.error("mail.unavailable", reply=trouble)
        elif passage.trial:
            log.info("mail.still_unavailable", reply=trouble)
        return _unavailable(trouble, FIRST_WAIT)

    async def report_back(self, passage: Passage) -> None:
        """Report that the server took part in a conversation to its end."""
        if not (passage.after_failures or passage.trial):
            return
        since = await self._pool.fetchval(OPEN_GATE)
        if since is not None:
            log.info("mail.available", unavailable_since=since.isoformat())


def _full() -> NotNowError:
    return NotNowError(
        "More letters wait for their turn than EMAIL_RATE_PER_SECOND lets go in two minutes. It comes again by "
        "itself; if digests come late every day, raise the rate.",
        after=_spread(FIRST_WAIT),
    )


def _unavailable(trouble: str, wait: timedelta) -> MailUnavailableError:
    return MailUnavailableError(
        f"The mail server is away: {trouble}. Nothing was sent; it is tried again by itself. "
        "If this lasts, find out why with: python -m bon_scheduler check",
        after=_spread(wait),
    )


def _spread(wait: timedelta) -> timedelta:
    """Lengthen a wait by up to half, so that what waited together does not come back together."""
    return wait * random.uniform(1.0, 1.5)  # noqa: S311 - jitter, not a secret
