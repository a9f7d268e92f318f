"""Real processes of the program, as an operator starts them."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.waiting import until

QUIET = {"LOG_FORMAT": "json", "NO_COLOR": "1"}


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that ended."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The JSON document on standard output."""
        return json.loads(self.out)


def environment_of(environ: Mapping[str, str]) -> dict[str, str]:
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    chosen = {"SHAAM_MODE": "mock", **({} if "SMTP_HOST" in environ else {"EMAIL_MODE": "log"})}
    return {**keep, **QUIET, **chosen, **environ}


async def run_command(*arguments: str, **environ: str) -> Finished:
    """Run `python -m bon_scheduler …` to its end."""
    return await run_program(sys.executable, "-m", "bon_scheduler", *arguments, **environ)


async def run_program(*command: str, **environ: str) -> Finished:
    """Run a command to its end, in the environment of an operator."""
    process = await start_program(*command, **environ)
    async with asyncio.timeout(90):
        out, err = await process.communicate()
    return Finished(process.returncode or 0, out.decode(), err.decode())


async def start_program(*command: str, **environ: str) -> asyncio.subprocess.Process:
    """Start a command in the environment of an operator."""
    return await asyncio.create_subprocess_exec(
        *command,
        env=environment_of(environ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@dataclass(slots=True)
class Service:
    """A `serve` process."""

    process: asyncio.subprocess.Process
    events: list[dict[str, Any]]
    port: int = 0

    async def ready(self) -> bool:
        """Whether /readyz says so."""
        try:
            url = f"http://127.0.0.1:{self.port}/readyz"
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    def saw(self, event: str) -> bool:
        """Whether an event of that name was logged."""
        return any(line["event"] == event for line in self.events)

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the events of that name."""
        return [line for line in self.events if line["event"] == event]

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; return the exit status."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(60):
            return await self.process.wait()


@asynccontextmanager
async def serve(
    *, program: Sequence[str] = ("bon_scheduler", "serve"), command: Sequence[str] = (), **environ: str
) -> AsyncIterator[Service]:
    """
    Start `serve`, or another program that serves, wait until it is ready, and see to it that it ends.

    `program` is a module of this checkout and its arguments; `command`, if given, is what is started instead.
    """
    environment = {"HEALTH_PORT": "0", "HEALTH_HOST": "127.0.0.1", **environ}
    started_as = command or (sys.executable, "-m", *program)
    process = await asyncio.create_subprocess_exec(
        *started_as, env=environment_of(environment), stderr=asyncio.subprocess.PIPE
    )
    service = Service(process, [])
    reading = asyncio.create_task(_read_events(service))
    try:

        async def started() -> bool:
            if process.returncode is not None:
                raise AssertionError(f"serve ended with {process.returncode}: {service.events}")
            return service.port > 0 and await service.ready()

        await until(started, seconds=30)
        yield service
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading


async def _read_events(service: Service) -> None:
    assert service.process.stderr is not None
    async for line in service.process.stderr:
        try:
            event = json.loads(line)
        except ValueError:
            event = {"event": line.decode().rstrip()}
        service.events.append(event)
        if event["event"] == "service.started":
            service.port = event["port"]
