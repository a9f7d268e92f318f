"""Which fire times are due, and what becomes of each."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise, takewhile
from zoneinfo import ZoneInfo

import pytest

from bon_scheduler import CatchUp, Cron
from bon_scheduler.schedule.timing import Period, Tick, check_cron, expected, fire_times, next_fire_time, transitions
from bon_scheduler.schedule.timing import plan as plan_history

ISRAEL = ZoneInfo("Asia/Jerusalem")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def between(expression: str, after: datetime, until: datetime) -> list[datetime]:
    return list(takewhile(lambda instant: instant <= until, fire_times(expression, ISRAEL, after)))


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        ("0 6 * * *", "2026-11-23T04:00", "2026-11-24T04:00"),  # winter, UTC + 2; strictly after
        ("0 6 * * *", "2026-07-01T02:59:59", "2026-07-01T03:00"),  # summer, UTC + 3
        ("30 2 * * *", "2026-03-26T12:00", "2026-03-27T00:00"),  # skipped by spring: just after the gap, at 03:00
        ("30 1 * * *", "2026-10-24T12:00", "2026-10-24T22:30"),  # repeated by autumn: the first time
        ("*/15 * * * *", "2026-11-23T04:00", "2026-11-23T04:15"),
        ("*/5 * * * * *", "2026-11-23T04:00:01", "2026-11-23T04:00:05"),
    ],
)
def test_the_next_fire_time_is_exact(expression: str, after: str, expected: str) -> None:
    assert next_fire_time(expression, ISRAEL, at(after)) == at(expected)


@pytest.mark.parametrize(("day", "expected"), [("2026-03-26T22:00", 92), ("2026-10-24T21:00", 100)])
def test_every_real_quarter_hour_of_a_night_that_changes_the_clocks_fires(day: str, expected: int) -> None:
    start = at(day) - timedelta(seconds=1)
    end = at(day) + timedelta(minutes=15) * expected - timedelta(seconds=1)
    found = between("*/15 * * * *", start, end)
    assert len(found) == expected
    assert {later - earlier for earlier, later in pairwise(found)} == {timedelta(minutes=15)}


def test_armed_in_the_repeated_hour_nothing_fires_in_the_past() -> None:
    in_the_fold = at("2026-10-24T23:10")  # 01:10, the second time
    assert next_fire_time("30 1 * * *", ISRAEL, in_the_fold) > in_the_fold


NOW = at("2026-11-23T05:00")
BEGINNING = at("2026-01-01T00:00")


def plan(cron: Cron, last: datetime, now: datetime) -> list[Tick]:
    return plan_history([Period(BEGINNING, cron, ISRAEL)], last, now)


QUARTERS = Cron("*/15 * * * *", CatchUp.LATEST, timedelta(minutes=40))


def test_nothing_is_due_before_its_instant_not_even_by_a_hair() -> None:
    hair = timedelta(microseconds=400)
    assert plan(QUARTERS, NOW - timedelta(minutes=15), NOW - hair) == []


def test_of_several_missed_the_latest_runs_and_the_others_are_missed_with_a_reason() -> None:
    ticks = plan(QUARTERS, NOW - timedelta(hours=1), NOW)
    assert [tick.fire_time for tick in ticks] == [NOW - timedelta(minutes=m) for m in (45, 30, 15, 0)]
    assert [tick.missed for tick in ticks] == [*["superseded by a later tick"] * 3, None]


def test_catch_up_all_runs_each_within_its_grace() -> None:
    everything = Cron("*/15 * * * *", CatchUp.ALL, timedelta(minutes=40))
    missed = [tick.missed is not None for tick in plan(everything, NOW - timedelta(hours=1), NOW)]
    assert missed == [True, False, False, False]


def test_catch_up_skip_runs_only_what_is_punctual() -> None:
    skipping = Cron("*/15 * * * *", CatchUp.SKIP, timedelta(minutes=40))
    missed = [tick.missed is not None for tick in plan(skipping, NOW - timedelta(hours=1), NOW)]
    assert missed == [True, True, True, False]


def test_beyond_its_grace_even_the_latest_is_missed() -> None:
    (tick,) = plan(QUARTERS, NOW - timedelta(minutes=15), NOW + timedelta(minutes=14, seconds=59))
    assert tick.missed is None
    late = Cron("0 6 * * *", CatchUp.LATEST, timedelta(hours=18))
    (daily,) = plan(late, at("2026-11-23T04:00"), at("2026-11-24T22:00:01"))
    assert daily.missed == "beyond grace: noticed 18:00:01 late, its grace is 18:00:00"


@pytest.mark.parametrize("expression", ["", "* * * *", "61 * * * *", "* * * * * * *", "@daily", "0 0 31 2 *"])
def test_an_expression_that_is_none_is_refused(expression: str) -> None:
    assert check_cron(expression) is not None


@pytest.mark.parametrize("expression", ["0 6 * * *", "*/15 * * * *", "*/5 * * * * *", "0 3 L * *"])
def test_an_expression_of_five_or_six_fields_is_accepted(expression: str) -> None:
    assert check_cron(expression) is None


def test_a_schedule_with_seconds_of_0_is_the_same_as_one_without() -> None:
    spring = at("2026-03-26T12:00")
    assert next_fire_time("0 30 2 * * *", ISRAEL, spring) == next_fire_time("30 2 * * *", ISRAEL, spring)


def test_a_changed_schedule_neither_invents_ticks_in_the_past_nor_forgets_real_ones() -> None:
    changed = NOW + timedelta(minutes=20)
    history = [Period(BEGINNING, QUARTERS, ISRAEL), Period(changed, Cron("*/10 * * * *"), ISRAEL)]
    found = [instant for instant, _ in expected(history, NOW, NOW + timedelta(minutes=45))]
    assert found == [NOW + timedelta(minutes=m) for m in (15, 30, 40)]


def test_nothing_is_expected_while_there_is_no_schedule() -> None:
    off, on = NOW + timedelta(minutes=20), NOW + timedelta(minutes=50)
    history = [Period(BEGINNING, QUARTERS, ISRAEL), Period(off, None, ISRAEL), Period(on, QUARTERS, ISRAEL)]
    found = [instant for instant, _ in expected(history, NOW, NOW + timedelta(minutes=75))]
    assert found == [NOW + timedelta(minutes=m) for m in (15, 60, 75)]


def test_the_clocks_change_twice_a_year_to_the_second() -> None:
    found = transitions(ISRAEL, at("2026-01-01T00:00"), at("2027-01-01T00:00"))
    assert [(t.instant, t.change) for t in found] == [
        (at("2026-03-27T00:00"), timedelta(hours=1)),
        (at("2026-10-24T23:00"), timedelta(hours=-1)),
    ]
