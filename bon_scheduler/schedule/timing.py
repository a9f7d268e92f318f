"""
Which fire times are due: pure functions of a schedule's history and two instants.

Cron semantics are Debian cron's, through cronsim: a fixed time in the hour that a spring night skips
runs once, just after the gap, and so do several of one job; one in the hour that an autumn night repeats
runs the first time; wildcards follow elapsed time. An expression with seconds (six fields) always follows
elapsed time, unless its seconds are 0, which is the same as leaving them out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from bon_scheduler.jobs import CatchUp, Cron

__all__ = [
    "Period",
    "Tick",
    "Transition",
    "check_cron",
    "describe_cron",
    "expected",
    "fire_times",
    "next_fire_time",
    "overstays",
    "plan",
    "transitions",
]

SUPERSEDED = "superseded by a later tick"
BEYOND_GRACE = "beyond grace: noticed {late} late, its grace is {grace}"
DOWN = "down: nobody was awake for it, and its catch-up is skip"
PUNCTUAL = timedelta(seconds=60)
"""A fire time noticed within this is on time, whatever the catch-up."""
FIELDS_WITH_SECONDS = 6
DAY = timedelta(days=1)
BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Period:
    """What was in force from an instant on: a schedule and its zone, or none."""

    effective_from: datetime
    """The first fire time is later than this (UTC, aware)."""
    cron: Cron | None
    zone: ZoneInfo


@dataclass(frozen=True, slots=True)
class Tick:
    """A due fire time (UTC) and what is to become of it: run, or missed for a reason."""

    fire_time: datetime
    missed: str | None = None


@dataclass(frozen=True, slots=True)
class Transition:
    """An instant (UTC) at which a zone's clocks change, and by how much."""

    instant: datetime
    change: timedelta


def _simulate(expression: str, start: datetime) -> CronSim:
    fields = expression.split()
    if len(fields) == FIELDS_WITH_SECONDS and not fields[0].strip("0"):
        expression = " ".join(fields[1:])
    return CronSim(expression, start)


def check_cron(expression: str) -> str | None:
    """Return what is wrong with a cron expression, or None."""
    try:
        next(_simulate(expression, BEGINNING))
    except CronSimError as error:
        return f"is not a cron expression: {str(error).lower()}; five fields, or six with seconds first"
    except StopIteration:
        return "never fires; name a date that exists"
    return None


def describe_cron(expression: str) -> str:
    """Return a cron expression in words that agree with what fires."""
    return _simulate(_as_it_fires(expression), BEGINNING).explain()


def _as_it_fires(expression: str) -> str:
    """
    Write an expression as what it amounts to.

    The words are made of the text: they take a step that is longer than its range for one that repeats, and a day of
    the month or the week that excludes nothing for a condition, though with the other it means every day.
    """
    simulated, fields = _simulate(expression, BEGINNING), expression.split()
    second, minute, hour, day, month, weekday = range(len(fields) - 6, len(fields))
    for field, values in (
        *([(second, simulated.seconds)] if second >= 0 else []),
        (minute, simulated.minutes),
        (hour, simulated.hours),
        (day, simulated.days),
        (month, simulated.months),
    ):
        if "/" in fields[field] and len(values) == 1:
            fields[field] = str(next(iter(values)))
    any_day = set(range(1, 32)) <= set(simulated.days)
    any_weekday = len({each % 7 for each in simulated.weekdays if isinstance(each, int)}) == 7  # noqa: PLR2004 - a week
    either = not simulated.day_and and (any_day or any_weekday)
    fields[day] = "*" if any_day or either else fields[day]
    fields[weekday] = "*" if any_weekday or either else fields[weekday]
    return " ".join(fields)


def fire_times(expression: str, zone: ZoneInfo, after: datetime) -> Iterator[datetime]:
    """Yield the fire times later than `after`, in order, in UTC."""
    simulation = _simulate(expression, after.astimezone(zone))
    if simulation.fixup_tz is None:
        yield from _in_elapsed_time(expression, zone, after)
        return
    last = after
    for local in simulation:
        instant = local.astimezone(UTC)
        # Started inside the repeated hour, cronsim may name an instant that is past.
        if instant > last:
            last = instant
            yield instant


