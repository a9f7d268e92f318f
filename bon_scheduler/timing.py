"""
Which fire times are due: pure functions of an expression, a zone, and two instants.

Cron semantics are Debian cron's, through cronsim: a fixed time in the hour that
a spring night skips runs once, just after the gap; one in the hour that an
autumn night repeats runs the first time; wildcards follow elapsed time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from bon_scheduler.jobs import CatchUp, Cron

__all__ = ["Tick", "check_cron", "describe_cron", "fire_times", "next_fire_time", "plan"]

SUPERSEDED = "superseded by a later tick"
BEYOND_GRACE = "noticed {late} late, beyond its grace of {grace}"
SKIPPED = "nobody was awake for it, and its catch-up is skip"
PUNCTUAL = timedelta(seconds=60)
"""A fire time noticed within this is on time, whatever the catch-up."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A due fire time (UTC) and what is to become of it: run, or missed for a reason."""

    fire_time: datetime
    missed: str | None = None


def check_cron(expression: str) -> str | None:
    """Say what is wrong with a cron expression, or None."""
    try:
        next(CronSim(expression, datetime(2026, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        return f"is not a cron expression: {str(error).lower()}; five fields, or six with seconds first"
    except StopIteration:
        return "never fires; name a date that exists"
    return None


def describe_cron(expression: str) -> str:
    """Return a cron expression in words."""
    return CronSim(expression, datetime(2026, 1, 1, tzinfo=UTC)).explain()


def fire_times(expression: str, zone: ZoneInfo, after: datetime) -> Iterator[datetime]:
    """Yield the fire times later than `after`, in order, in UTC."""
    last = after
    for local in CronSim(expression, after.astimezone(zone)):
        instant = local.astimezone(UTC)
        # Started inside the repeated hour, cronsim may name an instant that is past.
        if instant > last:
            last = instant
            yield instant


def next_fire_time(expression: str, zone: ZoneInfo, after: datetime) -> datetime:
    """Return the first fire time later than `after`, in UTC."""
    return next(fire_times(expression, zone, after))


def plan(cron: Cron, zone: ZoneInfo, last: datetime, now: datetime) -> list[Tick]:
    """
    Say what is to become of each fire time in (last, now], in order.

    `last` is the job's last accounted fire time; both instants are aware.
    """
    due = list(takewhile(lambda instant: instant <= now, fire_times(cron.expression, zone, last)))
    return [Tick(instant, _why_missed(cron, instant, due[-1], now)) for instant in due]


def _why_missed(cron: Cron, instant: datetime, newest: datetime, now: datetime) -> str | None:
    late = now - instant
    if late > cron.grace:
        return BEYOND_GRACE.format(late=_whole_seconds(late), grace=_whole_seconds(cron.grace))
    if cron.catch_up is CatchUp.SKIP and late > PUNCTUAL:
        return SKIPPED
    if cron.catch_up is CatchUp.LATEST and instant != newest:
        return SUPERSEDED
    return None


def _whole_seconds(span: timedelta) -> timedelta:
    return timedelta(seconds=int(span.total_seconds()))
