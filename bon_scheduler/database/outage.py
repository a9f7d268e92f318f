"""
The one place where the parts of a process report that the database does not answer them, and that it does again.

An outage is a line when it begins (`database.away`), the same once a minute, and one when every part that was
without the database has been answered (`database.back`). A connection that is lost and made again within a second is
one line (`database.reconnected`). Any other error of a part is logged when it is new, and once a minute while it lasts.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import asyncpg
import structlog

from bon_scheduler.database.connections import TRANSIENT_ERRORS
from bon_scheduler.database.unavailable import DatabaseUnavailableError
from bon_scheduler.log import describe_error

__all__ = ["Outage"]

log = structlog.get_logger()
AGAIN_SECONDS = 60.0
CERTAIN_SECONDS = 1.0
"""A connection that is lost is made again at once; after so long without, the database is away."""


@dataclass(slots=True)
class _Fault:
    """An error of one part that is no outage: what it is, when it was last logged, and how often it came since."""

    error: str
    logged: float
    unlogged: int = 0


class Outage:
    """Whether the database answers this process; safe to call from any thread. `seconds` is a clock nobody can set."""

    def __init__(self, seconds: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._without: set[str] = set()
        self._faults: dict[str, _Fault] = {}
        self._since = 0.0
        self._logged: float | None = None
        self._error = ""

    @property
    def lasts(self) -> bool:
        """Whether some part is without the database."""
        return bool(self._without)

    def failed(self, part: str, error: Exception) -> None:
        """Report that the database did not answer `part`, or what else kept it from its work; logged as said above."""
        with self._lock:
            if not isinstance(error, (*TRANSIENT_ERRORS, DatabaseUnavailableError)) or isinstance(
                error, asyncpg.TransactionRollbackError
            ):
                self._note_fault(part, describe_error(error))
            else:
                self._note_absence(part, error)

    def answered(self, part: str) -> None:
        """Report that the database answered `part`; costs nothing while all is well."""
        if part not in self._without and part not in self._faults:
            return
        with self._lock:
            self._faults.pop(part, None)
            if part not in self._without:
                return
            self._without.discard(part)
            if self._without:
                return
            seconds = round(self._seconds() - self._since, 1)
            if self._logged is None:
                log.warning("database.reconnected", part=part, seconds=seconds, error=self._error)
            else:
                log.warning("database.back", seconds=seconds)
            self._logged, self._error = None, ""

    def _note_absence(self, part: str, error: Exception) -> None:
        now = self._seconds()
        if not self._without:
            self._since = now
        self._without.add(part)
        no_connection = isinstance(error, DatabaseUnavailableError)
        if no_connection:
            self._error = str(error)  # which says where, why and what to do
        self._error = self._error or describe_error(error)
        if self._logged is None:
            due = no_connection or now - self._since >= CERTAIN_SECONDS
        else:
            due = now - self._logged >= AGAIN_SECONDS
        if due:
            self._logged = now
            seconds = round(now - self._since, 1)
            log.error("database.away", seconds=seconds, parts=sorted(self._without), error=self._error)

    def _note_fault(self, part: str, error: str) -> None:
        now, before = self._seconds(), self._faults.get(part)
        if before is not None and before.error == error and now - before.logged < AGAIN_SECONDS:
            before.unlogged += 1
            return
        times = 1 if before is None else before.unlogged + 1
        log.warning("part.failed", part=part, error=error, times=times)
        self._faults[part] = _Fault(error, now)
