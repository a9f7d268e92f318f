"""
Which fire times are due, held against a brute-force oracle that looks at every minute.

The oracle shares nothing with cronsim: it reads the expression itself, and walks the real minutes of a zone in order,
each with what a clock on the wall shows. A wildcard job fires at every real minute whose wall time matches. A job of
fixed times fires at the real minute at which a matching wall time is first reached or passed: a spring night passes
an hour of them at once, an autumn night reaches none of its second hour anew.

Most windows lie about the nights that change the clocks, in zones chosen for what is odd about them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from itertools import chain, islice, pairwise, takewhile
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bon_scheduler import CatchUp, Cron
from bon_scheduler.schedule.timing import Period, check_cron, expected, fire_times, next_fire_time, plan, transitions

ISRAEL = ZoneInfo("Asia/Jerusalem")
CAIRO = ZoneInfo("Africa/Cairo")
LORD_HOWE = ZoneInfo("Australia/Lord_Howe")
ZONES = (
    ISRAEL,
    ISRAEL,  # drawn twice as often: it is where BON lives
    ZoneInfo("Australia/Adelaide"),  # the southern summer, half an hour off
    ZoneInfo("Asia/Kolkata"),  # half an hour off, no summer time
    ZoneInfo("America/New_York"),
    ZoneInfo("Europe/London"),
    ZoneInfo("Africa/Casablanca"),  # goes back for Ramadan, on another date each year
    CAIRO,  # skips midnight: a day that begins at 01:00
    LORD_HOWE,  # changes by half an hour
)
YEARS = range(2026, 2038)
BEGIN, END = datetime(2026, 1, 2, tzinfo=UTC), datetime(2037, 12, 30, tzinfo=UTC)
SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
LONGEST_FOLD = timedelta(hours=4)
LIMITS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
DAYS_OF_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
EVER = datetime(2020, 1, 1, tzinfo=UTC)


def examples(count: int) -> settings:
    """Return settings for so many examples, unhurried: the machine may be busy."""
    return settings(max_examples=count, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


# The oracle


@dataclass(frozen=True, slots=True)
class Rule:
    """A five-field expression, read as Debian cron reads it."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    """0 is Sunday; 7 has become 0."""
    both_days: bool
    """Whether day of month and day of week must both match, or either."""
    wildcard: bool

    def matches(self, wall: datetime) -> bool:
        if wall.minute not in self.minutes or wall.hour not in self.hours or wall.month not in self.months:
            return False
        days = (wall.day in self.days, wall.isoweekday() % 7 in self.weekdays)
        return all(days) if self.both_days else any(days)

    def names_a_date(self) -> bool:
        longest = max(DAYS_OF_MONTH[month - 1] for month in self.months)
        return not self.both_days or min(self.days) <= longest


def numbers(field: str, lowest: int, highest: int) -> frozenset[int]:
    found: set[int] = set()
    for term in field.split(","):
        span, _, step = term.partition("/")
        first, _, last = (f"{lowest}-{highest}" if span == "*" else span).partition("-")
        found.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return frozenset(found)


def read(expression: str) -> Rule:
    fields = expression.split()
    minutes, hours, days, months, weekdays = (
        numbers(field, lowest, highest) for field, (lowest, highest) in zip(fields, LIMITS, strict=True)
    )
    return Rule(
        minutes=minutes,
        hours=hours,
        days=days,
        months=months,
        weekdays=frozenset(day % 7 for day in weekdays),
        both_days=fields[2].startswith("*") or fields[4].startswith("*"),
        wildcard=fields[0].startswith("*") or fields[1].startswith("*"),
    )


@lru_cache(maxsize=1500)
def walls(zone: ZoneInfo, day: date) -> list[tuple[datetime, datetime]]:
    """Return each real minute of a UTC day, with what the wall shows (naive)."""
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
    instants = [midnight + MINUTE * minute for minute in range(1440)]
    return [(instant, instant.astimezone(zone).replace(tzinfo=None, fold=0)) for instant in instants]


def minutes_of(zone: ZoneInfo, begin: datetime, end: datetime) -> Iterator[tuple[datetime, datetime]]:
    """Yield the real minutes of the UTC days from that of `begin` to that of `end`."""
    days = (end.date() - begin.date()).days + 1
    return chain.from_iterable(walls(zone, begin.date() + DAY * day) for day in range(days))


def oracle(expression: str, zone: ZoneInfo, after: datetime, until: datetime) -> list[datetime]:
    """Return the fire times in (after, until] of a five-field expression."""
    rule = read(expression)
    return elapsed(rule, zone, after, until) if rule.wildcard else fixed(rule, zone, after, until)


def elapsed(rule: Rule, zone: ZoneInfo, after: datetime, until: datetime) -> list[datetime]:
    minutes = minutes_of(zone, after, until)
    return [instant for instant, wall in minutes if rule.matches(wall) and after < instant <= until]


def fixed(rule: Rule, zone: ZoneInfo, after: datetime, until: datetime) -> list[datetime]:
    # From well before `after`, otherwise the second hour of an autumn night would look like the first.
    minutes = minutes_of(zone, after - LONGEST_FOLD, until)
    _, reached = next(minutes)
    found = []
    for instant, wall in minutes:
        newly = []
        while reached < wall:
            reached += MINUTE
            newly.append(reached)
        if any(map(rule.matches, newly)) and after < instant <= until:
            found.append(instant)
    return found


def scan(zone: ZoneInfo, begin: datetime, end: datetime, step: timedelta) -> list[tuple[datetime, timedelta]]:
    """Return the changes of offset in (begin, end] that looking every `step` sees."""
    steps = (begin + step * number for number in range((end - begin) // step + 1))
    offsets = ((instant, instant.astimezone(zone).utcoffset() or timedelta(0)) for instant in steps)
    return [(later, new - old) for (_, old), (later, new) in pairwise(offsets) if new != old]


@lru_cache
def clock_changes(zone: ZoneInfo) -> tuple[tuple[datetime, timedelta], ...]:
    """Return every change of a zone's clocks in `YEARS`, by looking every hour and then every minute of that hour."""
    hours = scan(zone, datetime(YEARS[0], 1, 1, tzinfo=UTC), datetime(YEARS[-1] + 1, 1, 1, tzinfo=UTC), HOUR)
    return tuple(chain.from_iterable(scan(zone, hour - HOUR, hour, MINUTE) for hour, _ in hours))


