"""
One attempt's hold on its run: claim, fence, finish, fail, give back.

It must survive a worker that dies, freezes or is presumed dead at any statement. So a run is
changed only by the attempt that owns it (`id`, `attempt`, `worker` and `running` must still
match), and an attempt that finds no such row has lost it and changes nothing.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from bon_scheduler.jobs import BusinessOutcome, Connection, Counts, LostRunError
from bon_scheduler.ledger import BULK, CALL_TIMEOUT_SECONDS, Origin, deliver

__all__ = [
    "Claim",
    "RunRef",
    "Verdict",
    "claim",
    "fail",
    "fence",
    "finish",
    "forsake",
    "give_back",
    "held_by",
    "lose",
    "lost_by",
    "record_outcomes",
]

# $1 run, $2 worker, $3 host, $4 attempts allowed: int, $5 exclusive: boolean.
CLAIM = """
    select c.verdict, c.attempt, c.holder_host, c.holder_since, c.holder_silent, (c.run).job, (c.run).fire_time,
           (c.run).enqueued_at, (c.run).payload, (c.run).origin, (c.run).given_back
      from bon_scheduler.claim($1, $2, $3, $4, $5) c
"""
# $1 run, $2 attempt, $3 worker, $4 whether this transaction has ended the run (FINISH). Locks `for share`: claims
# exclude that, while the fences of one run's transactions do not exclude each other.
FENCE = """
    select state::text
      from bon_scheduler.runs
     where id = $1 and attempt = $2 and worker = $3
       and (state = 'running' or $4 and state in ('succeeded', 'partial'))
       for share
"""
# $1 run, $2 attempt, $3 worker, $4 counts: jsonb. `partial` when the handler reported a failed business, since a
# person last retried the run.
FINISH = """
    with finished as (
        update bon_scheduler.runs r
           set counts = $4, error = null, finished_at = clock_timestamp(),
               state = case when exists (select from bon_scheduler.business_outcomes o
                                          where o.run_id = r.id and o.outcome = 'failed'
                                            and o.attempt > r.retried_after)
                            then 'partial' else 'succeeded' end::bon_scheduler.run_state
         where id = $1 and attempt = $2 and worker = $3 and state = 'running'
        returning id, attempt, state
    ), ended as (
        update bon_scheduler.attempts a
           set ended_at = clock_timestamp(), outcome = f.state::text
          from finished f
         where a.run_id = f.id and a.attempt = f.attempt
    )
    select state::text from finished
"""
# $1 run, $2 attempt, $3 worker, $4 outcome of the attempt, $5 error, $6 wait before the next: interval,
# null when there is none.
FAIL = """
    with failed as (
        update bon_scheduler.runs
           set error = $5,
               state = case when $6::interval is null
                            then 'dead' else 'retrying' end::bon_scheduler.run_state,
               run_at = case when $6::interval is null then run_at else clock_timestamp() + $6 end,
               timed_at = clock_timestamp(),
               finished_at = case when $6::interval is null then clock_timestamp() end
         where id = $1 and attempt = $2 and worker = $3 and state = 'running'
        returning id, attempt, state
    ), ended as (
        update bon_scheduler.attempts a
           set ended_at = clock_timestamp(), outcome = $4, error = $5
          from failed f
         where a.run_id = f.id and a.attempt = f.attempt
    )
    select state::text from failed
"""
# $1 run, $2 attempt, $3 worker, $4 wait before the next: interval or null, $5 why, or null.
GIVE_BACK = """
    with returned as (
        update bon_scheduler.runs
           set state = 'queued', given_back = given_back + 1, worker = null, error = $5,
               run_at = coalesce(clock_timestamp() + $4::interval, run_at), timed_at = clock_timestamp()
         where id = $1 and attempt = $2 and worker = $3 and state = 'running'
        returning id, attempt
    ), ended as (
        update bon_scheduler.attempts a
           set ended_at = clock_timestamp(), outcome = 'given_back', error = $5
          from returned f
         where a.run_id = f.id and a.attempt = f.attempt
    )
    select id from returned
