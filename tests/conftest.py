"""
One PostgreSQL a test session, one fresh database a test.

Where the server comes from, the first that answers: TEST_DATABASE_URL, a container engine
(testcontainers), the embedded wheel, a system installation. TEST_POSTGRES=url|container|wheel|system
forces one. Each test's database is a clone of a template that holds BON's tables and our schema.
"""

import asyncio
import contextlib
import io
import logging
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
import structlog

from bon_scheduler import declared, engine, service
from bon_scheduler.addresses import read_database_address
from bon_scheduler.config import LogFormat, LogLevel, Settings
from bon_scheduler.database import connections
from bon_scheduler.database.connections import Pool
from bon_scheduler.demo.postgres import PostgresUnavailableError, find_binaries, running_postgres
from bon_scheduler.demo.sample import create_tables
from bon_scheduler.engine.run_once import RunReport
from bon_scheduler.environment import load_settings
from bon_scheduler.jobs import AnyJob, Payload
from bon_scheduler.log import configure_logging
from tests.chaos.figures import print_figures

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
MakeSettings: TypeAlias = Callable[..., Settings]
RunJob: TypeAlias = Callable[..., Coroutine[Any, Any, RunReport]]

TEMPLATE = f"bon_template_{os.getpid()}"
numbers = count(1)


def pytest_xdist_auto_num_workers() -> int:
    """Give each core a worker and one more: tests wait for processes more than they compute."""
    return (os.cpu_count() or 1) + 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the chaos suite's figures; sum up what was not tested, and what to install so that it is."""
    print_figures(terminalreporter)
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.getreports("skipped")
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section("not tested here", sep="-")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count} {'test' if count == 1 else 'tests'}: {reason}")


@contextmanager
def _container() -> Iterator[str]:
    from testcontainers.community.postgres import PostgresContainer  # noqa: PLC0415 - imports docker

    with PostgresContainer("postgres:18-alpine", driver=None) as container:
        url = container.get_connection_url()
        # An engine on another machine has no TLS in its containers.
        yield url if read_database_address(url).tls.local else f"{url}?sslmode=disable"


def _engine_answers() -> bool:
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").exists():
        return False
    import docker  # noqa: PLC0415 - only where an engine is asked for
    from docker.errors import DockerException  # noqa: PLC0415

    try:
        with contextlib.closing(docker.from_env(timeout=2)) as client:
            return bool(client.ping())
    except DockerException:
        return False


@contextmanager
def _server() -> Iterator[str]:
    forced = os.environ.get("TEST_POSTGRES", "")
    url = os.environ.get("TEST_DATABASE_URL", "")
    if forced == "url" or (not forced and url):
        if not url:
            pytest.exit("TEST_POSTGRES=url needs TEST_DATABASE_URL", returncode=2)
        yield url
    elif forced == "container" or (not forced and _engine_answers()):
        if not _engine_answers():
            pytest.exit("TEST_POSTGRES=container, but no container engine answers", returncode=2)
        with _container() as from_container:
            yield from_container
    else:
        try:
            binaries = find_binaries("wheel" if forced == "wheel" else "system" if forced == "system" else "any")
        except PostgresUnavailableError as error:
            pytest.exit(f"TEST_POSTGRES={forced or '(any)'}: {error}", returncode=2)
        with running_postgres(binaries) as from_binaries:
            yield from_binaries


