"""
Reading the ledger: what ran, what it caused, what waits. Changes nothing.

Shapes are plain dictionaries, ready for JSON: the names are `interface.md`'s, instants are
UTC and aware, identifiers are UUIDs.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias
from uuid import UUID

from bon_scheduler.jobs import Connection
from bon_scheduler.ledger.entries import CALL_TIMEOUT_SECONDS

__all__ = [
    "MOST_COUNTED",
    "OPEN_STATES",
    "Queue",
    "Row",
    "actions_on",
    "attempts_of",
    "businesses_of",
    "caused_by",
    "count_held",
    "descendants",
    "find_run",
    "holder_of_key",
    "job_overview",
    "last_successes",
    "list_runs",
    "outcome_totals",
    "read_queue",
    "unfinished",
]

Row: TypeAlias = dict[str, Any]
OPEN_STATES = frozenset({"queued", "running", "retrying"})
MOST_COUNTED = 10_000
"""A longer queue is told as one of so many: what counts it reads no more, however many wait."""

# $1 since: timestamptz or null, $2 limit: int. Index: runs_newest.
LIST_RUNS = """
    select r.id as run_id, r.job, bon_scheduler.shown(r.fire_time) as fire_time, r.state::text as state, r.attempt,
           r.origin, bon_scheduler.shown(r.enqueued_at) as enqueued_at, bon_scheduler.shown(r.started_at) as started_at,
           bon_scheduler.shown(r.finished_at) as finished_at, r.counts, r.error, r.dry_run
      from bon_scheduler.runs r
     where r.enqueued_at >= coalesce($1, timestamptz '-infinity')
     order by r.enqueued_at desc, r.id
     limit $2
"""
# $1 since: timestamptz or null, $2 limit: int, $3 job or null, $4 state or null. Index: runs_by_job. The newest of each
# job and state that is asked for, and of them the newest: a state that is rare is found as fast as another.
LIST_CERTAIN_RUNS = """
    select r.id as run_id, r.job, bon_scheduler.shown(r.fire_time) as fire_time, r.state::text as state, r.attempt,
           r.origin, bon_scheduler.shown(r.enqueued_at) as enqueued_at, bon_scheduler.shown(r.started_at) as started_at,
           bon_scheduler.shown(r.finished_at) as finished_at, r.counts, r.error, r.dry_run
      from bon_scheduler.jobs j
     cross join unnest(enum_range(null::bon_scheduler.run_state)) as s (state)
     cross join lateral (
               select *
                 from bon_scheduler.runs n
                where n.job = j.name and n.state = s.state and n.enqueued_at >= coalesce($1, timestamptz '-infinity')
                order by n.enqueued_at desc, n.id
                limit $2
           ) r
     where ($3::text is null or j.name = $3)
       and ($4::text is null or s.state::text = $4)
     order by r.enqueued_at desc, r.id
     limit $2
"""
# $1 run. Index: runs_pkey.
FIND_RUN = """
    select id as run_id, job, bon_scheduler.shown(fire_time) as fire_time, state::text as state, attempt, origin,
           asked_by, reason, payload, dedupe_key, bon_scheduler.shown(run_at) as run_at,
           bon_scheduler.shown(enqueued_at) as enqueued_at, bon_scheduler.shown(started_at) as started_at,
           bon_scheduler.shown(finished_at) as finished_at, counts, error, caused_by, dry_run
      from bon_scheduler.runs
     where id = $1
"""
# $1 run. Index: attempts_pkey.
ATTEMPTS_OF = """
    select attempt, host, started_at, ended_at, outcome, error
      from bon_scheduler.attempts
     where run_id = $1
     order by attempt
"""
# $1 run. Indexes: business_outcomes_pkey, runs_pkey. `failed_before`: it failed, then a person retried the run,
# and nothing was said of it since.
BUSINESSES_OF = """
    select o.business_id,
           case when o.outcome = 'failed' and o.attempt <= r.retried_after
                then 'failed_before' else o.outcome end as outcome,
           o.counts, o.error
      from bon_scheduler.business_outcomes o
      join bon_scheduler.runs r on r.id = o.run_id
     where o.run_id = $1
     order by o.outcome = 'failed' desc, o.attempt <= r.retried_after, o.business_id
"""
# $1 target: the text of a run's id. Index: operator_actions_target.
ACTIONS_ON = """
    select at, by, action, reason
      from bon_scheduler.operator_actions
     where target = $1
     order by id
