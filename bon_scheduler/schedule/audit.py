"""
Is every tick accounted for? What the schedule history demanded, matched with what the ledger holds.

The history says which fire times were to be; the ledger says of each whether it ran (when, how late, on which
host, in how many attempts), was missed and why, was paused, or is dead. What it says nothing of is a gap.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import islice
from typing import Any

from bon_scheduler import ledger
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS, ActiveTick
from bon_scheduler.schedule import schedules
from bon_scheduler.schedule.timing import Period, expected, overstays

__all__ = ["Audit", "AuditedTick", "Verdict", "audit_ticks", "judge", "unaccounted"]

ALLOWANCE = timedelta(seconds=60)
"""A due tick may be that old before it is owed: several passes of the triggers."""
LATE = timedelta(seconds=60)
MOST_COUNTED = 10_000

# $1 since: timestamptz, $2 until: timestamptz. Indexes: runs_tick, attempts_pkey. By job, as the index is.
TICKS = """
    select r.job, r.fire_time, r.state::text as state, r.reason, r.error, r.attempt, r.started_at, r.id,
           a.host
      from bon_scheduler.jobs j
     cross join lateral (
               select *
                 from bon_scheduler.runs t
                where t.job = j.name
                  and t.origin = 'schedule'
                  and t.fire_time > $1
                  and t.fire_time <= $2
               offset 0
           ) r
      left join lateral (
               select host from bon_scheduler.attempts t where t.run_id = r.id and t.attempt = r.attempt offset 0
           ) a on true
"""
NOW = "select clock_timestamp()"
# $1 since: timestamptz. Index: pruning_pkey. What was pruned is not a gap.
RETAINED_SINCE = "select greatest($1, ticks_until) from bon_scheduler.pruning"


class Verdict(StrEnum):
    """What became of an expected tick."""

    RAN = "ran"
    IN_PROGRESS = "in_progress"
    WAITING = "waiting"
    """Due, and waiting for the tick before it to end."""
    STUCK = "stuck"
    """Due, and waiting behind a run that keeps ticks waiting for longer than a period, or will."""
    MISSED = "missed"
    PAUSED = "paused"
    HELD = "held"
    DEAD = "dead"
    CANCELLED = "cancelled"
    GAP = "gap"
    """Expected, and nothing recorded."""
    UNEXPECTED = "unexpected"
    """Recorded, and no schedule in force named it."""


BY_STATE = {
    "succeeded": Verdict.RAN,
    "partial": Verdict.RAN,
    "queued": Verdict.IN_PROGRESS,
    "running": Verdict.IN_PROGRESS,
    "retrying": Verdict.IN_PROGRESS,
    "missed": Verdict.MISSED,
    "paused": Verdict.PAUSED,
    "held": Verdict.HELD,
    "dead": Verdict.DEAD,
    "cancelled": Verdict.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class AuditedTick:
    """One fire time of a job and what became of it; a miss is resolved once a later tick of the job ran."""

    job: str
    fire_time: datetime
    verdict: Verdict
    run_id: Any = None
    started_at: datetime | None = None
    host: str | None = None
    attempts: int = 0
    reason: str | None = None
    resolved: bool | None = None

    @property
    def late(self) -> timedelta | None:
        """How long after its fire time it started."""
        return self.started_at - self.fire_time if self.started_at else None

    def as_json(self) -> dict[str, Any]:
        """Return it as `audit --json` gives it, without what does not apply."""
        late = self.late
        found = {
            "job": self.job,
            "fire_time": self.fire_time,
            "verdict": self.verdict,
            "run_id": self.run_id,
            "started_at": self.started_at,
            "late_seconds": round(late.total_seconds(), 3) if late is not None else None,
            "host": self.host,
            "attempts": self.attempts or None,
            "reason": self.reason,
            "resolved": self.resolved,
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Audit:
    """Every expected tick in (since, until], in order, with what became of it."""

    since: datetime
    until: datetime
    ticks: Sequence[AuditedTick]
    unusable: Mapping[str, str] = field(default_factory=dict)
    """Why nothing can be said of some jobs, by job."""

    def of(self, *verdicts: Verdict) -> list[AuditedTick]:
        """Return the ticks with one of these verdicts."""
        return [tick for tick in self.ticks if tick.verdict in verdicts]

    @property
    def late(self) -> list[AuditedTick]:
        """Ticks that ran, but more than a minute after their fire time."""
        return [tick for tick in self.of(Verdict.RAN) if tick.late is not None and tick.late > LATE]

    @property
    def sound(self) -> bool:
        """Whether there is no gap, no stuck tick, no unresolved miss, and no job of which nothing can be said."""
        return (
            not self.unusable
            and not self.of(Verdict.GAP, Verdict.STUCK)
            and all(tick.resolved for tick in self.of(Verdict.MISSED))
        )


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the ledger holds of ticks."""

    last_ticks: Mapping[str, datetime]
    """By job: until when all are accounted for."""
    rows: Sequence[Mapping[str, Any]]
    active: Mapping[str, ActiveTick]


