"""
Rehearse the night: what tonight's jobs would touch, and whether the brake would trip, while somebody is awake.

The brake's own questions are asked as if each job's next fire time were now, each in a read-only transaction: a run
that is rolled back would leave dead rows. What is found is kept in the ledger; tonight's runs are compared with it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg
import structlog

from bon_scheduler import CatchUp, Counts, Cron, JobContext, NoPayload, Retry, job
from bon_scheduler.config import Settings
from bon_scheduler.jobs import AnyJob, Connection, Rehearsed
from bon_scheduler.log import describe_error
from handlers.brake import Candidates, Judgement, judge
from handlers.draft_cleanup import draft_cleanup, stale_drafts
from handlers.overdue_detection import overdue_detection, unmarked_overdue
from handlers.overdue_digest import letters_owed, overdue_digest
from handlers.session_cleanup import expired_sessions, session_cleanup

__all__ = ["rehearsal"]

log = structlog.get_logger()
# $1 jobs: text[]. Index: pauses_pkey.
PAUSED = "select job from bon_scheduler.pauses where job = any ($1)"


@dataclass(frozen=True, slots=True)
class Part:
    """A job of the night."""

    job: AnyJob
    fires_with: AnyJob
    """The job by whose schedule it runs: its own, or the one that causes it."""
    count: Callable[[Connection, datetime, Settings], Awaitable[Candidates]]
    """Counts what it would do at a fire time."""


async def _drafts(connection: Connection, fire_time: datetime, _: Settings) -> Candidates:
    return await stale_drafts(connection, fire_time, now=fire_time)


async def _sessions(connection: Connection, fire_time: datetime, _: Settings) -> Candidates:
    return await expired_sessions(connection, fire_time, now=fire_time)


async def _invoices(connection: Connection, fire_time: datetime, settings: Settings) -> Candidates:
    as_of = fire_time.astimezone(settings.bon_timezone).date()
    return await unmarked_overdue(connection, as_of, now=fire_time)


async def _letters(connection: Connection, fire_time: datetime, settings: Settings) -> Candidates:
    return await letters_owed(connection, fire_time.astimezone(settings.bon_timezone).date())


PARTS = (
    Part(draft_cleanup, draft_cleanup, _drafts),
    Part(session_cleanup, session_cleanup, _sessions),
    Part(overdue_detection, overdue_detection, _invoices),
    Part(overdue_digest, overdue_detection, _letters),
)
DONE_NOW = frozenset({draft_cleanup.name, session_cleanup.name})
"""What may as well be done before the night: nobody is written to."""


@job(
    "rehearsal",
    schedule=Cron("0 22 * * *", catch_up=CatchUp.LATEST, grace=timedelta(hours=2)),
    retry=Retry(attempts=3),
)
async def rehearsal(ctx: JobContext, _: NoPayload) -> Counts:
    """Count what tonight's jobs would touch, and warn now where the brake would trip."""
    rehearsed, left_out = [], {"paused": 0, "unknown": 0}
    async with ctx.connection() as connection:
        paused = {row["job"] for row in await connection.fetch(PAUSED, [part.fires_with.name for part in PARTS])}
    for part in PARTS:
        fire_time = ctx.fires_next(part.fires_with.name)
        if fire_time is None:
            continue
        if part.fires_with.name in paused:
            left_out["paused"] += 1
            continue
        try:
            rehearsed.append(await _rehearse(ctx, part, fire_time))
        except asyncpg.PostgresConnectionError:
            raise
        except asyncpg.PostgresError as error:
            # Of this job alone, as where a privilege is missing.
            left_out["unknown"] += 1
            log.error("rehearsal.failed", of=part.job.name, error=describe_error(error))  # noqa: TRY400 - described
    counts = {each.job: each.candidates for each in rehearsed}
    counts["would_hold"] = sum(each.would_hold is not None for each in rehearsed)
    async with ctx.transaction() as tx:
        await ctx.keep_rehearsal(rehearsed, on=tx)
        counts |= {name: number for name, number in left_out.items() if number}
        return await ctx.finish(counts, on=tx, undone=left_out["unknown"] > 0)


async def _rehearse(ctx: JobContext, part: Part, fire_time: datetime) -> Rehearsed:
    async with ctx.connection() as connection, connection.transaction(readonly=True):
        candidates = await part.count(connection, fire_time, ctx.get(Settings))
        judged = await judge(ctx, candidates, on=connection, job=part.job.name)
    usual = None if judged.usual.median is None else round(judged.usual.median)
    found = Rehearsed(part.job.name, fire_time, judged.candidates, judged.of_all, usual, _why(part, judged))
    if found.would_hold is not None:
        log.warning("rehearsal.would_hold", of=found.job, at=fire_time.isoformat(), reason=found.would_hold)
    return found


def _why(part: Part, judged: Judgement) -> str | None:
    """Return why the brake would trip, and what a person can do before; None: it would not."""
    if judged.abnormal is None:
        return None
    command = "bon-scheduler"
    now = (
        f" To do it now: {command} run-once {part.job.name} --release-brake --reason …"
        if part.job.name in DONE_NOW
        else f" To keep it from beginning: {command} pause {part.fires_with.name} --reason …"
    )
    return f"{judged.abnormal}. The brake would hold the run until: {command} release RUN_ID --reason ….{now}"