"""
# $1 run. Indexes: business_outcomes_pkey, runs_pkey.
OUTCOME_TOTALS = """
    select count(*) as touched,
           count(*) filter (where o.outcome = 'failed' and o.attempt > r.retried_after) as failed
      from bon_scheduler.business_outcomes o
      join bon_scheduler.runs r on r.id = o.run_id
     where o.run_id = $1
"""
# $1 run. Index: runs_caused_by.
CAUSED_BY = """
    select id as run_id, job, state::text as state, counts
      from bon_scheduler.runs
     where caused_by = $1
     order by enqueued_at, id
"""
# $1 run. Index: runs_caused_by.
DESCENDANTS = """
    with recursive family as (
        select id, job, state, counts, coalesce(error, reason) as error, caused_by, enqueued_at
          from bon_scheduler.runs
         where caused_by = $1
        union all
        select r.id, r.job, r.state, r.counts, coalesce(r.error, r.reason), r.caused_by, r.enqueued_at
          from family f
          join bon_scheduler.runs r on r.caused_by = f.id
    )
    select id as run_id, job, state::text as state, counts, error, caused_by
      from family
     order by enqueued_at, id
"""
# $1 runs: uuid[], $2 jobs: text[]. Index: runs_caused_by. What they caused that has not ended, and what
# those caused: nothing is read of the many that have ended.
UNFINISHED = """
    with recursive family as (
        select id, job, state, ready, run_at, enqueued_at
          from bon_scheduler.runs
         where caused_by = any ($1)
           and state in ('queued', 'running', 'retrying')
        union all
        select r.id, r.job, r.state, r.ready, r.run_at, r.enqueued_at
          from family f
          join bon_scheduler.runs r on r.caused_by = f.id and r.state in ('queued', 'running', 'retrying')
    )
    select id as run_id, job, state::text as state,
           case when ready then 0
                else extract(epoch from least(run_at, now() + interval '1 day') - now()) end::float8 as wait_seconds
      from family
     where job = any ($2)
     order by enqueued_at, id
"""
# $1 job, $2 dedupe key. Index: runs_dedupe_key.
HOLDER_OF_KEY = """
    select id as run_id, state::text as state
      from bon_scheduler.runs
     where job = $1 and dedupe_key = $2
"""
# $1 how many runs of a kind are counted at most: int. Index: runs_by_job. A run that
# waits is not the last one that ran.
JOB_OVERVIEW = """
    select j.name, bon_scheduler.shown(j.last_tick) as last_tick,
           (select count(*)
              from (select from bon_scheduler.runs r
                     where r.job = j.name and r.state in ('queued', 'running', 'retrying')
                     limit $1) as counted) as waiting,
           (select count(*)
              from (select from bon_scheduler.runs r
                     where r.job = j.name and r.state = 'dead' and not r.dry_run
                     limit $1) as counted) as dead,
           last.state::text as last_state, bon_scheduler.shown(last.finished_at) as last_finished_at,
           last.id as last_run_id
      from bon_scheduler.jobs j
      left join lateral (
               select newest.*
                 from unnest(enum_range(null::bon_scheduler.run_state)) as s (state)
                cross join lateral (
                          select r.id, r.state, r.finished_at, r.enqueued_at
                            from bon_scheduler.runs r
                           where r.job = j.name and r.state = s.state and r.attempt > 0 and not r.dry_run
                           order by r.enqueued_at desc
                           limit 1) newest
                where s.state <> 'queued'
                order by newest.enqueued_at desc
                limit 1) last on true
     order by j.name
"""
# No parameters. Of a job's newest hundred runs of either state; one that has not done what it is for has an error.
# Index: runs_by_job.
LAST_SUCCESSES = """
    select j.name, max(recent.finished_at) as finished_at
      from bon_scheduler.jobs j
     cross join unnest(array['succeeded', 'partial']::bon_scheduler.run_state[]) as s (state)
     cross join lateral (
               select r.finished_at, r.error, r.dry_run
                 from bon_scheduler.runs r
                where r.job = j.name and r.state = s.state
                order by r.enqueued_at desc
                limit 100) as recent
     where recent.error is null and recent.finished_at is not null and not recent.dry_run
     group by j.name
"""
# No parameters. Index: runs_by_job.
COUNT_HELD = """
    select j.name as job, count(*) as runs
      from bon_scheduler.jobs j
      join bon_scheduler.runs r on r.job = j.name and r.state = 'held'
     group by j.name
     order by j.name
