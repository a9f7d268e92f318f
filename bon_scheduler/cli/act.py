"""Commands that change something: migrate, adopt, pause and resume jobs and businesses, retry, cancel, resend."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

import asyncpg

from bon_scheduler import database, ledger, mail, service
from bon_scheduler.addresses import read_database_address
from bon_scheduler.cli.ids import Kind, find_ids
from bon_scheduler.cli.parsing import (
    DONE,
    is_span,
    parse_instant,
    parse_span,
    person,
    read_reason,
    reading,
    require_known,
)
from bon_scheduler.cli.usage import UsageError
from bon_scheduler.clock import SystemClock
from bon_scheduler.config import Settings
from bon_scheduler.engine import pass_seconds
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import Action, Changed
from bon_scheduler.report import Report

__all__ = ["Target", "adopt", "cancel", "migrate", "pause", "release", "resend", "resume", "retry"]

BECOMES = {Action.RETRY: "queued", Action.CANCEL: "cancelled", Action.RELEASE: "queued"}


async def migrate(settings: Settings, report: Report) -> int:
    """Create or upgrade schema bon_scheduler."""
    try:
        applied = await service.prepare(settings)
    except asyncpg.InsufficientPrivilegeError as error:
        raise await database.explain_refused(settings, error, migrating=True) from error
    address = read_database_address(settings.listen_url)
    async with database.connect(settings.listen_url) as connection:
        name, missing = await database.name_of(connection), await database.missing_tables(connection)
    where = str(replace(address, database=name))
    if report.as_json:
        report.document({"applied": applied, "database": name, "at": where, "missing_tables": missing})
        return DONE
    if applied:
        report.say(f"Applied in {where}: {', '.join(applied)}.")
    else:
        report.say(f"Schema bon_scheduler is up to date in {where}.")
    if missing:
        which = (
            "none of BON's tables is"
            if len(missing) == len(database.COLUMNS)
            else f"{', '.join(missing)} of BON are not"
        )
        report.say(
            f"Warning: {which} there yet, and jobs do nothing without them. They may come later; where BON's are in "
            "another database, correct DATABASE_URL and migrate that."
        )
    return DONE


async def adopt(settings: Settings, report: Report, *, reason: str) -> int:
    """Have the ledger live where these settings lead, so that whoever serves there goes on."""
    why = read_reason(reason)
    caller = ledger.Caller.of(settings)
    async with reading(settings) as connection:
        what = await ledger.adopt(connection, caller, by=person(settings), reason=why)
        place = (await ledger.find_place(connection)).place
    if report.as_json:
        report.document({"adopted": True, "was": what, "place": str(place)})
    else:
        report.say(f"{what}.")
        report.say(f"It lives here from now on ({place}). Whoever serves here goes on within seconds.")
    return DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is paused or resumed, as it was typed."""

    job: str | None
    business: str | None
    until: str | None = None


async def pause(settings: Settings, report: Report, told: Target, *, reason: str) -> int:
    """Have nothing of a job begun, its ticks recorded as `paused`; or have every job skip a business."""
    if told.until is not None and told.job is None:
        raise UsageError("--until ends the pause of a job. Leave it out, and resume the business when it is time.")
    until = _read_until(told.until, settings) if told.until is not None else None
    why, by = read_reason(reason), person(settings)
    async with reading(settings) as connection:
        target = await _find_target(connection, told)
        waiting = running = 0
        if isinstance(target, str):
            changed = await ledger.pause_job(connection, target, by=by, reason=why, until=until)
            waiting, running = await ledger.open_counts(connection, target)
        else:
            if not await ledger.knows_business(connection, target):
                raise UsageError(f"BON has no business {target}. Its id is in BON's table businesses.")
            changed = await ledger.pause_business(connection, target, by=by, reason=why)
    _tell_pause(report, target, changed, pausing=True)
    if not report.as_json and isinstance(target, str):
        if changed:
            report.say("While it is, nothing of it is begun, whoever asks for it; its ticks are recorded as paused.")
            ends = f"by itself at {until:%Y-%m-%d %H:%M:%S} UTC, or" if until else "only"
            report.say(f"The pause ends {ends} with: bon-scheduler resume {target} --reason …")
        if waiting:
            report.say(f"{waiting:,} {'run waits' if waiting == 1 else 'runs wait'} for the end of the pause.")
        if running:
            report.say(f"{running:,} {'is running and goes' if running == 1 else 'are running and go'} on to the end.")
    return DONE


async def resume(settings: Settings, report: Report, told: Target, *, reason: str) -> int:
    """Undo `pause`."""
    why, by = read_reason(reason), person(settings)
    async with reading(settings) as connection:
        target = await _find_target(connection, told)
        if isinstance(target, str):
            changed = await ledger.resume_job(connection, target, by=by, reason=why)
        else:
            changed = await ledger.resume_business(connection, target, by=by, reason=why)
    _tell_pause(report, target, changed, pausing=False)
    return DONE


def _read_until(text: str, settings: Settings) -> datetime:
    now = SystemClock().now()
    until = now + parse_span(text) if is_span(text) else parse_instant(text, settings)
    if until <= now:
        raise UsageError(f"--until {text} has passed. Give a span such as 2h, or an instant that is to come.")
    return until


