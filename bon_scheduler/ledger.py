"""
The ledger of runs: every run is one row from the moment it is asked for until it is pruned.

Asking (`enqueue`), ticks (`record_tick`) and delivery (`redeliver`, `orphans`) are here; what an
attempt does to its run is in `attempts`, what a person does to it in `revise`. No other module writes
these tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import islice
from typing import Any
from uuid import UUID

import asyncpg

from bon_scheduler.jobs import AnyJob, Connection

__all__ = [
    "BULK",
    "CALL_TIMEOUT_SECONDS",
    "DryRun",
    "Origin",
    "Request",
    "TickVerdict",
    "UnknownJobError",
    "deliver",
    "enqueue",
    "enqueue_many",
    "last_ticks",
    "orphans",
    "record_dry_run",
    "record_tick",
    "redeliver",
    "register_jobs",
]

CALL_TIMEOUT_SECONDS = 10
BULK = 1000
"""Rows handed over in one statement."""

# $1 names: text[], $2 payload schemas: jsonb[].
REGISTER_JOBS = """
    insert into bon_scheduler.jobs as j (name, payload_schema)
    select name, payload_schema
      from unnest($1::text[], $2::jsonb[]) as t (name, payload_schema)
     order by name
    on conflict (name) do update
       set payload_schema = excluded.payload_schema
     where j.payload_schema is distinct from excluded.payload_schema
"""
# $1 names: text[].
LAST_TICKS = """
    select name, last_tick
      from bon_scheduler.jobs
     where name = any ($1) and last_tick is not null
"""
# $1 job, $2 its last tick, $3 since when its schedule is in force, $4 fire time: timestamptz, $5 why it is
# missed: text or null. One statement: the job's last tick moves forwards, the run is recorded and it is asked
# for, or nothing is.
RECORD_TICK = "select verdict, run_id from bon_scheduler.record_tick($1, $2, $3, $4, $5)"
# $1 job, $2 payload: jsonb, $3 dedupe key, $4 run at, $5 priority, $6 fire time, $7 origin, $8 asked by,
# $9 caused by.
ENQUEUE = """
    select bon_scheduler.enqueue($1, $2, dedupe_key => $3, run_at => $4, priority => $5,
                                 fire_time => $6, origin => $7, asked_by => $8, caused_by => $9)
"""
# $1 job, $2 payloads: jsonb[], $3 dedupe keys: text[], $4 priority: int, $5 asked by, $6 caused by.
ENQUEUE_MANY = "select bon_scheduler.enqueue_many($1, $2, $3, $4, 'run', $5, $6)"
DELIVER = "select bon_scheduler.deliver($1)"
# $1 run, $2 lease: interval or null.
REDELIVER = "select bon_scheduler.redeliver($1, $2)"
# $1 job names: text[]. Runs that are due, that no living worker holds and that no queue row would bring to one: a
# row that is put off for longer than a busy job does was so before the clock was set back. Indexes:
# runs_unfinished, pgqueuer_unique_dedupe_key (by no instant, which would read the whole queue for each run).
ORPHANS = """
    select r.id, r.job, r.state::text as state
      from bon_scheduler.runs r
     where r.state in ('queued', 'running', 'retrying')
       and r.job = any ($1)
       and bon_scheduler.is_due(r)
       and (r.state <> 'running' or not bon_scheduler.is_alive(r.worker))
       and not exists (select from bon_scheduler.pgqueuer q
                        where q.dedupe_key = r.id || '/' || r.attempt and q.status = 'queued'
                          and q.execute_after - interval '1 minute' <= now())
     order by r.run_at
     limit 1000
"""


# $1 run, $2 job, $3 payload: jsonb, $4 fire time, $5 asked by, $6 state, $7 started: timestamptz, $8 counts: json,
# $9 error. It has ended already, and no queue row ever brings it to anybody.
RECORD_DRY_RUN = """
    insert into bon_scheduler.runs
           (id, job, payload, fire_time, origin, asked_by, state, attempt, enqueued_at, started_at, finished_at,
            counts, error, dry_run)
    values ($1, $2, $3, $4, 'person', $5, $6, 1, $7, $7, clock_timestamp(), $8, $9, true)
"""


class UnknownJobError(Exception):
    """No job of that name is registered in this database."""


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


async def register_jobs(connection: Connection, jobs: Iterable[AnyJob]) -> None:
    """Make these jobs' names known, so that anybody may ask for them."""
    ordered = list(jobs)
    await connection.execute(
        REGISTER_JOBS,
        [job.name for job in ordered],
        [job.payload.model_json_schema() for job in ordered],
        timeout=CALL_TIMEOUT_SECONDS,
    )


async def last_ticks(connection: Connection, jobs: Sequence[str]) -> dict[str, datetime]:
    """Return each job's last accounted fire time (UTC)."""
    rows = await connection.fetch(LAST_TICKS, list(jobs), timeout=CALL_TIMEOUT_SECONDS)
    return {row["name"]: row["last_tick"] for row in rows}


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
    priority: int,
    asked_by: str,
    caused_by: UUID,
) -> int:
    """Ask for a run for each (payload, dedupe key), never holding more than BULK; return how many keys were new."""
    new = 0
    remaining = iter(requests)
    while part := list(islice(remaining, BULK)):
        payloads, keys = [payload for payload, _ in part], [key for _, key in part]
        new += await connection.fetchval(ENQUEUE_MANY, job, payloads, keys, priority, asked_by, caused_by)
    return new


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


async def deliver(connection: Connection, run_id: UUID) -> bool:
    """Make a queue row for a run that has not ended; False when one is there already."""
    return bool(await connection.fetchval(DELIVER, run_id, timeout=CALL_TIMEOUT_SECONDS))


async def redeliver(connection: Connection, run_id: UUID, lease: timedelta | None) -> bool:
    """Do the same for an orphan: a queue row that was picked and silent for longer than `lease`, if any, makes room."""
    return bool(await connection.fetchval(REDELIVER, run_id, lease, timeout=CALL_TIMEOUT_SECONDS))


async def orphans(connection: Connection, jobs: Sequence[str]) -> list[tuple[UUID, str]]:
    """Return (run, job) of these jobs' runs that nobody works on and no queue row would bring."""
    rows = await connection.fetch(ORPHANS, list(jobs), timeout=CALL_TIMEOUT_SECONDS)
    return [(row["id"], row["job"]) for row in rows]
