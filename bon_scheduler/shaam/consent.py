"""
Asking owners to consent again, and the brake on it.

That a grant is spent is one owner's matter when the authority says it of a few. When it says it of many in one run, no
owner did that: a database was restored from a backup, another program rotates the same tokens, or the client is
another's. So an answer is recorded first, and flagging is a second step. Ten are flagged at once in a run, of all its
batches and replicas, and on demand. The rest wait (`spent`) until the run can be judged: it is braked once more than
ten, and more than a fifth of those that are due, or at its end of those of which the authority judged, are spent.

Braked, nobody else is flagged or called, and the first run that ends then is held. Each later one asks one business,
until one is refreshed or a person releases the held run. Then those that wait are asked again. The row of the brake is
locked BEFORE BON's and ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import structlog

from bon_scheduler import ledger
from bon_scheduler.jobs import Connection
from bon_scheduler.shaam import refreshes
from bon_scheduler.shaam.refreshes import CALL_TIMEOUT_SECONDS, End, Exchange, State
from bon_scheduler.shaam.results import Tell

__all__ = [
    "Asked",
    "ConsentBrake",
    "ask",
    "begin_run",
    "choose_one",
    "close_held_run",
    "consent_brake",
    "end_run",
    "hold_run",
    "release_after_success",
    "release_consent_brake",
]

log = structlog.get_logger()
FEW = 10
"""So many are flagged whatever the others' answers are."""
SHARE = 5
"""More than one in so many is no owner's fault."""
A_REFRESH = "a refresh that succeeded"

READ = "select braked_at, reason, held, released_by from bon_scheduler.consent_brake"
LOCK = """
    select run, since, due, flagged, spent, unlimited, braked_at, reason, since < clock_timestamp() - interval '1 hour'
           as is_old
      from bon_scheduler.consent_brake
       for update
"""
# $1 run: uuid, or null: on demand only, $2 how many are due: int, $3 whether a person has let this run flag whomever
# the authority refuses: boolean. Another attempt at the same run goes on with its figures.
BEGIN = """
    update bon_scheduler.consent_brake
       set due = case when run = $1 then greatest(due, $2) else $2 end,
           flagged = case when run = $1 then flagged else 0 end,
           spent = case when run = $1 then spent else 0 end,
           since = case when run = $1 then since else clock_timestamp() end,
           unlimited = $3 or $1 is not null and (allowed or run = $1 and unlimited),
           allowed = allowed and $1 is null,
           run = $1::uuid
"""
# $1 how many more were flagged: int, $2 how many more are spent: int.
COUNT = "update bon_scheduler.consent_brake set flagged = flagged + $1, spent = spent + $2"
# $1 since: timestamptz. One row a business, read once a run that has more than ten.
COUNT_JUDGED = """
    select count(*)
      from bon_scheduler.shaam_refreshes
     where state in ('refreshed', 'needs_reauth', 'spent')
       and changed_at >= $1
"""
# $1 reason.
BRAKE = "update bon_scheduler.consent_brake set braked_at = clock_timestamp(), reason = $1 where braked_at is null"
# $1 by whom, $2 reason, $3 whether this run and the next may flag whomever the authority refuses: boolean. Those that
# wait count no more: they are asked again.
RELEASE = """
    update bon_scheduler.consent_brake
       set braked_at = null, reason = null, released_at = clock_timestamp(), released_by = $1, release_reason = $2,
           allowed = $3, unlimited = unlimited or $3, spent = flagged
     where braked_at is not null
    returning 1
"""
# $1 run. One run is held for a brake, unless a person cancels that, or its process dies before it is. Index: runs_pkey.
HOLD = """
    update bon_scheduler.consent_brake
       set held = $1
     where braked_at is not null
       and (held is null or held = $1
            or not exists (select from bon_scheduler.runs r
                            where r.id = consent_brake.held
                              and r.state in ('queued', 'running', 'retrying', 'held')))
    returning reason
"""
# $1 businesses: uuid[], or null for all. They are asked again.
ASK_AGAIN = """
    update bon_scheduler.shaam_refreshes
       set state = 'deferred', changed_at = clock_timestamp()
     where state = 'spent'
       and ($1::uuid[] is null or business_id = any ($1))
"""
# Flags whoever waits, unless the row holds another token by now. Reads one row a business, and
# looks up their tokens. Index: shaam_tokens_sealed.
FLAG_WAITING = """
    with flagged as (
        update public.business_shaam_credentials c
           set needs_reauth = true, updated_at = now()
          from bon_scheduler.shaam_refreshes r
          join bon_scheduler.shaam_tokens t on t.fingerprint = r.token_fingerprint
         where r.state = 'spent'
           and c.business_id = r.business_id
           and t.sealed = sha256(convert_to(c.encrypted_refresh_token, 'UTF8'))
           and c.needs_reauth = false
        returning c.business_id
    ), ended as (
        update bon_scheduler.shaam_refreshes r
           set state = case when exists (select from flagged f where f.business_id = r.business_id)
                            then 'needs_reauth' else 'deferred' end,
               unanswered = 0, changed_at = clock_timestamp()
         where r.state = 'spent'
    )
    select business_id from flagged
"""
# $1 businesses: uuid[]. One whose grant nobody called spent, if there is one. Index: shaam_refreshes_pkey.
CHOOSE_ONE = """
    select d.business_id
      from unnest($1::uuid[]) as d (business_id)
      left join bon_scheduler.shaam_refreshes r on r.business_id = d.business_id
     order by coalesce(r.state = 'spent', false), random()
     limit 1
"""


