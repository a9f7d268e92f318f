"""
How fast and how fairly does the ledger serve as the queue?

Usage: python -m benchmarks.queue [--runs N] [--rounds N] [--pinned-runs N] [--only drain,latency,idle,pinned,fairness].
A server of its own (the embedded one); the service in a process of its own, with its log lines written to a file.

- drain: no-op runs that wait when the service starts, from the first start to the last end in the ledger, beside bare
  PgQueuer 1.6 with as many no-op jobs at the same concurrency, round by round. PgQueuer is installed for this alone,
  into a temporary environment.
- latency: from the commit of `enqueue` to the handler's first line, at rest, 300 times.
- idle: transactions a second of a service with all of BON's jobs that has nothing to do.
- pinned: a drain beside a transaction that pins the horizon, against one without.
- fairness: how long a run waits for one business beside 10,000 of another, and for one job beside a slow one.
"""

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import asyncpg

from bon_scheduler import Counts, JobContext, NoPayload, declared, job, service
from bon_scheduler.config import Settings
from bon_scheduler.demo.postgres import find_binaries, running_postgres
from bon_scheduler.jobs import Payload
from bon_scheduler.log import configure_logging

PARTS = ("drain", "latency", "idle", "pinned", "fairness")
TIMES = 300
IDLE_SECONDS = 20
PGQUEUER = "pgqueuer[asyncpg]~=1.6.0"
# $1 job, $2 runs: int, $3 payload: jsonb.
FILL = """
    select bon_scheduler.enqueue_many($1, array(select $3::jsonb from generate_series(1, $2::int)),
               array(select gen_random_uuid()::text from generate_series(1, $2::int)), 0, 'program', 'benchmark', null)
"""
LEFT = "select count(*) from bon_scheduler.runs where state in ('queued', 'running', 'retrying')"
RATE = """
    select count(*) / extract(epoch from max(finished_at) - min(started_at))::float8
      from bon_scheduler.runs where state = 'succeeded' and attempt = 1
"""
TRANSACTIONS = "select xact_commit + xact_rollback from pg_stat_database where datname = $1"
PGQUEUER_PROGRAM = """
import asyncio, sys, time
import asyncpg
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.core.qm import QueueManager
async def main():
    connection = await asyncpg.connect(sys.argv[1])
    queries, runs = Queries(AsyncpgDriver(connection)), int(sys.argv[2])
    await queries.install()
    for n in range(0, runs, 1000):
        many = min(1000, runs - n)
        await queries.enqueue(["nothing"] * many, [None] * many, [0] * many)
    manager, done, began = QueueManager(queries), 0, None
    async def nothing(_):
        nonlocal done, began
        began = began or time.perf_counter()
        done += 1
        if done == runs:
            manager.shutdown.set()
    manager.entrypoint("nothing", accepts_context=False)(nothing)
    await manager.run(batch_size=10, max_concurrent_tasks=20)
    print(runs / (time.perf_counter() - began))
asyncio.run(main())
"""


class OfBusiness(Payload):
    """Whose run it is."""

    business_id: str = ""


def _mark(ctx: JobContext) -> None:
    """Say when a handler began, to whoever measures."""
    if path := os.environ.get("BENCHMARK_MARKS"):
        with Path(path).open("a") as marks:
            marks.write(f"{ctx.run_id} {time.monotonic_ns()}\n")


@job("nothing")
async def nothing(ctx: JobContext, _: OfBusiness) -> Counts:
    """Do nothing."""
    del ctx
    return {}


@job("mark")
async def mark(ctx: JobContext, _: OfBusiness) -> Counts:
    """Say that it began."""
    _mark(ctx)
    return {}


@job("slow")
async def slow(_: JobContext, __: NoPayload) -> Counts:
    """Wait as for a slow mail server."""
    await asyncio.sleep(3)
    return {}


JOBS = (nothing, mark, slow)


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def _serve(url: str) -> None:
    settings = _settings(url)
    configure_logging(settings.log_level, settings.log_format)
    async with service.serving(settings, jobs=[*JOBS, *declared.JOBS]):
        await asyncio.Event().wait()


