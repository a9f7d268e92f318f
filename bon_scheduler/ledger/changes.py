"""
Changes by an operator: runs are retried or cancelled, whatever state they are in.

Called by commands and by an interrupted `run-once`, beside living workers. The statement that changes a run also
records who did it, and why, in `operator_actions`. An attempt that has the run is not told: its fence finds a run that
is not `running`, or the next attempt's number, and refuses its commit.

Named runs are changed all together or not at all. Those that a state names (`--dead`, `--waiting`) are the ones that
are in it when asked, changed in batches: each is considered once, so that a run which dies again meanwhile does not
keep the command busy for ever, and no lock is held for long.

Order of locks, as everywhere: runs (by id), attempts. What a handler recorded of businesses is left
alone, because a handler that was cancelled may hold it while it waits at its fence for the run.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeAlias
from uuid import UUID

from bon_scheduler.jobs import Connection
from bon_scheduler.ledger.entries import BULK, CALL_TIMEOUT_SECONDS

__all__ = ["Action", "Changed", "RefusedError", "cancel_waiting", "change", "change_all", "retry_dead"]

# $1 runs: uuid[]. Index: runs_pkey. Waits for a fence that is about to commit, but not for a handler that has
# only recorded a business (which locks its run `for key share`).
LOCK_RUNS = """
    select id, job, state::text as state, fire_time, run_at, dry_run
      from bon_scheduler.runs
     where id = any ($1)
     order by id
       for no key update
"""
# $1 runs: uuid[], $2 by, $3 reason. Index: runs_pkey. The attempt's number is the fence, so it goes on; what
# was tried before, and the businesses that failed then, no longer count.
RETRY = """
    with changed as (
        update bon_scheduler.runs
           set state = 'queued', given_back = attempt, retried_after = attempt, run_at = null, ready = true,
               finished_at = null, error = null, reason = null, worker = null
         where id = any ($1)
        returning id
    ), woken as (
        select bon_scheduler.wake_workers() from changed limit 1
    ), noted as (
        insert into bon_scheduler.operator_actions (by, action, target, reason)
        select $2, 'retry', id::text, $3 from changed
    )
    select from woken
"""
# $1 runs: uuid[], $2 by, $3 reason. Indexes: runs_pkey, attempts_pkey. A dead run keeps the instant and the error of
# its end.
CANCEL = """
    with changed as (
        update bon_scheduler.runs
           set state = 'cancelled', reason = $3, finished_at = coalesce(finished_at, clock_timestamp())
         where id = any ($1)
        returning id, attempt
    ), ended as (
        update bon_scheduler.attempts a
           set ended_at = clock_timestamp(), outcome = 'cancelled'
          from changed r
         where a.run_id = r.id and a.attempt = r.attempt and a.ended_at is null
    )
    insert into bon_scheduler.operator_actions (by, action, target, reason)
    select $2, 'cancel', id::text, $3 from changed
"""
# $1 runs: uuid[], $2 by, $3 reason. Index: runs_pkey. The attempt that was held does not count.
RELEASE = """
    with changed as (
        update bon_scheduler.runs
           set state = 'queued', released = true, given_back = attempt, run_at = null, ready = true, reason = null,
               counts = '{}'
         where id = any ($1)
        returning id
    ), woken as (
        select bon_scheduler.wake_workers() from changed limit 1
    ), noted as (
        insert into bon_scheduler.operator_actions (by, action, target, reason)
        select $2, 'release', id::text, $3 from changed
    )
    select from woken
"""
# $1 job, or null for all. Index: runs_by_job.
DEAD_RUNS = """
    select r.id
      from bon_scheduler.jobs j
      join bon_scheduler.runs r on r.job = j.name
     where r.state = 'dead' and ($1::text is null or j.name = $1) and not r.dry_run
     order by r.id
"""
# $1 job. Index: runs_by_job.
WAITING_RUNS = """
    select id
      from bon_scheduler.runs
     where job = $1 and state in ('queued', 'retrying')
     order by id
