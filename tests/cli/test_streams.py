"""Standard streams that are closed, or that nobody reads: real processes do what they would have done."""

import asyncio
import fcntl
import os
import pty
import signal
import sys
import termios

import pytest

from tests.conftest import Connection
from tests.process import run_program
from tests.waiting import until

RUN = "select state::text, error from bon_scheduler.runs"


@pytest.mark.parametrize(
    "streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "| true", "2>&1 >/dev/null | true", "2>/dev/full"]
)
@pytest.mark.samples(3)
async def test_a_run_in_the_foreground_does_its_work_whatever_becomes_of_its_streams(
    connection: Connection, database_url: str, streams: str
) -> None:
    command = f"{sys.executable} -m bon_scheduler run-once session-cleanup"
    ended = await run_program(
        "bash", "-c", f"set -o pipefail; ( sleep 0.5; exec {command} ) {streams}", DATABASE_URL=database_url
    )
    assert ended.status == 0, ended
    assert await connection.fetchval(RUN) == "succeeded"


async def test_a_result_that_a_full_disk_does_not_take_is_an_error(database_url: str) -> None:
    command = f"{sys.executable} -m bon_scheduler jobs >/dev/full"
    ended = await run_program("bash", "-c", command, DATABASE_URL=database_url)
    assert ended.status == 1
    assert "No space left" in ended.err


async def test_a_service_whose_log_nobody_reads_works_and_stops_as_told(
    connection: Connection, database_url: str
) -> None:
    read, write = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bon_scheduler", "serve", stderr=write, stdout=write,
        env={"DATABASE_URL": database_url, "HEALTH_PORT": "0", "LOG_LEVEL": "debug"},
    )  # fmt: skip
    os.close(write)
    os.close(read)
    try:

        async def registered() -> bool:
            return bool(await connection.fetchval("select exists (select from bon_scheduler.workers)"))

        await until(registered, seconds=30)
        run_id = await connection.fetchval("select bon_scheduler.enqueue('session-cleanup')")

        async def succeeded() -> bool:
            return bool(await connection.fetchval(f"{RUN} where id = $1", run_id) == "succeeded")

        await until(succeeded, seconds=30)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_run_whose_terminal_closes_is_cancelled_and_nobody_goes_on_with_it(
    connection: Connection, database_url: str
) -> None:
    """A real terminal: the system sends SIGHUP, and nothing can be written any more."""
    terminal, end = pty.openpty()
    blocker = connection.transaction()
    await blocker.start()
    await connection.execute("lock table sessions in access exclusive mode")

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bon_scheduler", "run-once", "session-cleanup",
        env={"DATABASE_URL": database_url}, stdin=end, stdout=end, stderr=end,
        start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(end)
    try:

        async def waits() -> bool:
            query = (
                "select exists (select from pg_locks l join pg_database d on d.oid = l.database"
                " where not l.granted and d.datname = current_database())"
            )
            return bool(await connection.fetchval(query))

        await until(waits)
        os.close(terminal)
        async with asyncio.timeout(20):
            assert await process.wait() == 130
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await blocker.rollback()
    row = await connection.fetchrow("select state::text, reason from bon_scheduler.runs")
    assert row is not None
    assert tuple(row) == ("cancelled", "interrupted")
