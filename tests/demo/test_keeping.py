"""A demo in a directory that an earlier one has kept goes on with what is there, at the same address."""

import asyncio
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bon_scheduler.database import connections
from bon_scheduler.demo.postgres import find_binaries, running_postgres
from bon_scheduler.demo.run import CannotGoOnError, run_demo
from bon_scheduler.report import Report
from tests.demo.test_demo import pytestmark as pytestmark  # noqa: PLC0414 - for all of this module
from tests.process import environment_of, run_command
from tests.waiting import until

ADDRESS = re.compile(r"DATABASE_URL=(\S+)")
EXPIRE = "update public.business_shaam_credentials set token_expires_at = now() where not needs_reauth"
STATE = "select state::text from bon_scheduler.runs where id = $1"
COUNTS = "select counts from bon_scheduler.runs where id = $1"


@dataclass(frozen=True, slots=True)
class Demo:
    """A demo that serves, and what it printed until then."""

    process: asyncio.subprocess.Process
    told: str

    @property
    def url(self) -> str:
        """The address of its database, as it was printed last."""
        return str(ADDRESS.findall(self.told)[-1])


@asynccontextmanager
async def demo(directory: Path, *, cwd: Path | None = None) -> AsyncIterator[Demo]:
    """Start the demo, wait until it serves, and end it with Ctrl-C."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bon_scheduler", "demo", "--port", "0", "--keep", str(directory)),
        cwd=cwd,
        env=environment_of({}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    told = ""
    try:
        async for line in process.stdout:
            told += line.decode()
            if line.startswith(b"Serving"):
                break
        assert process.returncode is None, told
        yield Demo(process, told)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.slow
async def test_a_second_demo_goes_on_with_the_first_ones_database_at_its_address(tmp_path: Path) -> None:
    async with demo(tmp_path) as first:
        assert "Going on" not in first.told
        async with connections.connect(first.url) as connection:
            await connection.execute("create table mine as select 7 as number")
            runs = await connection.fetchval("select count(*) from bon_scheduler.runs")
    letters = sorted(path.name for path in (tmp_path / "digests").iterdir())
    async with demo(tmp_path) as second:
        assert second.url == first.url
        assert f"Going on with what was kept in {tmp_path}" in " ".join(second.told.split())
        async with connections.connect(second.url) as connection:
            assert await connection.fetchval("select number from mine") == 7
            assert await connection.fetchval("select count(*) from bon_scheduler.runs") >= runs
        assert letters == sorted(path.name for path in (tmp_path / "digests").iterdir())


@pytest.mark.slow
async def test_the_second_demos_authority_honours_the_tokens_that_were_kept(tmp_path: Path) -> None:
    async with demo(tmp_path):
        pass
    async with demo(tmp_path) as second, connections.connect(second.url) as connection:
        await connection.execute(EXPIRE)
        run_id = await connection.fetchval("select bon_scheduler.enqueue('shaam-token-refresh')")

        async def ended() -> bool:
            return await connection.fetchval(STATE, run_id) in {"succeeded", "partial", "dead"}

        await until(ended, seconds=60)
        counts = await connection.fetchval(COUNTS, run_id)
        assert counts["refreshed"] > 0 == counts["needs_reauth"], counts


@pytest.mark.slow
async def test_a_port_that_is_taken_is_said_with_what_to_export(tmp_path: Path) -> None:
    async with demo(tmp_path) as first:
        port = urlsplit(first.url).port
    with socket.create_server(("127.0.0.1", port or 0)):
        async with demo(tmp_path) as second:
            assert second.url != first.url
            assert f"The port that it had, {port}, is taken." in second.told
            assert f"export DATABASE_URL={second.url}\n" in second.told


@pytest.mark.slow
async def test_once_is_refused_where_a_database_is_kept_and_changes_nothing(tmp_path: Path) -> None:
    begun = await run_command("demo", "--once", "--port", "0", "--keep", str(tmp_path))
    assert begun.status == 0, begun.err
    letters = sorted(path.name for path in (tmp_path / "digests").iterdir())
    again = await run_command("demo", "--once", "--port", "0", "--keep", str(tmp_path))
    assert again.status == 2
    assert f"{tmp_path} holds a demo's database, which --once does not change" in " ".join(again.err.split())
    assert letters == sorted(path.name for path in (tmp_path / "digests").iterdir())


def test_a_database_whose_key_is_gone_is_left_as_it_is(tmp_path: Path) -> None:
    with running_postgres(find_binaries(), directory=tmp_path) as server:
        asyncio.run(make_database(server, "bon"))
    with pytest.raises(CannotGoOnError, match="not the key of its tokens"):
        run_demo(port=0, keep=tmp_path, once=False, report=Report(as_json=True))


def test_a_database_that_was_never_complete_is_made_anew(tmp_path: Path) -> None:
    with running_postgres(find_binaries(), directory=tmp_path) as server:
        asyncio.run(make_database(server, "bon_unfinished"))
    assert run_demo(port=0, keep=tmp_path, once=True, report=Report(as_json=True)) == 0


async def make_database(server: str, name: str) -> None:
    async with connections.connect(server) as connection:
        await connection.execute(f"create database {name}")