"""
# $1 how many runs of a kind are read at most: int. Indexes: runs_oldest, runs_timed, runs_held, runs_by_job.
READ_QUEUE = "select job, state::text as state, runs, due_seconds from bon_scheduler.read_queue($1)"


async def _rows(connection: Connection, query: str, *arguments: object) -> list[Row]:
    return [dict(row) for row in await connection.fetch(query, *arguments, timeout=CALL_TIMEOUT_SECONDS)]


async def list_runs(
    connection: Connection, *, job: str | None, state: str | None, since: datetime | None, limit: int
) -> list[Row]:
    """Return runs, newest first."""
    if job is None and state is None:
        return await _rows(connection, LIST_RUNS, since, limit)
    return await _rows(connection, LIST_CERTAIN_RUNS, since, limit, job, state)


async def find_run(connection: Connection, run_id: UUID) -> Row | None:
    """Return one run with all that is known of it, or None."""
    found = await _rows(connection, FIND_RUN, run_id)
    return found[0] if found else None


async def attempts_of(connection: Connection, run_id: UUID) -> list[Row]:
    """Return the run's attempts, first to last."""
    return await _rows(connection, ATTEMPTS_OF, run_id)


async def businesses_of(connection: Connection, run_id: UUID) -> list[Row]:
    """Return what the run did for each business, failures first."""
    return await _rows(connection, BUSINESSES_OF, run_id)


async def actions_on(connection: Connection, run_id: UUID) -> list[Row]:
    """Return what operators did to the run, first to last."""
    return await _rows(connection, ACTIONS_ON, str(run_id))


async def outcome_totals(connection: Connection, run_id: UUID) -> Row:
    """Return how many businesses the run touched, and how many of them failed."""
    return (await _rows(connection, OUTCOME_TOTALS, run_id))[0]


async def caused_by(connection: Connection, run_id: UUID) -> list[Row]:
    """Return the runs this run asked for."""
    return await _rows(connection, CAUSED_BY, run_id)


async def descendants(connection: Connection, run_id: UUID) -> list[Row]:
    """Return the runs this run caused, and theirs. It reads them all: to watch them, ask for `unfinished`."""
    return await _rows(connection, DESCENDANTS, run_id)


async def unfinished(connection: Connection, causes: Collection[UUID], jobs: Collection[str]) -> list[Row]:
    """
    Return the runs of these jobs that have not ended, with the seconds until each is due.

    They are what these runs caused, and what that caused while it has not ended itself.
    """
    return await _rows(connection, UNFINISHED, list(causes), list(jobs))


async def holder_of_key(connection: Connection, job: str, dedupe_key: str) -> Row | None:
    """Return the run that holds a dedupe key, or None."""
    found = await _rows(connection, HOLDER_OF_KEY, job, dedupe_key)
    return found[0] if found else None


async def last_successes(connection: Connection) -> dict[str, datetime]:
    """Return when each job last did what it is for (UTC, aware), on whichever replica."""
    rows = await connection.fetch(LAST_SUCCESSES, timeout=CALL_TIMEOUT_SECONDS)
    return {row["name"]: row["finished_at"] for row in rows}


async def count_held(connection: Connection) -> dict[str, int]:
    """Return how many runs the brake holds, by job."""
    rows = await connection.fetch(COUNT_HELD, timeout=CALL_TIMEOUT_SECONDS)
    return {row["job"]: row["runs"] for row in rows}


async def job_overview(connection: Connection) -> list[Row]:
    """Return each known job with its last run, and how many runs wait or are dead."""
    return await _rows(connection, JOB_OVERVIEW, MOST_COUNTED)


@dataclass(frozen=True, slots=True)
class Queue:
    """What has not ended, or waits for a person."""

    depths: Mapping[tuple[str, str], int]
    """How many runs there are, by (job, state)."""
    ages: Mapping[str, float]
    """By job, for how many seconds the run has been due that waits longest."""


async def read_queue(connection: Connection) -> Queue:
    """Read the queue as it is now; of a long one no more than `MOST_COUNTED` runs of each job and kind."""
    rows = await _rows(connection, READ_QUEUE, MOST_COUNTED)
    ages: dict[str, float] = {}
    for row in rows:
        if row["due_seconds"] is not None:
            ages[row["job"]] = max(ages.get(row["job"], 0.0), row["due_seconds"])
    return Queue({(row["job"], row["state"]): row["runs"] for row in rows}, ages)
