"""
The ledger of runs: every run is one row from the moment it is asked for until it is pruned.

Asking (`enqueue`) and ticks (`record_tick`) are here; how a run is claimed is in `claims`, what an attempt does
to it in `attempts`, what an operator does to it in `changes`. No other module writes these tables.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import islice
from typing import Any
from uuid import UUID

import asyncpg

from bon_scheduler.jobs import AnyJob, Connection, Exclusive

__all__ = [
    "BULK",
    "CALL_TIMEOUT_SECONDS",
    "ActiveTick",
    "DryRun",
    "Origin",
    "RefusedRequestError",
    "Request",
    "TickVerdict",
    "active_ticks",
    "enqueue",
    "enqueue_many",
    "exclusive",
    "last_ticks",
    "make_overtaken_ready",
    "record_dry_run",
    "record_tick",
    "register_jobs",
]

CALL_TIMEOUT_SECONDS = 10
BULK = 1000
"""Rows handed over in one statement."""

# $1 names: text[], $2 payload schemas: jsonb[], $3 attempts: int[], $4 what is exclusive: text[], $5 whether a job that
# is known already is declared anew: boolean.
REGISTER_JOBS = """
    insert into bon_scheduler.jobs as j (name, payload_schema, attempts, exclusive)
    select name, payload_schema, attempts, exclusive
      from unnest($1::text[], $2::jsonb[], $3::int[], $4::text[]) as t (name, payload_schema, attempts, exclusive)
     order by name
    on conflict (name) do update
       set payload_schema = excluded.payload_schema, attempts = excluded.attempts, exclusive = excluded.exclusive
     where $5
       and (j.payload_schema, j.attempts, j.exclusive)
           is distinct from (excluded.payload_schema, excluded.attempts, excluded.exclusive)
"""
# $1 names: text[].
LAST_TICKS = """
    select name, bon_scheduler.shown(last_tick) as last_tick
      from bon_scheduler.jobs
     where name = any ($1) and bon_scheduler.shown(last_tick) is not null
"""
# $1 job, $2 its last tick, $3 since when its schedule is in force, $4 fire time: timestamptz, $5 why it is
# missed: text or null. One statement: the job's last tick moves forwards, the run is recorded and it is asked
# for, or nothing is. Index: runs_active_ticks.
RECORD_TICK = "select verdict, run_id from bon_scheduler.record_tick($1, $2, $3, $4, $5)"
# The ticks that are queued, running or retrying, and when they are due; of several of one job, which only damage can
# bring about, the last. Index: runs_active_ticks.
ACTIVE_TICKS = """
    select distinct on (job)
           job, id, greatest(least(fire_time, '9998-12-31 00:00+00'), '0002-01-01 00:00+00') as fire_time,
           case when not ready then greatest(least(run_at, '9998-12-31 00:00+00'), '0002-01-01 00:00+00') end as due
      from bon_scheduler.runs
     where origin = 'schedule' and state in ('queued', 'running', 'retrying')
     order by job, due desc nulls last
"""
# $1 job, $2 payload: jsonb, $3 dedupe key, $4 run at, $5 priority, $6 fire time, $7 origin, $8 asked by,
# $9 caused by.
ENQUEUE = """
    select bon_scheduler.enqueue_run($1, $2, dedupe_key => $3, run_at => $4, priority => $5,
                                 fire_time => $6, origin => $7, asked_by => $8, caused_by => $9)
"""
# $1 job, $2 payloads: jsonb[], $3 dedupe keys: text[], $4 priority: int, $5 asked by, $6 caused by.
ENQUEUE_MANY = "select bon_scheduler.enqueue_many($1, $2, $3, $4, 'run', $5, $6)"
MAKE_OVERTAKEN_READY = "select bon_scheduler.make_overtaken_ready()"
# $1 run, $2 job, $3 payload: jsonb, $4 fire time, $5 asked by, $6 state, $7 started: timestamptz, $8 counts: json,
# $9 error. It has ended already, and nobody ever claims it.
RECORD_DRY_RUN = """
    insert into bon_scheduler.runs
           (id, job, payload, fire_time, origin, asked_by, state, attempt, enqueued_at, started_at, finished_at,
            counts, error, dry_run)
    values ($1, $2, $3, $4, 'person', $5, $6::text::bon_scheduler.run_state, 1, $7, $7, clock_timestamp(), $8, $9,
            true)
"""


@dataclass(frozen=True, slots=True)
class ActiveTick:
    """A tick's run that is queued, running or retrying."""

    run_id: UUID
    fire_time: datetime
    due: datetime | None
    """Not before this instant (UTC, aware); None: now."""


class RefusedRequestError(Exception):
    """The door refuses this run: an unknown job, or a value out of bounds; the message has the remedy."""


class Origin(StrEnum):
    """What asked for a run."""

    SCHEDULE = "schedule"
    PERSON = "person"
    PROGRAM = "program"
    RUN = "run"


