"""Real processes asked to stop in every situation: they stop, in time, and what they had goes on elsewhere."""

import asyncio
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from bon_scheduler.cli import signals
from bon_scheduler.cli.signals import waking_on_signals
from tests.conftest import Connection
from tests.process import Service, serve, start_program
from tests.server import backends, frozen
from tests.waiting import until

STUBBORN = ("tests.stubborn",)
LEAVING_SECONDS = 3
"""How long a process may take to leave once its attempts have had SHUTDOWN_SECONDS."""
RUNS = "select r.id, r.state::text as state from bon_scheduler.runs r"


@pytest.fixture(autouse=True)
def hangs_up() -> Iterator[None]:
    """Have children heed SIGHUP, also where the tests themselves were started to ignore it (`nohup`)."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@asynccontextmanager
async def serving(url: str, shutdown_seconds: float) -> AsyncIterator[Service]:
    async with serve(program=STUBBORN, DATABASE_URL=url, SHUTDOWN_SECONDS=str(shutdown_seconds)) as service:
        yield service


async def start(connection: Connection, job: str) -> None:
    """Ask for a run and wait until its handler runs."""
    run_id = await connection.fetchval("select bon_scheduler.enqueue($1)", job)

    async def running() -> bool:
        return bool(await connection.fetchval(f"{RUNS} where r.id = $1 and r.state = 'running'", run_id))

    await until(running)


async def stopped(service: Service, *signals: signal.Signals) -> tuple[int, float]:
    """Send the signals and wait for the end; return the status and the seconds since the last signal."""
    for number in signals:
        service.process.send_signal(number)
        await asyncio.sleep(0.2)  # the second is to be taken as a second one
    before = time.monotonic()
    async with asyncio.timeout(40):
        status = await service.process.wait()
    return status, time.monotonic() - before


async def test_an_idle_service_stops_at_once(database_url: str) -> None:
    async with serving(database_url, 10) as service:
        status, seconds = await stopped(service, signal.SIGTERM)
    assert (status, seconds < LEAVING_SECONDS) == (0, True)


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGHUP], [signal.SIGTERM, signal.SIGTERM], [signal.SIGHUP, signal.SIGTERM], [signal.SIGTERM] * 4],
    ids=lambda signals: "-".join(each.name for each in signals),
)
@pytest.mark.samples(2)
async def test_a_terminal_that_closes_and_a_request_that_comes_twice_at_once_drain_as_one_sigterm(
    connection: Connection, database_url: str, signals: list[signal.Signals]
) -> None:
    async with serving(database_url, 1) as service:
        await start(connection, "sleep")
        status, _ = await stopped(service, *signals)
    assert status == 0
    assert await connection.fetchval("select state::text from bon_scheduler.runs") == "queued"


async def test_a_second_sigterm_a_while_later_ends_the_process(connection: Connection, database_url: str) -> None:
    async with serving(database_url, 30) as service:
        await start(connection, "sleep")
        service.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(1.3)
        status, seconds = await stopped(service, signal.SIGTERM)
    assert (status, seconds < 2) == (130, True)


async def test_a_service_that_was_told_to_ignore_hanging_up_goes_on(connection: Connection, database_url: str) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does; a child inherits it
    try:
        async with serving(database_url, 1) as service:
            await start(connection, "sleep")
            service.process.send_signal(signal.SIGHUP)
            await asyncio.sleep(1.5)
            assert service.process.returncode is None
            assert (await stopped(service, signal.SIGTERM))[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("job", ["sleep", "swallow"])
async def test_what_does_not_finish_in_time_is_given_back_and_the_process_ends(
    connection: Connection, database_url: str, job: str
) -> None:
    async with serving(database_url, 1) as service:
        await start(connection, job)
        status, seconds = await stopped(service, signal.SIGTERM)
    assert status == 0
    assert seconds < 1 + LEAVING_SECONDS
    assert await connection.fetchval("select state::text from bon_scheduler.runs") == "queued"
    assert await connection.fetchval("select outcome from bon_scheduler.attempts") == "given_back"


@pytest.mark.parametrize("job", ["block", "thread"])
async def test_what_nothing_can_stop_does_not_keep_the_process(
    connection: Connection, database_url: str, job: str
) -> None:
    """A blocked event loop, or a thread that a handler left behind."""
    async with serving(database_url, 1) as service:
        await start(connection, job)
        status, seconds = await stopped(service, signal.SIGTERM)
    assert status == 1
    assert seconds < 1 + LEAVING_SECONDS + 1
    assert service.saw("service.forced")


@pytest.mark.parametrize("job", ["sleep", "block"])
async def test_a_second_signal_ends_the_process_at_once(connection: Connection, database_url: str, job: str) -> None:
    async with serving(database_url, 300) as service:
        await start(connection, job)
        status, seconds = await stopped(service, signal.SIGTERM, signal.SIGINT)
    assert (status, seconds < 1) == (130, True)


async def test_what_is_given_back_starts_elsewhere_within_a_second(connection: Connection, database_url: str) -> None:
    async with serving(database_url, 0.5) as leaving:
        for _ in range(4):
            await start(connection, "sleep")
        async with serving(database_url, 0.5):
            status, _ = await stopped(leaving, signal.SIGTERM)

            async def all_started_again() -> bool:
                again = "select count(*) from bon_scheduler.attempts where attempt = 2"
                return int(await connection.fetchval(again)) == 4

            await until(all_started_again)
    waits = await connection.fetch(
        "select b.started_at - a.ended_at from bon_scheduler.attempts a"
        " join bon_scheduler.attempts b using (run_id) where a.attempt = 1 and b.attempt = 2"
    )
    assert status == 0
    assert max(row[0].total_seconds() for row in waits) < 1


async def test_a_service_whose_database_is_away_stops_when_asked(database_url: str, connection: Connection) -> None:
    """Every connection of it is frozen: nothing can be given back, and nothing answers a farewell."""
    async with serving(database_url, 1) as service:
        await start(connection, "sleep")
        async with frozen(await backends(connection)):
            status, seconds = await stopped(service, signal.SIGTERM)
    assert status in {0, 1}
    assert seconds < 1 + LEAVING_SECONDS + 1


async def test_a_service_that_starts_on_a_database_that_hangs_stops_when_asked() -> None:
    """It has nothing to drain, so it is as well off as an idle one."""
    called = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as silent:
        url = f"postgresql://x@127.0.0.1:{silent.sockets[0].getsockname()[1]}/x"
        process = await start_program(sys.executable, "-m", "bon_scheduler", "serve", DATABASE_URL=url, HEALTH_PORT="0")
        await called.wait()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(LEAVING_SECONDS):
            await process.communicate()
    assert process.returncode == 0


async def test_a_signal_wakes_the_event_loop_whichever_thread_it_arrives_in() -> None:
    """One that comes to the main thread just before the loop goes to sleep is as little noticed: Ctrl-C waited."""
    taken = asyncio.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: taken.set())

    def strike() -> None:
        time.sleep(0.1)  # so that the loop sleeps
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    try:
        with waking_on_signals():
            threading.Thread(target=strike).start()
            # Not a time-out alone: as it wakes the loop, the signal is taken as well.
            started = time.monotonic()
            await asyncio.wait({asyncio.create_task(taken.wait())}, timeout=5)
            assert time.monotonic() - started < 4
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("answered_after", [59.9, 3600.0])
def test_a_forced_end_comes_within_a_minute_whenever_the_answers_come(
    monkeypatch: pytest.MonkeyPatch, answered_after: float
) -> None:
    """Platforms kill after a grace that is worked out from it (docs/operations.md)."""
    elapsed = [0.0]
    ended: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: elapsed[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: elapsed.append(elapsed.pop() + seconds))
    monkeypatch.setattr(signals, "end_now", lambda _: ended.append(elapsed[0]))
    signals._force(lambda: elapsed[0] < answered_after)
    assert ended[0] <= 60.1