"""
# $1 run, $2 attempt, $3 error. Closes the book on an attempt that lost its run; what ended it before stays.
LOSE = """
    with lost as (
        update bon_scheduler.attempts
           set ended_at = clock_timestamp(), outcome = 'lost', error = $3
         where run_id = $1 and attempt = $2 and ended_at is null
        returning outcome
    )
    select coalesce((select outcome from lost),
                    (select outcome from bon_scheduler.attempts where run_id = $1 and attempt = $2))
"""
# $1 worker. Index: runs_held.
HELD_BY = "select id, attempt from bon_scheduler.runs where worker = $1 and state = 'running'"
# $1 runs: uuid[], $2 their attempts: int[], $3 worker. Index: runs_pkey. One that has ended well was ended by its
# handler, which may have something left to do.
LOST_BY = """
    select mine.id, mine.attempt
      from unnest($1::uuid[], $2::int[]) as mine (id, attempt)
      left join bon_scheduler.runs r
        on r.id = mine.id and r.attempt = mine.attempt and r.worker = $3
           and r.state in ('running', 'succeeded', 'partial')
     where r.id is null
"""
# $1 run, $2 attempt, $3 worker. The attempt stays counted; whoever claims the run next closes the book on it.
FORSAKE = """
    update bon_scheduler.runs
       set worker = null
     where id = $1 and attempt = $2 and worker = $3 and state = 'running'
    returning id
"""
# $1 run, $2 businesses: uuid[], $3 outcomes: text[], $4 counts: jsonb[], $5 errors: text[].
RECORD_OUTCOMES = """
    insert into bon_scheduler.business_outcomes as o (run_id, business_id, outcome, counts, error, attempt)
    select $1, business_id, outcome, counts, error,
           (select greatest(r.attempt, 1) from bon_scheduler.runs r where r.id = $1)
      from unnest($2::uuid[], $3::text[], $4::jsonb[], $5::text[]) as t (business_id, outcome, counts, error)
    on conflict (run_id, business_id) do update
       set outcome = case when o.outcome = 'done' and excluded.outcome = 'kept'
                          then 'done' else excluded.outcome end,
           error = excluded.error,
           attempt = excluded.attempt,
           counts = (select coalesce(jsonb_object_agg(key, total), '{}')
                       from (select key, sum(value::bigint) as total
                               from (select * from jsonb_each_text(o.counts)
                                     union all
                                     select * from jsonb_each_text(excluded.counts)) as both_counts
                              group by key) as added)
"""


class Verdict(StrEnum):
    """What became of a claim; see the SQL function `claim`."""

    CLAIMED = "claimed"
    ENDED = "ended"
    HELD = "held"
    BUSY = "busy"
    LOCKED = "locked"
    EXHAUSTED = "exhausted"


@dataclass(frozen=True, slots=True)
class RunRef:
    """One attempt of one run by one worker: what every change must still match."""

    run_id: UUID
    attempt: int
    worker: UUID


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to a claim. Fields after `verdict` are set as far as they apply."""

    verdict: Verdict
    ref: RunRef | None
    job: str | None
    fire_time: datetime | None
    enqueued_at: datetime | None
    payload: Mapping[str, Any]
    origin: Origin | None
    given_back: int
    holder_host: str | None
    holder_since: datetime | None
    holder_silent: bool
    """By the database's clock, which proves nothing."""


async def claim(
    connection: Connection,
    run_id: UUID,
    *,
    worker: UUID,
    host: str,
    allowed: int,
    exclusive: bool,
) -> Claim:
    """Take a run for a worker, counting the attempt from now."""
    row = await connection.fetchrow(CLAIM, run_id, worker, host, allowed, exclusive, timeout=CALL_TIMEOUT_SECONDS)
    if row is None:  # the function always returns one row
        raise LostRunError(f"run {run_id} could not be claimed")
    verdict = Verdict(row["verdict"])
    return Claim(
        verdict,
        RunRef(run_id, row["attempt"], worker) if verdict is Verdict.CLAIMED else None,
        row["job"],
        row["fire_time"],
        row["enqueued_at"],
        row["payload"] or {},
        Origin(row["origin"]) if row["origin"] else None,
        row["given_back"] or 0,
        row["holder_host"],
        row["holder_since"],
        bool(row["holder_silent"]),
    )