@dataclass(frozen=True, slots=True)
class ConsentBrake:
    """The brake as it stands; not braked while `since` is None."""

    since: datetime | None
    reason: str | None
    held: UUID | None = None
    """The run that a person may release; None: none has ended since."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of one business whose grant is spent."""

    state: State
    """needs_reauth: its owner is asked; spent: not yet; deferred: its row holds another token by now."""
    braked: bool


async def consent_brake(connection: Connection) -> ConsentBrake:
    """Read whether owners are asked."""
    row = await connection.fetchrow(READ, timeout=CALL_TIMEOUT_SECONDS)
    return ConsentBrake(row["braked_at"], row["reason"], row["held"]) if row else ConsentBrake(None, None)


async def ask(connection: Connection, exchange: Exchange, reason: str, tell: Tell) -> Asked:
    """Record that a grant is spent, and flag the business if it is one of few. In the caller's transaction."""
    credential = exchange.credential
    row = await _lock(connection)
    if row["is_old"]:
        await connection.execute(BEGIN, None, 0, False)
        row = await _lock(connection)
    braked = row["braked_at"] is not None
    if row["unlimited"] or (not braked and row["flagged"] < FEW):
        newly = await refreshes.flag(connection, credential)
        if newly:
            await tell(connection, credential.business_id)
        # Flagged before: by the same write, whose answer was lost, or by another replica.
        state = State.NEEDS_REAUTH if newly or await refreshes.is_flagged(connection, credential) else State.DEFERRED
        counted = int(newly), int(newly)
    else:
        state, counted = State.SPENT, (0, 1)
    await connection.execute(COUNT, *counted)
    await refreshes.settle(connection, exchange, End(state=state, unspent=False, error=reason))
    if state is State.NEEDS_REAUTH:
        await refreshes.note(connection, credential.business_id, state, reason)
    spent = row["spent"] + counted[1]
    if not braked and row["run"] is not None and not row["unlimited"] and _are_many(spent, row["due"]):
        await _brake(connection, spent, row["flagged"], f"{row['due']} that are due")
        braked = True
    return Asked(state, braked)


async def begin_run(
    connection: Connection, run_id: UUID, *, due: int, tell: Tell, released: bool = False
) -> ConsentBrake:
    """
    Judge what an earlier run has left, and count anew; in the caller's transaction.

    A run that a person has `released` releases the brake, and flags whomever the authority refuses.
    """
    row = await _lock(connection)
    if released:
        await release_consent_brake(connection, run_id)
    if row["run"] != run_id:
        await end_run(connection, tell=tell)
    await connection.execute(BEGIN, run_id, due, released)
    return await consent_brake(connection)


