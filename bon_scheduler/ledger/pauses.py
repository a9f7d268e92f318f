"""Pauses: a job of which nothing is begun, its ticks being recorded as `paused`; a business that every job skips."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from bon_scheduler.jobs import Connection
from bon_scheduler.ledger.entries import CALL_TIMEOUT_SECONDS

__all__ = [
    "Pause",
    "knows_business",
    "pause_business",
    "pause_job",
    "paused_businesses",
    "paused_jobs",
    "resume_business",
    "resume_job",
]

# $1 job, $2 by, $3 reason, $4 until: timestamptz or null. Null when it is paused already.
PAUSE = """
    insert into bon_scheduler.pauses as p (job, by, reason, until) values ($1, $2, $3, $4)
    on conflict (job) do update
       set since = excluded.since, by = excluded.by, reason = excluded.reason, until = excluded.until
     where p.until <= now()
    returning job
"""
# $1 job. Null when it is not paused. What waited is looked for at once.
RESUME = """
    with over as (
        delete from bon_scheduler.pauses where job = $1 and (until is null or until > now()) returning job
    )
    select job, bon_scheduler.wake_workers() from over
"""
# $1 business: uuid, $2 by, $3 reason. Null when it is paused already.
PAUSE_BUSINESS = """
    insert into bon_scheduler.business_pauses (business_id, by, reason) values ($1, $2, $3)
    on conflict (business_id) do nothing
    returning business_id
"""
# $1 business: uuid. Null when it is not paused.
RESUME_BUSINESS = "delete from bon_scheduler.business_pauses where business_id = $1 returning business_id"
# $1 business: uuid. Index: businesses_pkey.
KNOWS_BUSINESS = "select exists (select from public.businesses where id = $1)"
# $1 by, $2 action, $3 target, $4 reason.
RECORD_ACTION = """
    insert into bon_scheduler.operator_actions (by, action, target, reason) values ($1, $2, $3, $4)
"""
PAUSED = """
    select job, bon_scheduler.shown(since) as since, by, reason, bon_scheduler.shown(until) as until
      from bon_scheduler.pauses
     where until is null or until > now()
"""
PAUSED_BUSINESSES = """
    select business_id, bon_scheduler.shown(since) as since, by, reason
      from bon_scheduler.business_pauses b
     order by b.since
"""


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause that lasts."""

    since: datetime | None
    by: str
    reason: str
    until: datetime | None = None
    """None: until somebody ends it."""


async def pause_job(connection: Connection, job: str, *, by: str, reason: str, until: datetime | None = None) -> bool:
    """Have nothing of the job begun until an instant or a resume; False when it is paused already."""
    return await _act(connection, PAUSE, (job, by, reason, until), "pause")


async def resume_job(connection: Connection, job: str, *, by: str, reason: str) -> bool:
    """Have the job run again from now on; False when it is not paused."""
    return await _act(connection, RESUME, (job, by, reason), "resume")


async def pause_business(connection: Connection, business_id: UUID, *, by: str, reason: str) -> bool:
    """Have every job skip the business from now on; False when they do already."""
    return await _act(connection, PAUSE_BUSINESS, (business_id, by, reason), "pause")


async def resume_business(connection: Connection, business_id: UUID, *, by: str, reason: str) -> bool:
    """Have jobs serve the business again from now on; False when it is not paused."""
    return await _act(connection, RESUME_BUSINESS, (business_id, by, reason), "resume")


async def _act(connection: Connection, change: str, how: tuple[object, ...], action: str) -> bool:
    target, by, reason = how[:3]
    async with connection.transaction():
        changed = await connection.fetchval(
            change, *(how if action == "pause" else (target,)), timeout=CALL_TIMEOUT_SECONDS
        )
        if changed is not None:
            await connection.execute(RECORD_ACTION, by, action, str(target), reason, timeout=CALL_TIMEOUT_SECONDS)
    return changed is not None


async def knows_business(connection: Connection, business_id: UUID) -> bool:
    """Return whether BON has such a business."""
    return bool(await connection.fetchval(KNOWS_BUSINESS, business_id, timeout=CALL_TIMEOUT_SECONDS))


async def paused_businesses(connection: Connection) -> dict[UUID, Pause]:
    """Return each paused business with since when, by whom and why."""
    rows = await connection.fetch(PAUSED_BUSINESSES, timeout=CALL_TIMEOUT_SECONDS)
    return {row["business_id"]: Pause(row["since"], row["by"], row["reason"]) for row in rows}


async def paused_jobs(connection: Connection) -> dict[str, Pause]:
    """Return each paused job with since when, by whom, why and until when."""
    rows = await connection.fetch(PAUSED, timeout=CALL_TIMEOUT_SECONDS)
    return {row["job"]: Pause(row["since"], row["by"], row["reason"], row["until"]) for row in rows}
