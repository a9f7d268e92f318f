"""
How long the ledger remembers: what is older is deleted in batches, oldest first.

Called by the job `ledger-pruning`, beside living workers. Nothing goes that something else still refers to: a run
stays while a delivery or a run it caused names it, and a run, a delivery or a question that waits for a person
stays until the person has decided. Forgetting ticks runs none again: each job's last tick only moves forwards.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import TypeAlias

from bon_scheduler.jobs import Connection
from bon_scheduler.ledger.entries import CALL_TIMEOUT_SECONDS

__all__ = ["BATCH", "PRUNERS", "Horizon", "mark_horizon"]

BATCH = 2000
"""Rows deleted in one transaction: a fraction of a second's work."""
OUTCOMES_KEPT = timedelta(days=60)
REFRESHES_KEPT = timedelta(days=60)
"""How a business's last exchange ended, once it has no credentials any more."""
ACTIONS_KEPT = timedelta(days=7 * 366)
"""What people did and why: seven years, as long as books are kept, and never shorter than runs are."""
SPENT_TOKENS_KEPT = timedelta(days=7)
"""A business's token changes a hundred times a day, and one in another's row is met at its next refresh."""

# In all: $1 now: timestamptz, as this worker believes; the database's clock holds it back, so that one clock
# that is far ahead forgets nothing. Each asks for that instant once (`select least(…)`): compared with a clock that
# moves, no index is searched. `offset 0` has the references to a row looked up by an index, row by row of the batch;
# `array(…)` the rows themselves, where a join might read the table: a generic plan does not know how long a batch is.
# $2 kept: interval. Index: pruning_pkey. BEFORE a tick is deleted, otherwise an audit would find a gap.
MARK_HORIZON = """
    update bon_scheduler.pruning
       set ticks_until = least($1, clock_timestamp()) - $2::interval
     where ticks_until < least($1, clock_timestamp()) - $2::interval
"""
# $2 kept: interval, $3 rows: int. Indexes: runs_by_end, runs_caused_by, deliveries_run, runs_pkey.
PRUNE_RUNS = """
    with old as (
        select r.id
          from bon_scheduler.runs r
         where (r.state in ('succeeded', 'partial', 'cancelled', 'missed', 'paused') or r.state = 'dead' and r.dry_run)
           and r.finished_at < (select least($1, clock_timestamp()) - $2::interval)
           and not exists (select from bon_scheduler.runs c where c.caused_by = r.id offset 0)
           and not exists (select from bon_scheduler.deliveries d where d.run_id = r.id offset 0)
         order by r.finished_at
         limit $3
           for update skip locked
    ), pruned as (
        delete from bon_scheduler.runs r
         where r.id = any (array(select id from old))
        returning r.id
    )
    select count(*) from pruned
"""
# $2 kept: interval, $3 rows: int. Indexes: deliveries_settled, deliveries_pkey. Its day counts, not only its
# age: the mailer refuses a letter of a day that may be forgotten, and a day more is kept for the zones.
PRUNE_DELIVERIES = """
    with old as (
        select d.id
          from bon_scheduler.deliveries d
         where d.state in ('sent', 'refused', 'released')
           and d.intended_at < (select least($1, clock_timestamp()) - $2::interval)
           and d.as_of < (select (least($1, clock_timestamp()) - $2::interval)::date - 1)
         order by d.intended_at
         limit $3
           for update skip locked
    ), pruned as (
        delete from bon_scheduler.deliveries d
         where d.id = any (array(select id from old))
        returning d.id
    )
    select count(*) from pruned
"""
# $2 kept: interval, $3 rows: int. Index: business_outcomes_by_age; then by their places, which are locked.
PRUNE_OUTCOMES = """
    with old as (
        select o.ctid as place
          from bon_scheduler.business_outcomes o
         where o.recorded_at < (select least($1, clock_timestamp()) - $2::interval)
         order by o.recorded_at
         limit $3
           for update skip locked
    ), pruned as (
        delete from bon_scheduler.business_outcomes o
         where o.ctid = any (array(select place from old))
        returning 1
    )
    select count(*) from pruned
"""
# $2 kept: interval, $3 rows: int. Indexes: shaam_tokens_by_age, shaam_tokens_pkey. What is still in its business's row
# stays, and what was nobody's, otherwise the last row that holds it would count as its owner.
PRUNE_TOKENS = """
    with old as (
        select t.fingerprint
          from bon_scheduler.shaam_tokens t
         where t.seen_at < (select least($1, clock_timestamp()) - $2::interval)
           and t.business_id is not null
           and not exists (select from public.business_shaam_credentials c
                            where c.business_id = t.business_id
                              and sha256(convert_to(c.encrypted_refresh_token, 'UTF8')) = t.sealed
                           offset 0)
         order by t.seen_at
         limit $3
           for update skip locked
    ), pruned as (
        delete from bon_scheduler.shaam_tokens t
         where t.fingerprint = any (array(select fingerprint from old))
        returning 1
    )
    select count(*) from pruned
"""
# $2 kept: interval, $3 rows: int. Indexes: operator_actions_by_age, operator_actions_pkey.
PRUNE_ACTIONS = """
    with old as (
        select a.id
          from bon_scheduler.operator_actions a
         where a.at < (select least($1, clock_timestamp()) - $2::interval)
         order by a.at
         limit $3
           for update skip locked
    ), pruned as (
        delete from bon_scheduler.operator_actions a
         where a.id = any (array(select id from old))
        returning 1
    )
    select count(*) from pruned
"""
# $2 kept: interval, $3 rows: int. Indexes: business_shaam_credentials_business_id_key, shaam_refreshes_pkey. Of
# businesses that BON has deleted, or whose credentials it has: each business is looked at once.
PRUNE_REFRESHES = """
    with old as (
        select r.business_id
          from bon_scheduler.shaam_refreshes r
         where r.changed_at < (select least($1, clock_timestamp()) - $2::interval)
           and (r.lease_until is null or r.lease_until < (select least($1, clock_timestamp()) - $2::interval))
           and not exists (select from public.business_shaam_credentials c
                            where c.business_id = r.business_id
                           offset 0)
         limit $3
           for update skip locked
    ), pruned as (
        delete from bon_scheduler.shaam_refreshes r
         where r.business_id = any (array(select business_id from old))
        returning 1
    )
    select count(*) from pruned
"""


