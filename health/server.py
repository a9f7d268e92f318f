"""The HTTP server on HEALTH_PORT: /livez, /readyz, /metrics."""

import asyncio
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler
from prometheus_client.exposition import choose_encoder

from bon_scheduler.config import Settings
from bon_scheduler.log import describe_error
from health.listening import Connections, Seldom
from health.probes import Probes

__all__ = ["CannotListenError", "answering"]

CLOSE_SECONDS = 1.0
LONGEST_LINE, LONGEST_FIELD, MOST_FIELDS = 2048, 8190, 32
"""Of a request, in bytes: its first line and each header; and how many headers."""


class CannotListenError(Exception):
    """Nothing can listen where the settings say. `why` is the system's word for it."""

    def __init__(self, settings: Settings, error: OSError) -> None:
        # Below 0 it is the resolver's, which the system has no word for.
        self.why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror or error)
        super().__init__(
            f"Cannot listen on HEALTH_HOST {settings.health_host}, HEALTH_PORT {settings.health_port}: {self.why}. "
            "Set them to an address of this machine and a port that nothing else uses."
        )


@asynccontextmanager
async def answering(probes: Probes, settings: Settings) -> AsyncIterator[int]:
    """
    Answer for the duration of the context; yield the port, which the system chose if HEALTH_PORT is 0.

    Raises CannotListenError.
    """
    token = settings.metrics_token.get_secret_value() if settings.metrics_token else None
    requests = _Requests()
    app = web.Application(middlewares=[requests.answer])
    for path in ("/livez", "/health"):
        app.router.add_get(path, partial(_livez, probes))
    for path in ("/readyz", "/health/ready"):
        app.router.add_get(path, partial(_readyz, probes))
    app.router.add_get("/metrics", partial(_metrics, probes, token))
    runner = web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=CLOSE_SECONDS,
        logger=_quiet_logger(),
        max_line_size=LONGEST_LINE,
        max_field_size=LONGEST_FIELD,
        max_headers=MOST_FIELDS,
        lingering_time=0,
    )
    await runner.setup()
    connections = Connections(partial(_make_protocol, runner), requests.answering)
    watcher = asyncio.create_task(probes.watch_loop(), name="loop-lag")
    try:
        async with AsyncExitStack() as stack:
            try:
                port = await stack.enter_async_context(connections.accepted(settings.health_host, settings.health_port))
            except OSError as error:
                raise CannotListenError(settings, error) from error
            yield port
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])
        await runner.cleanup()


def _make_protocol(runner: web.AppRunner) -> asyncio.Protocol:
    if runner.server is None:
        raise OSError("The server has ended.")  # while a connection was being accepted
    return runner.server()


@dataclass(frozen=True, slots=True)
class _Requests:
    """Which connections are being answered: one request each."""

    answering: set[asyncio.BaseTransport] = field(default_factory=set)

    @web.middleware
    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer, and end the connection. What comes behind the request is left unread."""
        transport = request.transport
        if transport is None:  # it has gone
            raise web.HTTPServiceUnavailable
        self.answering.add(transport)
        try:
            transport.pause_reading()
            response = await handler(request)
        except web.HTTPException as error:  # no such page, or not with this method
            response = web.Response(status=error.status, text=f"{error.status}\n")
        finally:
            self.answering.discard(transport)
        response.force_close()
        return response


def _quiet_logger() -> logging.Logger:
    """Return aiohttp's logger, which says of bad requests only now and then that there are some, and quotes none."""
    seldom = Seldom()

    def keep(record: logging.LogRecord) -> bool:
        if (unsaid := seldom.take(time.monotonic())) is None:
            return False
        error = record.exc_info[1] if record.exc_info else None
        why = type(error).__name__ if error is None or isinstance(error, HttpProcessingError) else describe_error(error)
        record.msg, record.args = f"A request on HEALTH_PORT was not answered ({unsaid} before it): {why}", ()
        record.exc_info = record.exc_text = None
        return True

    logger = logging.getLogger("bon_scheduler.health")
    logger.setLevel(logging.WARNING)
    logger.filters[:] = [keep]
    return logger


async def _livez(probes: Probes, _: web.Request) -> web.Response:
    return _json(*probes.live())


async def _readyz(probes: Probes, _: web.Request) -> web.Response:
    return _json(*await probes.ready())


async def _metrics(probes: Probes, token: str | None, request: web.Request) -> web.Response:
    given = request.headers.get("Authorization", "")
    if token is not None and not hmac.compare_digest(
        given.encode(errors="surrogateescape"), f"Bearer {token}".encode()
    ):
        return web.Response(status=401, text="METRICS_TOKEN is set: send it as a bearer token.\n")
    await probes.refresh_metrics()
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return web.Response(body=encode(probes.metrics.registry), headers={"Content-Type": content_type})


def _json(well: bool, body: object) -> web.Response:
    return web.Response(status=200 if well else 503, body=orjson.dumps(body), content_type="application/json")
