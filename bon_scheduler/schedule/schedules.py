"""
What was in force when: each job's schedule history, which ticks and audits are computed from.

Every replica triggers by the history in the database, not by its own code, so two versions side by side
never disagree about what is due. Only one of the living `serve` processes writes it: the one of the highest
version, and of those the one that started last. An older version that restarts during a deploy changes
nothing; after a rollback, when the newer ones are gone, it becomes the one that writes. It also ends the schedule of
a job that it does not have, which was removed or renamed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID
from zoneinfo import ZoneInfo

import asyncpg
import structlog

from bon_scheduler.jobs import CatchUp, Connection, Cron
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS
from bon_scheduler.schedule.clocks import TOLERANCE
from bon_scheduler.schedule.timing import Period, check_cron

__all__ = ["Declaration", "Histories", "bring_back", "declare", "read_histories"]

log = structlog.get_logger()

# $1 worker. Whether this worker is the one whose schedules count.
IS_DECLARER = """
    select id = $1
      from bon_scheduler.workers
     where serves
       and last_word is not null
     order by bon_scheduler.numbers_of(version) desc, started_at desc, id
     limit 1
"""
# $1 job. BEFORE the history is read and written, so that no tick is recorded in between.
LOCK_JOB = "select last_tick from bon_scheduler.jobs where name = $1 for no key update"
# $1 job. Index: schedules_pkey.
IN_FORCE = """
    select expression, timezone, catch_up, grace
      from bon_scheduler.schedules
     where job = $1
     order by effective_from desc
     limit 1
"""
# $1 job, $2 effective from: timestamptz, $3 expression or null, $4 zone, $5 catch-up, $6 grace: interval,
# $7 version. From an instant after the job's last tick and after every period so far.
DECLARE = """
    insert into bon_scheduler.schedules
           (job, effective_from, expression, timezone, catch_up, grace, declared_by)
    select $1, greatest($2, j.last_tick, (select max(s.effective_from) + interval '1 microsecond'
                                            from bon_scheduler.schedules s
                                           where s.job = $1)),
           $3, $4, $5, $6, $7
      from bon_scheduler.jobs j
     where j.name = $1
    returning effective_from
"""
# $1 job, $2 effective from: timestamptz. A job owes nothing from before its first schedule.
BEGIN_TICKS = "update bon_scheduler.jobs set last_tick = $2 where name = $1 and last_tick is null"
# $1 now: timestamptz, which all clocks agree on, $2 jobs: text[]. Index: runs_tick. The jobs BEFORE their schedules, as
# `declare` locks them.
BRING_BACK = """
    with late as (
        select j.name, j.last_tick
          from bon_scheduler.jobs j
         where j.name = any ($2) and j.last_tick > $1
         order by j.name
           for no key update
    ), moved as (
        update bon_scheduler.schedules s
           set effective_from = $1
          from late l
         where s.job = l.name
           and s.effective_from = l.last_tick
           and not exists (select from bon_scheduler.schedules o
                            where o.job = s.job and o.effective_from <> s.effective_from)
           and not exists (select from bon_scheduler.runs r where r.job = s.job and r.origin = 'schedule')
        returning s.job
    )
    update bon_scheduler.jobs j
       set last_tick = $1
      from moved m
     where j.name = m.job
    returning j.name
"""
HISTORIES = """
    select job, bon_scheduler.shown(effective_from) as effective_from, expression, timezone, catch_up,
           extract(epoch from grace)::float8 as grace_seconds
      from bon_scheduler.schedules s
     order by job, s.effective_from
"""


@dataclass(frozen=True, slots=True)
class Declaration:
    """The schedules of one worker's version."""

    schedules: Mapping[str, Cron | None]
    """Every job of this version, None where it has no schedule."""
    zone: ZoneInfo
    worker: UUID
    version: str


@dataclass(frozen=True, slots=True)
class Histories:
    """What was in force when, by job, oldest first; and why it cannot be told of some."""

    periods: Mapping[str, Sequence[Period]]
    unusable: Mapping[str, str]
    """Jobs whose schedule in force cannot be read here: of another version or other time zone data, or damaged."""


