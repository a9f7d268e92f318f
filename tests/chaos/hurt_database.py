"""
What is done to the database, to the way there, and to claims.

Each function hurts the world once, with random timing, and returns for how many seconds the service was hindered: from
the fault (a process that died), or from its end (a database that answers again), until work went on. None when work
was never hindered.
"""

import asyncio
import signal
import time
from contextlib import AsyncExitStack
from uuid import UUID

import asyncpg

from bon_scheduler.database.migrations import SCHEMA
from tests.chaos.world import LEASE_SECONDS, Replica, World
from tests.waiting import until

STAYS_OPEN_MS = 1500
"""Less than what ends an idle transaction: two thirds of the lease."""
BACKENDS = "select pid from pg_stat_activity where datname = 'bon' and application_name like 'bon_scheduler%'"
# The engines' connections look whether they still listen.
LISTENERS = f"{BACKENDS} and query ilike '%listen%'"
PATIENCE_SECONDS = 20.0
RELOAD = "select pg_reload_conf()"
TERMINATE = "select count(pg_terminate_backend(pid)) from unnest($1::int[]) as t (pid)"
WAKE_WORKERS = (
    (SCHEMA / "functions" / "wake_workers.sql").read_text().replace("wake_workers()", "bon_scheduler.wake_workers()", 1)
)
# Nobody is woken: runs are found by looking.
MUTE = """
    create or replace function bon_scheduler.wake_workers() returns void
    language sql set search_path = bon_scheduler, pg_temp as 'select null::void'
"""


async def _restart(world: World, how: signal.Signals, away_seconds: float) -> float | None:
    await asyncio.sleep(world.rng.uniform(0, 0.3))
    world.cluster.stop(how)
    until_back = time.monotonic() + away_seconds
    while time.monotonic() < until_back:
        await asyncio.sleep(0.2)
        for replica in world.replicas:
            assert await replica.answers("/livez") == 200
        if time.monotonic() > until_back - away_seconds + 1.5:
            assert await world.replicas[0].answers("/readyz") == 503
    world.cluster.start()
    for replica in world.replicas:
        replica.proxy.target_port = world.cluster.port
    return await world.working()


async def restart_immediate(world: World) -> float | None:
    return await _restart(world, signal.SIGQUIT, 0)


async def restart_fast(world: World) -> float | None:
    return await _restart(world, signal.SIGINT, 0)


async def outage(world: World) -> float | None:
    return await _restart(world, signal.SIGQUIT, world.rng.uniform(2, 6))


async def connection_limit(world: World) -> float | None:
    """Fill the server and cut the service's connections again and again: there is no room for new ones."""
    async with AsyncExitStack() as stack:

        async def fill() -> None:
            while True:
                try:
                    hog = await asyncpg.connect(world.cluster.url(database="bon"), timeout=5)
                except asyncpg.TooManyConnectionsError:
                    return
                stack.push_async_callback(hog.close)

        until_over = time.monotonic() + world.rng.uniform(1, 4)
        hindered: set[int] = set()
        # The service may win the race for a place that is just free: go on until each replica has gone without.
        while time.monotonic() < until_over or len(hindered) < len(world.replicas):
            assert time.monotonic() < until_over + PATIENCE_SECONDS
            await world.value(TERMINATE, [row["pid"] for row in await world.fetch(BACKENDS)])
            await fill()
            hindered |= {replica.number for replica in world.replicas if await replica.answers("/readyz") == 503}
    return await world.working()


async def read_only(world: World) -> float | None:
    """Refuse every write for some seconds, as a primary does that has failed over."""
    await world.execute("alter system set default_transaction_read_only = on", RELOAD)
    try:
        await asyncio.sleep(world.rng.uniform(1, 5))
    finally:
        await world.execute("alter system reset default_transaction_read_only", RELOAD)
    return await world.working()


async def disk_full(world: World) -> float | None:
    """Refuse many statements at random, as a server does whose disk is full."""
    async with AsyncExitStack() as stack:
        share = world.rng.uniform(0.2, 1.0)
        for replica in world.replicas:
            await stack.enter_async_context(replica.proxy.refusing(share))
        await asyncio.sleep(world.rng.uniform(1, 4))
    return await world.working()


# Connections


async def terminate_one(world: World) -> float | None:
    rows = await world.fetch(BACKENDS)
    await world.value(TERMINATE, [world.rng.choice(rows)["pid"]])
    return await world.working()


async def terminate_all(world: World) -> float | None:
    await world.value(TERMINATE, [row["pid"] for row in await world.fetch(BACKENDS)])
    return await world.working()


