"""What LOG_LEVEL=debug tells of an attempt: how long it waited for connections, and how long its statements took."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from bon_scheduler.jobs import Connection

__all__ = ["Timings"]

log = structlog.get_logger()
MOST_LINES = 50
"""Of borrowed connections a attempt; the line at its end counts all."""


@dataclass(slots=True)
class Timings:
    """Adds up what an attempt did with connections. No SQL and no values are kept."""

    connections: int = 0
    statements: int = 0
    waited_seconds: float = 0.0
    statement_seconds: float = 0.0

    @asynccontextmanager
    async def of(self, connection: Connection, asked_at: float) -> AsyncIterator[None]:
        """Time what is done with a connection that was asked for at `asked_at`, by `time.perf_counter`."""
        if not _wanted():
            yield
            return
        lent_at, statements, seconds, slowest = time.perf_counter(), 0, 0.0, 0.0

        def count(statement: Any) -> None:  # noqa: ANN401 - asyncpg's LoggedQuery
            nonlocal statements, seconds, slowest
            statements += 1
            seconds += statement.elapsed
            slowest = max(slowest, statement.elapsed)

        try:
            with connection.query_logger(count):
                yield
        finally:
            self.connections += 1
            self.statements += statements
            self.waited_seconds += lent_at - asked_at
            self.statement_seconds += seconds
            if self.connections <= MOST_LINES:
                log.debug(
                    "connection.returned",
                    waited_ms=_ms(lent_at - asked_at),
                    held_ms=_ms(time.perf_counter() - lent_at),
                    statements=statements,
                    statements_ms=_ms(seconds),
                    slowest_ms=_ms(slowest),
                )

    def report(self) -> None:
        """Log what all of them came to, where there were any."""
        if not self.connections:
            return
        log.debug(
            "run.timings",
            connections=self.connections,
            waited_ms=_ms(self.waited_seconds),
            statements=self.statements,
            statements_ms=_ms(self.statement_seconds),
        )


def _wanted() -> bool:
    return logging.getLogger().isEnabledFor(logging.DEBUG)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
