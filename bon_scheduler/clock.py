"""
What time it is, as a parameter of the program.

Nothing below `service` reads the machine's clock by itself: it is handed a
`Clock`, so that a test, a replay or a check of several clocks decides.
"""

from datetime import UTC, datetime
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


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
