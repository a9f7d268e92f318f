"""Pauses: a job whose ticks are recorded as `paused` instead of run, a business that every job skips."""

from uuid import UUID

import asyncpg

from bon_scheduler.jobs import Connection
from bon_scheduler.ledger.entries import CALL_TIMEOUT_SECONDS

__all__ = [
    "knows_business",
    "pause_business",
    "pause_job",
    "paused_businesses",
    "paused_jobs",
    "resume_business",
    "resume_job",
]

# $1 job, $2 by, $3 reason. Null when it is paused already.
PAUSE = """
    insert into bon_scheduler.pauses (job, by, reason) values ($1, $2, $3)
    on conflict (job) do nothing
    returning job
"""
# $1 job. Null when it is not paused.
RESUME = "delete from bon_scheduler.pauses where job = $1 returning job"
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
PAUSED = "select job, since, by, reason from bon_scheduler.pauses"
PAUSED_BUSINESSES = "select business_id, since, by, reason from bon_scheduler.business_pauses order by since"


async def pause_job(connection: Connection, job: str, *, by: str, reason: str) -> bool:
    """Have the job's ticks recorded as `paused` from now on; False when they are already."""
    return await _act(connection, PAUSE, (job, by, reason), "pause")


async def resume_job(connection: Connection, job: str, *, by: str, reason: str) -> bool:
    """Have the job's ticks run again from now on; False when it is not paused."""
    return await _act(connection, RESUME, (job, by, reason), "resume")


async def pause_business(connection: Connection, business_id: UUID, *, by: str, reason: str) -> bool:
    """Have every job skip the business from now on; False when they do already."""
    return await _act(connection, PAUSE_BUSINESS, (business_id, by, reason), "pause")


async def resume_business(connection: Connection, business_id: UUID, *, by: str, reason: str) -> bool:
    """Have jobs serve the business again from now on; False when it is not paused."""
    return await _act(connection, RESUME_BUSINESS, (business_id, by, reason), "resume")


async def _act(connection: Connection, change: str, how: tuple[str | UUID, str, str], action: str) -> bool:
    target, by, reason = how
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


async def paused_businesses(connection: Connection) -> dict[UUID, str]:
    """Return each paused business with why, since when and by whom."""
    rows = await connection.fetch(PAUSED_BUSINESSES, timeout=CALL_TIMEOUT_SECONDS)
    return {row["business_id"]: _why(row) for row in rows}


async def paused_jobs(connection: Connection) -> dict[str, str]:
    """Return each paused job with why, since when and by whom."""
    rows = await connection.fetch(PAUSED, timeout=CALL_TIMEOUT_SECONDS)
    return {row["job"]: _why(row) for row in rows}


def _why(row: asyncpg.Record) -> str:
    return f"{row['reason']} (by {row['by']} since {row['since']:%Y-%m-%d %H:%M} UTC)"