# What is drawn


@dataclass(frozen=True, slots=True)
class Window:
    """A zone and an interval (after, until]."""

    zone: ZoneInfo
    after: datetime
    until: datetime


@st.composite
def terms(draw: st.DrawFn, lowest: int, highest: int) -> str:
    first = draw(st.integers(lowest, highest))
    last = draw(st.integers(lowest, highest))
    step = draw(st.integers(1, 12))
    forms = [f"{first}", f"{first}", f"*/{step}"]
    if first < last:
        forms += [f"{first}-{last}", f"{first}-{last}/{step}"]
    return draw(st.sampled_from(forms))


def lists(lowest: int, highest: int) -> st.SearchStrategy[str]:
    return st.lists(terms(lowest, highest), min_size=1, max_size=3).map(",".join)


STAR = st.just("*")
MINUTES = STAR | st.sampled_from(("0", "30", "*/15", "5,30,45", "0,30", "59")) | lists(0, 59)
HOURS = STAR | lists(0, 4) | lists(0, 23) | st.sampled_from(("*/2", "1", "2", "3"))
DAYS = STAR | STAR | lists(1, 31) | lists(20, 31)
MONTHS = STAR | STAR | st.sampled_from(("3", "10", "3,10,11", "*/3", "2-4")) | lists(1, 12)
WEEKDAYS = STAR | STAR | lists(0, 7)

DAILY = st.tuples(MINUTES, HOURS).map(lambda fields: f"{' '.join(fields)} * * *")
ANY = st.tuples(MINUTES, HOURS, DAYS, MONTHS, WEEKDAYS).map(" ".join)
EXPRESSIONS = DAILY | ANY.filter(lambda expression: read(expression).names_a_date())
SPANS = st.integers(1, 3 * 1440).map(lambda minutes: MINUTE * minutes)
CRUMBS = st.just(timedelta(0)) | st.integers(1, 59_999_999).map(lambda some: timedelta(microseconds=some))
"""What an instant is past a whole minute."""


