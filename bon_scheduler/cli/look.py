"""Commands that list what the ledger holds: jobs, runs. They change nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from typing import Any
from uuid import UUID

from bon_scheduler import declared, ledger
from bon_scheduler.cli.ids import Kind, find_ids, mark, shorten
from bon_scheduler.cli.in_force import (
    is_handled,
    read_in_force,
    tell_liveness,
    tell_pause,
    tell_unhandled,
    unhandled,
)
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
from bon_scheduler.ledger import MOST_COUNTED, Pause
from bon_scheduler.report import Column, Report, format_counts, format_distance, format_span
from bon_scheduler.schedule import describe_cron, fire_times

__all__ = ["Which", "describe", "jobs", "runs"]

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
    "state",
    Column("ended", importance=3),
    Column("took", importance=2),
    Column("attempt", importance=1),
    Column("what it did, or why not", wraps=24),
)
BUSINESS_COLUMNS = (
    *("run", "job", "at", "state"),
    *(Column("for it, or why not", wraps=12), Column("letters", wraps=7)),
)
FOR_ALL_COLUMNS = (
    *("run", "job", "at", "state"),
    *("runs", Column("why", wraps=24)),
)
OTHER_WORK = "its handler comes with other work"
ELSEWHERE = "the service has its handler, this version has not"
MOST_FOR_ALL = 5
"""Of the runs that did nothing for any business."""
WAITS = frozenset({"queued", "retrying"})
BUSINESS_SPAN = "7d"
"""How far back `runs --business` looks without --since."""


async def jobs(settings: Settings, report: Report, clock: Clock) -> int:
    """List every job: schedule, next fire time, last run, waiting and dead runs, pauses; and whether anybody works."""
    ours = {job.name: job for job in declared.JOBS}
    broken = {name: f"broken: {fault}" for fault in declared.FAULTS for name in fault.jobs}
    async with reading(settings) as connection:
        known = {row["name"]: row for row in await ledger.job_overview(connection)}
        paused = await ledger.paused_jobs(connection)
        left_alone = await ledger.paused_businesses(connection)
        in_force = await read_in_force(connection, settings)
    overview = []
    for name in sorted(ours.keys() | known.keys() | broken.keys()):
        row, (cron, zone) = known.get(name, {}), in_force.crons.get(name, (None, settings.bon_timezone))
        pause = paused.get(name)
        begin = clock.now() if pause is None or pause.until is None else pause.until
        promised = cron is not None and (pause is None or pause.until is not None)
        upcoming = fire_times(cron.expression, zone, begin) if cron and promised else iter(())
        overview.append(
            {
                "job": name,
                "summary": ours[name].summary
                if name in ours
                else broken.get(name, ELSEWHERE if is_handled(name, in_force.beats) else OTHER_WORK),
                "handled": is_handled(name, in_force.beats),
                "schedule": cron.expression if cron else None,
                "limits": _limits(ours[name], cron is not None) if name in ours else [],
                "schedule_in_words": describe_cron(cron.expression) if cron else None,
                "next_fire_times": list(islice(upcoming, NEXT_SHOWN)),
                "paused": asdict(pause) if pause else None,
                "last_run_id": row.get("last_run_id"),
                "last_state": row.get("last_state"),
                "last_finished_at": row.get("last_finished_at"),
                "waiting": row.get("waiting", 0),
                "dead": row.get("dead", 0),
            }
        )
    if report.as_json:
        report.document(
            {
                "jobs": overview,
                "paused_businesses": {str(key): asdict(why) for key, why in left_alone.items()},
                "serving": in_force.serving,
                "workers": [asdict(beat) for beat in in_force.beats],
                "differences": in_force.differences,
            }
        )
        return DONE
    report.table(JOBS_COLUMNS, [_job_row(row, clock.now()) for row in overview], empty="No jobs are declared.")
    _tell_paused(report, paused, left_alone)
    for line in in_force.differences:
        report.say(f"\n{line}")
    if any(row["dead"] for row in overview):
        report.say(
            "\nDead runs: see why with `bon-scheduler runs --state dead` and `bon-scheduler show RUN_ID`; mend the "
            "cause, then `bon-scheduler retry RUN_ID --reason …` or `bon-scheduler retry --dead --job JOB --reason …`."
        )
    # Of a job that nobody has, as long as nobody asks for it, there is nothing to say.
    tell_unhandled(report, (row["job"] for row in overview if row["waiting"] or row["job"] in ours), in_force.beats)
    tell_liveness(report, in_force.beats)
    return DONE


def _tell_paused(report: Report, paused: Mapping[str, Pause], left_alone: Mapping[UUID, Pause]) -> None:
    if paused:
        rows = [(job, tell_pause(pause)) for job, pause in sorted(paused.items())]
        report.table(
            ["paused job", Column("since when, by whom, why", wraps=30)], rows, title="\nNothing of it is begun"
        )
    if left_alone:
        rows = [(str(key), tell_pause(pause)) for key, pause in left_alone.items()]
        columns = ("paused business", Column("since when, by whom, why", wraps=30))
        report.table(columns, rows, title="\nSkipped by every job")


def _job_row(row: Mapping[str, Any], now: datetime) -> list[object]:
    upcoming = [format_distance(instant, now) for instant in row["next_fire_times"][:1]]
    ended = format_distance(row["last_finished_at"], now) if row["last_finished_at"] else ""
    return [
        row["job"],
        (row["schedule_in_words"] or "on demand").removeprefix("At "),
        "broken"
        if row["summary"].startswith("broken: ")
        else " ".join([*(["paused"] if row["paused"] else []), *upcoming]) or "—",
        f"{row['last_state']} {ended}".rstrip() if row["last_state"] else "—",
        _counted(row["waiting"]),
        _counted(row["dead"]),
        ", ".join(row["limits"]) or "—",
    ]


def _counted(runs: int) -> str:
    """Return how many runs were counted; of more than are counted, that there are more."""
    return f"{runs:,}{'+' if runs >= MOST_COUNTED else ''}" if runs else "—"


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
    business: str | None = None


async def runs(settings: Settings, report: Report, clock: Clock, which: Which) -> int:
    """List runs, newest first."""
    job, state, since = which.job, which.state, which.since
    if state is not None and state not in STATES.split(", "):
        raise UsageError(f'"{state}" is not a state. The states are: {STATES}.')
    if which.business is not None:
        return await _runs_for_business(settings, report, clock, which)
    started = clock.now() - parse_span(since) if since else None
    async with reading(settings) as connection:
        beats = await ledger.heartbeats(connection)
        if job is not None:
            await require_known(connection, job)
        rows = await ledger.list_runs(connection, job=job, state=state, since=started, limit=which.limit + 1)
        rows, more = rows[: which.limit], len(rows) > which.limit
        short = await shorten(connection, Kind.RUN, [row["run_id"] for row in rows])
    if report.as_json:
        unhandled_jobs = sorted({row["job"] for row in rows if row["state"] in WAITS and unhandled(row["job"], beats)})
        report.document({"runs": rows, "more": more, "unhandled": unhandled_jobs})
        return DONE
    asked = [f"{name} {value}" for name, value in (("job", job), ("state", state), ("since", since)) if value]
    report.table(
        RUNS_COLUMNS,
        [_run_row(row, short, report, clock.now()) for row in rows],
        empty=f"No run matches: {', '.join(asked)}." if asked else "No runs yet.",
    )
    _tell_more(report, which, more)
    tell_unhandled(report, (row["job"] for row in rows if row["state"] in WAITS), beats)
    tell_liveness(report, beats)
    return DONE


def _tell_more(report: Report, which: Which, more: bool) -> None:
    if more:
        many = f"These are the newest {which.limit:,}, and there are more."
        report.say(f"\n{many} List them with a higher --limit, or fewer with --job, --state or --since.")


async def _runs_for_business(settings: Settings, report: Report, clock: Clock, which: Which) -> int:
    """List what recent runs did for a business, letters included; apart, those that did nothing for anybody."""
    since = clock.now() - parse_span(which.since or BUSINESS_SPAN)
    async with reading(settings) as connection:
        if which.job is not None:
            await require_known(connection, which.job)
        (business_id,) = await find_ids(connection, Kind.BUSINESS, [which.business or ""])
        rows = await ledger.runs_for_business(
            connection, business_id, since=since, job=which.job, state=which.state, limit=which.limit + 1
        )
        rows, more = rows[: which.limit], len(rows) > which.limit
        for_all = await ledger.stopped_for_all(connection, since=since, job=which.job, state=which.state)
        pause = (await ledger.paused_businesses(connection)).get(business_id)
        known = await ledger.knows_business(connection, business_id)
        short = await shorten(connection, Kind.RUN, [row["run_id"] for row in [*rows, *for_all]])
        letters = await shorten(connection, Kind.DELIVERY, [each for row in rows for each in row["delivery_ids"]])
        beats = await ledger.heartbeats(connection)
    if report.as_json:
        paused = asdict(pause) if pause else None
        found = {"runs": rows, "more": more, "stopped_for_all": for_all}
        report.document({"business_id": business_id, "paused": paused, **found})
        return DONE
    report.table(
        BUSINESS_COLUMNS,
        [_business_row(row, short, letters, report, clock.now()) for row in rows],
        empty=f"No run of the last {which.since or BUSINESS_SPAN} did anything for business {business_id}.",
    )
    _tell_more(report, which, more)
    if not known:
        report.say(f"\nBON has no business {business_id}.")
    if pause is not None:
        report.say(f"\nEvery job skips this business {tell_pause(pause)}.")
    for row in rows:
        for delivery, state in zip(row["delivery_ids"], row["letters"], strict=True):
            if state == "unknown":
                report.say(f"\nSend the letter again, knowingly: bon-scheduler resend {letters[delivery]} --reason …")
    _tell_stopped(report, for_all, short, clock.now())
    tell_unhandled(report, (row["job"] for row in rows if row["state"] in WAITS), beats)
    tell_liveness(report, beats)
    return DONE


def _tell_stopped(
    report: Report, rows: Sequence[Mapping[str, Any]], short: Mapping[UUID | None, str], now: datetime
) -> None:
    """List, of each job, the newest run that did nothing for any business, and how many there are."""
    if not rows:
        return
    report.table(
        FOR_ALL_COLUMNS,
        [
            (
                mark(short[row["run_id"]]),
                row["job"],
                report.day_and_time(row["at"], now),
                row["state"],
                f"{row['alike']:,}",
                row["error"] or "—",
            )
            for row in rows[:MOST_FOR_ALL]
        ],
        title="\nStopped for all businesses, the newest of each job",
    )
    if any(row["alike"] > 1 for row in rows) or len(rows) > MOST_FOR_ALL:
        jobs = f"and {len(rows) - MOST_FOR_ALL} more jobs; " if len(rows) > MOST_FOR_ALL else ""
        report.say(
            f"{jobs}list each with: bon-scheduler runs --state {max(rows, key=lambda row: int(row['alike']))['state']}"
        )


def _business_row(
    row: Mapping[str, Any],
    short: Mapping[UUID | None, str],
    letters: Mapping[UUID | None, str],
    report: Report,
    now: datetime,
) -> list[object]:
    found = [
        f"{state} ({mark(letters[key])})" if state == "unknown" else state
        for key, state in zip(row["delivery_ids"], row["letters"], strict=True)
    ]
    did = describe(row)
    return [
        mark(short[row["run_id"]]),
        row["job"],
        report.day_and_time(row["at"], now),
        row["state"],
        f"{row['outcome']}: {did}" if row["outcome"] and did != "—" else row["outcome"] or did,
        ", ".join(found) or "—",
    ]


def _run_row(row: ledger.Row, short: Mapping[UUID | None, str], report: Report, now: datetime) -> list[object]:
    return [
        mark(short[row["run_id"]]),
        row["job"],
        report.day_and_time(row["fire_time"], now),
        f"{row['state']} (dry run)" if row["dry_run"] else row["state"],
        format_distance(row["finished_at"], now),
        format_span(row["started_at"], row["finished_at"]),
        row["attempt"],
        describe(row),
    ]


def describe(row: Mapping[str, Any]) -> str:
    """Return a run's or an outcome's counts, and its error, as far as there are any."""
    counts = format_counts(row["counts"], brief=True) if row["counts"] else ""
    return "; ".join(part for part in (counts, row.get("error")) if part) or "—"
