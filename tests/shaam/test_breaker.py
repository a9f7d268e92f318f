"""The circuit breaker: it opens for what concerns everybody, and never for one business's own trouble."""

import json
from collections.abc import Callable
from datetime import timedelta

from bon_scheduler.shaam.breaker import FAILURES_IN_A_ROW, HANDFUL, Breaker
from bon_scheduler.shaam.client import Ambiguous, Answer, Misconfigured, NeedsReauth, Refreshed, Transient

GOOD = Refreshed("access", "refresh", timedelta(seconds=601))
AWAY, REFUSED = Transient("HTTP 503"), Misconfigured("HTTP 403")


class Clock:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def breaker_after(*answers: Answer) -> tuple[Breaker, Clock]:
    clock = Clock()
    breaker = Breaker(clock)
    for answer in answers:
        breaker.note(answer)
    return breaker, clock


def test_failures_in_a_row_open_it_and_one_less_does_not() -> None:
    assert breaker_after(*[AWAY] * (FAILURES_IN_A_ROW - 1))[0].why_not() is None
    assert "HTTP 503" in (breaker_after(*[AWAY] * FAILURES_IN_A_ROW)[0].why_not() or "")
    assert breaker_after(*[Ambiguous("HTML")] * FAILURES_IN_A_ROW)[0].why_not() is not None


def test_a_handful_of_refusals_opens_it_and_says_so() -> None:
    assert breaker_after(*[REFUSED] * (HANDFUL - 1))[0].refusal is None
    breaker, _ = breaker_after(*[REFUSED] * HANDFUL)
    assert "HTTP 403" in (breaker.refusal or "")
    assert breaker.why_not() == breaker.admit() == breaker.refusal


def test_any_answer_to_the_application_begins_the_count_anew() -> None:
    for answer in (GOOD, NeedsReauth("used")):
        half = [AWAY] * (FAILURES_IN_A_ROW - 1) + [REFUSED] * (HANDFUL - 1)
        assert breaker_after(*half, answer, *half)[0].why_not() is None


def test_after_its_pause_one_is_let_through_and_decides() -> None:
    breaker, clock = breaker_after(*[AWAY] * FAILURES_IN_A_ROW)
    clock.seconds += 29
    assert breaker.why_not() is not None
    clock.seconds += 1
    assert breaker.admit() is None
    assert breaker.admit() is not None  # the others wait for what the first one finds
    breaker.note(GOOD)
    assert breaker.why_not() is None


def test_each_probe_that_fails_doubles_the_pause_up_to_ten_minutes() -> None:
    breaker, clock = breaker_after(*[AWAY] * FAILURES_IN_A_ROW)
    for pause in (30, 60, 120, 240, 480, 600, 600):
        clock.seconds += pause - 1
        assert breaker.why_not() is not None, pause
        clock.seconds += 1
        assert breaker.admit() is None, pause
        breaker.note(AWAY)


def test_what_was_under_way_when_it_opened_does_not_make_the_pause_longer() -> None:
    breaker, clock = breaker_after(*[AWAY] * (FAILURES_IN_A_ROW + 30))
    clock.seconds += 30
    assert breaker.why_not() is None


def test_an_outage_is_a_line_each_time_one_tried_in_vain_and_one_when_it_is_over(logged: Callable[[], str]) -> None:
    breaker, clock = breaker_after(*[AWAY] * (FAILURES_IN_A_ROW + 40))  # those that were under way
    for pause in (30, 60):
        clock.seconds += pause
        assert breaker.admit() is None
        breaker.note(AWAY if pause == 30 else GOOD)
        breaker.note(GOOD if pause == 60 else AWAY)
    lines = [json.loads(line) for line in logged().splitlines()]
    assert [line["event"] for line in lines] == ["shaam.shut_off", "shaam.shut_off", "shaam.back"]
    assert lines[-1]["seconds"] == 90
