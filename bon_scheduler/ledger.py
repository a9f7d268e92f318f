"""
The ledger of runs: every run is one row from the moment it is asked for until it is pruned.

Asking (`enqueue`), ticks (`advance_tick`) and delivery (`redeliver`, `orphans`) are here; what an
attempt does to its run is in `attempts`. No other module writes these tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import asyncpg

from bon_scheduler.jobs import AnyJob, Connection

__all__ = [
    "BULK",
    "CALL_TIMEOUT_SECONDS",
    "Origin",
    "Request",
    "UnknownJobError",
    "advance_tick",
    "cancel_run",
    "enqueue",
    "enqueue_many",
    "last_ticks",
    "orphans",
    "redeliver",
    "register_jobs",
]

CALL_TIMEOUT_SECONDS = 15
BULK = 1000
"""Rows handed over in one statement."""

# $1 names: text[], $2 payload schemas: jsonb[], $3 scheduled: boolean[]. A job scheduled for the first time
# owes nothing from the past.
REGISTER_JOBS = """
    insert into bon_scheduler.jobs as j (name, payload_schema, scheduled, last_tick)
    select name, payload_schema, scheduled, case when scheduled then now() end
      from unnest($1::text[], $2::jsonb[], $3::boolean[]) as t (name, payload_schema, scheduled)
     order by name
    on conflict (name) do update
       set payload_schema = excluded.payload_schema,
           scheduled = excluded.scheduled,
           last_tick = coalesce(j.last_tick, excluded.last_tick)
     where (j.payload_schema, j.scheduled, j.last_tick is null)
           is distinct from (excluded.payload_schema, excluded.scheduled, excluded.last_tick is null)
"""
# $1 names: text[].
LAST_TICKS = """
    select name, last_tick
      from bon_scheduler.jobs
     where name = any ($1) and last_tick is not null
"""
# $1 job, $2 fire time: timestamptz, $3 why it is missed: text or null. One statement: the job's last tick
# moves forwards only, and whoever moves it records the tick and asks for the run. Index: jobs_pkey.
ADVANCE_TICK = """
    with advanced as (
        update bon_scheduler.jobs
           set last_tick = $2
         where name = $1 and last_tick < $2
        returning name
    ), missed as (
        insert into bon_scheduler.runs (job, fire_time, origin, asked_by, state, reason, finished_at)
        select name, $2, 'schedule', 'schedule', 'missed', $3, now()
          from advanced
         where $3::text is not null
        on conflict do nothing
        returning id
    )
    select id from missed
    union all
    select bon_scheduler.enqueue(name, fire_time => $2, origin => 'schedule', asked_by => 'schedule')
      from advanced
     where $3::text is null
"""
# $1 job, $2 payload: jsonb, $3 dedupe key, $4 run at, $5 priority, $6 fire time, $7 origin, $8 asked by,
# $9 caused by.
ENQUEUE = """
    select bon_scheduler.enqueue($1, $2, dedupe_key => $3, run_at => $4, priority => $5,
                                 fire_time => $6, origin => $7, asked_by => $8, caused_by => $9)
"""
# $1 job, $2 payloads: jsonb[], $3 dedupe keys: text[], $4 asked by, $5 caused by.
ENQUEUE_MANY = """
    select count(bon_scheduler.enqueue($1, payload, dedupe_key => key, origin => 'run',
                                       asked_by => $4, caused_by => $5))
      from unnest($2::jsonb[], $3::text[]) as t (payload, key)
"""
# $1 run, $2 reason. Only a run that has not started.
CANCEL_QUEUED = """
    update bon_scheduler.runs
       set state = 'cancelled', reason = $2, finished_at = clock_timestamp()
     where id = $1 and state in ('queued', 'retrying')
    returning id
"""
REDELIVER = "select bon_scheduler.deliver($1, $2)"
# $1 lease: interval, $2 job names: text[]. Runs that have not ended, that no living worker holds and that no
# queue row would bring to one. Index: runs_unfinished.
ORPHANS = """
    select r.id, r.job, r.state::text as state
      from bon_scheduler.runs r
     where r.state in ('queued', 'running', 'retrying')
       and r.job = any ($2)
       and r.run_at <= clock_timestamp()
       and (r.state <> 'running' or not bon_scheduler.is_alive(r.worker, $1))
       and not exists (select from bon_scheduler.pgqueuer q
                        where q.dedupe_key = r.id || '/' || r.attempt and q.status = 'queued')
     order by r.run_at
     limit 1000
