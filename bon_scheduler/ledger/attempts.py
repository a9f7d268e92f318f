"""
One attempt's hold on its run: fence, finish, fail, give back; and what becomes of the runs of a dead worker.

It must survive a worker that dies, freezes or is presumed dead at any statement. So a run is
changed only by the attempt that owns it (`id`, `attempt`, `worker` and `running` must still
match), and an attempt that finds no such row has lost it and changes nothing.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import orjson

from bon_scheduler.jobs import BusinessOutcome, Connection, Counts, LostRunError
from bon_scheduler.ledger.entries import BULK, CALL_TIMEOUT_SECONDS

__all__ = [
    "Finished",
    "Released",
    "RunRef",
    "add_progress",
    "fail",
    "fence",
    "finish",
    "finish_many",
    "give_back",
    "give_back_all",
    "held_by",
    "let_go",
    "lose",
    "lost_by",
    "pretend",
    "record_outcomes",
    "release_lost",
]

# $1 run, $2 attempt, $3 worker, $4 whether this transaction has ended the run (FINISH). Locks `for share`: whoever
# changes the run waits, while the fences of one run's transactions do not exclude each other. Index: runs_pkey.
FENCE = """
    select state::text
      from bon_scheduler.runs
     where id = $1 and attempt = $2 and worker = $3
       and (state = 'running' or $4 and state in ('succeeded', 'partial'))
       for share
"""
# $1 runs: uuid[], $2 their attempts: int[], $3 worker, $4 counts: text[] of JSON, $5 why each left something undone:
# text[], null where none did, empty where the counts say it. `partial` then, and when the handler reported a failed
# business since a person last retried the run. The state is compared as text, otherwise rows might be looked for in the
# index of what runs, which beside a long transaction holds all that ever ran. `nested`: within a savepoint, so that it
# may yet be undone while its transaction goes on. Indexes: runs_pkey, attempts_pkey, business_outcomes_pkey.
FINISH = """
    with finished as (
        update bon_scheduler.runs r
           set counts = m.counts::json, error = nullif(m.undone, ''), finished_at = clock_timestamp(),
               state = case when m.undone is not null or exists (select from bon_scheduler.business_outcomes o
                                          where o.run_id = r.id and o.outcome = 'failed'
                                            and o.attempt > r.retried_after)
                            then 'partial' else 'succeeded' end::bon_scheduler.run_state
          from unnest($1::uuid[], $2::int[], $4::text[], $5::text[]) as m (id, attempt, counts, undone)
         where r.id = m.id and r.attempt = m.attempt and r.worker = $3 and r.state::text = 'running'
        returning r.id, r.attempt, r.state, r.xmin
    ), ended as (
        update bon_scheduler.attempts a
           set ended_at = clock_timestamp(), outcome = f.state::text
          from finished f
         where a.run_id = f.id and a.attempt = f.attempt
    )
    select id, state::text, xmin <> pg_current_xact_id()::xid as nested from finished
"""
# $1 run, $2 attempt, $3 worker, $4 counts: json. Adds to what this run has done, whichever attempt did
# it, in the order in which the counts first came. Index: runs_pkey.
PROGRESS = """
    update bon_scheduler.runs r
       set counts = (select coalesce(json_object_agg(key, total order by first), '{}')
                       from (select key, sum(value::bigint) as total, min(number) as first
                               from (select * from json_each_text(r.counts) with ordinality
                                     union all
                                     select key, value, 1000000 + number
                                       from json_each_text($4::json) with ordinality as t (key, value, number))
                                    as both_counts (key, value, number)
                              group by key) as added)
     where id = $1 and attempt = $2 and worker = $3 and state = 'running'
    returning counts
"""
# $1 run, $2 attempt, $3 worker, $4 job.
PRETEND = """
    insert into bon_scheduler.runs (id, attempt, worker, job, origin, state, dry_run)
    values ($1, $2, $3, $4, 'person', 'running', true)
