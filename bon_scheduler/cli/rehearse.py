"""What tonight's jobs would touch: the command `rehearse`."""

from collections.abc import Mapping, Sequence
from typing import Any

from bon_scheduler import engine, ledger, service
from bon_scheduler.cli.parsing import BADLY, DONE, HELD, find_job, person, reading
from bon_scheduler.cli.rehearsed import number
from bon_scheduler.clock import SystemClock
from bon_scheduler.config import Settings
from bon_scheduler.report import Report
from bon_scheduler.schedule import Clocks

__all__ = ["rehearse"]

JOB = "rehearsal"
PUBLIC = ("job", "fire_time", "candidates", "of", "usual", "verdict", "reason")


async def rehearse(settings: Settings, report: Report) -> int:
    """Run the job `rehearsal` now, and report what it found."""
    job, clocks = find_job(JOB), Clocks(SystemClock())
    async with reading(settings) as connection:
        await clocks.require_agreement(connection)
    order = engine.Order(job=job, payload=job.payload(), fire_time=clocks.now(), asked_by=person(settings))
    async with service.machinery(settings, clock=clocks) as parts:
        result = await engine.run_once(
            parts.pool, parts.runner, parts.jobs, order, concurrency=settings.worker_concurrency
        )
        async with parts.pool.acquire() as connection:
            rows = await ledger.rehearsals_of(connection, result.run["run_id"])
    held = any(row["reason"] for row in rows)
    if report.as_json:
        report.document(
            {
                **{name: result.run[name] for name in ("run_id", "state", "counts")},
                "error": result.why,
                "would_hold": held,
                "jobs": [{name: row[name] for name in PUBLIC} for row in rows],
            }
        )
    else:
        _tell(report, rows, result)
    return HELD if held else DONE if result.went_well else BADLY


def _tell(report: Report, rows: Sequence[Mapping[str, Any]], result: engine.RunReport) -> None:
    report.table(
        ["job", "at", "candidates", "of", "usual", "verdict"],
        [
            (
                row["job"],
                f"{row['fire_time'].astimezone(report.zone):%m-%d %H:%M}",
                f"{row['candidates']:,}",
                f"{row['of']:,}",
                number(row["usual"]),
                row["verdict"],
            )
            for row in rows
        ],
        empty="Nothing was rehearsed: no job of the night has a schedule, or each is paused.",
    )
    for row in rows:
        if row["reason"]:
            report.say(f"{row['job']} would be held: {row['reason']}")
    counts = result.run["counts"]
    if counts.get("paused"):
        report.say(f"Left out, because a person has paused them: {counts['paused']}. See: bon-scheduler jobs")
    if not result.went_well:
        report.say(f"Not all could be counted: {result.why or 'see the log, and: bon-scheduler check'}")