def _in_elapsed_time(expression: str, zone: ZoneInfo, after: datetime) -> Iterator[datetime]:
    """
    Yield the fire times of an expression with wildcards, from one change of the clocks to the next.

    Between two changes the zone is a constant offset. Left to cross one by itself, cronsim 2.8 is wrong
    where midnight is skipped (Cairo, Beirut, Santiago) or half an hour is (Lord Howe).
    """
    begin, seen, offset = after, after, _offset(zone, after)
    while True:
        for wall in _simulate(expression, begin.astimezone(UTC) + offset):
            instant = wall - offset
            changes = transitions(zone, seen, instant)
            if changes:
                # A second BEFORE the change, otherwise a fire time at its very instant would be lost.
                begin, seen = changes[0].instant - timedelta(seconds=1), changes[0].instant
                offset = _offset(zone, seen)
                break
            seen = instant
            yield instant
        else:
            return


def next_fire_time(expression: str, zone: ZoneInfo, after: datetime) -> datetime:
    """Return the first fire time later than `after`, in UTC."""
    return next(fire_times(expression, zone, after))


def expected(history: Sequence[Period], after: datetime, until: datetime) -> Iterator[tuple[datetime, Cron]]:
    """
    Yield each fire time in (after, until] with the schedule that named it, in order.

    `history` is ordered by `effective_from`; a period ends where the next begins.
    """
    for index, period in enumerate(history):
        begin = max(after, period.effective_from)
        end = min(until, history[index + 1].effective_from) if index + 1 < len(history) else until
        if period.cron is None or begin >= end:
            continue
        for instant in fire_times(period.cron.expression, period.zone, begin):
            if instant > end:
                break
            yield instant, period.cron


def plan(history: Sequence[Period], last: datetime, now: datetime) -> list[Tick]:
    """
    Say what is to become of each fire time in (last, now], in order.

    `last` is the job's last accounted fire time; both instants are aware.
    """
    due = list(expected(history, last, now))
    return [Tick(instant, _why_missed(cron, instant, due[-1][0], now)) for instant, cron in due]


def overstays(history: Sequence[Period], since: datetime, now: datetime, due: datetime | None) -> bool:
    """
    Whether the tick of `since` keeps the next one waiting for longer than a period, or will: it is not `due` before.

    A period is the time from one fire time to the next, of the schedule in force at `now`; without one, a day.
    """
    period = history[-1]
    if period.cron is None:
        ends = since + 2 * DAY
    else:
        ends = next(islice(fire_times(period.cron.expression, period.zone, since), 1, None))
    return max(now, due or now) >= ends


def _why_missed(cron: Cron, instant: datetime, newest: datetime, now: datetime) -> str | None:
    late = now - instant
    if cron.catch_up is CatchUp.LATEST and instant != newest:
        return SUPERSEDED
    if late > cron.grace:
        return BEYOND_GRACE.format(late=_whole_seconds(late), grace=_whole_seconds(cron.grace))
    if cron.catch_up is CatchUp.SKIP and late > PUNCTUAL:
        return DOWN
    return None


def _whole_seconds(span: timedelta) -> timedelta:
    return timedelta(seconds=int(span.total_seconds()))


def transitions(zone: ZoneInfo, begin: datetime, end: datetime) -> list[Transition]:
    """Return the instants in (begin, end] at which the zone's clocks change, to the second."""
    found = []
    day = timedelta(days=1)
    earlier = begin
    while earlier < end:
        later = min(earlier + day, end)
        change = _offset(zone, later) - _offset(zone, earlier)
        if change:
            found.append(Transition(_bisect(zone, earlier, later), change))
        earlier = later
    return found


def _offset(zone: ZoneInfo, instant: datetime) -> timedelta:
    return instant.astimezone(zone).utcoffset() or timedelta(0)


def _bisect(zone: ZoneInfo, earlier: datetime, later: datetime) -> datetime:
    """Return the first whole second after `earlier` with the offset of `later`."""
    goal = _offset(zone, later)
    while later - earlier > timedelta(seconds=1):
        middle = earlier + (later - earlier) / 2
        if _offset(zone, middle) == goal:
            later = middle
        else:
            earlier = middle
    return later.replace(microsecond=0)
