"""Which fire times are due, and what becomes of each."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise, takewhile
from zoneinfo import ZoneInfo

import pytest

from bon_scheduler import CatchUp, Cron
from bon_scheduler.timing import check_cron, fire_times, next_fire_time, plan

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
QUARTERS = Cron("*/15 * * * *", CatchUp.LATEST, timedelta(minutes=40))


def test_nothing_is_due_before_its_instant_not_even_by_a_hair() -> None:
    hair = timedelta(microseconds=400)
    assert plan(QUARTERS, ISRAEL, NOW - timedelta(minutes=15), NOW - hair) == []


def test_of_several_missed_the_latest_runs_and_the_others_are_missed_with_a_reason() -> None:
    ticks = plan(QUARTERS, ISRAEL, NOW - timedelta(hours=1), NOW)
    assert [tick.fire_time for tick in ticks] == [NOW - timedelta(minutes=m) for m in (45, 30, 15, 0)]
    assert ["grace" in ticks[0].missed if ticks[0].missed else "", ticks[-1].missed] == [True, None]
    assert {tick.missed for tick in ticks[1:3]} == {"superseded by a later tick"}


def test_catch_up_all_runs_each_within_its_grace() -> None:
    everything = Cron("*/15 * * * *", CatchUp.ALL, timedelta(minutes=40))
    missed = [tick.missed is not None for tick in plan(everything, ISRAEL, NOW - timedelta(hours=1), NOW)]
    assert missed == [True, False, False, False]


def test_catch_up_skip_runs_only_what_is_punctual() -> None:
    skipping = Cron("*/15 * * * *", CatchUp.SKIP, timedelta(minutes=40))
    missed = [tick.missed is not None for tick in plan(skipping, ISRAEL, NOW - timedelta(hours=1), NOW)]
    assert missed == [True, True, True, False]


def test_beyond_its_grace_even_the_latest_is_missed() -> None:
    (tick,) = plan(QUARTERS, ISRAEL, NOW - timedelta(minutes=15), NOW + timedelta(minutes=14, seconds=59))
    assert tick.missed is None
    late = Cron("0 6 * * *", CatchUp.LATEST, timedelta(hours=18))
    (daily,) = plan(late, ISRAEL, at("2026-11-23T04:00"), at("2026-11-24T22:00:01"))
    assert daily.missed == "noticed 18:00:01 late, beyond its grace of 18:00:00"


@pytest.mark.parametrize("expression", ["", "* * * *", "61 * * * *", "* * * * * * *", "@daily", "0 0 31 2 *"])
def test_an_expression_that_is_none_is_refused(expression: str) -> None:
    assert check_cron(expression) is not None


@pytest.mark.parametrize("expression", ["0 6 * * *", "*/15 * * * *", "*/5 * * * * *", "0 3 L * *"])
def test_an_expression_of_five_or_six_fields_is_accepted(expression: str) -> None:
    assert check_cron(expression) is None
