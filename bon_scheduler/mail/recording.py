"""
What became of a letter, written to the delivery ledger: the server's answer, or that nothing was sent.

On connections that handlers cannot keep busy, and again while the database restarts, is full or does not answer: what
the world already did must be known.
"""

import asyncio
from dataclasses import dataclass
from uuid import UUID

from bon_scheduler.database import TRANSIENT_ERRORS, Pool
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS
from bon_scheduler.mail.replies import Answer

__all__ = ["Intention", "record", "withdraw_unheard"]

PAUSES_SECONDS = (0.2, 1.0, 3.0)
"""Between the tries to record while the database does not answer."""

# `unknown` is settled too: someone gave up on an attempt that was only slow, and this is its answer.
# $1 delivery: uuid, $2 run: uuid, $3 attempt: int, $4 state: text (one of ours, so not a literal),
# $5 reply: text. Index: deliveries_pkey.
SETTLE = """
    update bon_scheduler.deliveries
       set state = $4, reply = $5, settled_at = now()
     where id = $1
       and run_id = $2
       and attempt = $3
       and state in ('intended', 'unknown')
"""

# Nothing was sent, so the intention never was. `unknown` as in SETTLE.
# $1 delivery: uuid, $2 run: uuid, $3 attempt: int. Index: deliveries_pkey.
WITHDRAW = """
    delete from bon_scheduler.deliveries
     where id = $1
       and run_id = $2
       and attempt = $3
       and state in ('intended', 'unknown')
"""

# The same of an intention that may have been committed, though nobody heard so. Parameters as GIVE_UP's.
# Index: deliveries_kind_business_id_as_of_recipient_hash_key.
WITHDRAW_UNHEARD = """
    delete from bon_scheduler.deliveries
     where kind = $1
       and business_id = $2
       and as_of = $3
       and recipient_hash = $4
       and run_id = $5
       and attempt = $6
       and state in ('intended', 'unknown')
"""


@dataclass(frozen=True, slots=True)
class Intention:
    """A row of `deliveries` that this attempt owns."""

    id: UUID
    run_id: UUID
    attempt: int


async def record(pool: Pool, intention: Intention, answer: Answer) -> None:
    """Settle an intention, or withdraw it where nothing was sent."""
    ours = (intention.id, intention.run_id, intention.attempt)
    if answer.delivery is None:
        await _persist(pool, WITHDRAW, *ours)
    else:
        await _persist(pool, SETTLE, *ours, answer.delivery.value, answer.reply)


async def withdraw_unheard(pool: Pool, *key_and_attempt: object) -> None:
    """Withdraw what WITHDRAW_UNHEARD names, if it was committed."""
    await _persist(pool, WITHDRAW_UNHEARD, *key_and_attempt)


async def _persist(pool: Pool, statement: str, *values: object) -> None:
    for pause_seconds in (*PAUSES_SECONDS, None):
        try:
            async with pool.acquire(timeout=CALL_TIMEOUT_SECONDS) as connection:
                await connection.execute(statement, *values, timeout=CALL_TIMEOUT_SECONDS)
        except TRANSIENT_ERRORS:
            if pause_seconds is None:
                raise
            await asyncio.sleep(pause_seconds)
        else:
            return
