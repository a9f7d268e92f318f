"""
What time it is, as a parameter of the program.

Nothing below `service` reads the machine's clock by itself: it is handed a
`Clock`, so that a test, a replay or a check of several clocks decides.
"""

import time
from datetime import UTC, datetime
from typing import Protocol

__all__ = ["Clock", "SystemClock", "seconds_since_boot"]


class Clock(Protocol):
    """A source of the present instant."""

    def now(self) -> datetime:
        """Return the present instant (UTC, aware)."""
        ...


class SystemClock:
    """This machine's wall clock."""

    def now(self) -> datetime:
        """Return the present instant (UTC, aware)."""
        return datetime.now(UTC)


def seconds_since_boot() -> float:
    """Return seconds by a clock that nobody can set; where the system has one, it counts suspension."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)
