"""
What the service does not do at present though it is asked to: by its settings, by a pause, by a brake.

`serve` logs each at start, and `check` has a row for each: a run that nobody makes leaves no other trace.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import structlog

from bon_scheduler import ledger, shaam
from bon_scheduler.config import Settings, switched_off
from bon_scheduler.jobs import Connection

__all__ = ["StoodAside", "find_stood_aside", "report_stood_aside"]

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class StoodAside:
    """Work that waits for a person; the texts name no person and no business."""

    name: str
    what: str
    remedy: str


async def find_stood_aside(connection: Connection) -> list[StoodAside]:
    """Return what the ledger holds back: paused jobs and businesses, held runs, the brake on consent."""
    return [each async for each in _look(connection)]


async def _look(connection: Connection) -> AsyncIterator[StoodAside]:
    for job in sorted(await ledger.paused_jobs(connection)):
        resume = f"`jobs` says why; end it with: bon-scheduler resume {job} --reason …"
        yield StoodAside("paused", f"{job} is paused: its ticks are not run", resume)
    if businesses := len(await ledger.paused_businesses(connection)):
        resume = "`jobs` lists them; end one with: bon-scheduler resume --business UUID --reason …"
        yield StoodAside("paused", f"{businesses} paused businesses are skipped by every job", resume)
    for job, runs in (await ledger.count_held(connection)).items():
        look = f"See why: bon-scheduler runs --job {job} --state held; then release or cancel."
        yield StoodAside("held", f"the brake holds {runs} runs of {job}", look)
    if (braked := await shaam.consent_brake(connection)).since is not None:
        since = f"{braked.since:%Y-%m-%d %H:%M} UTC"
        look = "See docs/operations.md, consent.braked."
        yield StoodAside(
            "consent", f"no owner is asked to consent again since {since}: too many grants are spent", look
        )


async def report_stood_aside(connection: Connection, settings: Settings) -> None:
    """Log each; as a warning unless the settings say so in so many words."""
    for off in switched_off(settings):
        level = log.info if off.chosen else log.warning
        level("service.stands_aside", name=off.name, what=off.what, remedy=off.remedy)
    for found in await find_stood_aside(connection):
        log.warning("service.stands_aside", name=found.name, what=found.what, remedy=found.remedy)