async def declare(
    connection: Connection,
    declaration: Declaration,
    histories: Histories,
    *,
    now: datetime,
    first: datetime,
) -> list[str]:
    """
    Put these schedules in force from `now` (UTC, aware) on, where they differ from what is.

    `histories` is what `read_histories` gave. A job's first is in force from `first` on, which one clock names for all
    replicas. Does nothing unless this worker is the one whose schedules count. Returns the jobs whose schedule changed.
    """
    zone = declaration.zone
    wanted = dict.fromkeys(histories.periods) | dict(declaration.schedules)
    differing = {job: cron for job, cron in wanted.items() if _differs(histories.periods.get(job, ()), cron, zone)}
    if not differing or not await connection.fetchval(IS_DECLARER, declaration.worker, timeout=CALL_TIMEOUT_SECONDS):
        return []
    for job, cron in sorted(differing.items()):
        begin = now if job in histories.periods or job in histories.unusable else first
        await _declare_one(connection, job, _as_row(cron, zone), begin, declaration.version)
    return sorted(differing)


def _differs(history: Sequence[Period], cron: Cron | None, zone: ZoneInfo) -> bool:
    in_force = history[-1] if history else None
    if cron is None:
        return in_force is not None and in_force.cron is not None
    return in_force is None or (in_force.cron, in_force.zone.key) != (cron, zone.key)


async def bring_back(connection: Connection, histories: Histories, now: datetime) -> bool:
    """
    Put first schedules in force from `now` (UTC, aware) on that begin later; return whether there were any.

    They were declared by a clock that was ahead, and would fire when that instant comes, with no gap in an audit.
    `now` must be what all clocks agree on.
    """
    late = [
        job
        for job, periods in histories.periods.items()
        if len(periods) == 1 and periods[0].effective_from > now + TOLERANCE
    ]
    rows = await connection.fetch(BRING_BACK, now, late, timeout=CALL_TIMEOUT_SECONDS) if late else []
    for row in rows:
        log.warning("schedule.brought_back", job=row["name"], since=now)
    return bool(rows)


async def _declare_one(
    connection: Connection, job: str, wanted: tuple[str | None, str, str, timedelta], begin: datetime, version: str
) -> None:
    async with connection.transaction():
        await connection.execute(LOCK_JOB, job, timeout=CALL_TIMEOUT_SECONDS)
        row = await connection.fetchrow(IN_FORCE, job, timeout=CALL_TIMEOUT_SECONDS)
        if row is not None and tuple(row) == wanted:
            return  # another replica was first
        effective_from = await connection.fetchval(DECLARE, job, begin, *wanted, version, timeout=CALL_TIMEOUT_SECONDS)
        await connection.execute(BEGIN_TICKS, job, effective_from, timeout=CALL_TIMEOUT_SECONDS)
    log.info("schedule.declared", job=job, expression=wanted[0], since=effective_from)


def _as_row(cron: Cron | None, zone: ZoneInfo) -> tuple[str | None, str, str, timedelta]:
    policy = cron or Cron("")
    return (cron.expression if cron else None, zone.key, str(policy.catch_up), policy.grace)


async def read_histories(connection: Connection) -> Histories:
    """Read each job's schedule history. What cannot be read keeps no other job's from being read."""
    periods: dict[str, list[Period]] = {}
    unusable: dict[str, str] = {}
    for row in await connection.fetch(HISTORIES, timeout=CALL_TIMEOUT_SECONDS):
        job = row["job"]
        unusable.pop(job, None)  # only what is in force last matters
        try:
            periods.setdefault(job, []).append(_read_period(row))
        except (ValueError, OverflowError, OSError, KeyError) as error:
            unusable[job] = f"its schedule in the ledger cannot be read here: {error}"
    for job in unusable:
        periods.pop(job, None)
    return Histories({job: history for job, history in periods.items() if history}, unusable)


def _read_period(row: asyncpg.Record) -> Period:
    """Read one row; raises ValueError, OverflowError, OSError or KeyError."""
    if row["effective_from"] is None:
        raise ValueError("effective_from is no instant")
    cron, expression = None, row["expression"]
    if expression:
        if what := check_cron(expression):
            raise ValueError(f'"{expression}" {what}')
        cron = Cron(expression, CatchUp(row["catch_up"]), timedelta(seconds=row["grace_seconds"]))
    return Period(row["effective_from"], cron, ZoneInfo(row["timezone"]))
