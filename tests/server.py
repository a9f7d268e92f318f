"""The processes of the PostgreSQL server that a test talks to, where they are on this machine."""

import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.conftest import Connection

BACKENDS = "select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"


async def backends(connection: Connection) -> list[int]:
    """Return the processes that serve others in the test's database; skip where they are not on this machine."""
    found = [row["pid"] for row in await connection.fetch(BACKENDS)]
    if not all(_is_backend(pid) for pid in found):
        pytest.skip("the server's processes are not on this machine")
    return found


def _is_backend(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"postgres: ")
    except OSError:
        return False


@asynccontextmanager
async def frozen(processes: Sequence[int]) -> AsyncIterator[None]:
    """Have processes stand still inside the block."""
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
