"""
The brake: before anything commits, what a run would do is compared with what is normal.

It trips when the candidates are more than BRAKE_MIN_ROWS, and more than BRAKE_MAX_SHARE of all rows of their kind or
more than ten times the median of the last 14 runs. The run is then `held`: nothing has changed, and a person decides.
"""

from dataclasses import dataclass
from typing import Any

from bon_scheduler import JobContext
from bon_scheduler.config import Settings
from bon_scheduler.jobs import Connection, HeldError, Usual

__all__ = ["Candidates", "brake"]

TIMES_USUAL = 10


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


async def brake(ctx: JobContext, candidates: Candidates, *, on: Connection) -> None:
    """Raise HeldError when a run is about to do abnormally much, unless a person has released it."""
    settings = ctx.get(Settings)
    if ctx.released or candidates.number <= settings.brake_min_rows:
        return
    of_all = max(await on.fetchval(candidates.of_all, *candidates.arguments), candidates.number)
    usual = await ctx.usual(candidates.count, on=on)
    too_large_a_share = candidates.number > settings.brake_max_share * of_all
    too_unusual = usual.median is not None and candidates.number > TIMES_USUAL * usual.median
    if too_large_a_share or too_unusual:
        raise HeldError(
            _explain(candidates, of_all, usual, settings.brake_max_share if too_large_a_share else None, ctx),
            figures={"candidates": candidates.number, "of": of_all, "usual": round(usual.median or 0)},
        )


def _explain(candidates: Candidates, of_all: int, usual: Usual, share: float | None, ctx: JobContext) -> str:
    text = f"{candidates.number:,} of {of_all:,} {candidates.kind} {candidates.which}"
    if usual.median is None:
        text = f"first run: {text}"
    else:
        runs = f"the last {usual.runs} runs" if usual.runs > 1 else "the last run"
        text += f"; the median of {runs} is {usual.median:,.0f}"
    if share is not None:
        text += f", and more than {share:.0%} of all are abnormal"
    decide = "If that is right, release it once" if usual.median is None else "If that is as it should be, release it"
    command = f"run-once {ctx.job_name} --release-brake" if ctx.dry_run else f"release {ctx.run_id}"
    return f"{text}. Nothing was changed. {decide}: bon-scheduler {command} --reason …"
