"""The authority's simulator in a process of its own: `python -m tests.authority`, and what a test tells it to do."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from bon_scheduler.demo.shaam_simulator import HOST, Misbehaviour, ShaamSimulator, shaam_simulator
from tests.tax import CLIENT_ID, CLIENT_SECRET

MOST_BYTES_AT_ONCE = 16 * 1024 * 1024


@dataclass(slots=True)
class Authority:
    """A running simulator: each method is its own, over HTTP."""

    token_url: str
    _control_url: str
    _session: aiohttp.ClientSession

    async def issue(self, subject: str) -> str:
        return str(await self._call("issue", subject))

    async def issue_many(self, subjects: Sequence[str]) -> list[str]:
        return list(await self._call("issue_many", list(subjects)))

    async def current(self, subject: str) -> str:
        return str(await self._call("current", subject))

    async def honours(self, token: str) -> bool:
        return bool(await self._call("honours", token))

    async def withdraw(self, subject: str) -> None:
        await self._call("withdraw", subject)

    async def spoil(self, subject: str, fault: Misbehaviour | None) -> None:
        await self._call("spoil", subject, fault)

    async def requests(self) -> int:
        return int(await self._call("requests"))

    async def reuses(self) -> list[str]:
        return list(await self._call("reuses"))

    async def secrets(self) -> set[str]:
        return set(await self._call("secrets"))

    async def _call(self, name: str, *arguments: object) -> Any:
        async with self._session.post(self._control_url, json=[name, *arguments]) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()


@asynccontextmanager
async def authority(delay_seconds: float = 0) -> AsyncIterator[Authority]:
    """Start the simulator, and see to it that it ends; each of its answers takes so long."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.authority",
        str(delay_seconds),
        cwd=Path(__file__).parent.parent,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        urls = json.loads(await process.stdout.readline())
        async with aiohttp.ClientSession() as session:
            yield Authority(urls["token"], urls["control"], session)
    finally:
        process.stdin.close()  # it ends with its parent
        await process.wait()


async def _obey(simulator: ShaamSimulator, request: web.Request) -> web.Response:
    name, *arguments = await request.json()
    if name == "spoil":
        subject, fault = arguments
        if fault is None:
            simulator.spoil.pop(subject, None)
        else:
            simulator.spoil[subject] = Misbehaviour(fault)
        return web.json_response(None)
    if name == "issue_many":
        return web.json_response([simulator.issue(subject) for subject in arguments[0]])
    found = getattr(simulator, name)
    value = found(*arguments) if callable(found) else found
    return web.json_response(sorted(value) if isinstance(value, set) else value)


async def _serve(delay_seconds: float) -> None:
    async with shaam_simulator(
        client_id=CLIENT_ID, client_secret=CLIENT_SECRET, delay_seconds=delay_seconds
    ) as simulator:

        async def obey(request: web.Request) -> web.Response:
            return await _obey(simulator, request)

        app = web.Application(client_max_size=MOST_BYTES_AT_ONCE)
        app.router.add_post("/", obey)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, HOST, 0).start()
        control = f"http://{HOST}:{runner.addresses[0][1]}/"
        sys.stdout.write(json.dumps({"token": simulator.token_url, "control": control}) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1])))
