"""
Options and arguments that several commands take, and how each command is performed.

What a command needs is imported when it runs.
"""

import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bon_scheduler.cli.telling import complain

if TYPE_CHECKING:
    from bon_scheduler.config import Settings
    from bon_scheduler.report import Report

__all__ = [
    "AsJson",
    "BusinessId",
    "JobName",
    "MaybeJobName",
    "PayloadText",
    "Reason",
    "RunId",
    "RunIds",
    "perform",
]

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
RunId = Annotated[
    str,
    typer.Argument(metavar="RUN_ID|JOB", help="List them with: runs. Its first characters do; a job's: its last run."),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's name; list them with: jobs")]
MaybeJobName = Annotated[str | None, typer.Argument(metavar="JOB", help="A job's name; list them with: jobs")]
BusinessId = Annotated[
    str | None,
    typer.Option("--business", metavar="UUID", help="A business; its first characters do."),
]
PayloadText = Annotated[str, typer.Option("--payload", metavar="JSON", help="The run's arguments.")]

Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; it is recorded.")]
RunIds = Annotated[
    list[str] | None, typer.Argument(metavar="RUN_ID…", help="List them with: runs. First characters do.")
]


def perform(
    as_json: bool,
    call: "Callable[[Settings, Report], Coroutine[Any, Any, int]]",
    *,
    logs: bool = True,
    needs_all: bool = False,
) -> None:
    """Run a command. One that `needs_all` jobs is refused where one is broken; the others go on without it."""
    from bon_scheduler import declared
    from bon_scheduler.cli.signals import run
    from bon_scheduler.log import configure_logging, silence_logging
    from bon_scheduler.report import Report

    if needs_all:
        declared.require_sound()
    for fault in declared.FAULTS:
        complain(f"{fault} Going on without it.")
    settings = declared.read_settings()
    configure_logging(settings.log_level, settings.log_format)
    if not logs and sys.stderr.isatty():
        silence_logging()
    report = Report(as_json=as_json, zone=settings.bon_timezone)
    raise typer.Exit(run(_explaining(settings, call(settings, report))))


async def _explaining(settings: "Settings", command: Coroutine[Any, Any, int]) -> int:
    """Await a command; raise RoleRefusedError, which names the role, where the database refuses the role something."""
    import asyncpg

    from bon_scheduler.database import explain_refused

    try:
        return await command
    except asyncpg.InsufficientPrivilegeError as error:
        raise await explain_refused(settings, error) from error