class TickVerdict(StrEnum):
    """What became of a fire time; see the SQL function `record_tick`."""

    RECORDED = "recorded"
    PAUSED = "paused"
    MISSED = "missed"
    WAITS = "waits"
    STALE = "stale"


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


@dataclass(frozen=True, slots=True)
class DryRun:
    """A run that only pretended, and has ended."""

    run_id: UUID
    job: str
    payload: Mapping[str, Any]
    fire_time: datetime
    asked_by: str
    state: str
    started_at: datetime
    counts: Mapping[str, int]
    error: str | None


async def register_jobs(
    connection: Connection, jobs: Iterable[AnyJob], *, scheduled: Collection[str] = (), anew: bool = True
) -> None:
    """
    Make these jobs known, so that anybody may ask for them.

    `scheduled` names those with a schedule in force, declared or not: no two runs of such a job work at once. Unless
    `anew`, those that are known already stay as they are: a person's process may know less of schedules.
    """
    ordered = list(jobs)
    await connection.execute(
        REGISTER_JOBS,
        [job.name for job in ordered],
        [job.payload.model_json_schema() for job in ordered],
        [job.retry.attempts for job in ordered],
        [exclusive(job, job.name in scheduled) for job in ordered],
        anew,
        timeout=CALL_TIMEOUT_SECONDS,
    )


def exclusive(job: AnyJob, scheduled: bool) -> Exclusive:
    """Return what of a job must not run together, as declared; with a schedule in force, runs of the job."""
    return Exclusive.JOB if scheduled and job.exclusive is Exclusive.NO else job.exclusive


async def last_ticks(connection: Connection, jobs: Sequence[str]) -> dict[str, datetime]:
    """Return each job's last accounted fire time (UTC)."""
    rows = await connection.fetch(LAST_TICKS, list(jobs), timeout=CALL_TIMEOUT_SECONDS)
    return {row["name"]: row["last_tick"] for row in rows}


async def active_ticks(connection: Connection) -> dict[str, ActiveTick]:
    """Return, by job, its tick that has not ended."""
    rows = await connection.fetch(ACTIVE_TICKS, timeout=CALL_TIMEOUT_SECONDS)
    return {row["job"]: ActiveTick(row["id"], row["fire_time"], row["due"]) for row in rows}


async def record_tick(
    connection: Connection,
    job: str,
    *,
    previous: datetime,
    in_force: datetime | None,
    fire_time: datetime,
    missed: str | None,
) -> TickVerdict:
    """
    Account for the fire time after `previous`, to be run or missed for a reason; see the SQL function.

    `in_force` is the start of the newest period of the schedule history it was planned by.
    """
    row = await connection.fetchrow(
        RECORD_TICK, job, previous, in_force, fire_time, missed, timeout=CALL_TIMEOUT_SECONDS
    )
    if row is None:
        raise LookupError("record_tick always returns one row")
    return TickVerdict(row["verdict"])


async def enqueue(connection: Connection, request: Request) -> UUID | None:
    """Ask for a run; None when its dedupe key is taken. Raises RefusedRequestError."""
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
        raise RefusedRequestError(f"{error.args[0]}. {error.as_dict().get('hint', '')}") from error
    return run_id


async def enqueue_many(
    connection: Connection,
    job: str,
    requests: Iterable[tuple[Mapping[str, Any], str]],
    *,
    priority: int,
    asked_by: str,
    caused_by: UUID,
) -> int:
    """Ask for a run for each (payload, dedupe key), never holding more than BULK; return how many keys were new."""
    new = 0
    remaining = iter(requests)
    while part := list(islice(remaining, BULK)):
        payloads, keys = [payload for payload, _ in part], [key for _, key in part]
        try:
            new += await connection.fetchval(ENQUEUE_MANY, job, payloads, keys, priority, asked_by, caused_by)
        except asyncpg.NoDataFoundError as error:
            known = "It is known once it is in handlers.JOBS and `serve` was started, or: bon-scheduler migrate"
            raise RefusedRequestError(f'bon_scheduler: unknown job "{job}". {known}') from error
    return new


async def make_overtaken_ready(connection: Connection) -> int:
    """End the waits that only a clock which was set back explains; return how many; see the SQL function."""
    return int(await connection.fetchval(MAKE_OVERTAKEN_READY, timeout=CALL_TIMEOUT_SECONDS))


async def record_dry_run(connection: Connection, run: DryRun) -> None:
    """Record a dry run, whole."""
    await connection.execute(
        RECORD_DRY_RUN,
        run.run_id,
        run.job,
        dict(run.payload),
        run.fire_time,
        run.asked_by,
        run.state,
        run.started_at,
        dict(run.counts),
        run.error,
        timeout=CALL_TIMEOUT_SECONDS,
    )
