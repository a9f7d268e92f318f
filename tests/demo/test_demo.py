"""The demo as a newcomer starts it: a process of its own, on a database of its own."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

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
