"""
Who is at work, what a waiting run waits for, and what runs did for one business: read for people.

Changes nothing, and judges nobody: whoever takes over a worker's runs goes by `workers.Watch`. Silence is told here by
the database's clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from bon_scheduler.jobs import Connection
from bon_scheduler.ledger.entries import CALL_TIMEOUT_SECONDS
from bon_scheduler.ledger.history import Row

__all__ = [
    "Heartbeat",
    "Obstacle",
    "heartbeats",
    "held_counts",
    "latest_run",
    "obstacle",
    "open_counts",
    "runs_for_business",
    "stopped_for_all",
]

HEARTBEATS = """
    select host, pid, version, serves, bon_scheduler.shown(seen_at) as seen_at,
           greatest(extract(epoch from clock_timestamp() - seen_at), 0)::float8 as silent_seconds,
           last_word is not null and clock_timestamp() - seen_at <= lease as alive, settings, jobs
      from bon_scheduler.workers w
     order by serves desc, w.seen_at desc, id
"""
# $1 job. The newest that was to run; else the newest. Index: runs_by_job.
LATEST_RUN = """
    select newest.id
      from unnest(enum_range(null::bon_scheduler.run_state)) as s (state)
     cross join lateral (
               select r.id, r.enqueued_at
                 from bon_scheduler.runs r
                where r.job = $1 and r.state = s.state and not r.dry_run
                order by r.enqueued_at desc
                limit 1) as newest
     order by s.state not in ('missed', 'paused') desc, newest.enqueued_at desc
     limit 1
"""
# $1 run. Indexes: runs_pkey, runs_exclusive, attempts_pkey.
OBSTACLE = """
    select r.ready, bon_scheduler.shown(r.run_at) as run_at,
           other.id as behind, a.host as behind_on, bon_scheduler.shown(a.started_at) as behind_since
      from bon_scheduler.runs r
      left join bon_scheduler.runs other
        on other.concurrency_key = r.concurrency_key and other.state = 'running' and other.id <> r.id
      left join bon_scheduler.attempts a on a.run_id = other.id and a.attempt = other.attempt
     where r.id = $1 and r.state in ('queued', 'retrying')
     limit 1
"""
# $1 job. Index: runs_by_job.
OPEN_COUNTS = """
    select count(*) filter (where state <> 'running') as waiting, count(*) filter (where state = 'running') as running
      from bon_scheduler.runs
     where job = $1 and state in ('queued', 'retrying', 'running')
"""
# Index: runs_by_job.
HELD_COUNTS = """
    select j.name as job, counted.dead, counted.held
      from bon_scheduler.jobs j
     cross join lateral (
               select count(*) filter (where r.state = 'dead') as dead, count(*) filter (where r.state = 'held') as held
                 from bon_scheduler.runs r
                where r.job = j.name and r.state in ('dead', 'held') and not r.dry_run) as counted
     where counted.dead + counted.held > 0
     order by j.name
"""
# $1 business: uuid, $2 since: timestamptz, $3 job or null, $4 state or null, $5 limit: int. Runs that did something for
# it or were asked for it. Indexes: runs_newest, business_outcomes_pkey, deliveries_run.
RUNS_FOR_BUSINESS = """
    select r.id as run_id, r.job, bon_scheduler.shown(coalesce(r.fire_time, r.asked_for, r.enqueued_at)) as at,
           r.state::text as state, o.outcome,
           coalesce(o.counts, case when r.business = $1::text then r.counts::jsonb end) as counts,
           coalesce(o.error, r.error, r.reason) as error,
           array(select d.id from bon_scheduler.deliveries d
                  where d.run_id = r.id and d.business_id = $1 order by d.intended_at, d.id) as delivery_ids,
           array(select d.state from bon_scheduler.deliveries d
                  where d.run_id = r.id and d.business_id = $1 order by d.intended_at, d.id) as letters
      from bon_scheduler.runs r
      left join bon_scheduler.business_outcomes o on o.run_id = r.id and o.business_id = $1
     where r.enqueued_at >= $2
       and ($3::text is null or r.job = $3)
       and ($4::text is null or r.state = $4::bon_scheduler.run_state)
       and not r.dry_run
       and (o.run_id is not null
            or r.business = $1::text
            or exists (select from bon_scheduler.deliveries d where d.run_id = r.id and d.business_id = $1))
     order by r.enqueued_at desc, r.id
     limit $5
