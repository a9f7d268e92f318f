"""Servers of a test's own, their copies, and services that find themselves on one."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bon_scheduler import declared, service
from bon_scheduler.config import Settings
from bon_scheduler.database import connections
from bon_scheduler.demo import postgres
from bon_scheduler.demo.postgres import PostgresUnavailableError
from bon_scheduler.demo.sample import create_tables
from bon_scheduler.service import Serving
from tests.chaos.cluster import Cluster

COMMAND_SECONDS = 60


def binaries() -> Path:
    """Where the server's programs are; skip where there are none."""
    try:
        return postgres.find_binaries()
    except PostgresUnavailableError as error:
        pytest.skip(str(error))


class Server(Cluster):
    """A server whose data can be copied; each start may listen on another port."""

    def __init__(self, home: Path) -> None:
        super().__init__(binaries(), home)
        self.data = home / "data"

    def copied(self, home: Path) -> "Server":
        """Copy the files of this server, which is stopped, as one copies a disk."""
        home.mkdir(parents=True)
        shutil.copytree(self.data, home / "data", symlinks=True)
        return Server(home)

    def replaced_by(self, copy: "Server") -> None:
        """Put the files of a copy in the place of this server's own, as a restored backup is; both are stopped."""
        shutil.rmtree(self.data)
        shutil.copytree(copy.data, self.data, symlinks=True)

    def replica(self, home: Path) -> "Server":
        """Make a replica that follows this server, which is running."""
        home.mkdir(parents=True)
        program("pg_basebackup", "-d", self.url(), "-D", str(home / "data"), "-R", "-X", "stream", "-c", "fast")
        return Server(home)


@contextmanager
def server(home: Path, *, of: Server | None = None) -> Iterator[Server]:
    """Run a new server, or that one, for the duration of the block."""
    home.mkdir(parents=True, exist_ok=True)
    running = of or Server(home)
    if of is None:
        running.create()
    running.start()
    try:
        yield running
    finally:
        running.stop(signal.SIGQUIT)


def program(name: str, *arguments: str, given: bytes = b"") -> bytes:
    """Run one of PostgreSQL's own programs; return what it printed."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    command = [str(binaries() / name), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, env=keep, check=False, timeout=COMMAND_SECONDS)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


async def prepare(url: str) -> None:
    """Make BON's tables and our schema in an empty database."""
    async with connections.connect(url) as connection:
        await create_tables(connection)
    await service.prepare(declared.read_settings({"DATABASE_URL": url}))


def settings(url: str, **environ: str) -> Settings:
    values = {"DATABASE_URL": url, "HEALTH_PORT": "0", "HEALTH_HOST": "127.0.0.1", "LEASE_SECONDS": "5"}
    return declared.read_settings({**values, **environ})


async def readiness(serving: Serving) -> tuple[int, Mapping[str, Any]]:
    """Return the status of /readyz and what it says of each thing."""
    url = f"http://127.0.0.1:{serving.port}/readyz"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, (await answer.json())["checks"]


async def why_not(serving: Serving) -> str | None:
    """Return why the ledger is quarantined, as /readyz says it."""
    status, checks = await readiness(serving)
    reason: str | None = checks["place"]["reason"]
    assert reason is None or status == 503
    return reason


async def is_ready(serving: Serving) -> bool:
    return (await readiness(serving))[0] == 200