"""

Row: TypeAlias = Mapping[str, Any]
DEAD = frozenset({"dead"})
WAITING = frozenset({"queued", "retrying"})
COMMAND = "bon-scheduler"


class Action(StrEnum):
    """What may be done to a run, as `operator_actions` names it."""

    RETRY = "retry"
    CANCEL = "cancel"
    RELEASE = "release"

    @property
    def changes(self) -> frozenset[str]:
        """The states in which it may be done."""
        return _CHANGES[self]


_CHANGES = {
    Action.RETRY: frozenset({"dead", "partial", "cancelled"}),
    Action.CANCEL: frozenset({"queued", "running", "retrying", "held", "dead"}),
    Action.RELEASE: frozenset({"held"}),
}
_MAKE_GOOD = f"make its tick good with: {COMMAND} run-once {{job}} --fire-time {{fire_time}}"
_NOT_HELD = "is not held by the brake; leave it out"
# By action and state: why not, and the remedy.
_REFUSALS = {
    Action.RETRY: {
        "missed": f"is missed, it never was to run; {_MAKE_GOOD}",
        "paused": f"is paused, it never was to run; {_MAKE_GOOD}",
        "queued": "is queued, it runs as soon as a worker is free; leave it out",
        "running": f"is running; wait for its end, or stop it first with: {COMMAND} cancel {{run_id}} --reason …",
        "retrying": "is retrying, it runs again by itself at {run_at}; leave it out",
        "succeeded": f"has succeeded, there is nothing to mend; do it anew with: {COMMAND} run-once {{job}}",
        "held": "is held by the brake and waits for a person; "
        f"have it go on with: {COMMAND} release {{run_id}} --reason …",
    },
    Action.CANCEL: {
        "succeeded": "has succeeded, what it did stays; leave it out",
        "partial": "has ended partial, what it did stays; leave it out",
        "cancelled": "is cancelled already; leave it out",
        "missed": "is missed, it never was to run; leave it out",
        "paused": "is paused, it never was to run; leave it out",
    },
    Action.RELEASE: {},
}


_STATEMENTS = {Action.RETRY: RETRY, Action.CANCEL: CANCEL, Action.RELEASE: RELEASE}


class RefusedError(Exception):
    """What was asked for cannot be changed, so nothing was; the message says what, why, and the remedy."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A run that was changed, and the state it was in."""

    run_id: UUID
    job: str
    was: str


async def change(
    connection: Connection, action: Action, run_ids: Collection[UUID], *, states: Collection[str], by: str, reason: str
) -> list[Changed]:
    """Change those of the runs that are in one of `states`, in one transaction; return them."""
    async with connection.transaction():
        found = await _lock(connection, run_ids)
        return await _change(connection, action, [row for row in found.values() if row["state"] in states], by, reason)


async def change_all(
    connection: Connection, action: Action, run_ids: Collection[UUID], *, by: str, reason: str
) -> list[Changed]:
    """Change all of the runs, in one transaction; raises RefusedError, and changes none, when one cannot be."""
    async with connection.transaction():
        found = await _lock(connection, run_ids)
        faults = [fault for run_id in run_ids if (fault := _fault(action, run_id, found.get(run_id)))]
        if faults:
            raise RefusedError("Nothing was changed.\n" + "\n".join(f"- {fault}" for fault in faults))
        return await _change(connection, action, list(found.values()), by, reason)


async def retry_dead(connection: Connection, job: str | None, *, by: str, reason: str) -> list[Changed]:
    """Queue all dead runs again, of one job or of all; return those that were still dead at their turn."""
    rows = await connection.fetch(DEAD_RUNS, job, timeout=CALL_TIMEOUT_SECONDS)
    return await _in_batches(connection, Action.RETRY, [row["id"] for row in rows], DEAD, by, reason)


async def cancel_waiting(connection: Connection, job: str, *, by: str, reason: str) -> list[Changed]:
    """Cancel the job's runs that wait for a worker; return those that no worker had taken by their turn."""
    rows = await connection.fetch(WAITING_RUNS, job, timeout=CALL_TIMEOUT_SECONDS)
    return await _in_batches(connection, Action.CANCEL, [row["id"] for row in rows], WAITING, by, reason)


async def _in_batches(
    connection: Connection, action: Action, run_ids: Sequence[UUID], states: Collection[str], by: str, reason: str
) -> list[Changed]:
    changed: list[Changed] = []
    for start in range(0, len(run_ids), BULK):
        batch = run_ids[start : start + BULK]
        changed += await change(connection, action, batch, states=states, by=by, reason=reason)
    return changed


async def _lock(connection: Connection, run_ids: Collection[UUID]) -> dict[UUID, Row]:
    # A statement of its own, BEFORE the change: the next one's snapshot sees what whoever held the locks has done.
    rows = await connection.fetch(LOCK_RUNS, list(run_ids), timeout=CALL_TIMEOUT_SECONDS)
    return {row["id"]: dict(row) for row in rows}


def _fault(action: Action, run_id: UUID, row: Row | None) -> str | None:
    if row is None:
        return f"No run {run_id}; list runs with: {COMMAND} runs"
    if row["dry_run"]:
        return (
            f"Run {run_id} was a dry run, nothing of it is left to change; do it with: {COMMAND} run-once {row['job']}."
        )
    if row["state"] in action.changes:
        return None
    instants = {
        name: instant.isoformat() if isinstance(instant := row[name], datetime) else "once"
        for name in ("fire_time", "run_at")
    }
    why = _REFUSALS[action].get(row["state"], _NOT_HELD)
    return f"Run {run_id} {why.format(run_id=run_id, job=row['job'], **instants)}."


async def _change(connection: Connection, action: Action, rows: Sequence[Row], by: str, reason: str) -> list[Changed]:
    run_ids = [row["id"] for row in rows]
    await connection.execute(_STATEMENTS[action], run_ids, by, reason, timeout=CALL_TIMEOUT_SECONDS)
    return [Changed(row["id"], row["job"], row["state"]) for row in rows]
