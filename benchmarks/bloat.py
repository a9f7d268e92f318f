"""
Do tables and indexes stay flat while runs come and go? 100,000 runs in ten rounds, pruned after each.

Usage: python -m benchmarks.bloat [RUNS]. A server of its own (the embedded one), two services in this process, a
job that does nothing. After each round everything that has ended is pruned, as `ledger-pruning` does after
RUN_RETENTION_DAYS, and the sizes with their indexes are printed. The server's autovacuum, which wakes once a
minute, is woken each second, because ten rounds stand for ten days. Exits 1 where a table is larger after the
last round than half as much again as after the third.
"""

import asyncio
import sys
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta

from bon_scheduler import Counts, JobContext, NoPayload, database, job, service
from bon_scheduler.config import Settings
from bon_scheduler.demo.postgres import find_binaries, running_postgres
from bon_scheduler.environment import load_settings
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import PRUNERS, Horizon
from bon_scheduler.log import configure_logging

ROUNDS = 10
SETTLED_ROUND = 3
MOST_GROWTH = 1.5
TABLES = ("runs", "attempts")
SERVER = {"autovacuum_naptime": "1s", "autovacuum_vacuum_cost_delay": "0"}
ASK = "select count(bon_scheduler.enqueue('nothing')) from generate_series(1, $1::int)"
UNFINISHED = "select exists (select from bon_scheduler.runs where state in ('queued', 'running', 'retrying'))"
SIZES = """
    select pg_total_relation_size('bon_scheduler.' || t)
      from unnest($1::text[]) with ordinality as x (t, n)
     order by n
"""


@job("nothing")
async def nothing(ctx: JobContext, _: NoPayload) -> Counts:
    """Do nothing, in a transaction."""
    async with ctx.transaction() as tx:
        return await ctx.finish({}, on=tx)


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def prune(connection: Connection) -> None:
    """Delete all that has ended."""
    horizon = Horizon(datetime.now(UTC), timedelta(0))
    for pruner in PRUNERS.values():
        while await pruner(connection, horizon):
            pass


async def measure(settings: Settings, runs: int) -> bool:
    """Work through `runs` runs in rounds; say whether the sizes stayed flat."""
    await service.prepare(settings, jobs=[nothing])
    sizes: list[list[int]] = []
    say("round   runs/s " + "".join(f"{name:>14}" for name in TABLES) + "   (kB, with indexes)")
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(database.connect(settings.listen_url))
        for _ in range(2):
            await stack.enter_async_context(service.serving(settings, jobs=[nothing]))
        for number in range(1, ROUNDS + 1):
            begun = time.monotonic()
            await connection.execute(ASK, runs // ROUNDS)
            while await connection.fetchval(UNFINISHED):  # noqa: ASYNC110 - the services say nothing to us
                await asyncio.sleep(0.1)
            seconds = time.monotonic() - begun
            await prune(connection)
            await asyncio.sleep(3)  # autovacuum's turn
            sizes.append([row[0] for row in await connection.fetch(SIZES, list(TABLES))])
            kilobytes = "".join(f"{size // 1024:>14,}" for size in sizes[-1])
            say(f"{number:>5} {runs // ROUNDS / seconds:>8.0f} {kilobytes}")
    growth = {name: sizes[-1][n] / sizes[SETTLED_ROUND - 1][n] for n, name in enumerate(TABLES)}
    say("growth since round 3: " + ", ".join(f"{name} × {times:.2f}" for name, times in growth.items()))
    return max(growth.values()) <= MOST_GROWTH


def main() -> int:
    """Measure on a server of our own."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with running_postgres(find_binaries(), settings=SERVER) as url:
        settings = load_settings(
            {"DATABASE_URL": url, "HEALTH_PORT": "0", "HEALTH_HOST": "127.0.0.1", "LOG_LEVEL": "error"}
        )
        configure_logging(settings.log_level, settings.log_format)
        return 0 if asyncio.run(measure(settings, runs)) else 1


if __name__ == "__main__":
    sys.exit(main())
