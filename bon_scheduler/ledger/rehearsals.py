"""
What rehearsals say of runs to come, and what there was to do when these came.

Four rows a rehearsal, deleted with its run. The newest of each job is the one that counts.
"""

from collections.abc import Sequence
from uuid import UUID

from bon_scheduler.jobs import Connection, Rehearsed
from bon_scheduler.ledger.entries import CALL_TIMEOUT_SECONDS
from bon_scheduler.ledger.history import Row

__all__ = ["compare_with_rehearsal", "keep_rehearsal", "rehearsals_of", "would_hold"]

# $1 run, $2 jobs: text[], $3 fire times: timestamptz[], $4 candidates: bigint[], $5 of all: bigint[], $6 usual:
# bigint[], $7 why each would be held: text[]. Another attempt at the same run says it anew.
KEEP = """
    insert into bon_scheduler.rehearsals (run_id, job, fire_time, candidates, of_all, usual, would_hold)
    select $1, r.*
      from unnest($2::text[], $3::timestamptz[], $4::bigint[], $5::bigint[], $6::bigint[], $7::text[])
           as r (job, fire_time, candidates, of_all, usual, would_hold)
    on conflict (run_id, job) do update
       set fire_time = excluded.fire_time, candidates = excluded.candidates, of_all = excluded.of_all,
           usual = excluded.usual, would_hold = excluded.would_hold, rehearsed_at = clock_timestamp()
"""
# $1 job, $2 run, $3 candidates: bigint. Only the first run after the fire time that was rehearsed; its other attempts
# find less to do, and change nothing. Index: rehearsals_newest.
COMPARE = """
    update bon_scheduler.rehearsals r
       set compared_with = $2, found = $3
      from (select run_id, job
              from bon_scheduler.rehearsals
             where job = $1
             order by rehearsed_at desc
             limit 1) as newest
     where r.run_id = newest.run_id
       and r.job = newest.job
       and r.rehearsed_at > clock_timestamp() - interval '24 hours'
       and r.fire_time <= clock_timestamp() + interval '1 minute'
       and r.compared_with is null
    returning r.candidates
"""
# $1 run: of the rehearsal, or one that was rehearsed. Index: none for the second; there are few rows.
OF_RUN = """
    select run_id as rehearsal, job, fire_time, candidates, of_all as "of", usual,
           case when would_hold is null then 'goes' else 'would be held' end as verdict, would_hold as reason,
           rehearsed_at, compared_with, found
      from bon_scheduler.rehearsals
     where run_id = $1 or compared_with = $1
     order by fire_time, job
"""
# No parameters. Of each job that was ever rehearsed, whether its next run would be held. Index: rehearsals_newest.
WOULD_HOLD = """
    select j.name as job,
           coalesce((select r.would_hold is not null and r.compared_with is null
                            and r.rehearsed_at > clock_timestamp() - interval '24 hours'
                       from bon_scheduler.rehearsals r
                      where r.job = j.name
                      order by r.rehearsed_at desc
                      limit 1), false) as would_hold
      from bon_scheduler.jobs j
     where exists (select from bon_scheduler.rehearsals r where r.job = j.name)
"""


async def keep_rehearsal(connection: Connection, run_id: UUID, rehearsed: Sequence[Rehearsed]) -> None:
    """Keep what a rehearsal says of each job's next run."""
    await connection.execute(
        KEEP,
        run_id,
        [each.job for each in rehearsed],
        [each.fire_time for each in rehearsed],
        [each.candidates for each in rehearsed],
        [each.of_all for each in rehearsed],
        [each.usual for each in rehearsed],
        [each.would_hold for each in rehearsed],
        timeout=CALL_TIMEOUT_SECONDS,
    )


async def compare_with_rehearsal(connection: Connection, job: str, run_id: UUID, candidates: int) -> int | None:
    """
    Keep what a run has to do beside what was rehearsed, and return the latter.

    None where nothing was rehearsed within 24 hours, its fire time is to come, or another run was compared with it.
    """
    rehearsed: int | None = await connection.fetchval(COMPARE, job, run_id, candidates, timeout=CALL_TIMEOUT_SECONDS)
    return rehearsed


async def rehearsals_of(connection: Connection, run_id: UUID) -> list[Row]:
    """Return what a rehearsal said, in the order in which the jobs fire; of another run, what was said of it."""
    return [dict(row) for row in await connection.fetch(OF_RUN, run_id, timeout=CALL_TIMEOUT_SECONDS)]


async def would_hold(connection: Connection) -> dict[str, bool]:
    """Return, by job that was rehearsed, whether the brake would trip at its next run."""
    rows = await connection.fetch(WOULD_HOLD, timeout=CALL_TIMEOUT_SECONDS)
    return {row["job"]: row["would_hold"] for row in rows}