"""
# $1 run, $2 attempt, $3 worker, $4 outcome of the attempt, $5 error, $6 wait before the next: interval,
# null when there is none. Indexes: runs_pkey, attempts_pkey.
FAIL = """
    with failed as (
        update bon_scheduler.runs
           set error = $5,
               state = case when $6::interval is null
                            then 'dead' else 'retrying' end::bon_scheduler.run_state,
               run_at = clock_timestamp() + $6::interval, ready = coalesce($6::interval <= '0', true),
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
# $1 runs: uuid[], $2 attempts: int[], $3 worker, $4 wait before the next: interval or null, $5 why, or null.
# Indexes: runs_pkey, attempts_pkey.
GIVE_BACK = """
    with returned as (
        update bon_scheduler.runs r
           set state = 'queued', given_back = r.given_back + 1, worker = null, error = $5,
               run_at = clock_timestamp() + $4::interval, ready = $4::interval is null
          from unnest($1::uuid[], $2::int[]) as m (id, attempt)
         where r.id = m.id and r.attempt = m.attempt and r.worker = $3 and r.state::text = 'running'
        returning r.id, r.attempt
    ), ended as (
        update bon_scheduler.attempts a
           set ended_at = clock_timestamp(), outcome = 'given_back', error = $5
          from returned f
         where a.run_id = f.id and a.attempt = f.attempt
    ), woken as (
        select bon_scheduler.wake_workers() from returned where $4::interval is null limit 1
    )
    select id, (select count(*) from woken) from returned
"""
# $1 runs: uuid[], $2 attempts: int[], $3 worker. `release_lost` does the rest: the attempts count. Index: runs_pkey.
LET_GO = """
    update bon_scheduler.runs r
       set worker = null
      from unnest($1::uuid[], $2::int[]) as m (id, attempt)
     where r.id = m.id and r.attempt = m.attempt and r.worker = $3 and r.state::text = 'running'
"""
# $1 run, $2 attempt, $3 error. Closes the book on an attempt that lost its run; what ended it before stays.
# Index: attempts_pkey.
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
           and r.state::text in ('running', 'succeeded', 'partial')
     where r.id is null
"""
RELEASE_LOST = "select run_id, job, attempt, state::text from bon_scheduler.release_lost()"
# $1 run, $2 businesses: uuid[], $3 outcomes: text[], $4 counts: jsonb[], $5 errors: text[].
# Indexes: business_outcomes_pkey, runs_pkey.
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


@dataclass(frozen=True, slots=True)
class RunRef:
    """One attempt of one run by one worker: what every change must still match."""

    run_id: UUID
    attempt: int
    worker: UUID


@dataclass(frozen=True, slots=True)
class Finished:
    """How a run ended well, in a transaction that may not have committed."""

    state: str
    may_be_undone: bool
    """Whether it stands in a savepoint, which may be rolled back while its transaction commits."""


@dataclass(frozen=True, slots=True)
class Released:
    """A run that a dead worker had: it waits again, or is dead."""

    run_id: UUID
    job: str
    attempt: int
    state: str


async def fence(connection: Connection, ref: RunRef, *, finished: bool = False) -> str | None:
    """
    Refuse, with LostRunError, to go on to the commit unless this attempt still owns its run.

    Return the state the run has ended in, when the transaction has `finished` it and that still stands; else None.
    """
    state: str | None = await connection.fetchval(
        FENCE, ref.run_id, ref.attempt, ref.worker, finished, timeout=CALL_TIMEOUT_SECONDS
    )
    if state is None:
        raise _lost(ref)
    return None if state == "running" else state


async def add_progress(connection: Connection, ref: RunRef, counts: Counts) -> Counts:
    """Add to the counts of a run under way; return those of all its attempts. Raises LostRunError."""
    total: Counts | None = await connection.fetchval(
        PROGRESS,
        ref.run_id,
        ref.attempt,
        ref.worker,
        dict(counts),
        timeout=CALL_TIMEOUT_SECONDS,
    )
    if total is None:
        raise _lost(ref)
    return total


async def pretend(connection: Connection, ref: RunRef, job: str) -> None:
    """Make a run that this attempt owns, in a transaction that is rolled back: a dry run's."""
    await connection.execute(PRETEND, ref.run_id, ref.attempt, ref.worker, job, timeout=CALL_TIMEOUT_SECONDS)


def _lost(ref: RunRef) -> LostRunError:
    return LostRunError(f"attempt {ref.attempt} no longer owns run {ref.run_id}")


async def finish(connection: Connection, ref: RunRef, counts: Counts, *, undone: bool | str = False) -> Finished:
    """
    End the run as `succeeded` or `partial`; as the latter when something is left undone, and a text says why.

    Raises LostRunError.
    """
    why = undone if isinstance(undone, str) else "" if undone else None
    ended = await _finish(connection, ref.worker, [(ref, counts)], undone=why)
    if ref.run_id not in ended:
        raise _lost(ref)
    return ended[ref.run_id]


async def finish_many(connection: Connection, finished: Sequence[tuple[RunRef, Counts]]) -> dict[UUID, str]:
    """End one worker's runs as `finish` does; return the state of each that was still its attempt's."""
    # By id, as everywhere, otherwise a person who cancels many at once could wait for us and we for them.
    ordered = sorted(finished, key=lambda item: item[0].run_id)
    ended = await _finish(connection, finished[0][0].worker, ordered)
    return {run_id: end.state for run_id, end in ended.items()}


async def _finish(
    connection: Connection, worker: UUID, finished: Sequence[tuple[RunRef, Counts]], *, undone: str | None = None
) -> dict[UUID, Finished]:
    rows = await connection.fetch(
        FINISH,
        [ref.run_id for ref, _ in finished],
        [ref.attempt for ref, _ in finished],
        worker,
        [orjson.dumps(dict(counts)).decode() for _, counts in finished],
        [undone] * len(finished),
        timeout=CALL_TIMEOUT_SECONDS,
    )
    return {row["id"]: Finished(row["state"], row["nested"]) for row in rows}


async def fail(connection: Connection, ref: RunRef, *, outcome: str, error: str, wait: timedelta | None) -> str:
    """End the attempt; the run is `retrying` after `wait`, or `dead` without one. Raises LostRunError."""
    state: str | None = await connection.fetchval(
        FAIL, ref.run_id, ref.attempt, ref.worker, outcome, error, wait, timeout=CALL_TIMEOUT_SECONDS
    )
    if state is None:
        raise _lost(ref)
    return state


async def give_back(
    connection: Connection, ref: RunRef, *, wait: timedelta | None = None, why: str | None = None
) -> bool:
    """Have a run wait again, at once or after `wait`, at no cost in attempts; False when it was lost."""
    returned = await connection.fetch(
        GIVE_BACK, [ref.run_id], [ref.attempt], ref.worker, wait, why, timeout=CALL_TIMEOUT_SECONDS
    )
    return bool(returned)


async def let_go(connection: Connection, worker: UUID, refs: Collection[RunRef]) -> None:
    """Have runs whose attempts' end cannot be recorded released as those of a dead worker."""
    mine = [ref.run_id for ref in refs], [ref.attempt for ref in refs]
    await connection.execute(LET_GO, *mine, worker, timeout=CALL_TIMEOUT_SECONDS)


async def give_back_all(connection: Connection, worker: UUID, refs: Collection[RunRef]) -> list[RunRef]:
    """Give back, at once, those of a worker's runs that are still its own; return them."""
    if not refs:
        return []
    numbers = {ref.run_id: ref for ref in refs}
    mine = list(numbers), [ref.attempt for ref in refs]
    rows = await connection.fetch(GIVE_BACK, *mine, worker, None, None, timeout=CALL_TIMEOUT_SECONDS)
    return [numbers[row["id"]] for row in rows]


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


async def release_lost(connection: Connection) -> list[Released]:
    """Have the runs that no living worker holds wait again, or be dead; see the SQL function. Return them."""
    return [Released(*row) for row in await connection.fetch(RELEASE_LOST, timeout=CALL_TIMEOUT_SECONDS)]


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