@dataclass(frozen=True, slots=True)
class Horizon:
    """What is old: `now` as the worker believes (UTC, aware), and for how long runs are kept."""

    now: datetime
    runs_kept: timedelta


Pruner: TypeAlias = Callable[[Connection, Horizon], Awaitable[int]]
"""Deletes one batch of what is old; returns how many rows, 0 once there is nothing left."""


async def mark_horizon(connection: Connection, horizon: Horizon) -> None:
    """Note, before any tick is deleted, until when ticks may be missing from the ledger."""
    await connection.execute(MARK_HORIZON, horizon.now, horizon.runs_kept, timeout=CALL_TIMEOUT_SECONDS)


def _pruner(statement: str, kept: Callable[[Horizon], timedelta]) -> Pruner:
    async def prune(connection: Connection, horizon: Horizon) -> int:
        return int(await connection.fetchval(statement, horizon.now, kept(horizon), BATCH))

    return prune


PRUNERS: Mapping[str, Pruner] = MappingProxyType(
    {
        # Deliveries BEFORE runs, and outcomes too: a run is let go of once nothing refers to it.
        "deliveries": _pruner(PRUNE_DELIVERIES, lambda horizon: horizon.runs_kept),
        "outcomes": _pruner(PRUNE_OUTCOMES, lambda horizon: min(OUTCOMES_KEPT, horizon.runs_kept)),
        "runs": _pruner(PRUNE_RUNS, lambda horizon: horizon.runs_kept),
        "tokens": _pruner(PRUNE_TOKENS, lambda _: SPENT_TOKENS_KEPT),
        "refreshes": _pruner(PRUNE_REFRESHES, lambda _: REFRESHES_KEPT),
        "actions": _pruner(PRUNE_ACTIONS, lambda horizon: max(ACTIONS_KEPT, horizon.runs_kept)),
    }
)
"""By the name it is counted under."""
