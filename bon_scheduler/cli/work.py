"""Commands that work on runs: serve, run-once."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import structlog

from bon_scheduler import declared, engine, ledger, service
from bon_scheduler.cli.in_force import tell_pause
from bon_scheduler.cli.parsing import (
    BADLY,
    DONE,
    HELD,
    find_job,
    parse_instant,
    person,
    private_directory,
    read_payload,
    read_reason,
    reading,
    type_payload,
)
from bon_scheduler.cli.signals import LEAVING_SECONDS, end_now, stopping_on_signals, unless
from bon_scheduler.cli.usage import UsageError
from bon_scheduler.cli.watching import watching
from bon_scheduler.clock import Clock
from bon_scheduler.config import Settings, switched_off
from bon_scheduler.jobs import AnyJob
from bon_scheduler.ledger import OPEN_STATES
from bon_scheduler.report import Column, Report, add_counts, format_counts
from bon_scheduler.schedule import Clocks

__all__ = ["RunOnce", "run_once", "serve"]

log = structlog.get_logger()
WHY_NO_LETTER = ("already_sent", "no_recipient", "refused", "unknown", "paused")
LEAVING = timedelta(seconds=LEAVING_SECONDS)
"""How long leaving may take once attempts have had SHUTDOWN_SECONDS to finish."""


async def serve(settings: Settings, jobs: Sequence[AnyJob] = declared.JOBS) -> int:
    """Run the service until SIGTERM or SIGINT, then drain; a second signal ends it at once."""
    patience = timedelta(seconds=settings.shutdown_seconds) + LEAVING
    serving: service.Serving | None = None
    with stopping_on_signals(patience, lambda: serving.machinery.unanswered if serving else 0) as stop:
        async with AsyncExitStack() as stack:
            # Starting may hang, as the database may, and leaves nothing to drain.
            serving = await unless(stop, stack.enter_async_context(service.serving(settings, jobs=jobs)))
            await stop.wait()
        if serving is not None and (left := serving.machinery.runner.abandoned):
            # Their runs were given back and their transactions cut; nothing would end them.
            log.warning("service.left_handlers_behind", handlers=left)
            end_now(DONE)
    return DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOnce:
    """What `run-once` was told, as it was typed."""

    name: str
    payload: str
    fire_time: str | None
    send: bool
    dry_run: bool
    out: Path | None
    release_brake: bool
    reason: str | None


async def run_once(settings: Settings, report: Report, clock: Clock, told: RunOnce) -> int:
    """Make one run now, or pretend to, work through what it causes, and report."""
    job, out = find_job(told.name), told.out
    arguments = read_payload(told.payload)
    if told.send:
        if "send" not in job.payload.model_fields:
            raise UsageError(f'"{told.name}" sends nothing by itself, so --send means nothing to it. Leave it out.')
        arguments["send"] = True
    named = parse_instant(told.fire_time, settings) if told.fire_time else None
    if named is not None and named > clock.now():
        raise UsageError(f"--fire-time {told.fire_time} is in the future. Give one that has passed, or none for now.")
    typed, released_for = type_payload(job, arguments), _reason_to_release(told)
    clocks = Clocks(clock)
    async with reading(settings) as connection:
        await clocks.require_agreement(connection)
        pause = (await ledger.paused_jobs(connection)).get(told.name)
    if pause is not None and not told.dry_run:
        raise UsageError(
            f'"{told.name}" is paused {report.for_people(tell_pause(pause))}. Nothing was begun. '
            f"End the pause first: bon-scheduler resume {told.name} --reason …"
        )
    order = engine.Order(
        job=job, payload=typed, fire_time=named or clocks.now(), asked_by=person(settings), released_for=released_for
    )
    letters = 0
    if told.dry_run:
        async with AsyncExitStack() as stack:
            directory = None if out is None else stack.enter_context(private_directory("--out", out))
            runner = service.dry_runner(settings, clock=clocks, out=directory)
            dry_runner = await stack.enter_async_context(runner)
            stack.enter_context(report.progress(f"{told.name}: dry run"))
            try:
                result = await dry_runner.run(order)
            except asyncio.CancelledError:
                report.say("Interrupted. A dry run keeps nothing: everything was rolled back.")
                raise
        letters = dry_runner.kept.total()
    else:
        if out is not None:
            raise UsageError(
                "--out is where --dry-run writes the letters it would send. Give both, or leave --out out."
            )
        async with (
            service.machinery(settings, clock=clocks) as parts,
            watching(report, parts.control, told.name) as watched,
        ):
            result = await engine.run_once(
                parts.pool,
                parts.runner,
                parts.jobs,
                replace(order, begun=watched.begun),
                concurrency=settings.worker_concurrency,
            )
    if report.as_json:
        report.document(result.as_json())
    else:
        _show_result(report, result, settings)
        if out is not None:
            report.say(_tell_letters(letters, out, result))
    return HELD if result.held else DONE if result.went_well else BADLY


def _reason_to_release(told: RunOnce) -> str | None:
    """Return why the run may pass the brake; None: it may not."""
    if told.release_brake is (told.reason is None):
        raise UsageError("--release-brake and --reason TEXT go together. Give both or neither.")
    return None if told.reason is None else read_reason(told.reason)


def _tell_letters(letters: int, out: Path, result: engine.RunReport) -> str:
    """Tell how many letters a dry run wrote, and why it wrote none."""
    if letters:
        many = f"{letters:,} letters are" if letters > 1 else "1 letter is"
        return f"{many} in {out}, as .html, .txt and .eml."
    counts = add_counts(run["counts"] for run in [result.run, *result.caused])
    whys = {name: counts[name] for name in WHY_NO_LETTER if counts.get(name)}
    return f"No letter was written to {out}: none would be sent{f' ({format_counts(whys)})' if whys else ''}."


def _show_result(report: Report, result: engine.RunReport, settings: Settings) -> None:
    alike: dict[tuple[str, str, str], list[Mapping[str, int]]] = {}
    for run in [{**result.run, "error": result.why}, *result.caused]:
        why = "" if run["state"] == "held" else run["error"] or ""
        alike.setdefault((run["job"], run["state"], why), []).append(run["counts"])
    report.table(
        ["job", "state", "runs", Column("counts", wraps=20), Column("error", wraps=20)],
        [(job, state, len(c), format_counts(add_counts(c)), error) for (job, state, error), c in alike.items()],
    )
    for run in [{**result.run, "error": result.why}, *result.caused]:
        if run["state"] == "held":
            report.say(f"{run['job']} is held: {run['error']}")
    if waiting := {run["job"] for run in result.caused if run["state"] in OPEN_STATES}:
        report.say(f"Not done yet, because paused or without a handler here: {', '.join(sorted(waiting))}.")
    if result.run["dry_run"]:
        report.say("A dry run: everything was rolled back, nobody was called, nothing was sent.")
    report.say(f"run {result.run['run_id']}; more with: bon-scheduler show {result.run['run_id']}")
    counts = add_counts(run["counts"] for run in [result.run, *result.caused])
    kept_from_it = {"mail": counts.get("logged", 0) > 0, "shaam": "mocked" in counts}
    for off in switched_off(settings):
        if kept_from_it.get(off.name):
            report.say(f"Not done: {off.fault or f'{off.what}.'}")