"""
# $1 since: timestamptz, $2 job or null, $3 state or null. Of each job the newest run for all businesses that is dead or
# held, so that it did nothing for any, and how many there are. Index: runs_by_job.
STOPPED_FOR_ALL = """
    select newest.id as run_id, j.name as job, bon_scheduler.shown(newest.at) as at, s.state::text as state,
           newest.error, newest.alike
      from bon_scheduler.jobs j
     cross join unnest(array['dead', 'held']::bon_scheduler.run_state[]) as s (state)
     cross join lateral (
               select r.id, r.enqueued_at, coalesce(r.fire_time, r.asked_for, r.enqueued_at) as at,
                      coalesce(r.error, r.reason) as error, count(*) over () as alike
                 from bon_scheduler.runs r
                where r.job = j.name and r.state = s.state and r.enqueued_at >= $1
                  and r.business is null and not r.dry_run
                order by r.enqueued_at desc
                limit 1) as newest
     where ($2::text is null or j.name = $2)
       and ($3::text is null or s.state::text = $3)
     order by newest.enqueued_at desc, newest.id
"""
LOOK_SECONDS = 60.0
"""What a person asks of weeks may take longer than what a worker asks."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last heartbeat of a worker that has not left."""

    host: str
    pid: int
    version: str
    serves: bool
    seen_at: datetime | None
    silent: timedelta
    alive: bool
    """Whether it was heard within its lease."""
    settings: Mapping[str, str]
    """Those of its settings that anybody may read, by name."""
    jobs: Sequence[str] | None
    """Those it takes runs of; None: its version does not say."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What may keep a waiting run from being begun."""

    ready: bool
    """Whether its instant has come."""
    run_at: datetime | None
    behind: UUID | None
    """The run that excludes it."""
    behind_on: str | None
    behind_since: datetime | None


async def heartbeats(connection: Connection) -> list[Heartbeat]:
    """Return the last heartbeat of each worker, those that serve first, the latest first."""
    rows = await connection.fetch(HEARTBEATS, timeout=CALL_TIMEOUT_SECONDS)
    return [
        Heartbeat(
            row["host"],
            row["pid"],
            row["version"],
            row["serves"],
            row["seen_at"],
            timedelta(seconds=min(row["silent_seconds"], timedelta.max.total_seconds() // 2)),
            row["alive"],
            row["settings"] or {},
            row["jobs"],
        )
        for row in rows
    ]


async def latest_run(connection: Connection, job: str) -> UUID | None:
    """Return the job's last run, or None."""
    found: UUID | None = await connection.fetchval(LATEST_RUN, job, timeout=CALL_TIMEOUT_SECONDS)
    return found


async def obstacle(connection: Connection, run_id: UUID) -> Obstacle | None:
    """Return what keeps a run that waits; None: it does not wait."""
    row = await connection.fetchrow(OBSTACLE, run_id, timeout=CALL_TIMEOUT_SECONDS)
    return None if row is None else Obstacle(*row)


async def open_counts(connection: Connection, job: str) -> tuple[int, int]:
    """Return how many runs of the job wait, and how many run."""
    row = await connection.fetchrow(OPEN_COUNTS, job, timeout=LOOK_SECONDS)
    return (0, 0) if row is None else (row["waiting"], row["running"])


async def held_counts(connection: Connection) -> list[Row]:
    """Return, by job, how many runs are dead and how many are held, of jobs that have any."""
    return [dict(row) for row in await connection.fetch(HELD_COUNTS, timeout=CALL_TIMEOUT_SECONDS)]


async def runs_for_business(
    connection: Connection, business_id: UUID, *, since: datetime, job: str | None, state: str | None, limit: int
) -> list[dict[str, Any]]:
    """Return what runs did for a business, letters included, the newest first."""
    arguments = business_id, since, job, state, limit
    return [dict(row) for row in await connection.fetch(RUNS_FOR_BUSINESS, *arguments, timeout=LOOK_SECONDS)]


async def stopped_for_all(
    connection: Connection, *, since: datetime, job: str | None, state: str | None
) -> list[dict[str, Any]]:
    """Return of each job the newest dead and the newest held run that is for all businesses, and how many are alike."""
    return [dict(row) for row in await connection.fetch(STOPPED_FOR_ALL, since, job, state, timeout=LOOK_SECONDS)]