async def audit_ticks(connection: Connection, since: datetime) -> Audit:
    """Audit every job from `since` (UTC, aware), or what the ledger still holds, until now by the database's clock."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        until = await connection.fetchval(NOW)
        since = await connection.fetchval(RETAINED_SINCE, since)
        histories = await schedules.read_histories(connection)
        last_ticks = await ledger.last_ticks(connection, list(histories.periods))
        rows = await connection.fetch(TICKS, since, until, timeout=CALL_TIMEOUT_SECONDS)
        held_by = await ledger.active_ticks(connection)
    recorded = Recorded(last_ticks, [dict(row) for row in rows], held_by)
    # In a thread: of a long time it counts for a second, and everything else would stand still.
    found = await asyncio.to_thread(judge, histories.periods, recorded, since, until)
    return replace(found, unusable=histories.unusable)


def judge(histories: Mapping[str, Sequence[Period]], recorded: Recorded, since: datetime, until: datetime) -> Audit:
    """Match what the histories demand with what the ledger has recorded."""
    rows = {(row["job"], row["fire_time"]): row for row in recorded.rows}
    ticks: list[AuditedTick] = []
    for job, history in histories.items():
        active = recorded.active.get(job)
        for instant, _ in expected(history, since, until):
            row = rows.pop((job, instant), None)
            if row is not None:
                ticks.append(_from_row(row))
            elif instant <= recorded.last_ticks.get(job, since) or (active is None and until - instant > ALLOWANCE):
                ticks.append(AuditedTick(job, instant, Verdict.GAP))
            elif active is not None:
                stuck = overstays(history, min(instant, active.fire_time), until, active.due)
                ticks.append(_waiting(job, instant, active, stuck=stuck))
    ticks += [_from_row(row, Verdict.UNEXPECTED) for row in rows.values()]
    return Audit(since, until, _resolve(sorted(ticks, key=lambda tick: (tick.fire_time, tick.job))))


def _waiting(job: str, instant: datetime, active: ActiveTick, *, stuck: bool) -> AuditedTick:
    due = f", which is due {active.due:%Y-%m-%d %H:%M} UTC" if active.due else ""
    return AuditedTick(
        job,
        instant,
        Verdict.STUCK if stuck else Verdict.WAITING,
        reason=f"behind run {active.run_id}{due}",
    )


def _from_row(row: Mapping[str, Any], verdict: Verdict | None = None) -> AuditedTick:
    return AuditedTick(
        row["job"],
        row["fire_time"],
        verdict or BY_STATE[row["state"]],
        row["id"],
        row["started_at"],
        row["host"],
        row["attempt"],
        row["reason"] or row["error"],
    )


def _resolve(ticks: Sequence[AuditedTick]) -> list[AuditedTick]:
    """Mark each miss as resolved or not: made good by a later tick of the same job that ran."""
    latest_run: dict[str, datetime] = {}
    for tick in ticks:
        if tick.verdict is Verdict.RAN:
            latest_run[tick.job] = tick.fire_time
    return [
        tick
        if tick.verdict is not Verdict.MISSED
        else AuditedTick(
            tick.job,
            tick.fire_time,
            tick.verdict,
            tick.run_id,
            reason=tick.reason,
            resolved=latest_run.get(tick.job, tick.fire_time) > tick.fire_time,
        )
        for tick in ticks
    ]


async def unaccounted(connection: Connection) -> dict[str, int]:
    """Return, by job with a schedule, how many ticks have been due for over a minute and are in no ledger row."""
    until = await connection.fetchval(NOW, timeout=CALL_TIMEOUT_SECONDS) - ALLOWANCE
    histories = await schedules.read_histories(connection)
    last_ticks = await ledger.last_ticks(connection, list(histories.periods))
    counted = await asyncio.to_thread(_count, histories.periods, last_ticks, until)
    return {**counted, **dict.fromkeys(histories.unusable, 1)}  # how many nobody knows: enough to be alerted


def _count(
    histories: Mapping[str, Sequence[Period]], last_ticks: Mapping[str, datetime], until: datetime
) -> dict[str, int]:
    return {
        job: sum(1 for _ in islice(expected(histories[job], last, until), MOST_COUNTED))
        for job, last in last_ticks.items()
    }
