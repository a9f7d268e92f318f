"""How often a database that is away is logged, by a clock that the test sets."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest

from bon_scheduler.database.outage import Outage
from bon_scheduler.database.unavailable import DatabaseUnavailableError

REFUSED = DatabaseUnavailableError("Cannot connect: the database bon at db:5432 does not answer.")
LOST = asyncpg.InterfaceError("connection is closed")
DEADLOCK = asyncpg.DeadlockDetectedError("deadlock detected")


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class Told:
    """An outage, its clock and what it has logged."""

    def __init__(self, logged: Callable[[], str]) -> None:
        self.clock = Clock()
        self.outage = Outage(self.clock)
        self._logged = logged

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._logged().splitlines()]

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]


@pytest.fixture
def told(logged: Callable[[], str]) -> Told:
    return Told(logged)


def test_an_outage_is_a_line_when_it_begins_one_a_minute_and_one_when_all_have_been_answered(told: Told) -> None:
    for _ in range(250):
        for part in ("engine", "triggers"):
            told.outage.failed(part, REFUSED)
        told.clock.now += 0.5
    told.outage.answered("engine")
    assert told.events == ["database.away"] * 3
    told.outage.answered("triggers")
    told.outage.answered("triggers")
    assert told.events == [*["database.away"] * 3, "database.back"]
    assert [line["seconds"] for line in told.lines] == [0, 60, 120, 125]
    assert told.lines[1]["parts"] == ["engine", "triggers"]
    assert told.lines[0]["error"] == str(REFUSED)


def test_a_connection_that_is_made_again_at_once_is_one_line(told: Told) -> None:
    told.outage.failed("engine", LOST)
    told.clock.now += 0.1
    told.outage.answered("engine")
    assert told.events == ["database.reconnected"]


def test_silence_is_an_outage_after_a_second(told: Told) -> None:
    told.outage.failed("engine", TimeoutError())
    assert told.events == []
    told.clock.now += 1
    told.outage.failed("heartbeat", TimeoutError())
    assert told.events == ["database.away"]


def test_the_next_outage_is_told_again(told: Told) -> None:
    for _ in range(2):
        told.outage.failed("engine", REFUSED)
        told.outage.answered("engine")
    assert told.events == ["database.away", "database.back"] * 2


def test_a_part_that_is_well_does_not_end_what_another_suffers(told: Told) -> None:
    told.outage.failed("engine", REFUSED)
    told.outage.answered("reconcile")
    assert told.outage.lasts
    assert told.events == ["database.away"]


@pytest.mark.parametrize("error", [DEADLOCK, ValueError("a fault of ours")])
def test_what_is_no_outage_is_told_once_a_minute(told: Told, error: Exception) -> None:
    for _ in range(150):
        told.outage.failed("reconcile", error)
        told.clock.now += 0.5
    assert told.events == ["part.failed"] * 2
    assert [line["times"] for line in told.lines] == [1, 120]
    told.outage.answered("reconcile")
    told.outage.failed("reconcile", error)
    assert told.events == ["part.failed"] * 3
    assert not told.outage.lasts