@st.composite
def instants(draw: st.DrawFn, zone: ZoneInfo) -> datetime:
    """Draw an instant, mostly in the day and a half before a change of the zone's clocks or the hours after it."""
    nights = [night for night, _ in clock_changes(zone)]
    if nights and draw(st.integers(0, 4)) > 0:
        origin, minutes = draw(st.sampled_from(nights)), draw(st.integers(-36 * 60, 4 * 60))
    else:
        origin, minutes = BEGIN, draw(st.integers(0, (END - BEGIN) // MINUTE))
    return origin + MINUTE * minutes + draw(CRUMBS)


@st.composite
def windows(draw: st.DrawFn) -> Window:
    zone = draw(st.sampled_from(ZONES))
    after = draw(instants(zone))
    return Window(zone, after, after + draw(SPANS) + draw(CRUMBS))


@st.composite
def folds(draw: st.DrawFn) -> Window:
    """Draw a window that begins in the second of two hours that the wall shows alike."""
    zone = draw(st.sampled_from([zone for zone in ZONES if clock_changes(zone)]))
    night, change = draw(st.sampled_from([found for found in clock_changes(zone) if found[1] < timedelta(0)]))
    into = draw(st.integers(0, -change // MINUTE - 1))
    after = night + MINUTE * into + draw(CRUMBS)
    return Window(zone, after, after + draw(SPANS))


CRONS = st.builds(
    Cron,
    EXPRESSIONS,
    st.sampled_from(CatchUp),
    st.sampled_from([timedelta(0), SECOND * 30, MINUTE * 20, HOUR, HOUR * 18, DAY * 7]),
)


@st.composite
def histories(draw: st.DrawFn, window: Window) -> list[Period]:
    """Draw what was in force: a schedule or none, in a zone, changed up to four times within the window."""
    length = (window.until - window.after) // SECOND
    froms = [window.after + SECOND * draw(st.integers(-3600, length + 3600)) for _ in range(draw(st.integers(0, 4)))]
    return [
        Period(begin, draw(st.none() | CRONS | CRONS), draw(st.sampled_from([window.zone, *ZONES])))
        for begin in sorted([draw(st.sampled_from([EVER, window.after])), *froms])
    ]


SPRING_NIGHT = Window(ISRAEL, datetime(2026, 3, 26, 12, tzinfo=UTC), datetime(2026, 3, 28, tzinfo=UTC))

APRIL = Window(ISRAEL, datetime(2026, 4, 1, tzinfo=UTC), datetime(2026, 4, 2, tzinfo=UTC))


def between(expression: str, window: Window) -> list[datetime]:
    found = fire_times(expression, window.zone, window.after)
    return list(takewhile(lambda instant: instant <= window.until, found))


def always(cron: Cron, zone: ZoneInfo) -> list[Period]:
    return [Period(EVER, cron, zone)]


# Fire times


@examples(500)
@given(EXPRESSIONS, windows())
@example("*/30 1 * * 5", Window(CAIRO, datetime(2026, 4, 23, 12, tzinfo=UTC), datetime(2026, 4, 24, 12, tzinfo=UTC)))
@example("*/15 2 * * *", Window(LORD_HOWE, datetime(2026, 4, 4, tzinfo=UTC), datetime(2026, 4, 5, tzinfo=UTC)))
@example("* 2 * * *", Window(LORD_HOWE, datetime(2026, 10, 3, tzinfo=UTC), datetime(2026, 10, 4, tzinfo=UTC)))
def test_fire_times_are_those_of_the_oracle(expression: str, window: Window) -> None:
    assert between(expression, window) == oracle(expression, window.zone, window.after, window.until)


@pytest.mark.long
@pytest.mark.timeout(1200)
@examples(20_000)
@given(EXPRESSIONS, windows())
def test_fire_times_are_those_of_the_oracle_at_length(expression: str, window: Window) -> None:
    assert between(expression, window) == oracle(expression, window.zone, window.after, window.until)


@examples(60)
@given(EXPRESSIONS, windows())
def test_fire_times_are_later_than_asked_and_strictly_increasing_and_in_utc(expression: str, window: Window) -> None:
    found = between(expression, window)
    assert all(earlier < later for earlier, later in pairwise([window.after, *found]))
    assert all(instant.tzinfo is UTC for instant in found)


@examples(200)
@given(DAILY, folds())
def test_begun_in_the_repeated_hour_they_are_those_of_the_oracle_and_none_is_past(
    expression: str, window: Window
) -> None:
    assert next_fire_time(expression, window.zone, window.after) > window.after
    assert between(expression, window) == oracle(expression, window.zone, window.after, window.until)


@pytest.mark.timeout(60)  # a spin would be endless
@examples(10)
@given(DAILY, folds())
def test_a_thousand_steps_from_the_repeated_hour_each_lead_on(expression: str, window: Window) -> None:
    stepped = [window.after]
    for _ in range(1000):
        stepped.append(next_fire_time(expression, window.zone, stepped[-1]))
    assert all(earlier < later for earlier, later in pairwise(stepped))
    assert stepped[1:] == list(islice(fire_times(expression, window.zone, window.after), 1000))


@examples(150)
@given(ANY)
def test_an_expression_is_accepted_exactly_if_some_date_matches_it(expression: str) -> None:
    assert (check_cron(expression) is None) == read(expression).names_a_date()


@pytest.mark.parametrize("minutes", ["10/20", "10-10/20"])
def test_a_step_from_a_single_number_goes_on_to_the_end_of_the_field(minutes: str) -> None:
    """Pins cronsim's reading, which the oracle is not asked about: crontab(5) has steps after ranges and stars only."""
    assert [found.minute for found in between(f"{minutes} 6 1 4 *", APRIL)] == [10, 30, 50]


# Six fields


@examples(100)
@given(EXPRESSIONS, windows(), st.sampled_from(("0", "00")))
@example("30 2 * * *", SPRING_NIGHT, "0")
@example("30 2 * * *", SPRING_NIGHT, "00")
def test_with_seconds_of_0_they_are_those_of_the_five_fields(expression: str, window: Window, zero: str) -> None:
    assert between(f"{zero} {expression}", window) == between(expression, window)


@examples(30)
@given(st.integers(1, 59), windows())
def test_every_so_many_seconds_follow_elapsed_time(step: int, window: Window) -> None:
    after = window.after.replace(microsecond=0)
    seconds = (after + SECOND * number for number in range(1, 2 * 3600 + 1))
    wanted = [instant for instant in seconds if instant.second % step == 0]
    assert between(f"*/{step} * * * * *", Window(window.zone, after, after + HOUR * 2)) == wanted


@examples(100)
@given(DAILY, windows(), st.sampled_from(("30", "0,59", "*/20", "5-55/25")))
def test_with_seconds_fixed_times_follow_elapsed_time_too(expression: str, window: Window, seconds: str) -> None:
    marks = sorted(numbers(seconds, 0, 59))
    minutes = elapsed(read(expression), window.zone, window.after - MINUTE, window.until)
    wanted = [minute + SECOND * mark for minute in minutes for mark in marks]
    assert between(f"{seconds} {expression}", window) == [t for t in wanted if window.after < t <= window.until]


# Expected and planned


@examples(100)
@given(st.data(), windows(), st.floats(0, 1))
def test_what_is_expected_up_to_an_instant_and_after_it_is_what_is_expected(
    data: st.DataObject, window: Window, part: float
) -> None:
    history = data.draw(histories(window))
    middle = window.after + (window.until - window.after) * part
    halves = [*expected(history, window.after, middle), *expected(history, middle, window.until)]
    assert halves == list(expected(history, window.after, window.until))


@examples(200)
@given(st.data(), windows())
def test_each_schedule_of_a_history_is_expected_on_its_own_interval(data: st.DataObject, window: Window) -> None:
    history = data.draw(histories(window))
    ends = [*(period.effective_from for period in history[1:]), window.until]
    wanted = [
        (instant, period.cron)
        for period, end in zip(history, ends, strict=True)
        if period.cron is not None
        for instant in oracle(
            period.cron.expression, period.zone, max(window.after, period.effective_from), min(window.until, end)
        )
    ]
    assert list(expected(history, window.after, window.until)) == wanted


@examples(100)
@given(st.data(), windows())
def test_whatever_the_catch_up_each_expected_fire_time_is_planned_once(data: st.DataObject, window: Window) -> None:
    history = data.draw(histories(window))
    planned = [tick.fire_time for tick in plan(history, window.after, window.until)]
    assert planned == [instant for instant, _ in expected(history, window.after, window.until)]


@examples(100)
@given(CRONS, windows())
def test_catch_up_latest_runs_the_newest_within_its_grace_and_no_other(cron: Cron, window: Window) -> None:
    latest = Cron(cron.expression, CatchUp.LATEST, cron.grace)
    ticks = plan(always(latest, window.zone), window.after, window.until)
    run = [tick.fire_time for tick in ticks if tick.missed is None]
    assert run == [tick.fire_time for tick in ticks[-1:] if window.until - tick.fire_time <= cron.grace]


@examples(100)
@given(CRONS, windows())
def test_catch_up_all_runs_exactly_those_within_their_grace(cron: Cron, window: Window) -> None:
    everything = Cron(cron.expression, CatchUp.ALL, cron.grace)
    for tick in plan(always(everything, window.zone), window.after, window.until):
        assert (tick.missed is None) == (window.until - tick.fire_time <= cron.grace)


@examples(100)
@given(CRONS, windows())
def test_catch_up_skip_runs_exactly_those_noticed_within_a_minute(cron: Cron, window: Window) -> None:
    skipping = Cron(cron.expression, CatchUp.SKIP, cron.grace)
    for tick in plan(always(skipping, window.zone), window.after, window.until):
        assert (tick.missed is None) == (window.until - tick.fire_time <= min(cron.grace, MINUTE))


@examples(100)
@given(st.data(), windows(), st.lists(st.floats(0, 1), max_size=12))
def test_planned_again_and_again_from_the_last_planned_each_appears_once(
    data: st.DataObject, window: Window, parts: list[float]
) -> None:
    history = data.draw(histories(window))
    last, planned = window.after, []
    for part in [*sorted(parts), 1]:
        ticks = plan(history, last, window.after + (window.until - window.after) * part)
        planned += [tick.fire_time for tick in ticks]
        last = planned[-1] if planned else last
    assert planned == [instant for instant, _ in expected(history, window.after, window.until)]


# The nights in Israel: instants measured with Debian's daemon and cronsim (ticks.md)

SPRINGS = ("2026-03-27", "2027-03-26", "2028-03-24", "2029-03-23", "2030-03-29")
AUTUMNS = ("2026-10-25", "2027-10-31", "2028-10-29", "2029-10-28", "2030-10-27")


def night(day: str, expression: str) -> list[timedelta]:
    """Return the fire times of a day in Israel, from UTC midnight of its date: the first hours are negative."""
    midnight = datetime.fromisoformat(day).replace(tzinfo=UTC)
    begin, end = (
        (midnight + DAY * days).replace(tzinfo=ISRAEL).astimezone(UTC) - timedelta(microseconds=1) for days in (0, 1)
    )
    return [instant - midnight for instant in between(expression, Window(ISRAEL, begin, end))]


@pytest.mark.parametrize("day", SPRINGS)
@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("0 3 * * *", [HOUR * 0]),
        ("0 4 * * *", [HOUR * 1]),
        ("0 6 * * *", [HOUR * 3]),
        ("30 2 * * *", [HOUR * 0]),
        ("5,30,45 2 * * *", [HOUR * 0]),
        ("*/15 2 * * *", []),
        ("15 */2 * * *", [MINUTE * 15 + HOUR * hour for hour in (-2, *range(1, 21, 2))]),
        ("*/15 * * * *", [MINUTE * 15 * quarter for quarter in range(-8, 84)]),
    ],
)
def test_the_spring_night_in_israel_is_as_measured(day: str, expression: str, wanted: list[timedelta]) -> None:
    assert night(day, expression) == wanted


@pytest.mark.parametrize("day", AUTUMNS)
@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("0 3 * * *", [HOUR * 1]),
        ("0 4 * * *", [HOUR * 2]),
        ("0 6 * * *", [HOUR * 4]),
        ("30 1 * * *", [HOUR * -1.5]),
        ("*/15 1 * * *", [MINUTE * 15 * quarter for quarter in range(-8, 0)]),
        ("*/15 * * * *", [MINUTE * 15 * quarter for quarter in range(-12, 88)]),
    ],
)
def test_the_autumn_night_in_israel_is_as_measured(day: str, expression: str, wanted: list[timedelta]) -> None:
    assert night(day, expression) == wanted


