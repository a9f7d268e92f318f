"""The schedule in words agrees with what fires."""

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bon_scheduler.schedule import check_cron, describe_cron, fire_times

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("0 6 1-31 * MON", "At 06:00 every day"),
        ("0 6 15 * 0-7", "At 06:00 every day"),
        ("*/90 * * * *", "At the start of every hour"),
        ("0 */30 * * *", "At 00:00 every day"),
        ("0 0 */40 * *", "At 00:00 on the first day of every month"),
        ("0 6 */1 * MON", "At 06:00 on Monday"),
        ("0 6 1 * MON", "At 06:00 on the first day of month and on Monday"),
        ("0 3 L * *", "At 03:00 on the last day of every month"),
    ],
)
def test_words_of_odd_expressions(expression: str, words: str) -> None:
    assert describe_cron(expression) == words


FIELD = st.sampled_from(["*", "1", "1-31", "*/1", "*/2", "*/40", "1,15"])
WEEKDAY = st.sampled_from(["*", "MON", "0-6", "1-7", "1-5"])


@settings(max_examples=60, deadline=None)
@given(day=FIELD, weekday=WEEKDAY)
def test_what_is_called_every_day_fires_every_day_and_nothing_else_does(day: str, weekday: str) -> None:
    expression = f"0 6 {day} * {weekday}"
    if check_cron(expression):
        return
    fired = list(islice(fire_times(expression, ZoneInfo("UTC"), START), 40))
    daily = all(later - earlier == timedelta(days=1) for earlier, later in pairwise(fired))
    words = describe_cron(expression)
    assert words.endswith("every day") == daily, words
