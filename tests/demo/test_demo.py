"""The demo as a newcomer starts it: a process of its own, on a database of its own."""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from bon_scheduler.demo.postgres import PostgresUnavailableError, find_binaries, running_postgres
from bon_scheduler.demo.run import run_demo
from bon_scheduler.report import Report
from tests.process import run_command
from tests.waiting import until

pytestmark = pytest.mark.skipif(
    os.environ.get("TEST_POSTGRES") == "container", reason="the demo runs a server of its own"
)


async def test_the_demo_runs_every_job_as_its_sample_data_demands() -> None:
    result = await run_command("demo", "--once", "--port", "0", "--json", DATABASE_URL="postgresql://nowhere:1/bon")
    assert result.status == 0, result.out + result.err
    document = result.document
    assert document["faults"] == []
    states = {job["job"]: job["state"] for job in document["jobs"]}
    assert states.pop("shaam-token-refresh") == "partial"
    assert set(states.values()) == {"succeeded"}
    assert document["letters"] == 14


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
async def test_nothing_survives_a_demo_that_is_ended(tmp_path: Path, number: signal.Signals, status: int) -> None:
    """Nor do an earlier demo's letters, but whatever else is in their directory."""
    (tmp_path / "digests").mkdir()
    for name in ("notes.txt", "01-an-earlier-one.html"):
        (tmp_path / "digests" / name).touch()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bon_scheduler", "demo", "--port", "0", "--keep", str(tmp_path),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    async for line in process.stdout:
        if line.startswith(b"Serving"):
            break
    assert servers_of(tmp_path)
    process.send_signal(number)
    assert await process.wait() == status

    async def gone() -> bool:
        return not servers_of(tmp_path)

    await until(gone)
    assert len(list((tmp_path / "digests").glob("*.html"))) == 14
    assert (tmp_path / "digests" / "notes.txt").exists()


def test_a_directory_that_another_demo_uses_is_left_as_it_is(tmp_path: Path) -> None:
    letter = tmp_path / "digests" / "01-owner.html"
    letter.parent.mkdir()
    letter.touch()
    with (
        running_postgres(find_binaries(), directory=tmp_path),
        pytest.raises(PostgresUnavailableError, match=f"Another server uses {tmp_path}/postgres-.* another directory"),
    ):
        run_demo(port=0, keep=tmp_path, once=True, report=Report(as_json=True))
    assert letter.exists()


async def test_a_port_that_is_taken_is_said_with_status_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = await run_command("demo", "--once", "--port", port, "--json")
    assert (result.status, result.out) == (2, "")
    assert f"Cannot listen on --port {port}: Address already in use. Give another, or 0 for any." in result.err


def servers_of(directory: Path) -> list[str]:
    """The command lines of processes that work in a directory."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = cmdline.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(directory / "postgres-") in text:
            found.append(text)
    return found