async def end_run(connection: Connection, *, tell: Tell) -> set[UUID]:
    """Brake, or flag whoever waits, by all answers of the run; return whom. In the caller's transaction."""
    row = await _lock(connection)
    if row["braked_at"] is not None or row["spent"] == row["flagged"]:
        return set()
    judged = int(await connection.fetchval(COUNT_JUDGED, row["since"]))
    if not row["unlimited"] and _are_many(row["spent"], judged):
        await _brake(connection, row["spent"], row["flagged"], f"{judged} of which the authority judged")
        return set()
    flagged = [found["business_id"] for found in await connection.fetch(FLAG_WAITING, timeout=CALL_TIMEOUT_SECONDS)]
    for business_id in flagged:
        await tell(connection, business_id)
        log.warning("token.needs_reauth", business_id=str(business_id), reason="its grant is spent")
    await connection.execute(COUNT, row["spent"] - row["flagged"], 0)
    return set(flagged)


async def choose_one(connection: Connection, due: Sequence[UUID]) -> list[UUID]:
    """Return the one business that is asked while the brake holds, ready to be asked."""
    chosen: UUID | None = await connection.fetchval(CHOOSE_ONE, list(due), timeout=CALL_TIMEOUT_SECONDS)
    if chosen is None:
        return []
    await connection.execute(ASK_AGAIN, [chosen])
    return [chosen]


async def hold_run(connection: Connection, run_id: UUID) -> str | None:
    """Return why this run is to be held: the brake holds, and no other run is held for it. None: it is not to be."""
    reason: str | None = await connection.fetchval(HOLD, run_id, timeout=CALL_TIMEOUT_SECONDS)
    return reason


async def close_held_run(connection: Connection) -> None:
    """End the run that was held for a brake that holds no more."""
    row = await connection.fetchrow(READ, timeout=CALL_TIMEOUT_SECONDS)
    if row is None or row["braked_at"] is not None or row["held"] is None:
        return
    why = f"Held by the brake on consent until that was released by {row['released_by']}."
    if await ledger.end_held(connection, row["held"], why):
        log.info("consent.run_closed", held=str(row["held"]), why=why)


async def release_consent_brake(connection: Connection, run_id: UUID) -> bool:
    """
    Release the brake because a person has released this run, which asks again those that wait.

    It, and the next scheduled run, flag whomever the authority refuses. False where the brake does not hold. In the
    caller's transaction.
    """
    releases = [action for action in await ledger.actions_on(connection, run_id) if action["action"] == "release"]
    by, reason = (releases[-1]["by"], releases[-1]["reason"]) if releases else ("a person", f"run {run_id}")
    return await _release(connection, by, reason, allowed=True)


async def release_after_success(connection: Connection) -> bool:
    """Release the brake: the one that was asked is refreshed. It may brake again. In the caller's transaction."""
    return await _release(connection, A_REFRESH, A_REFRESH, allowed=False)


async def _lock(connection: Connection) -> Mapping[str, Any]:
    row = await connection.fetchrow(LOCK, timeout=CALL_TIMEOUT_SECONDS)
    if row is None:
        raise LookupError("The row of bon_scheduler.consent_brake is missing. Insert it: insert into … default values")
    return dict(row)


async def _release(connection: Connection, by: str, reason: str, *, allowed: bool) -> bool:
    if await connection.fetchval(RELEASE, by, reason, allowed, timeout=CALL_TIMEOUT_SECONDS) is None:
        return False
    await connection.execute(ASK_AGAIN, None)
    log.warning("consent.released", by_person=allowed)
    return True


async def _brake(connection: Connection, spent: int, flagged: int, of: str) -> None:
    reason = (
        f"The authority calls {spent} grants spent, of {of}: no owner's fault. It looks like a database restored "
        "from a backup, another program that rotates these tokens, or the client or key of another environment. "
        f"{flagged} owners were asked to consent again before that was seen, and nobody is since."
    )
    await connection.execute(BRAKE, reason)
    log.error("consent.braked", spent=spent, reason=reason)


def _are_many(spent: int, asked: int) -> bool:
    return spent > FEW and spent * SHARE > asked
