"""The HTTP server on HEALTH_PORT: /livez, /readyz, /metrics."""

import asyncio
import hmac
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import orjson
from aiohttp import web
from prometheus_client.exposition import choose_encoder

from bon_scheduler.config import Settings
from health.probes import Probes

__all__ = ["CannotListenError", "answering"]

CLOSE_SECONDS = 1.0


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
    app = web.Application()
    for path in ("/livez", "/health"):
        app.router.add_get(path, partial(_livez, probes))
    for path in ("/readyz", "/health/ready"):
        app.router.add_get(path, partial(_readyz, probes))
    app.router.add_get("/metrics", partial(_metrics, probes, token))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_SECONDS)
    await runner.setup()
    watcher = asyncio.create_task(probes.watch_loop(), name="loop-lag")
    try:
        site = web.TCPSite(runner, settings.health_host, settings.health_port)
        try:
            await site.start()
        except OSError as error:
            raise CannotListenError(settings, error) from error
        yield int(runner.addresses[0][1])
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])
        await runner.cleanup()


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
