"""
The dead man's switch: tell a watcher outside that a job started, succeeded or failed.

By healthchecks.io's convention: the URL itself after a success, `/start` and `/fail` after it otherwise. The
watcher raises the alarm when it hears nothing, so this needs no reliability of its own: a few tries, in the
background, and never an effect on the run. A URL is a secret: it is not logged.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import aiohttp
import structlog
from pydantic import SecretStr

__all__ = ["Deadman"]

log = structlog.get_logger()
TRIES = 3
TIMEOUT = aiohttp.ClientTimeout(total=5)
FAREWELL_SECONDS = 2.0


class Deadman:
    """Pings by job name; a job without a URL is not watched."""

    def __init__(
        self, urls: Mapping[str, SecretStr], session: aiohttp.ClientSession, silent: Callable[[], bool]
    ) -> None:
        self._urls = urls
        self._session = session
        self._silent = silent
        self._pings: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def watching(
        cls, urls: Mapping[str, SecretStr], *, silent: Callable[[], bool] = lambda: False
    ) -> "AsyncIterator[Deadman]":
        """Ping for the duration of the context, unless `silent`; at its end wait a moment for pings under way."""
        async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
            deadman = cls(urls, session, silent)
            yield deadman
            if deadman._pings:
                await asyncio.wait(set(deadman._pings), timeout=FAREWELL_SECONDS)

    def started(self, job: str) -> None:
        """Tell that a run of the job started."""
        self._ping(job, "/start")

    def ended(self, job: str, state: str) -> None:
        """Tell how a run ended; one that is to be retried has not ended."""
        if state in {"succeeded", "partial"}:
            self._ping(job, "")
        elif state in {"dead", "held"}:
            self._ping(job, "/fail")

    def _ping(self, job: str, path: str) -> None:
        if job not in self._urls or self._silent():
            return
        url = self._urls[job].get_secret_value().rstrip("/") + path
        task = asyncio.create_task(self._send(job, url))
        self._pings.add(task)
        task.add_done_callback(self._pings.discard)

    async def _send(self, job: str, url: str) -> None:
        trouble = ""
        for attempt in range(1, TRIES + 1):
            try:
                async with self._session.get(url, allow_redirects=False) as answer:
                    if answer.status < 300:  # noqa: PLR2004 - 2xx
                        return
                    trouble = f"HTTP {answer.status}"
            except (aiohttp.ClientError, TimeoutError) as error:
                trouble = type(error).__name__
            await asyncio.sleep(attempt * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
        log.warning("deadman.unreached", job=job, error=trouble)
