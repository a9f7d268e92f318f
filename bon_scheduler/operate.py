"""What an operator does to jobs: pause and resume. Each is recorded with who, when and why."""

from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS

__all__ = ["pause_job", "paused_jobs", "resume_job"]

# $1 job, $2 by, $3 reason. Null when it is paused already.
PAUSE = """
    insert into bon_scheduler.pauses (job, by, reason) values ($1, $2, $3)
    on conflict (job) do nothing
    returning job
"""
# $1 job. Null when it is not paused.
RESUME = "delete from bon_scheduler.pauses where job = $1 returning job"
# $1 by, $2 action, $3 target, $4 reason.
RECORD_ACTION = """
    insert into bon_scheduler.operator_actions (by, action, target, reason) values ($1, $2, $3, $4)
"""
PAUSED = "select job, since, by, reason from bon_scheduler.pauses"


async def pause_job(connection: Connection, job: str, *, by: str, reason: str) -> bool:
    """Have the job's ticks recorded as `paused` from now on; False when they are already."""
    return await _act(connection, PAUSE, "pause", job, by, reason)


async def resume_job(connection: Connection, job: str, *, by: str, reason: str) -> bool:
    """Have the job's ticks run again from now on; False when it is not paused."""
    return await _act(connection, RESUME, "resume", job, by, reason)


async def _act(connection: Connection, change: str, action: str, job: str, by: str, reason: str) -> bool:
    arguments = (job, by, reason) if change is PAUSE else (job,)
    async with connection.transaction():
        changed = await connection.fetchval(change, *arguments, timeout=CALL_TIMEOUT_SECONDS)
        if changed is not None:
            await connection.execute(RECORD_ACTION, by, action, job, reason, timeout=CALL_TIMEOUT_SECONDS)
    return changed is not None


async def paused_jobs(connection: Connection) -> dict[str, str]:
    """Return each paused job with why, since when and by whom."""
    rows = await connection.fetch(PAUSED, timeout=CALL_TIMEOUT_SECONDS)
    return {row["job"]: f"{row['reason']} (by {row['by']} since {row['since']:%Y-%m-%d %H:%M} UTC)" for row in rows}
