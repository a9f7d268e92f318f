"""No single clock is believed: whichever of three is wrong, the instant is right or late, never early."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon_scheduler.schedule.clocks import CONFIRM_SECONDS, TOLERANCE, Clocks
from tests.conftest import SetClock

TRUE = datetime(2026, 11, 23, 4, tzinfo=UTC)
HOURS = st.integers(-48 * 3600, 48 * 3600).map(lambda seconds: timedelta(seconds=seconds))
SMALL = st.integers(-2000, 2000).map(lambda ms: timedelta(milliseconds=ms))


@dataclass
class World:
    """True time, and how far each clock is from it."""

    passed: float = 0.0
    wall_off: timedelta = timedelta(0)
    database_off: timedelta = timedelta(0)

    def __post_init__(self) -> None:
        self._wall = SetClock(TRUE)
        self.clocks = Clocks(self._wall, elapsed=lambda: self.passed)

    @property
    def now(self) -> datetime:
        return TRUE + timedelta(seconds=self.passed)

    def believe(self, newest_tick: datetime | None = None) -> datetime:
        self._wall.instant = self.now + self.wall_off
        return self.clocks.believe(self.now + self.database_off, self.passed, newest_tick)

    def off(self, newest_tick: datetime | None = None) -> timedelta:
        """How far the believed instant is from the true one."""
        return self.believe(newest_tick) - self.now


@given(wall=SMALL, database=SMALL)
def test_clocks_that_agree_are_believed(wall: timedelta, database: timedelta) -> None:
    world = World(wall_off=wall, database_off=database)
    for world.passed in (0.0, 15.0, 30.0):
        assert abs(world.off()) <= timedelta(seconds=2)


@given(step=HOURS, wall_is_wrong=st.booleans())
def test_one_clock_that_steps_changes_nothing(step: timedelta, wall_is_wrong: bool) -> None:
    world = World()
    world.believe()
    world.wall_off, world.database_off = (step, timedelta(0)) if wall_is_wrong else (timedelta(0), step)
    for world.passed in (15.0, 3600.0, 90_000.0):
        assert abs(world.off()) <= TOLERANCE


@given(wrong=HOURS, wall_is_wrong=st.booleans())
def test_a_clock_that_is_wrong_at_start_makes_nothing_early(wrong: timedelta, wall_is_wrong: bool) -> None:
    off = (wrong, timedelta(0)) if wall_is_wrong else (timedelta(0), wrong)
    world = World(wall_off=off[0], database_off=off[1])
    assert world.off() <= TOLERANCE
    world.passed = 600.0
    assert world.off() <= TOLERANCE
    world.wall_off = world.database_off = timedelta(0)
    world.passed = 615.0
    assert world.off() == timedelta(0)


@given(jump=st.integers(61, 366 * 86_400).map(lambda seconds: timedelta(seconds=seconds)))
def test_both_clocks_jumping_ahead_are_not_believed_until_they_have_agreed_for_long(jump: timedelta) -> None:
    world = World()
    world.believe()
    world.wall_off = world.database_off = jump
    world.passed = 15.0
    assert world.off() == timedelta(0)
    world.passed = 15.0 + CONFIRM_SECONDS - 1
    assert world.off() == timedelta(0)
    world.passed = 15.0 + CONFIRM_SECONDS
    assert world.off() == jump


@given(behind=st.integers(16 * 60 + 1, 48 * 3600).map(lambda seconds: timedelta(seconds=seconds)), wall=st.booleans())
def test_without_an_anchor_a_clock_that_is_behind_the_ledger_is_not_believed(behind: timedelta, wall: bool) -> None:
    """Otherwise a lone replica whose clock is a day behind at its start would fire nothing."""
    world = World(wall_off=-behind if wall else timedelta(0), database_off=timedelta(0) if wall else -behind)
    assert world.off(newest_tick=TRUE - timedelta(minutes=15)) == timedelta(0)


def test_a_jump_that_is_taken_back_in_time_leaves_no_trace() -> None:
    world = World()
    world.believe()
    world.wall_off = world.database_off = timedelta(days=365)
    for world.passed in (15.0, 300.0):
        assert world.off() == timedelta(0)
    world.wall_off = world.database_off = timedelta(0)
    world.passed = 330.0
    assert world.off() == timedelta(0)
    world.wall_off = world.database_off = timedelta(days=365)
    world.passed = 700.0
    assert world.off() == timedelta(0)


def test_three_clocks_of_which_no_two_agree_give_the_earliest() -> None:
    world = World()
    world.believe()
    world.wall_off, world.database_off = timedelta(hours=2), timedelta(hours=-3)
    assert world.off() == timedelta(hours=-3)


def test_a_slow_common_drift_is_followed() -> None:
    world = World()
    for minute in range(120):
        world.passed = 60.0 * minute
        world.wall_off = world.database_off = timedelta(seconds=2 * minute)
        assert world.off() >= timedelta(seconds=2 * minute - 2)


@given(
    steps=st.lists(
        st.tuples(st.floats(1, 7200), st.sampled_from(["wall", "database", "neither"]), HOURS), min_size=1, max_size=30
    )
)
def test_with_at_most_one_wrong_clock_at_a_time_nothing_is_ever_early(
    steps: list[tuple[float, str, timedelta]],
) -> None:
    world = World()
    world.believe()
    for seconds, which, off in steps:
        world.passed += seconds
        world.wall_off = off if which == "wall" else timedelta(0)
        world.database_off = off if which == "database" else timedelta(0)
        assert abs(world.off()) <= TOLERANCE


def test_a_step_of_the_wall_clock_shows_in_its_drift() -> None:
    world = World()
    world.believe()
    before = world.clocks.drift()
    world.wall_off = timedelta(hours=2)
    world.believe()
    assert world.clocks.drift() - before == pytest.approx(7200)