def _named(url: str, database: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{database}"))


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """The address of the session's server, whose template is made."""
    with _server() as url:
        asyncio.run(_make_template(url))
        yield url
        asyncio.run(_drop(url, TEMPLATE))


async def _make_template(url: str) -> None:
    async with connections.connect(url) as connection:
        await connection.execute(f'create database "{TEMPLATE}"')
    async with connections.connect(_named(url, TEMPLATE)) as connection:
        await create_tables(connection)
    await service.prepare(load_settings({"DATABASE_URL": _named(url, TEMPLATE)}))


async def _drop(url: str, database: str) -> None:
    async with connections.connect(url) as connection:
        await connection.execute(f'drop database if exists "{database}" with (force)')


@contextmanager
def copy_of(server_url: str, purpose: str, *statements: str) -> Iterator[str]:
    """A copy of the template in which these statements were executed; it lives as long as the context."""
    name = f"{purpose}_{os.getpid()}"

    async def make() -> None:
        async with connections.connect(server_url) as connection:
            await connection.execute(f'create database "{name}" template "{TEMPLATE}"')
        async with connections.connect(_named(server_url, name)) as connection:
            for statement in statements:
                await connection.execute(statement)

    asyncio.run(make())
    yield _named(server_url, name)
    asyncio.run(_drop(server_url, name))


@pytest.fixture
async def empty_database_url(server_url: str) -> AsyncIterator[str]:
    """A database with nothing in it."""
    name = f"empty_{os.getpid()}_{next(numbers)}"
    async with connections.connect(server_url) as connection:
        await connection.execute(f'create database "{name}"')
    yield _named(server_url, name)
    await _drop(server_url, name)


@pytest.fixture
async def database_url(server_url: str) -> AsyncIterator[str]:
    """A database with BON's tables, empty, and our schema."""
    name = f"test_{os.getpid()}_{next(numbers)}"
    async with connections.connect(server_url) as connection:
        await connection.execute(f'create database "{name}" template "{TEMPLATE}"')
    yield _named(server_url, name)
    await _drop(server_url, name)


@pytest.fixture
def make_settings(database_url: str) -> MakeSettings:
    """Settings for the test's database; keyword arguments are environment variables."""

    def make(**environ: str) -> Settings:
        chosen = {"SHAAM_MODE": "mock", **({} if "SMTP_HOST" in environ else {"EMAIL_MODE": "log"})}
        address = {"DATABASE_URL": database_url, "HEALTH_PORT": "0", "HEALTH_HOST": "127.0.0.1"}
        values = {**address, **chosen, **environ}
        return declared.read_settings(values)

    return make


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    """The default settings, on the test's database."""
    return make_settings()


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[Pool]:
    """A pool on the test's database."""
    async with connections.open_pool(settings) as opened:
        yield opened


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Connection]:
    """A connection to the test's database."""
    async with connections.connect(database_url) as opened:
        yield opened


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """What is logged from here on, as JSON lines at the lowest level; call it to read."""
    written = io.StringIO()
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", written)
    configure_logging(LogLevel.DEBUG, LogFormat.JSON)
    yield written.getvalue
    root.handlers[:] = before
    root.setLevel(level)
    structlog.reset_defaults()


@dataclass(slots=True)
class SetClock:
    """A clock that stands where it is put."""

    instant: datetime

    def now(self) -> datetime:
        return self.instant


@pytest.fixture
def run_job(make_settings: MakeSettings) -> RunJob:
    """
    Run a job, and what it causes, in the foreground through the real ledger and runner.

    `run_job(job, payload, fire_time=…, now=…, jobs=…, SMTP_HOST=…)`: `now` is the machine's clock,
    and either is the other by default; further keyword arguments are environment variables.
    """

    async def run(
        job: AnyJob,
        payload: Payload | None = None,
        *,
        fire_time: datetime | None = None,
        now: datetime | None = None,
        jobs: Sequence[AnyJob] = declared.JOBS,
        **environ: str,
    ) -> RunReport:
        settings = make_settings(**environ)
        instant = fire_time or now or datetime.now(UTC)
        async with service.machinery(settings, jobs=jobs, clock=SetClock(now or instant)) as parts:
            return await engine.run_once(
                parts.pool,
                parts.runner,
                parts.jobs,
                engine.Order(
                    job=job,
                    payload=payload if payload is not None else job.payload(),
                    fire_time=instant,
                    asked_by="a test",
                ),
                concurrency=5,
            )

    return run


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `long` what `samples` leaves out."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("samples"):
            groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in groups.values():
        marker = group[0].get_closest_marker("samples")
        number = marker.args[0] if marker else 0
        kept = {round(place * (len(group) - 1) / max(number - 1, 1)) for place in range(number)}
        for place, item in enumerate(group):
            if place not in kept:
                item.add_marker(pytest.mark.long)