# Transitions


@pytest.mark.parametrize("year", YEARS)
@pytest.mark.parametrize("zone", sorted(set(ZONES), key=str), ids=str)
def test_transitions_are_the_changes_that_looking_at_the_clock_sees(zone: ZoneInfo, year: int) -> None:
    begin, end = datetime(year, 1, 1, tzinfo=UTC), datetime(year + 1, 1, 1, tzinfo=UTC)
    found = [(transition.instant, transition.change) for transition in transitions(zone, begin, end)]
    assert found == [change for change in clock_changes(zone) if change[0].year == year]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zone", sorted(set(ZONES), key=str), ids=str)
def test_transitions_are_the_changes_that_looking_every_minute_sees(zone: ZoneInfo) -> None:
    begin, end = datetime(YEARS[0], 1, 1, tzinfo=UTC), datetime(YEARS[-1] + 1, 1, 1, tzinfo=UTC)
    found = [(transition.instant, transition.change) for transition in transitions(zone, begin, end)]
    assert found == scan(zone, begin, end, MINUTE)


@examples(100)
@given(windows())
def test_transitions_of_an_interval_exclude_its_begin_and_include_its_end(window: Window) -> None:
    changes = [change for change in clock_changes(window.zone) if window.after < change[0] <= window.until]
    found = transitions(window.zone, window.after, window.until)
    assert [(transition.instant, transition.change) for transition in found] == changes


@pytest.mark.parametrize("zone", sorted(set(ZONES), key=str), ids=str)
def test_a_transition_belongs_to_the_interval_that_ends_with_it(zone: ZoneInfo) -> None:
    for night, _ in clock_changes(zone):
        assert [found.instant for found in transitions(zone, night - DAY * 2, night)] == [night]
        assert transitions(zone, night, night + DAY * 2) == []
