"""
What is usual for a job, runs that the brake holds, and which of BON's rows each run has changed.

Sizes: a changed row takes 34 bytes, a deleted draft 43, and each 36 in the index by business.
"""

from typing import Any
from uuid import UUID

from bon_scheduler.jobs import BusinessOutcome, Connection, Counts, LostRunError, Usual
from bon_scheduler.ledger.attempts import RunRef
from bon_scheduler.ledger.entries import CALL_TIMEOUT_SECONDS

__all__ = [
    "Usual",
    "count_changed",
    "end_held",
    "hold",
    "record_changed",
    "rows_of_business",
    "rows_of_run",
    "usual",
]

LOOKED_AT = 14
"""Runs that say what is usual."""

# $1 job, $2 name of a count, $3 how many runs. Index: runs_by_job.
USUAL = """
    select count(*) as runs, percentile_cont(0.5) within group (order by number) as median
      from (select r.number
              from unnest(array['succeeded', 'partial']::bon_scheduler.run_state[]) as s (state)
             cross join lateral (select (n.counts ->> $2)::bigint as number, n.enqueued_at
                                   from bon_scheduler.runs n
                                  where n.job = $1
                                    and n.state = s.state
                                    and not n.dry_run
                                    and n.counts ->> $2 is not null
                                  order by n.enqueued_at desc
                                  limit $3) as r
             order by r.enqueued_at desc
             limit $3) as recent
"""
# $1 run, $2 attempt, $3 worker, $4 reason, $5 figures: json. Indexes: runs_pkey, attempts_pkey.
HOLD = """
    with held as (
        update bon_scheduler.runs
           set state = 'held', reason = $4, error = null, counts = $5, worker = null
         where id = $1 and attempt = $2 and worker = $3 and state = 'running'
        returning id, attempt
    ), ended as (
        update bon_scheduler.attempts a
           set ended_at = clock_timestamp(), outcome = 'held', error = $4
          from held h
         where a.run_id = h.id and a.attempt = h.attempt
    )
    select id from held
"""
# $1 run, $2 why it goes on no more. Index: runs_pkey.
END_HELD = """
    update bon_scheduler.runs
       set state = 'partial', error = $2, reason = null, finished_at = clock_timestamp()
     where id = $1 and state = 'held'
    returning true
"""
# $1 run. Of all its attempts: what one of them did not come to record, the next one does. Indexes:
# changed_rows_pkey, business_outcomes_pkey, runs_pkey.
RECORD_CHANGED = """
    with changed as (
        select r.business_id, c.change, r.items
          from bon_scheduler.changed_rows c
         cross join lateral unnest(c.businesses, c.items) as r (business_id, items)
         where c.run_id = $1
    ), counted as (
        select business_id, change as name, count(*) as number from changed group by business_id, change
         union all
        select business_id, 'items', sum(items) from changed where items is not null group by business_id
    )
    insert into bon_scheduler.business_outcomes as o (run_id, business_id, outcome, counts, attempt)
    select $1, business_id, 'done', jsonb_object_agg(name, number),
           (select greatest(r.attempt, 1) from bon_scheduler.runs r where r.id = $1)
      from counted
     group by business_id
     order by business_id
        on conflict (run_id, business_id) do update
       set outcome = excluded.outcome, error = null, attempt = excluded.attempt,
           counts = o.counts || excluded.counts
"""
# $1 run. Index: changed_rows_pkey.
COUNT_CHANGED = """
    select r.business_id, c.change, count(*) as rows, sum(r.items)::bigint as items
      from bon_scheduler.changed_rows c
     cross join lateral unnest(c.businesses, c.items) as r (business_id, items)
     where c.run_id = $1
     group by r.business_id, c.change
"""
# $1 run. Index: changed_rows_pkey.
ROWS_OF_RUN = """
    select c.run_id, c.change, r.id, r.business_id, r.items, r.updated, c.recorded_at
      from bon_scheduler.changed_rows c
     cross join lateral unnest(c.ids, c.businesses, c.items, c.updated) as r (id, business_id, items, updated)
     where c.run_id = $1
     order by c.number, r.id
"""
# $1 business. Index: changed_rows_businesses.
ROWS_OF_BUSINESS = """
    select c.run_id, c.change, r.id, r.business_id, r.items, r.updated, c.recorded_at
      from bon_scheduler.changed_rows c
     cross join lateral unnest(c.ids, c.businesses, c.items, c.updated) as r (id, business_id, items, updated)
     where c.businesses @> array[$1::uuid]
       and r.business_id = $1
     order by c.recorded_at, r.id
"""


async def usual(connection: Connection, job: str, count: str) -> Usual:
    """Return the median of a count over the job's last runs that ended well."""
    row = await connection.fetchrow(USUAL, job, count, LOOKED_AT, timeout=CALL_TIMEOUT_SECONDS)
    if row is None:
        raise LookupError("an aggregate always returns one row")
    return Usual(row["runs"], row["median"])


async def hold(connection: Connection, ref: RunRef, *, reason: str, figures: Counts) -> str:
    """End the attempt, and have the run wait for a person; return its state. Raises LostRunError."""
    found = await connection.fetchval(
        HOLD, ref.run_id, ref.attempt, ref.worker, reason, dict(figures), timeout=CALL_TIMEOUT_SECONDS
    )
    if found is None:
        raise LostRunError(f"attempt {ref.attempt} no longer owns run {ref.run_id}")
    return "held"


async def end_held(connection: Connection, run_id: UUID, why: str) -> bool:
    """End a run that is held, because there is nothing left for a person to decide; False where it is not held."""
    return bool(await connection.fetchval(END_HELD, run_id, why, timeout=CALL_TIMEOUT_SECONDS))


async def record_changed(connection: Connection, run_id: UUID) -> None:
    """Record for each business how many of its rows a run has changed, in all its attempts."""
    await connection.execute(RECORD_CHANGED, run_id)


async def count_changed(connection: Connection, run_id: UUID) -> list[BusinessOutcome]:
    """Return for each business, and each kind of change, how many of its rows a run has changed."""
    return [
        BusinessOutcome(
            row["business_id"],
            counts={row["change"]: row["rows"]} | ({} if row["items"] is None else {"items": row["items"]}),
        )
        for row in await connection.fetch(COUNT_CHANGED, run_id)
    ]


async def rows_of_run(connection: Connection, run_id: UUID) -> list[dict[str, Any]]:
    """Return each row that a run has changed, in order."""
    return [dict(row) for row in await connection.fetch(ROWS_OF_RUN, run_id, timeout=CALL_TIMEOUT_SECONDS)]


async def rows_of_business(connection: Connection, business_id: UUID) -> list[dict[str, Any]]:
    """Return each row of a business that any run has changed, the oldest first."""
    return [dict(row) for row in await connection.fetch(ROWS_OF_BUSINESS, business_id, timeout=CALL_TIMEOUT_SECONDS)]
