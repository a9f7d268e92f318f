"""
The circuit breaker of the authority's endpoint, for one process.

It opens when the endpoint fails whoever asks, so that a run does not wait for thousands of time-outs, and when
the application is refused whoever it asks for, so that a wrong secret is tried a handful of times and not by
every business. One business's own trouble never opens it: any answer that was given to the application
starts the count anew. Once it has been open for a while one exchange is let through, and its answer decides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import structlog

from bon_scheduler.clock import seconds_since_boot
from bon_scheduler.shaam.client import Ambiguous, Answer, Misconfigured, NeedsReauth, Refreshed, Transient

__all__ = ["HANDFUL", "Breaker"]

log = structlog.get_logger()

HANDFUL = 5
"""So many refusals of the application in a row, and it is believed."""
FAILURES_IN_A_ROW = 20
SHORTEST_PAUSE = timedelta(seconds=30)
LONGEST_PAUSE = timedelta(minutes=10)


@dataclass(slots=True)
class Breaker:
    """Counts what the endpoint answers; `seconds` is a clock that nobody can set."""

    seconds: Callable[[], float] = seconds_since_boot
    _failures: int = 0
    _refusals: int = 0
    _reason: str | None = None
    _since: float = 0.0
    _until: float = 0.0
    _pause: timedelta = SHORTEST_PAUSE
    _probing: bool = False

    @property
    def refusal(self) -> str | None:
        """Why the application is taken to be refused; None while it is not."""
        return self._reason if self._refusals >= HANDFUL else None

    def why_not(self) -> str | None:
        """Return why nobody may be called now, if so."""
        return self._reason if self.seconds() < self._until else None

    def admit(self) -> str | None:
        """Let a call through, just before it is made, or say why not; half open, one finds out for the others."""
        reason = self.why_not()
        if reason is None and self._reason is not None:
            self._probing = True
            self._until = self.seconds() + self._pause.total_seconds()
        return reason

    def note(self, answer: Answer) -> None:
        """Account for an answer."""
        match answer:
            case Refreshed() | NeedsReauth():
                if self._reason is not None:
                    log.warning("shaam.back", seconds=round(self.seconds() - self._since, 1))
                self._failures = self._refusals = 0
                self._reason, self._pause, self._probing = None, SHORTEST_PAUSE, False
            case Misconfigured(reason):
                self._refusals += 1
                if self._refusals >= HANDFUL:
                    self._open(f"the application is refused ({reason})")
            case Transient(reason) | Ambiguous(reason):
                self._failures += 1
                if self._failures >= FAILURES_IN_A_ROW:
                    self._open(f"the authority's endpoint fails ({reason})")

    def _open(self, reason: str) -> None:
        if self._probing:
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
        elif self._reason is not None:
            return  # what was under way when it opened says nothing new
        else:
            self._since = self.seconds()
        log.error("shaam.shut_off", reason=reason, pause_seconds=self._pause.total_seconds())
        self._reason, self._probing = reason, False
        self._until = self.seconds() + self._pause.total_seconds()
