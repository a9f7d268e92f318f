"""Commands that change something: migrate, adopt, pause and resume jobs and businesses, retry, cancel, resend."""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from bon_scheduler import ledger, mail, service
from bon_scheduler.cli.ids import Kind, find_ids
from bon_scheduler.cli.parsing import (
    DONE,
    person,
    read_reason,
    reading,
    require_known,
)
from bon_scheduler.cli.usage import UsageError
from bon_scheduler.config import Settings
from bon_scheduler.engine import pass_seconds
from bon_scheduler.ledger import Action, Changed
from bon_scheduler.report import Report

__all__ = ["adopt", "cancel", "migrate", "pause", "release", "resend", "resume", "retry"]

BECOMES = {Action.RETRY: "queued", Action.CANCEL: "cancelled", Action.RELEASE: "queued"}


async def migrate(settings: Settings, report: Report) -> int:
    """Create or upgrade schema bon_scheduler."""
    applied = await service.prepare(settings)
    if report.as_json:
        report.document({"applied": applied})
    else:
        report.say(f"Applied: {', '.join(applied)}." if applied else "Schema bon_scheduler is up to date.")
    return DONE


async def adopt(settings: Settings, report: Report, *, reason: str) -> int:
    """Have the ledger live where these settings lead, so that whoever serves there goes on."""
    why = read_reason(reason)
    caller = ledger.Caller.of(settings)
    async with reading(settings) as connection:
        what = await ledger.adopt(connection, caller, by=person(), reason=why)
        place = (await ledger.find_place(connection)).place
    if report.as_json:
        report.document({"adopted": True, "was": what, "place": str(place)})
    else:
        report.say(f"{what}.")
        report.say(f"It lives here from now on ({place}). Whoever serves here goes on within seconds.")
    return DONE


async def pause(settings: Settings, report: Report, *, name: str | None, business: str | None, reason: str) -> int:
    """Have a job's ticks recorded as `paused` instead of run, or every job skip a business."""
    return await _change(settings, report, name, business, reason, pausing=True)


async def resume(settings: Settings, report: Report, *, name: str | None, business: str | None, reason: str) -> int:
    """Undo `pause`."""
    return await _change(settings, report, name, business, reason, pausing=False)


async def _change(
    settings: Settings, report: Report, name: str | None, business: str | None, reason: str, *, pausing: bool
) -> int:
    if (name is None) is (business is None):
        raise UsageError("Say what: either a JOB or --business UUID. List jobs with: python -m bon_scheduler jobs")
    why, by = read_reason(reason), person()
    async with reading(settings) as connection:
        if name is not None:
            target: dict[str, str | UUID] = {"job": name}
            await require_known(connection, name)
            act = ledger.pause_job if pausing else ledger.resume_job
            changed = await act(connection, name, by=by, reason=why)
        else:
            (business_id,) = await find_ids(connection, Kind.BUSINESS, [business or ""])
            target = {"business_id": business_id}
            if pausing and not await ledger.knows_business(connection, business_id):
                raise UsageError(f"BON has no business {business_id}. Its id is in BON's table businesses.")
            act_on = ledger.pause_business if pausing else ledger.resume_business
            changed = await act_on(connection, business_id, by=by, reason=why)
    if report.as_json:
        report.document({**target, "paused": pausing, "changed": changed})
        return DONE
    what = name or f"Business {target['business_id']}"
    if changed:
        report.say(f"{what} is {'paused' if pausing else 'resumed'}.")
    else:
        report.say(f"{what} was {'paused' if pausing else 'not paused'} already: nothing changed.")
    return DONE


async def resend(settings: Settings, report: Report, *, delivery: str, reason: str) -> int:
    """Send a letter again that is `unknown`, knowing that it may arrive twice."""
    why = read_reason(reason)
    async with reading(settings) as connection:
        (delivery_id,) = await find_ids(connection, Kind.DELIVERY, [delivery])
        run_id = await mail.release(connection, delivery_id, by=person(), reason=why)
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
        raise UsageError("Say which runs: either RUN_ID… or --dead. List them with: python -m bon_scheduler runs")
    if job is not None and not dead:
        raise UsageError("--job narrows --dead, and means nothing to runs that are named. Leave it out.")
    why, by = read_reason(reason), person()
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
        raise UsageError(
            "Say which runs: either RUN_ID… or --waiting --job JOB. List them with: python -m bon_scheduler runs"
        )
    if waiting is (job is None):
        raise UsageError("--waiting and --job JOB go together: all runs of one job that wait. Give both or neither.")
    why, by = read_reason(reason), person()
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
        raise UsageError("Say which runs: RUN_ID…. List them with: python -m bon_scheduler runs --state held")
    why, by = read_reason(reason), person()
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
