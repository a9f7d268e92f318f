"""
The brake: before anything commits, what a run would do is compared with what is normal.

It trips when there are more than BRAKE_MIN_ROWS candidates and one of two holds: they are more than BRAKE_MAX_SHARE of
all rows of their kind, or more than ten times the median of the last 14 runs. The run is then `held`: nothing has
changed, and a person decides.
"""

from dataclasses import dataclass
from typing import Any

import structlog

from bon_scheduler import JobContext
from bon_scheduler.config import Settings
from bon_scheduler.jobs import Connection, HeldError, Usual

__all__ = ["Candidates", "Judgement", "brake", "judge"]

log = structlog.get_logger()
TIMES_USUAL = 10
TIMES_REHEARSED, ROWS_REHEARSED = 2, 100
"""By how much a night may differ from its rehearsal without a warning: both must be exceeded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a run would change or send."""

    number: int
    count: str
    """Under which name the job counts what it does to them."""
    kind: str
    """All rows of their kind, in words, as in "29,000 of 31,000 drafts"."""
    which: str
    """What they have in common, as in "are older than 30 days"."""
    of_all: str
    """SQL that counts all rows of their kind."""
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a run would do, beside what is normal."""

    candidates: int
    of_all: int
    usual: Usual
    abnormal: str | None
    """Why the brake trips, in words with the figures; None: it does not."""


async def brake(ctx: JobContext, candidates: Candidates, *, on: Connection) -> None:
    """Raise HeldError when a run is about to do abnormally much, unless a person has released it."""
    if not ctx.dry_run:
        await _compare(ctx, candidates.number, on)
    if ctx.released or candidates.number <= ctx.get(Settings).brake_min_rows:
        return
    judged = await judge(ctx, candidates, on=on)
    if judged.abnormal is None:
        return
    first = judged.usual.median is None
    decide = "If that is right, release it once" if first else "If that is as it should be, release it"
    command = f"run-once {ctx.job_name} --release-brake" if ctx.dry_run else f"release {ctx.run_id}"
    raise HeldError(
        f"{judged.abnormal}. Nothing was changed. {decide}: bon-scheduler {command} --reason …",
        figures={"candidates": judged.candidates, "of": judged.of_all, "usual": round(judged.usual.median or 0)},
    )


async def judge(ctx: JobContext, candidates: Candidates, *, on: Connection, job: str | None = None) -> Judgement:
    """Compare what would be done with what is normal for `job`; None: for the one that runs."""
    settings = ctx.get(Settings)
    of_all = max(await on.fetchval(candidates.of_all, *candidates.arguments), candidates.number)
    usual = await ctx.usual(candidates.count, on=on, job=job)
    too_large_a_share = candidates.number > settings.brake_max_share * of_all
    too_unusual = usual.median is not None and candidates.number > TIMES_USUAL * usual.median
    abnormal = None
    if candidates.number > settings.brake_min_rows and (too_large_a_share or too_unusual):
        abnormal = _explain(candidates, of_all, usual, settings.brake_max_share if too_large_a_share else None)
    return Judgement(candidates.number, of_all, usual, abnormal)


async def _compare(ctx: JobContext, number: int, on: Connection) -> None:
    """Log how far the night is from what its rehearsal said, if there was one."""
    rehearsed = await ctx.compare_with_rehearsal(number, on=on)
    if rehearsed is None:
        return
    least, most = sorted((rehearsed, number))
    far = most - least > ROWS_REHEARSED and most > TIMES_REHEARSED * least
    (log.warning if far else log.info)("rehearsal.compared", rehearsed=rehearsed, candidates=number)


def _explain(candidates: Candidates, of_all: int, usual: Usual, share: float | None) -> str:
    text = f"{candidates.number:,} of {of_all:,} {candidates.kind} {candidates.which}"
    if usual.median is None:
        text = f"first run: {text}"
    else:
        runs = f"the last {usual.runs} runs" if usual.runs > 1 else "the last run"
        text += f"; the median of {runs} is {usual.median:,.0f}"
    if share is not None:
        text += f", and more than {share:.0%} of all are abnormal"
    return text