"""


class UnknownJobError(Exception):
    """No job of that name is registered in this database."""


class Origin(StrEnum):
    """What asked for a run."""

    SCHEDULE = "schedule"
    PERSON = "person"
    PROGRAM = "program"
    RUN = "run"


@dataclass(frozen=True, slots=True)
class Request:
    """A wish for a run."""

    job: str
    payload: Mapping[str, Any]
    dedupe_key: str | None = None
    run_at: datetime | None = None
    priority: int = 0
    fire_time: datetime | None = None
    origin: Origin = Origin.PROGRAM
    asked_by: str | None = None
    caused_by: UUID | None = None


async def register_jobs(connection: Connection, jobs: Iterable[AnyJob], scheduled: Iterable[str]) -> None:
    """Make these jobs' names known, so that anybody may ask for them; start the ticks of scheduled ones."""
    ordered = list(jobs)
    with_schedule = set(scheduled)
    await connection.execute(
        REGISTER_JOBS,
        [job.name for job in ordered],
        [job.payload.model_json_schema() for job in ordered],
        [job.name in with_schedule for job in ordered],
        timeout=CALL_TIMEOUT_SECONDS,
    )


async def last_ticks(connection: Connection, jobs: Sequence[str]) -> dict[str, datetime]:
    """Return each job's last accounted fire time (UTC)."""
    rows = await connection.fetch(LAST_TICKS, list(jobs), timeout=CALL_TIMEOUT_SECONDS)
    return {row["name"]: row["last_tick"] for row in rows}


async def advance_tick(
    connection: Connection, job: str, fire_time: datetime, *, missed: str | None = None
) -> UUID | None:
    """Record a tick as asked for, or as missed for a reason; None when another replica already has."""
    run_id: UUID | None = await connection.fetchval(ADVANCE_TICK, job, fire_time, missed, timeout=CALL_TIMEOUT_SECONDS)
    return run_id


async def enqueue(connection: Connection, request: Request) -> UUID | None:
    """Ask for a run; None when its dedupe key is taken. Raises UnknownJobError."""
    try:
        run_id: UUID | None = await connection.fetchval(
            ENQUEUE,
            request.job,
            dict(request.payload),
            request.dedupe_key,
            request.run_at,
            request.priority,
            request.fire_time,
            request.origin,
            request.asked_by,
            request.caused_by,
            timeout=CALL_TIMEOUT_SECONDS,
        )
    except asyncpg.InvalidParameterValueError as error:
        raise UnknownJobError(f"{error.args[0]}. {error.as_dict().get('hint', '')}") from error
    return run_id


async def enqueue_many(
    connection: Connection,
    job: str,
    requests: Iterable[tuple[Mapping[str, Any], str]],
    *,
    asked_by: str,
    caused_by: UUID,
) -> int:
    """Ask for a run for each (payload, dedupe key); return how many keys were new."""
    new = 0
    batch = list(requests)
    for start in range(0, len(batch), BULK):
        part = batch[start : start + BULK]
        new += await connection.fetchval(
            ENQUEUE_MANY, job, [payload for payload, _ in part], [key for _, key in part], asked_by, caused_by
        )
    return new


async def cancel_run(connection: Connection, run_id: UUID, reason: str) -> bool:
    """Cancel a run that has not started; False when it has."""
    return (await connection.fetchval(CANCEL_QUEUED, run_id, reason, timeout=CALL_TIMEOUT_SECONDS)) is not None


async def redeliver(connection: Connection, run_id: UUID, delay: timedelta = timedelta(0)) -> bool:
    """Make a queue row for a run that has not ended; False when one is there already."""
    return bool(await connection.fetchval(REDELIVER, run_id, delay, timeout=CALL_TIMEOUT_SECONDS))


async def orphans(connection: Connection, jobs: Sequence[str], lease: timedelta) -> list[tuple[UUID, str]]:
    """Return (run, job) of these jobs' runs that nobody works on and no queue row would bring."""
    rows = await connection.fetch(ORPHANS, lease, list(jobs), timeout=CALL_TIMEOUT_SECONDS)
    return [(row["id"], row["job"]) for row in rows]
