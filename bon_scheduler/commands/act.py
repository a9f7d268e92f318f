"""Commands that change more than one run: migrate, pause, resume."""

from bon_scheduler import operate, service
from bon_scheduler.commands.parsing import DONE, UsageError, person, reading, require_known
from bon_scheduler.config import Settings
from bon_scheduler.report import Report

__all__ = ["migrate", "pause", "resume"]


async def migrate(settings: Settings, report: Report) -> int:
    """Create or upgrade schema bon_scheduler."""
    applied = await service.prepare(settings)
    if report.as_json:
        report.document({"applied": applied})
    else:
        report.say(f"Applied: {', '.join(applied)}." if applied else "Schema bon_scheduler is up to date.")
    return DONE


async def pause(settings: Settings, report: Report, *, name: str, reason: str) -> int:
    """Have a job's ticks recorded as `paused` instead of run."""
    return await _change(settings, report, name, reason, pausing=True)


async def resume(settings: Settings, report: Report, *, name: str, reason: str) -> int:
    """Have a paused job's ticks run again."""
    return await _change(settings, report, name, reason, pausing=False)


async def _change(settings: Settings, report: Report, name: str, reason: str, *, pausing: bool) -> int:
    if not reason.strip():
        raise UsageError("--reason is empty. Say why: it is recorded, and shown by `jobs` and `audit`.")
    act = operate.pause_job if pausing else operate.resume_job
    async with reading(settings) as connection:
        await require_known(connection, name)
        changed = await act(connection, name, by=person(), reason=reason.strip())
    word = "paused" if pausing else "resumed"
    if report.as_json:
        report.document({"job": name, "paused": pausing, "changed": changed})
    elif changed:
        report.say(f"{name} is {word}.")
    else:
        report.say(f"{name} was {'paused' if pausing else 'not paused'} already: nothing changed.")
    return DONE
