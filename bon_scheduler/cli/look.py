"""Commands that read the ledger: jobs, runs, show. They change nothing."""

from itertools import islice

from bon_scheduler import declared, ledger, mail
from bon_scheduler.cli.parsing import (
    DONE,
    UsageError,
    parse_span,
    read_run_ids,
    reading,
    require_known,
)
from bon_scheduler.cli.usage import STATES
from bon_scheduler.clock import Clock
from bon_scheduler.config import Settings
from bon_scheduler.jobs import AnyJob, Exclusive
from bon_scheduler.report import Report, format_counts, format_span
from bon_scheduler.schedule import describe_cron, fire_times

__all__ = ["jobs", "runs", "show"]

NEXT_SHOWN = 3


async def jobs(settings: Settings, report: Report, clock: Clock) -> int:
    """List every job: schedule, next fire time, last run, waiting and dead runs."""
    schedules = declared.schedules_of(settings)
    ours = {job.name: job for job in declared.JOBS}
    async with reading(settings) as connection:
        known = {row["name"]: row for row in await ledger.job_overview(connection)}
        paused = await ledger.paused_jobs(connection)
        left_alone = await ledger.paused_businesses(connection)
    overview = []
    for name in sorted(ours.keys() | known.keys()):
        row, cron = known.get(name, {}), schedules.get(name)
        upcoming = fire_times(cron.expression, settings.bon_timezone, clock.now()) if cron else iter(())
        overview.append(
            {
                "job": name,
                "summary": ours[name].summary if name in ours else "its handler comes with other work",
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
    report.table(
        ["job", "schedule", f"next ({settings.bon_timezone.key})", "limits", "last run", "ended", "waiting", "dead"],
        [
            (
                row["job"],
                row["schedule_in_words"] or "on demand",
                ", ".join(f"{report.instant(instant)[5:-3]}" for instant in row["next_fire_times"]) or "—",
                ", ".join(row["limits"]) or "—",
                "paused" if row["paused"] else row["last_state"] or "—",
                report.instant(row["last_finished_at"]),
                row["waiting"],
                row["dead"],
            )
            for row in overview
        ],
    )
    if left_alone:
        report.table(["paused business", "why"], list(left_alone.items()), title="\nSkipped by every job")
    if any(row["dead"] for row in overview):
        report.say(
            "\nDead runs: see why with `runs --state dead` and `show RUN_ID`; mend the cause, then "
            "`retry RUN_ID --reason …` or `retry --dead --job JOB --reason …`."
        )
    return DONE


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


async def runs(
    settings: Settings,
    report: Report,
    clock: Clock,
    *,
    job: str | None,
    state: str | None,
    since: str | None,
    limit: int,
) -> int:
    """List runs, newest first."""
    if state is not None and state not in STATES.split(", "):
        raise UsageError(f'"{state}" is not a state. The states are: {STATES}.')
    started = clock.now() - parse_span(since) if since else None
    async with reading(settings) as connection:
        if job is not None:
            await require_known(connection, job)
        rows = await ledger.list_runs(connection, job=job, state=state, since=started, limit=limit)
    if report.as_json:
        report.document({"runs": rows})
        return DONE
    report.table(
        ["run", "job", "fire time", "outcome", "attempt", "took", "counts", "error"],
        [
            (
                row["run_id"],
                row["job"],
                report.instant(row["fire_time"]),
                f"{row['state']} (dry run)" if row["dry_run"] else row["state"],
                row["attempt"],
                format_span(row["started_at"], row["finished_at"]),
                format_counts(row["counts"]),
                row["error"] or "",
            )
            for row in rows
        ],
    )
    return DONE


async def show(settings: Settings, report: Report, *, run: str) -> int:
    """Show one run: attempts, businesses, what caused it and what it caused, what operators did to it."""
    (run_id,) = read_run_ids([run])
    async with reading(settings) as connection:
        found = await ledger.find_run(connection, run_id)
        if found is None:
            raise UsageError(f"No run {run_id}. List runs with: python -m bon_scheduler runs")
        attempts = await ledger.attempts_of(connection, run_id)
        businesses = await ledger.businesses_of(connection, run_id)
        caused = await ledger.caused_by(connection, run_id)
        actions = await ledger.actions_on(connection, run_id)
        letters = await mail.deliveries_of(connection, run_id)
    if report.as_json:
        lists = {"attempts": attempts, "businesses": businesses, "caused": caused, "actions": actions}
        report.document({**found, **lists, "deliveries": letters})
        return DONE
    instants = ("fire_time", "run_at", "enqueued_at", "started_at", "finished_at")
    report.facts(
        {
            **{
                name: report.instant(found[name]) if name in instants and found[name] else found[name] for name in found
            },
            "counts": format_counts(found["counts"]),
        }
    )
    report.table(
        ["attempt", "outcome", "started", "took", "host", "error"],
        [
            (
                row["attempt"],
                row["outcome"] or "running",
                report.instant(row["started_at"]),
                format_span(row["started_at"], row["ended_at"]),
                row["host"],
                row["error"] or "",
            )
            for row in attempts
        ],
        title="\nAttempts",
    )
    if businesses:
        report.table(
            ["business", "outcome", "counts", "error"],
            [
                (row["business_id"], row["outcome"], format_counts(row["counts"]), row["error"] or "")
                for row in businesses
            ],
            title="\nBusinesses",
        )
    if letters:
        report.table(
            ["delivery", "business", "day", "outcome", "reply"],
            [
                (row["delivery_id"], row["business_id"], row["as_of"], row["state"], row["reply"] or "")
                for row in letters
            ],
            title="\nDeliveries",
        )
    if caused:
        report.table(
            ["run", "job", "outcome", "counts"],
            [(row["run_id"], row["job"], row["state"], format_counts(row["counts"])) for row in caused],
            title="\nCaused",
        )
    if actions:
        report.table(
            ["when", "action", "by", "reason"],
            [(report.instant(row["at"]), row["action"], row["by"], row["reason"]) for row in actions],
            title="\nOperators",
        )
    return DONE
