"""Commands that read the ledger: jobs, runs, show. They change nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any, TypeAlias
from uuid import UUID

import orjson

from bon_scheduler import declared, ledger, mail
from bon_scheduler.cli.ids import Kind, find_ids, shorten
from bon_scheduler.cli.parsing import (
    DONE,
    UsageError,
    parse_span,
    reading,
    require_known,
)
from bon_scheduler.cli.usage import STATES
from bon_scheduler.clock import Clock
from bon_scheduler.config import Settings
from bon_scheduler.jobs import AnyJob, Exclusive
from bon_scheduler.report import Column, Report, format_counts, format_distance, format_span
from bon_scheduler.schedule import describe_cron, fire_times

__all__ = ["Which", "jobs", "runs", "show"]

Rows: TypeAlias = Sequence[Mapping[str, Any]]
NEXT_SHOWN = 3
JOBS_COLUMNS = (
    "job",
    Column("schedule", wraps=9),
    "next",
    Column("last run", wraps=10),
    "waiting",
    "dead",
    Column("limits", wraps=10, importance=1),
)
RUNS_COLUMNS = (
    "run",
    "job",
    Column("fire time", importance=4),
    "outcome",
    Column("ended", importance=3),
    Column("took", importance=2),
    Column("attempt", importance=1),
    Column("what it did, or why not", wraps=24),
)


async def jobs(settings: Settings, report: Report, clock: Clock) -> int:
    """List every job: schedule, next fire time, last run, waiting and dead runs."""
    schedules = declared.schedules_of(settings)
    ours = {job.name: job for job in declared.JOBS}
    broken = {name: f"broken: {fault}" for fault in declared.FAULTS for name in fault.jobs}
    async with reading(settings) as connection:
        known = {row["name"]: row for row in await ledger.job_overview(connection)}
        paused = await ledger.paused_jobs(connection)
        left_alone = await ledger.paused_businesses(connection)
    overview = []
    for name in sorted(ours.keys() | known.keys() | broken.keys()):
        row, cron = known.get(name, {}), schedules.get(name)
        upcoming = fire_times(cron.expression, settings.bon_timezone, clock.now()) if cron else iter(())
        overview.append(
            {
                "job": name,
                "summary": ours[name].summary
                if name in ours
                else broken.get(name, "its handler comes with other work"),
                "schedule": cron.expression if cron else None,
                "limits": _limits(ours[name], cron is not None) if name in ours else [],
                "schedule_in_words": describe_cron(cron.expression) if cron else None,
                "next_fire_times": list(islice(upcoming, NEXT_SHOWN)),
                "paused": paused.get(name),
                "last_run_id": row.get("last_run_id"),
                "last_state": row.get("last_state"),
                "last_finished_at": row.get("last_finished_at"),
                "waiting": row.get("waiting", 0),
                "dead": row.get("dead", 0),
            }
        )
    if report.as_json:
        report.document({"jobs": overview, "paused_businesses": {str(key): why for key, why in left_alone.items()}})
        return DONE
    report.table(JOBS_COLUMNS, [_job_row(row, clock.now()) for row in overview], empty="No jobs are declared.")
    if left_alone:
        report.table(["paused business", "why"], list(left_alone.items()), title="\nSkipped by every job")
    if any(row["dead"] for row in overview):
        report.say(
            "\nDead runs: see why with `runs --state dead` and `show RUN_ID`; mend the cause, then "
            "`retry RUN_ID --reason …` or `retry --dead --job JOB --reason …`."
        )
    return DONE


def _job_row(row: Mapping[str, Any], now: datetime) -> list[object]:
    upcoming = [format_distance(instant, now) for instant in row["next_fire_times"][:1]]
    ended = format_distance(row["last_finished_at"], now) if row["last_finished_at"] else ""
    return [
        row["job"],
        (row["schedule_in_words"] or "on demand").removeprefix("At "),
        "broken"
        if row["summary"].startswith("broken: ")
        else "paused"
        if row["paused"]
        else upcoming[0]
        if upcoming
        else "—",
        f"{row['last_state']} {ended}".rstrip() if row["last_state"] else "—",
        row["waiting"] or "—",
        row["dead"] or "—",
        ", ".join(row["limits"]) or "—",
    ]


def _limits(job: AnyJob, scheduled: bool) -> list[str]:
    """Return what bounds how many runs of a job work at once."""
    alone = ledger.exclusive(job, scheduled)
    words = {Exclusive.NO: None, Exclusive.JOB: "one at once", Exclusive.BUSINESS: "one a business"}[alone]
    return [
        *([words] if words else []),
        *([f"{job.at_once} at once"] if job.at_once else []),
        *([f"{job.at_once_here} a replica"] if job.at_once_here else []),
        *(["mail rate"] if job.sends_mail else []),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Which:
    """Which runs `runs` was told to list, as it was typed."""

    job: str | None
    state: str | None
    since: str | None
    limit: int


async def runs(settings: Settings, report: Report, clock: Clock, which: Which) -> int:
    """List runs, newest first."""
    job, state, since = which.job, which.state, which.since
    if state is not None and state not in STATES.split(", "):
        raise UsageError(f'"{state}" is not a state. The states are: {STATES}.')
    started = clock.now() - parse_span(since) if since else None
    async with reading(settings) as connection:
        if job is not None:
            await require_known(connection, job)
        rows = await ledger.list_runs(connection, job=job, state=state, since=started, limit=which.limit)
        short = await shorten(connection, Kind.RUN, [row["run_id"] for row in rows])
    if report.as_json:
        report.document({"runs": rows})
        return DONE
    asked = [f"{name} {value}" for name, value in (("job", job), ("state", state), ("since", since)) if value]
    report.table(
        RUNS_COLUMNS,
        [_run_row(row, short, report, clock.now()) for row in rows],
        empty=f"No run matches: {', '.join(asked)}." if asked else "No runs yet.",
    )
    return DONE


def _run_row(row: ledger.Row, short: Mapping[UUID | None, str], report: Report, now: datetime) -> list[object]:
    return [
        short[row["run_id"]],
        row["job"],
        report.day_and_time(row["fire_time"], now),
        f"{row['state']} (dry run)" if row["dry_run"] else row["state"],
        format_distance(row["finished_at"], now),
        format_span(row["started_at"], row["finished_at"]),
        row["attempt"],
        _did(row),
    ]


def _did(row: Mapping[str, Any]) -> str:
    """Return a run's or an outcome's counts, and its error, as far as there are any."""
    counts = format_counts(row["counts"], brief=True) if row["counts"] else ""
    return "; ".join(part for part in (counts, row.get("error")) if part) or "—"


async def show(settings: Settings, report: Report, clock: Clock, *, run: str) -> int:
    """Show one run: attempts, businesses, what caused it and what it caused, what operators did to it."""
    async with reading(settings) as connection:
        (run_id,) = await find_ids(connection, Kind.RUN, [run])
        found = await ledger.find_run(connection, run_id)
        if found is None:
            raise UsageError(f"No run {run_id}. List runs with: python -m bon_scheduler runs")
        lists = {
            "attempts": await ledger.attempts_of(connection, run_id),
            "businesses": await ledger.businesses_of(connection, run_id),
            "caused": await ledger.caused_by(connection, run_id),
            "actions": await ledger.actions_on(connection, run_id),
            "deliveries": await mail.deliveries_of(connection, run_id),
        }
        short = {
            **await shorten(connection, Kind.RUN, [row["run_id"] for row in lists["caused"]]),
            **await shorten(connection, Kind.DELIVERY, [row["delivery_id"] for row in lists["deliveries"]]),
        }
    if report.as_json:
        report.document({**found, **lists})
        return DONE
    _show_facts(report, found, clock.now())
    _show_lists(report, lists, short)
    return DONE


def _show_facts(report: Report, run: ledger.Row, now: datetime) -> None:
    instants = ("fire_time", "run_at", "enqueued_at", "started_at", "finished_at")
    facts = dict(run)
    for name in instants:
        if run[name] is not None:
            facts[name] = f"{report.instant(run[name])} ({format_distance(run[name], now)})"
    facts["payload"] = orjson.dumps(run["payload"]).decode() if run["payload"] else None
    facts["counts"] = format_counts(run["counts"]) if run["counts"] else None
    report.facts(facts)


def _show_lists(
    report: Report, lists: Mapping[str, Sequence[Mapping[str, Any]]], short: Mapping[UUID | None, str]
) -> None:
    report.table(
        ["attempt", "outcome", "started", "took", Column("host", importance=1), Column("error", wraps=16)],
        [
            (
                row["attempt"],
                row["outcome"] or "running",
                report.instant(row["started_at"]),
                format_span(row["started_at"], row["ended_at"]),
                row["host"],
                row["error"] or "",
            )
            for row in lists["attempts"]
        ],
        title="\nAttempts",
        empty="\nNobody has begun it.",
    )
    tables: list[tuple[str, str, Sequence[Column | str], Callable[[Mapping[str, Any]], Sequence[object]]]] = [
        (
            "businesses",
            "Businesses",
            ["business", "outcome", Column("what it did, or why not", wraps=20)],
            lambda row: (row["business_id"], row["outcome"], _did(row)),
        ),
        (
            "deliveries",
            "Letters",
            ["delivery", "business", "day", "outcome", Column("reply", wraps=12)],
            lambda row: (
                short[row["delivery_id"]],
                row["business_id"],
                row["as_of"],
                row["state"],
                row["reply"] or "",
            ),
        ),
        (
            "caused",
            "Caused",
            ["run", "job", "outcome", Column("counts", wraps=20)],
            lambda row: (short[row["run_id"]], row["job"], row["state"], format_counts(row["counts"], brief=True)),
        ),
        (
            "actions",
            "Operators",
            ["when", "action", "by", Column("reason", wraps=20)],
            lambda row: (report.instant(row["at"]), row["action"], row["by"], row["reason"]),
        ),
    ]
    for name, title, columns, cells in tables:
        if lists[name]:
            report.table(columns, [cells(row) for row in lists[name]], title=f"\n{title}")