def _settings(url: str) -> Settings:
    return declared.read_settings({"DATABASE_URL": url, "HEALTH_PORT": "0", "HEALTH_HOST": "127.0.0.1"})


@contextmanager
def _serving(url: str, marks: Path) -> Iterator[None]:
    """Run the service in a process of its own."""
    with tempfile.TemporaryFile() as log:
        environ = {**os.environ, "BENCHMARK_MARKS": str(marks)}
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.queue", "--serve", url],
            stderr=log,
            env=environ,
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait()


async def _drained(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    while await connection.fetchval(LEFT):  # noqa: ASYNC110 - the service says nothing to us
        await asyncio.sleep(0.3)


def install_pgqueuer(directory: Path) -> Path:
    """Install PgQueuer into an environment of its own; return its Python."""
    python = directory / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", PGQUEUER], check=True)
    return python


class Bench:
    """One server, and a fresh database for each measurement."""

    def __init__(self, url: str, marks: Path) -> None:
        self.root, self.marks = url, marks
        self.numbers = iter(range(1000))

    async def database(self) -> str:
        """Create a database; return its address."""
        name = f"queue_{next(self.numbers)}"
        connection = await asyncpg.connect(self.root)
        await connection.execute(f"create database {name}")
        await connection.close()
        head, _, _ = self.root.rpartition("/")
        return f"{head}/{name}"

    async def prepared(self) -> "tuple[str, asyncpg.Connection[asyncpg.Record]]":
        """Create a database with our schema; return its address and a connection."""
        url = await self.database()
        await service.prepare(_settings(url), jobs=[*JOBS, *declared.JOBS])
        return url, await asyncpg.connect(url)

    async def drain(self, runs: int, *, pinned: bool = False) -> float:
        """Return runs a second."""
        url, connection = await self.prepared()
        await connection.execute(FILL, "nothing", runs, "{}")
        pin = await asyncpg.connect(url)
        if pinned:
            await pin.execute("begin isolation level repeatable read; select 1")
        with _serving(url, self.marks):
            await _drained(connection)
        await pin.close()
        rate: float = await connection.fetchval(RATE)
        ended = await connection.fetchval("select count(*) from bon_scheduler.attempts where outcome = 'succeeded'")
        await connection.close()
        if ended != runs:
            raise LookupError(f"{ended} attempts succeeded, of {runs} runs")
        return rate

    async def pgqueuer(self, python: Path, runs: int) -> float:
        """Return jobs a second of bare PgQueuer."""
        url = await self.database()
        process = await asyncio.create_subprocess_exec(
            str(python), "-c", PGQUEUER_PROGRAM, url, str(runs), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        return float(out)

    def began(self) -> dict[str, int]:
        """Return when each marked run's handler began."""
        with suppress(FileNotFoundError):
            return {run: int(instant) for run, instant in map(str.split, self.marks.read_text().splitlines())}
        return {}

    async def waits(self, connection: "asyncpg.Connection[asyncpg.Record]", business: str) -> float:
        """Ask for a run; return for how many milliseconds its handler did not begin."""
        ask = "select bon_scheduler.enqueue('mark', jsonb_build_object('business_id', $1::text))"
        run = str(await connection.fetchval(ask, business))
        asked = time.monotonic_ns()
        while run not in self.began():  # noqa: ASYNC110 - a file says nothing by itself
            await asyncio.sleep(0.02)
        return (self.began()[run] - asked) / 1e6


async def measure_drain(bench: Bench, runs: int, rounds: int, python: Path) -> None:
    """Print runs a second beside bare PgQueuer's, and the ratio of the medians."""
    ours, bare = [], []
    for _ in range(rounds):
        ours.append(await bench.drain(runs))
        bare.append(await bench.pgqueuer(python, runs))
    shown = [", ".join(f"{rate:.0f}" for rate in rates) for rates in (ours, bare)]
    ratio = statistics.median(ours) / statistics.median(bare)
    say(f"drain, {runs:,} runs: ours {shown[0]} a second; bare PgQueuer {shown[1]}; ratio of medians {ratio:.2f}")


async def measure_latency(bench: Bench) -> None:
    """Print how long a run waits at rest."""
    url, connection = await bench.prepared()
    asked: dict[str, int] = {}
    with _serving(url, bench.marks):
        await bench.waits(connection, "")
        for _ in range(TIMES):
            run = str(await connection.fetchval("select bon_scheduler.enqueue('mark')"))
            asked[run] = time.monotonic_ns()
            await asyncio.sleep(random.uniform(0.02, 0.06))  # noqa: S311 - jitter, not a secret
        await asyncio.sleep(1)
    began = bench.began()
    waits = sorted((began[run] - instant) / 1e6 for run, instant in asked.items())
    p50, p99 = statistics.median(waits), waits[int(len(waits) * 0.99)]
    say(f"latency at rest, {len(waits)} times: p50 {p50:.1f} ms, p99 {p99:.1f} ms, most {waits[-1]:.1f} ms")


async def measure_idle(bench: Bench) -> None:
    """Print transactions a second of a service at rest."""
    url, connection = await bench.prepared()
    await connection.close()
    other = await asyncpg.connect(bench.root)
    with _serving(url, bench.marks):
        await asyncio.sleep(5)
        name = url.rpartition("/")[2]
        before, began = await other.fetchval(TRANSACTIONS, name), time.monotonic()
        await asyncio.sleep(IDLE_SECONDS)
        rate = (await other.fetchval(TRANSACTIONS, name) - before) / (time.monotonic() - began)
    await other.close()
    say(f"idle: {rate:.2f} transactions a second")


async def measure_pinned(bench: Bench, runs: int) -> None:
    """Print the rate beside a pinned horizon and without."""
    free, pinned = await bench.drain(runs), await bench.drain(runs, pinned=True)
    say(f"pinned, {runs:,} runs: {pinned:.0f} a second against {free:.0f}, ratio {pinned / free:.2f}")


async def measure_fairness(bench: Bench) -> None:
    """Print how long others wait beside a business of many runs, and beside a slow job."""
    url, connection = await bench.prepared()
    await connection.execute(FILL, "mark", 10_000, '{"business_id": "many"}')
    with _serving(url, bench.marks):
        while not bench.began():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)
        beside_many = [await bench.waits(connection, f"one {n}") for n in range(5)]
        left = await connection.fetchval(LEFT)
        await _drained(connection)
        await connection.execute("select bon_scheduler.enqueue('slow') from generate_series(1, 300)")
        await asyncio.sleep(1)
        beside_slow = [await bench.waits(connection, "") for _ in range(10)]
    await connection.close()
    say(f"fairness: beside 10,000 of one business ({left:,} left) at most {max(beside_many):.0f} ms")
    say(f"fairness: beside 300 runs of a job that takes 3 s, at most {max(beside_slow):.0f} ms")


async def measure(bench: Bench, options: argparse.Namespace, pgqueuer: Path | None) -> None:
    """Measure what was asked for."""
    if pgqueuer is not None:
        await measure_drain(bench, options.runs, options.rounds, pgqueuer)
    if "latency" in options.only:
        await measure_latency(bench)
    if "idle" in options.only:
        await measure_idle(bench)
    if "pinned" in options.only:
        await measure_pinned(bench, options.pinned_runs)
    if "fairness" in options.only:
        await measure_fairness(bench)


def main() -> int:
    """Measure on a server of our own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pinned-runs", type=int, default=60_000)
    parser.add_argument("--only", type=lambda text: text.split(","), default=PARTS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(_serve(options.serve))
    with tempfile.TemporaryDirectory() as directory, running_postgres(find_binaries()) as url:
        pgqueuer = install_pgqueuer(Path(directory) / "pgqueuer") if "drain" in options.only else None
        asyncio.run(measure(Bench(url, Path(directory) / "marks"), options, pgqueuer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
