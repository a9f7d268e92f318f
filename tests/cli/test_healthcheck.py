"""The command that asks the probes, as an image's health check does."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.conftest import Connection
from tests.process import run_command, serve
from tests.waiting import until

ALIVE, READY = ("healthcheck",), ("healthcheck", "--ready")


async def test_it_says_what_the_probes_say(database_url: str) -> None:
    async with serve(DATABASE_URL=database_url) as service:
        # Nothing but where to ask: no database, no other setting.
        asked = {"HEALTH_PORT": str(service.port), "HEALTH_HOST": "0.0.0.0"}
        for command, path in ((ALIVE, "/livez"), (READY, "/readyz")):
            told = await run_command(*command, **asked)
            assert (told.status, told.out, told.err) == (0, f"ok: {path} 200\n", "")
        as_json = await run_command(*READY, "--json", **asked)
        assert as_json.document == {"healthy": True, "path": "/readyz", "status": 200, "why": None}


async def test_a_service_that_is_not_ready_is_told_with_what_is_down(database_url: str, connection: Connection) -> None:
    async with serve(DATABASE_URL=database_url) as service:
        asked = {"HEALTH_PORT": str(service.port)}
        await connection.execute("alter schema bon_scheduler rename to elsewhere")
        await until(lambda: _is_not(service.ready()), seconds=30)
        told = await run_command(*READY, **asked)
        assert told.status == 1
        assert told.out.startswith("not ok: /readyz 503, ")
        assert (await run_command(*ALIVE, **asked)).status == 0
        await connection.execute("alter schema elsewhere rename to bon_scheduler")
        assert await service.stop(signal.SIGTERM) == 0
    gone = await run_command(*ALIVE, **asked)
    assert (gone.status, gone.err) == (1, "")
    assert "nobody answers" in gone.out


async def _is_not(asked: "asyncio.Future[bool] | object") -> bool:
    return not await asked  # type: ignore[misc]


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[int]:
    """Listen on a port of this machine and give every caller the same bytes."""

    async def give(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(give, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 503 No\r\n\r\n[]", b"HTTP/1.1 404 No\r\n\r\n"])
async def test_whatever_else_answers_is_not_well(answer: bytes) -> None:
    async with answering(answer) as port:
        told = await run_command(*ALIVE, HEALTH_PORT=str(port))
    assert (told.status, told.err) == (1, "")
    assert told.out.startswith("not ok: /livez")
    assert told.out.count("\n") == 1


@pytest.mark.parametrize("port", ["0", "-1", "65536", "http", "٣"])
async def test_a_port_that_nobody_can_be_asked_at_is_refused(port: str) -> None:
    told = await run_command(*ALIVE, HEALTH_PORT=port)
    assert told.status == 2
    assert f'HEALTH_PORT is "{port}"' in told.err
