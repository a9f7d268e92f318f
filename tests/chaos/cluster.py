"""A PostgreSQL server of a test's own that can be stopped the hard way and started again on the same data."""

import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bon_scheduler.demo import postgres
from bon_scheduler.demo.postgres import SETTINGS, PostgresUnavailableError

STOP_SECONDS = 30
# Commits that were acknowledged must survive a crash of the server; `fsync` would only matter for one of the machine.
DURABLE = {"synchronous_commit": "on", "full_page_writes": "on", "max_connections": "60"}


class Cluster:
    """A server; each start may listen on another port."""

    def __init__(self, binaries: Path, home: Path) -> None:
        self._binaries = binaries
        self._data = home / "data"
        self._log = home / "postgres.log"
        self._server: subprocess.Popen[bytes] | None = None
        self.port = 0

    def url(self, *, database: str = "postgres", port: int | None = None) -> str:
        return f"postgresql://postgres@127.0.0.1:{port or self.port}/{database}"

    def create(self) -> None:
        postgres._initialise(self._binaries, self._data, self._log)

    def start(self) -> None:
        settings = {**SETTINGS, **DURABLE}
        self._server, self.port = postgres._start(self._binaries, self._data, self._log, settings, {})

    def stop(self, how: signal.Signals) -> None:
        """Do what `pg_ctl stop` does: SIGINT is a fast shutdown, SIGQUIT an immediate one, which is a crash."""
        if self._server is not None:
            self._server.send_signal(how)
            self._server.wait(STOP_SECONDS)
            self._server = None

    def log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Run a fresh server inside the block; skip where there is none to run."""
    try:
        binaries = postgres.find_binaries()
    except PostgresUnavailableError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory(prefix="bon-chaos-", dir=postgres._memory_disk()) as home:
        cluster = Cluster(binaries, Path(home))
        cluster.create()
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop(signal.SIGQUIT)


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port