async def terminate_listener(world: World) -> float | None:
    """End the connections that listen and claim."""

    async def found() -> list[int]:
        return [row["pid"] for row in await world.fetch(LISTENERS)]

    await world.value(TERMINATE, await until(found))
    return await world.working()


async def reset(world: World) -> float | None:
    assert world.rng.choice(world.replicas).proxy.reset() > 0
    return await world.working()


async def latency(world: World) -> float | None:
    proxy = world.rng.choice(world.replicas).proxy
    async with proxy.latency(world.rng.uniform(0.02, 0.2)):
        await asyncio.sleep(world.rng.uniform(1, 3))
    return await world.working()


async def _black_hole(world: World, replicas: list[Replica], seconds: float) -> float | None:
    async with AsyncExitStack() as stack:
        for replica in replicas:
            await stack.enter_async_context(replica.proxy.black_hole())
        until_over = time.monotonic() + seconds
        while time.monotonic() < until_over:
            await asyncio.sleep(min(5.0, max(0.0, until_over - time.monotonic())))
            for replica in world.replicas:
                assert await replica.answers("/livez") == 200
    return await world.working()


async def black_hole_for_one(world: World) -> float | None:
    """Let nothing through to one replica: the other takes its runs over."""
    victim = world.rng.choice(world.replicas)
    run_id = await world.ask("pay", open=STAYS_OPEN_MS)
    victim = await world.holder(run_id, "open")
    hindered = await _black_hole(world, [victim], world.rng.uniform(LEASE_SECONDS + 3, 15))
    assert await world.attempt_of(run_id) > 1
    return hindered


async def black_hole_for_all(world: World) -> float | None:
    return await _black_hole(world, world.replicas, world.rng.uniform(2, 12))


async def black_hole_for_a_minute(world: World) -> float | None:
    return await _black_hole(world, world.replicas, 60)


# Claims


async def wake_up_lost(world: World) -> float | None:
    """Lose every notification: what is asked for is found by looking."""
    await world.execute(MUTE)
    try:
        runs = [await world.ask("pay", before=200) for _ in range(20)]
        return await _succeeded(world, runs)
    finally:
        await world.execute(WAKE_WORKERS)


async def listen_lost(world: World) -> float | None:
    """End the engines' connections while they sleep, so that nobody hears what is asked for at that moment."""
    found = [row["pid"] for row in await world.fetch(LISTENERS)]
    await world.value(TERMINATE, found)
    runs = [await world.ask("pay", before=200) for _ in range(20)]
    return await _succeeded(world, runs)


async def claim_unanswered(world: World) -> float | None:
    """Lose the answers to claims that have committed: the runs are a worker's that knows nothing of them."""
    for replica in world.replicas:
        replica.proxy.lose_claims(world.rng.randint(1, 2))
    runs = [await world.ask("pay", before=20) for _ in range(20)]

    async def all_lost() -> bool:
        if any(replica.proxy.claims_to_lose for replica in world.replicas):
            runs.append(await world.ask("pay", before=20))
        return not any(replica.proxy.claims_to_lose for replica in world.replicas)

    await until(all_lost)
    return await _succeeded(world, runs)


async def batch_half_done(world: World) -> float | None:
    """Kill a replica while it begins and records many runs at once."""
    runs = [await world.ask("nothing", steps=0) for _ in range(60)]
    await asyncio.sleep(world.rng.uniform(0, 0.1))
    victim = world.rng.choice(world.replicas)
    killed = time.monotonic()
    victim.running.process.kill()
    await victim.running.process.wait()
    await world.succeeded(*runs)
    return time.monotonic() - killed


async def exclusive_contended(world: World) -> float | None:
    """Have both replicas at one exclusive job, and kill one in the middle: never do two runs of it work at once."""
    runs = [await world.ask("alone", before=30) for _ in range(10)]
    await asyncio.sleep(world.rng.uniform(0.1, 0.5))
    victim = world.rng.choice(world.replicas)
    killed = time.monotonic()
    victim.running.process.kill()
    await victim.running.process.wait()
    await world.succeeded(*runs)
    assert await world.value("select count(*) from not_alone") == 0
    return time.monotonic() - killed


async def pinned_horizon(world: World) -> float | None:
    """Ask for a burst of runs beside a transaction that keeps every dead row, as a backup does."""
    connection = await asyncpg.connect(world.cluster.url(database="bon"), timeout=5)
    try:
        await connection.execute("begin isolation level repeatable read; select count(*) from bon_scheduler.runs")
        runs = [await world.ask("pay") for _ in range(60)]
        return await _succeeded(world, runs)
    finally:
        await connection.close()


async def _succeeded(world: World, runs: list[UUID]) -> float | None:
    before = time.monotonic()
    await world.succeeded(*runs)
    return time.monotonic() - before
