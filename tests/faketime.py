"""
Processes whose clocks are not the machine's: libfaketime, preloaded into them and into nothing else.

Two ways. `wall_clock` moves only the wall clock of a process, at run time; its monotonic and boot-time
clocks stay true. `running_from` puts all clocks of several processes in one other time, which may also
run faster: timers, time-outs and PostgreSQL's clock keep pace with it.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

LIBRARIES = sorted(Path("/usr/lib").glob("**/faketime/libfaketime.so.1"))
MEMORY = Path("/dev/shm")
# What a process under libfaketime shares with others: the names of a semaphore and of a piece of memory.
HOLD = 'echo "$FAKETIME_SHARED"; read _'

needs_faketime = pytest.mark.skipif(not LIBRARIES, reason="needs libfaketime: apt-get install libfaketime")


@contextmanager
def _shared(environ: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """
    Complete the variables that put processes under libfaketime, so that they share one beginning.

    A process that is killed would leave shared memory of its own behind, which later stops another one
    of the same process id from starting. So a holder makes it, and it is removed here.
    """
    complete = {"LD_PRELOAD": str(LIBRARIES[0]), "TZ": "UTC", **environ}
    with subprocess.Popen(
        ["sh", "-c", HOLD],
        env={"PATH": os.environ["PATH"], **complete},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        names = holder.stdout.readline().split()
        try:
            yield {**complete, "FAKETIME_SHARED": " ".join(names)}
        finally:
            holder.communicate("\n")
            semaphore, memory = (name.removeprefix("/") for name in names)
            (MEMORY / f"sem.{semaphore}").unlink(missing_ok=True)
            (MEMORY / memory).unlink(missing_ok=True)


class WallClock:
    """The wall clock of the processes that are started with `environ`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.environ: Mapping[str, str] = {}

    def set(self, off_by: timedelta) -> None:
        """Make it wrong by this much from now on."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{off_by.total_seconds():+.0f}\n")
        new.replace(self._file)  # at once: a half-written file would be another time


@contextmanager
def wall_clock(directory: Path, off_by: timedelta = timedelta(0)) -> Iterator[WallClock]:
    """
    Give processes a wall clock that can be set while they run.

    FAKETIME_DONT_FAKE_MONOTONIC covers CLOCK_BOOTTIME as well (libfaketime 0.9.10: one switch for
    CLOCK_MONOTONIC, _RAW, _COARSE and BOOTTIME).
    """
    clock = WallClock(directory / "wall-clock")
    clock.set(off_by)
    environ = {
        "FAKETIME_TIMESTAMP_FILE": str(directory / "wall-clock"),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with _shared(environ) as complete:
        clock.environ = complete
        yield clock


@contextmanager
def running_from(instant: datetime, *, speed: int = 1) -> Iterator[Mapping[str, str]]:
    """Yield the variables for processes in which it is now `instant` (aware), and time runs `speed` times as fast."""
    with _shared({"FAKETIME": f"@{instant.astimezone(UTC):%Y-%m-%d %H:%M:%S} x{speed}"}) as complete:
        yield complete
