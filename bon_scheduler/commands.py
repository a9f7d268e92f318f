"""
What each command does, given settings and somewhere to report: returns the exit status.

Exit status: 0 done, 1 a run ended badly or a check failed, 2 wrong usage, 4 already running.
"""

import asyncio
import difflib
import getpass
import os
import re
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import orjson
from pydantic import ValidationError

from bon_scheduler import db, history, ledger, once, service
from bon_scheduler.check import Level, check_deployment
from bon_scheduler.clock import Clock
from bon_scheduler.config import Settings
from bon_scheduler.jobs import AnyJob, Connection, Payload
from bon_scheduler.ledger import Origin, Request
from bon_scheduler.report import Report, format_counts, format_span
from bon_scheduler.runner import explain_payload
from bon_scheduler.timing import describe_cron, next_fire_time

__all__ = [
    "DONE",
    "UsageError",
    "check",
    "enqueue",
    "jobs",
    "migrate",
    "parse_instant",
    "parse_span",
    "run_once",
    "runs",
    "serve",
    "show",
]

DONE, BADLY, USAGE, BUSY = 0, 1, 2, 4
STATES = "queued, running, retrying, succeeded, partial, dead, held, cancelled, missed, paused"
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class UsageError(Exception):
    """The command was called wrongly; the message says what, which value and the remedy."""


def parse_span(text: str) -> timedelta:
    """Read `90s`, `10m`, `2h`, `7d` or `1w`."""
    match = re.fullmatch(r"(\d+)([smhdw])", text.strip())
    if not match:
        raise UsageError(f'"{text}" is not a span of time. Write a number and a unit: 90s, 10m, 2h, 7d, 1w.')
    return timedelta(**{UNITS[match[2]]: int(match[1])})


def parse_instant(text: str, settings: Settings) -> datetime:
    """Read an ISO instant; one without an offset is meant in BON_TIMEZONE."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(
            f'"{text}" is not an instant. Write it as 2026-11-23T06:00 or 2026-11-23T06:00:00+02:00.'
        ) from error
    return (instant if instant.tzinfo else instant.replace(tzinfo=settings.bon_timezone)).astimezone(UTC)


def _person() -> str:
    """Return who asks: the user's name, or the number where a container has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"


def _find_job(name: str) -> AnyJob:
    by_name = {job.name: job for job in service.JOBS}
    if name in by_name:
        return by_name[name]
    raise UsageError(f'Unknown job "{name}".{_did_you_mean(name, list(by_name))}')


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    guess = f' Did you mean "{close[0]}"?' if close else ""
    return f"{guess} List them with: python -m bon_scheduler jobs"