async def _find_target(connection: Connection, told: Target) -> str | UUID:
    """Return the job's name, or the business's id; raises UsageError."""
    if (told.job is None) is (told.business is None):
        raise UsageError("Say what: either a JOB or --business UUID. List jobs with: bon-scheduler jobs")
    if told.job is not None:
        await require_known(connection, told.job)
        return told.job
    return (await find_ids(connection, Kind.BUSINESS, [told.business or ""]))[0]


def _tell_pause(report: Report, target: str | UUID, changed: bool, *, pausing: bool) -> None:
    if report.as_json:
        key = "job" if isinstance(target, str) else "business_id"
        report.document({key: target, "paused": pausing, "changed": changed})
        return
    what = target if isinstance(target, str) else f"Business {target}"
    if changed:
        report.say(f"{what} is {'paused' if pausing else 'resumed'}.")
    else:
        report.say(f"{what} was {'paused' if pausing else 'not paused'} already: nothing changed.")


async def resend(settings: Settings, report: Report, *, delivery: str, reason: str) -> int:
    """Send a letter again that is `unknown`, knowing that it may arrive twice."""
    why = read_reason(reason)
    async with reading(settings) as connection:
        (delivery_id,) = await find_ids(connection, Kind.DELIVERY, [delivery])
        run_id = await mail.release(connection, delivery_id, by=person(settings), reason=why)
    if report.as_json:
        report.document({"delivery_id": delivery_id, "run_id": run_id})
    else:
        report.say(f"Delivery {delivery_id} is sent once more, by run {run_id}.")
    return DONE


async def retry(
    settings: Settings, report: Report, *, runs: Sequence[str], dead: bool, job: str | None, reason: str
) -> int:
    """Queue runs again that ended dead, partial or cancelled."""
    if bool(runs) is dead:
        raise UsageError("Say which runs: either RUN_ID… or --dead. List them with: bon-scheduler runs")
    if job is not None and not dead:
        raise UsageError("--job narrows --dead, and means nothing to runs that are named. Leave it out.")
    why, by = read_reason(reason), person(settings)
    async with reading(settings) as connection:
        if job is not None:
            await require_known(connection, job)
        if dead:
            with report.progress("queueing dead runs again"):
                changed = await ledger.retry_dead(connection, job, by=by, reason=why)
        else:
            run_ids = await find_ids(connection, Kind.RUN, runs)
            changed = await ledger.change_all(connection, Action.RETRY, run_ids, by=by, reason=why)
    _tell(settings, report, Action.RETRY, changed)
    return DONE


async def cancel(
    settings: Settings, report: Report, *, runs: Sequence[str], waiting: bool, job: str | None, reason: str
) -> int:
    """Cancel runs that wait, run or are dead."""
    if bool(runs) is waiting:
        raise UsageError("Say which runs: either RUN_ID… or --waiting --job JOB. List them with: bon-scheduler runs")
    if waiting is (job is None):
        raise UsageError("--waiting and --job JOB go together: all runs of one job that wait. Give both or neither.")
    why, by = read_reason(reason), person(settings)
    async with reading(settings) as connection:
        if job is not None:
            await require_known(connection, job)
            with report.progress("cancelling runs that wait"):
                changed = await ledger.cancel_waiting(connection, job, by=by, reason=why)
        else:
            run_ids = await find_ids(connection, Kind.RUN, runs)
            changed = await ledger.change_all(connection, Action.CANCEL, run_ids, by=by, reason=why)
    _tell(settings, report, Action.CANCEL, changed)
    return DONE


async def release(settings: Settings, report: Report, *, runs: Sequence[str], reason: str) -> int:
    """Queue runs that the brake holds, to pass it once."""
    if not runs:
        raise UsageError("Say which runs: RUN_ID…. List them with: bon-scheduler runs --state held")
    why, by = read_reason(reason), person(settings)
    async with reading(settings) as connection:
        run_ids = await find_ids(connection, Kind.RUN, runs)
        changed = await ledger.change_all(connection, Action.RELEASE, run_ids, by=by, reason=why)
    _tell(settings, report, Action.RELEASE, changed)
    return DONE


def _tell(settings: Settings, report: Report, action: Action, changed: Sequence[Changed]) -> None:
    running = sum(run.was == "running" for run in changed)
    seconds = pass_seconds(timedelta(seconds=settings.lease_seconds))
    if report.as_json:
        report.document(
            {
                "action": action,
                "changed": len(changed),
                "runs": [{"run_id": run.run_id, "job": run.job, "was": run.was} for run in changed],
                "stops_within_seconds": seconds if running else None,
            }
        )
        return
    for (job, was), count in sorted(Counter((run.job, run.was) for run in changed).items()):
        report.say(f"{job}: {count:,} {'run that was' if count == 1 else 'runs that were'} {was} → {BECOMES[action]}.")
    if running:
        report.say(f"What was running can commit nothing more, and its worker stops it within {seconds:g} s.")
    if not changed:
        report.say("There is no such run: nothing changed.")
