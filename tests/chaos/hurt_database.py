"""
What is done to the database, to the way there, and to the queue in it.

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

from tests.chaos.world import LEASE_SECONDS, Replica, World
from tests.waiting import until

STAYS_OPEN_MS = 1500
"""Less than what ends an idle transaction: two thirds of the lease."""
BACKENDS = "select pid from pg_stat_activity where datname = 'bon' and application_name like 'bon_scheduler%'"
# PgQueuer's connection is the one that has said LISTEN.
LISTENERS = f"{BACKENDS} and query ilike '%listen%'"
PATIENCE_SECONDS = 20.0
RELOAD = "select pg_reload_conf()"
TERMINATE = "select count(pg_terminate_backend(pid)) from unnest($1::int[]) as t (pid)"
DOUBLE = """
    insert into bon_scheduler.pgqueuer (priority, entrypoint, payload, execute_after, dedupe_key, status)
    select priority, entrypoint, payload, execute_after, null, 'queued'
      from bon_scheduler.pgqueuer cross join generate_series(1, 2)
"""
MAKE_STALE = """
    update bon_scheduler.pgqueuer
       set status = 'picked', queue_manager_id = gen_random_uuid(), heartbeat = now() - interval '1 hour',
           execute_after = now() + interval '1 hour'
     where status = 'queued'
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
    """End the connections that listen: PgQueuer's looks whether it still does, which names it."""

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


async def delete_queue(world: World) -> float | None:
    """Delete every queue row by hand, while runs wait for a worker and while they run."""
    runs = [await world.ask("pay", before=200) for _ in range(20)]
    await asyncio.sleep(world.rng.uniform(0, 0.2))
    await world.execute("delete from bon_scheduler.pgqueuer")
    return await _delivered(world, runs)


async def truncate_queue(world: World) -> float | None:
    runs = [await world.ask("pay", before=200) for _ in range(20)]
    await world.execute("truncate bon_scheduler.pgqueuer")
    return await _delivered(world, runs)


async def double_queue(world: World) -> float | None:
    """Have every queue row twice: only one attempt of each run may come of it."""
    runs = [await world.ask("pay", before=200) for _ in range(20)]
    await world.execute(DOUBLE)
    return await _delivered(world, runs)


async def stale_queue(world: World) -> float | None:
    """Have queue rows look picked by a worker that has gone."""
    runs = [await world.ask("pay", before=200) for _ in range(20)]
    await world.execute(MAKE_STALE)
    return await _delivered(world, runs)


async def _delivered(world: World, runs: list[UUID]) -> float | None:
    before = time.monotonic()
    await world.succeeded(*runs)
    return time.monotonic() - before
