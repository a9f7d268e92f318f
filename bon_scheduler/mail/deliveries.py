"""
The delivery ledger as others see it: what became of letters, and what a person decides about the uncertain ones.

`mail` writes it while it sends. Here is what happens without a sender: letters whose sender is gone become
`unknown`, and an operator may release an `unknown` one, knowing that its owner may get it twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any
from uuid import UUID

from bon_scheduler import ledger
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS, Origin, Request

__all__ = [
    "NotUncertainError",
    "Uncertain",
    "count_sent",
    "count_unknown",
    "deliveries_of",
    "give_up_unanswered",
    "release",
    "some_unknown",
]

RECENT = timedelta(days=7)
"""How long an uncertain letter is worth an alert: what it said has been said again since."""

# An intention whose attempt is over can no longer be answered; mail.GIVE_UP does the same for one letter, when
# somebody comes across it first. If an answer is recorded after all, it settles the row.
# Indexes: deliveries_uncertain, runs_held.
GIVE_UP_UNANSWERED = """
    update bon_scheduler.deliveries d
       set state = 'unknown', reply = 'the attempt ended before the answer was recorded', settled_at = now()
     where d.state = 'intended'
       and not exists (select from bon_scheduler.runs r
                        where r.id = d.run_id
                          and r.state = 'running'
                          and r.attempt = d.attempt
                          and bon_scheduler.is_alive(r.worker))
    returning d.id, d.kind, d.business_id, d.as_of
"""
# $1 how far back: interval. Index: deliveries_uncertain.
COUNT_UNKNOWN = """
    select count(*)
      from bon_scheduler.deliveries
     where state = 'unknown' and intended_at > now() - $1::interval
"""
# $1 how far back: interval, $2 how many: int. Index: deliveries_uncertain.
SOME_UNKNOWN = """
    select id, kind, business_id, as_of
      from bon_scheduler.deliveries
     where state = 'unknown' and intended_at > now() - $1::interval
     order by intended_at desc
     limit $2
"""
# $1 run. Index: deliveries_run.
DELIVERIES_OF = """
    select id as delivery_id, kind, business_id, as_of, state, attempt, reply, intended_at, settled_at
      from bon_scheduler.deliveries
     where run_id = $1
     order by intended_at, id
"""
# $1 run, $2 attempt: int. Index: deliveries_run.
COUNT_SENT = "select count(*) from bon_scheduler.deliveries where run_id = $1 and attempt < $2 and state = 'sent'"
# $1 delivery: uuid. Indexes: deliveries_pkey, runs_pkey, business_pauses_pkey. The run that would have sent it says
# which job sends it.
LOCK_DELIVERY = """
    select d.state, d.business_id, d.as_of, r.job, r.payload,
           exists (select from bon_scheduler.business_pauses p where p.business_id = d.business_id) as paused
      from bon_scheduler.deliveries d
      join bon_scheduler.runs r on r.id = d.run_id
     where d.id = $1
       for no key update of d
"""
# $1 delivery: uuid, $2 by, $3 reason. Index: deliveries_pkey.
RELEASE = """
    with released as (
        update bon_scheduler.deliveries set state = 'released' where id = $1 returning id
    )
    insert into bon_scheduler.operator_actions (by, action, target, reason)
    select $2, 'resend', id::text, $3 from released
"""

_REFUSALS = {
    "sent": "was sent: the server's answer is recorded. There is nothing to resend",
    "refused": "was refused by the server. Correct the address in BON; the next digest goes there",
    "intended": "is being sent just now. Wait until it is sent, or unknown",
    "released": "was released already, and goes out with the run that was asked for then",
}


class NotUncertainError(Exception):
    """A delivery cannot be sent again; the message says which, why, and the remedy."""


@dataclass(frozen=True, slots=True)
class Uncertain:
    """A letter that may or may not have arrived."""

    id: UUID
    kind: str
    business_id: UUID
    as_of: date


async def give_up_unanswered(connection: Connection) -> list[Uncertain]:
    """Mark as `unknown` what no attempt of a living worker is sending any more; return those letters."""
    rows = await connection.fetch(GIVE_UP_UNANSWERED, timeout=CALL_TIMEOUT_SECONDS)
    return [Uncertain(*row) for row in rows]


async def count_unknown(connection: Connection) -> int:
    """Count the letters of the last seven days that may or may not have arrived."""
    return int(await connection.fetchval(COUNT_UNKNOWN, RECENT, timeout=CALL_TIMEOUT_SECONDS))


async def some_unknown(connection: Connection, most: int) -> list[Uncertain]:
    """Return the latest of them."""
    rows = await connection.fetch(SOME_UNKNOWN, RECENT, most, timeout=CALL_TIMEOUT_SECONDS)
    return [Uncertain(*row) for row in rows]


async def deliveries_of(connection: Connection, run_id: UUID) -> Sequence[dict[str, Any]]:
    """Return the letters a run was the last to try."""
    return [dict(row) for row in await connection.fetch(DELIVERIES_OF, run_id, timeout=CALL_TIMEOUT_SECONDS)]


async def count_sent(connection: Connection, run_id: UUID, *, before: int) -> int:
    """Return how many letters the attempts of a run `before` that one have sent."""
    return int(await connection.fetchval(COUNT_SENT, run_id, before, timeout=CALL_TIMEOUT_SECONDS))


async def release(connection: Connection, delivery_id: UUID, *, by: str, reason: str) -> UUID:
    """
    Let an `unknown` letter be sent once more, and ask for a run that sends it; return the run.

    Raises NotUncertainError for any other, and while its business is paused: the run would leave it out, and the
    letter be `released` for good. The letter is written anew, of the same day, and keeps its Message-ID: mail
    readers that have it may show it once. The run is told the day (`as_of` of its payload), otherwise it would be
    another day's letter, to everybody.
    """
    async with connection.transaction():
        row = await connection.fetchrow(LOCK_DELIVERY, delivery_id, timeout=CALL_TIMEOUT_SECONDS)
        if row is None:
            raise NotUncertainError(f"No delivery {delivery_id}. See which are unknown with: bon-scheduler check")
        if row["state"] != "unknown":
            raise NotUncertainError(f"Delivery {delivery_id} {_REFUSALS[row['state']]}.")
        if row["paused"]:
            raise NotUncertainError(
                f"Delivery {delivery_id} is of a business that is paused, so that nothing goes out to it. First: "
                f"bon-scheduler resume --business {row['business_id']} --reason …"
            )
        await connection.execute(RELEASE, delivery_id, by, reason, timeout=CALL_TIMEOUT_SECONDS)
        payload = {**row["payload"], "as_of": row["as_of"].isoformat()}
        request = Request(row["job"], payload, origin=Origin.PERSON, asked_by=by)
        run_id = await ledger.enqueue(connection, request)
    if run_id is None:
        raise LookupError("the ledger gave no run for a request without a key")
    return run_id