def _read_payload(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UsageError(f'--payload is not JSON: {error}. Write it as \'{{"key": "value"}}\'.') from error
    if not isinstance(value, dict):
        raise UsageError(f"--payload must be a JSON object, not {type(value).__name__}. Write {{}} for none.")
    return value


def _type_payload(job: AnyJob, value: Mapping[str, Any]) -> Payload:
    try:
        payload: Payload = job.payload.model_validate(value)
    except ValidationError as error:
        raise UsageError(explain_payload(job, error)) from error
    return payload


async def serve(settings: Settings) -> int:
    """Be the service until SIGTERM or SIGINT, then drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with service.serving(settings):
        await stop.wait()
    return DONE


async def run_once(
    settings: Settings,
    report: Report,
    clock: Clock,
    *,
    name: str,
    payload: str,
    fire_time: str | None,
    send: bool,
) -> int:
    """Make one run now, work through what it causes, and report."""
    job = _find_job(name)
    arguments = _read_payload(payload)
    if send:
        if "send" not in job.payload.model_fields:
            raise UsageError(f'"{name}" sends nothing by itself, so --send means nothing to it. Leave it out.')
        arguments["send"] = True
    now = clock.now()
    instant = parse_instant(fire_time, settings) if fire_time else now
    if instant > now:
        raise UsageError(f"--fire-time {fire_time} is in the future. Give one that has passed, or none for now.")
    async with service.machinery(settings, clock=clock) as parts:
        result = await once.run_once(
            parts.pool,
            parts.runner,
            parts.jobs,
            job=job,
            payload=_type_payload(job, arguments),
            fire_time=instant,
            asked_by=_person(),
            concurrency=settings.worker_concurrency,
        )
    if report.as_json:
        report.document(result.as_json())
    else:
        _show_result(report, result)
    return DONE if result.went_well else BADLY


def _show_result(report: Report, result: once.RunReport) -> None:
    rows = [
        (run["job"], run["state"], format_counts(run["counts"]), run["error"] or "")
        for run in [result.run, *result.caused]
    ]
    report.table(["job", "outcome", "counts", "error"], rows)
    report.say(f"run {result.run['run_id']}; more with: python -m bon_scheduler show {result.run['run_id']}")


async def jobs(settings: Settings, report: Report, clock: Clock) -> int:
    """List every job: schedule, next fire time, last run, waiting and dead runs."""
    schedules = service.schedules_of(settings)
    declared = {job.name: job for job in service.JOBS}
    async with _reading(settings) as connection:
        known = {row["name"]: row for row in await history.job_overview(connection)}
    overview = []
    for name in sorted(declared.keys() | known.keys()):
        row, cron = known.get(name, {}), schedules.get(name)
        upcoming = next_fire_time(cron.expression, settings.bon_timezone, clock.now()) if cron else None
        overview.append(
            {
                "job": name,
                "summary": declared[name].summary if name in declared else "its handler comes with other work",
                "schedule": cron.expression if cron else None,
                "schedule_in_words": describe_cron(cron.expression) if cron else None,
                "next_fire_time": upcoming,
                "last_run_id": row.get("last_run_id"),
                "last_state": row.get("last_state"),
                "last_finished_at": row.get("last_finished_at"),
                "waiting": row.get("waiting", 0),
                "dead": row.get("dead", 0),
            }
        )
    if report.as_json:
        report.document({"jobs": overview})
        return DONE
    report.table(
        ["job", "schedule", f"next ({settings.bon_timezone.key})", "last run", "ended", "waiting", "dead"],
        [
            (
                row["job"],
                row["schedule_in_words"] or "on demand",
                report.instant(row["next_fire_time"]),
                row["last_state"] or "—",
                report.instant(row["last_finished_at"]),
                row["waiting"],
                row["dead"],
            )
            for row in overview
        ],
    )
    return DONE


async def enqueue(
    settings: Settings,
    report: Report,
    clock: Clock,
    *,
    name: str,
    payload: str,
    key: str | None,
    after: str | None,
    priority: int,
) -> int:
    """Ask for a run; say its id, or which run holds the key."""
    arguments = _read_payload(payload)
    declared = {job.name: job for job in service.JOBS}
    if name in declared:
        arguments = _type_payload(declared[name], arguments).model_dump(mode="json")
    request = Request(
        name,
        arguments,
        dedupe_key=key,
        run_at=clock.now() + parse_span(after) if after else None,
        priority=priority,
        origin=Origin.PERSON,
        asked_by=_person(),
    )
    async with _reading(settings) as connection:
        if name not in declared:
            known = [row["name"] for row in await history.job_overview(connection)]
            if name not in known:
                raise UsageError(f'Unknown job "{name}".{_did_you_mean(name, [*known, *declared])}')
        run_id = await ledger.enqueue(connection, request)
        holder = await history.holder_of_key(connection, name, key) if run_id is None and key else None
    answer = {"run_id": run_id or (holder or {}).get("run_id"), "duplicate": run_id is None}
    if report.as_json:
        report.document(answer)
    elif run_id is not None:
        report.say(str(run_id))
    else:
        state = holder["state"] if holder else "unknown"
        report.say(f'The key "{key}" is held by run {answer["run_id"]}, which is {state}: nothing was enqueued.')
    return DONE


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
    async with _reading(settings) as connection:
        if job is not None:
            known = [row["name"] for row in await history.job_overview(connection)]
            if job not in known:
                raise UsageError(f'Unknown job "{job}".{_did_you_mean(job, known)}')
        rows = await history.list_runs(connection, job=job, state=state, since=started, limit=limit)
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
                row["state"],
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
    """Show one run: attempts, businesses, what caused it and what it caused."""
    try:
        run_id = UUID(run)
    except ValueError as error:
        raise UsageError(f'"{run}" is not a run\'s id. List runs with: python -m bon_scheduler runs') from error
    async with _reading(settings) as connection:
        found = await history.find_run(connection, run_id)
        if found is None:
            raise UsageError(f"No run {run_id}. List runs with: python -m bon_scheduler runs")
        attempts = await history.attempts_of(connection, run_id)
        businesses = await history.businesses_of(connection, run_id)
        caused = await history.caused_by(connection, run_id)
    if report.as_json:
        report.document({**found, "attempts": attempts, "businesses": businesses, "caused": caused})
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
    if caused:
        report.table(
            ["run", "job", "outcome", "counts"],
            [(row["run_id"], row["job"], row["state"], format_counts(row["counts"])) for row in caused],
            title="\nCaused",
        )
    return DONE


async def migrate(settings: Settings, report: Report) -> int:
    """Create or upgrade schema bon_scheduler."""
    applied = await service.prepare(settings)
    if report.as_json:
        report.document({"applied": applied})
    else:
        report.say(f"Applied: {', '.join(applied)}." if applied else "Schema bon_scheduler is up to date.")
    return DONE


async def check(settings: Settings, report: Report, clock: Clock) -> int:
    """Say whether this deployment is sound."""
    findings = await check_deployment(settings, clock)
    sound = all(finding.level is not Level.FAILURE for finding in findings)
    if report.as_json:
        keys = ("name", "level", "what", "remedy")
        report.document({"sound": sound, "findings": [{key: getattr(f, key) for key in keys} for f in findings]})
    else:
        report.table(["", "what", "found", "remedy"], [(f.level, f.name, f.what, f.remedy or "") for f in findings])
    return DONE if sound else BADLY


@asynccontextmanager
async def _reading(settings: Settings) -> AsyncIterator[Connection]:
    """Borrow a connection to a database whose schema is there."""
    async with db.open_pool(settings) as pool, pool.acquire() as connection:
        await db.require_schema(connection)
        yield connection