async def fence(connection: Connection, ref: RunRef, *, finished: bool = False) -> str | None:
    """
    Refuse, with LostRunError, to go on to the commit unless this attempt still owns its run.

    Return the state the run has ended in, when the transaction has `finished` it and that still stands; else None.
    """
    state: str | None = await connection.fetchval(
        FENCE, ref.run_id, ref.attempt, ref.worker, finished, timeout=CALL_TIMEOUT_SECONDS
    )
    if state is None:
        raise LostRunError(f"attempt {ref.attempt} no longer owns run {ref.run_id}")
    return None if state == "running" else state


async def finish(connection: Connection, ref: RunRef, counts: Counts) -> str:
    """End the run as `succeeded` or `partial`; return which. Raises LostRunError."""
    state: str | None = await connection.fetchval(
        FINISH, ref.run_id, ref.attempt, ref.worker, dict(counts), timeout=CALL_TIMEOUT_SECONDS
    )
    if state is None:
        raise LostRunError(f"attempt {ref.attempt} no longer owns run {ref.run_id}")
    return state


async def fail(connection: Connection, ref: RunRef, *, outcome: str, error: str, wait: timedelta | None) -> str:
    """End the attempt; the run is `retrying` after `wait`, or `dead` without one. Raises LostRunError."""
    async with connection.transaction():
        state: str | None = await connection.fetchval(
            FAIL, ref.run_id, ref.attempt, ref.worker, outcome, error, wait, timeout=CALL_TIMEOUT_SECONDS
        )
        if state is None:
            raise LostRunError(f"attempt {ref.attempt} no longer owns run {ref.run_id}")
        if wait is not None:
            await deliver(connection, ref.run_id)
    return state


async def give_back(
    connection: Connection, ref: RunRef, *, wait: timedelta | None = None, why: str | None = None
) -> bool:
    """Return a run to the queue, due at once or after `wait`, at no cost in attempts; False when it was lost."""
    async with connection.transaction():
        returned = await connection.fetchval(
            GIVE_BACK, ref.run_id, ref.attempt, ref.worker, wait, why, timeout=CALL_TIMEOUT_SECONDS
        )
        if returned is not None:
            await deliver(connection, ref.run_id)
    return returned is not None


async def lose(connection: Connection, ref: RunRef, error: str) -> str:
    """
    Note that an attempt lost its run, unless it ended otherwise before; return its outcome.

    A write whose answer was lost in an outage finds here that it took effect.
    """
    return str(await connection.fetchval(LOSE, ref.run_id, ref.attempt, error, timeout=CALL_TIMEOUT_SECONDS))


async def held_by(connection: Connection, worker: UUID) -> set[RunRef]:
    """Return what the ledger says this worker is working on."""
    rows = await connection.fetch(HELD_BY, worker, timeout=CALL_TIMEOUT_SECONDS)
    return {RunRef(row["id"], row["attempt"], worker) for row in rows}


async def lost_by(connection: Connection, worker: UUID, refs: Collection[RunRef]) -> set[RunRef]:
    """Return those of a worker's attempts whose run another took over, or a person cancelled."""
    mine = [ref.run_id for ref in refs], [ref.attempt for ref in refs]
    rows = await connection.fetch(LOST_BY, *mine, worker, timeout=CALL_TIMEOUT_SECONDS)
    return {RunRef(row["id"], row["attempt"], worker) for row in rows}


async def forsake(connection: Connection, ref: RunRef) -> bool:
    """Let go of a run that nobody here works on, as when the answer to a claim was lost; False when it has ended."""
    return (
        await connection.fetchval(FORSAKE, ref.run_id, ref.attempt, ref.worker, timeout=CALL_TIMEOUT_SECONDS)
        is not None
    )


async def record_outcomes(connection: Connection, run_id: UUID, outcomes: Iterable[BusinessOutcome]) -> None:
    """Record what the run did for each business; counts of a repeated business add up."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.business_id)
    for start in range(0, len(ordered), BULK):
        part = ordered[start : start + BULK]
        await connection.execute(
            RECORD_OUTCOMES,
            run_id,
            [outcome.business_id for outcome in part],
            [outcome.outcome for outcome in part],
            [dict(outcome.counts) for outcome in part],
            [outcome.error for outcome in part],
        )
