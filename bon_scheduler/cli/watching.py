"""
A run in the foreground, as its terminal sees it: how far it has come, and what was kept when it is interrupted.

What is shown is what the ledger holds, so it is what was committed.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from rich.markup import escape
from rich.status import Status

from bon_scheduler import ledger
from bon_scheduler.cli.ids import Kind, mark, shorten
from bon_scheduler.database import TRANSIENT_ERRORS, Pool
from bon_scheduler.ledger import OPEN_STATES
from bon_scheduler.report import Report, format_counts

__all__ = ["Watched", "watching"]

LOOK_SECONDS = 0.5
TELL_SECONDS = 5.0


class Watched:
    """The run that is watched, once it has begun."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.run_id: UUID | None = None

    def begun(self, run_id: UUID) -> None:
        """Take note of the run."""
        self.run_id = run_id


@asynccontextmanager
async def watching(report: Report, pool: Pool, job: str) -> AsyncIterator[Watched]:
    """Show, on a terminal, how far a run has come; when it is interrupted, say everywhere what was done and kept."""
    watched = Watched(job)
    following: asyncio.Task[None] | None = None
    interrupted = False
    with report.progress(f"{job}: beginning") as status:
        if status is not None:
            following = asyncio.create_task(_follow(status, pool, watched))
        try:
            yield watched
        except asyncio.CancelledError:
            interrupted = True
            raise
        finally:
            if following is not None:
                following.cancel()
            if interrupted:
                await _tell_interrupted(report, pool, watched)


async def _follow(status: Status, pool: Pool, watched: Watched) -> None:
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        if watched.run_id is None:
            continue
        try:
            async with pool.acquire() as connection:
                run = await ledger.find_run(connection, watched.run_id)
                caused = await ledger.descendants(connection, watched.run_id)
        except TRANSIENT_ERRORS:
            continue  # the run itself says what is wrong
        if run is not None:
            status.update(escape(_words(run, caused)))


def _words(run: ledger.Row, caused: list[ledger.Row]) -> str:
    counts = f": {format_counts(run['counts'], brief=True)}" if run["counts"] else ""
    ended = sum(each["state"] not in OPEN_STATES for each in caused)
    rest = f"; {ended:,} of the {len(caused):,} runs it caused have ended" if caused else ""
    return f"{run['job']} {run['state']}{counts}{rest}"


async def _tell_interrupted(report: Report, pool: Pool, watched: Watched) -> None:
    """Say what became of the run and of those it caused."""
    if watched.run_id is None:
        report.say(f"Interrupted. {watched.job} was not begun.")
        return
    try:
        async with asyncio.timeout(TELL_SECONDS), pool.acquire() as connection:
            run = await ledger.find_run(connection, watched.run_id)
            caused = await ledger.descendants(connection, watched.run_id)
            short = (await shorten(connection, Kind.RUN, [watched.run_id]))[watched.run_id]
    except TRANSIENT_ERRORS:
        report.say(f"Interrupted. See what became of it with: bon-scheduler show {watched.run_id}")
        return
    if run is None:
        return
    kept = f"What it committed stays: {format_counts(run['counts'])}." if run["counts"] else "It committed no counts."
    report.say(f"Interrupted. Run {mark(short)} of {run['job']} is {run['state']}. {kept}")
    if caused:
        states = ", ".join(f"{many:,} {state}" for state, many in sorted(Counter(r["state"] for r in caused).items()))
        waiting = any(each["state"] in OPEN_STATES for each in caused)
        report.say(
            f"Runs it caused: {states}.{' A `serve` goes on with those that have not ended.' if waiting else ''}"
        )
    report.say(f"More with: bon-scheduler show {short}")
