"""
What is done to the world, one function a kind of fault.

Each hurts the world once, with random timing, and returns for how many seconds the service was hindered: from the
fault (a process that died), or from its end (a database that answers again), until work went on. None when work was
never hindered.
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import MappingProxyType
from uuid import UUID

import asyncpg

from tests.chaos.world import LEASE_SECONDS, SHUTDOWN_SECONDS, Replica, World
from tests.waiting import until

__all__ = ["A_MINUTE", "FAMILIES", "Fault"]

Strike = Callable[[World], Awaitable[float | None]]
RESCUED_SECONDS = LEASE_SECONDS + 5
RESUMED_SECONDS = 5.0
GIVEN_BACK_SECONDS = 1.0
LEAVING_SECONDS = 3.0
STAYS_OPEN_MS = 1500
"""Longer than SHUTDOWN_SECONDS, and less than what ends an idle transaction: two thirds of the lease."""
BACKENDS = "select pid from pg_stat_activity where datname = 'bon' and application_name like 'bon_scheduler%'"
# PgQueuer's connection is the one that has said LISTEN.
LISTENERS = f"{BACKENDS} and query ilike '%listen%'"
RELOAD = "select pg_reload_conf()"
TERMINATE = "select pg_terminate_backend(pid) from unnest($1::int[]) as t (pid)"


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault, and within how many seconds work must go on."""

    strike: Strike
    bound_seconds: float


# Processes


async def _kill(victim: Replica) -> float:
    """Kill a replica; return when. Another is started in its place as the world settles."""
    killed = time.monotonic()
    victim.running.process.kill()
    await victim.running.process.wait()
    return killed


async def _killed_in(world: World, phase: str, **milliseconds: int) -> float | None:
    run_id = await world.ask("pay", **milliseconds)
    victim = await world.holder(run_id, phase)
    await asyncio.sleep(world.rng.uniform(0, 0.2))
    attempt = await world.attempt_of(run_id)
    killed = await _kill(victim)
    if phase == "after":
        return None
    await world.next_started(run_id, attempt)
    return time.monotonic() - killed


async def kill_before(world: World) -> float | None:
    return await _killed_in(world, "before", before=1500)


async def kill_open(world: World) -> float | None:
    return await _killed_in(world, "open", open=1500)


async def kill_after(world: World) -> float | None:
    return await _killed_in(world, "after", after=1500)


async def kill_commit(world: World) -> float | None:
    """Kill a replica while it commits a dozen runs at once."""
    runs = [await world.ask("pay", open=world.rng.randint(0, 150)) for _ in range(12)]
    victim = await world.holder(world.rng.choice(runs), "commit")
    await asyncio.sleep(world.rng.uniform(0, 0.03))
    killed = await _kill(victim)
    await world.succeeded(*runs)
    return time.monotonic() - killed


async def poison(world: World) -> float | None:
    """Have a run kill its worker in every attempt: it ends dead, and nothing of it stays."""
    before = time.monotonic()
    run_id = await world.ask("poison")

    async def dead() -> bool:
        await world.revive()
        return bool(await world.value("select state = 'dead' from bon_scheduler.runs where id = $1", run_id))

    await until(dead, seconds=60)
    assert await world.value("select attempt from bon_scheduler.runs where id = $1", run_id) == 3
    return (time.monotonic() - before) / 3


async def _frozen_in(world: World, phase: str, **milliseconds: int) -> float | None:
    """Freeze a replica for longer than its lease; what it commits when it wakes must be refused."""
    run_id = await world.ask("pay", **milliseconds)
    victim = await world.holder(run_id, phase)
    await asyncio.sleep(world.rng.uniform(0, 0.1))
    attempt = await world.attempt_of(run_id)
    frozen = time.monotonic()
    victim.running.process.send_signal(signal.SIGSTOP)
    try:
        seconds = None
        if phase != "after":
            await world.next_started(run_id, attempt)
            seconds = time.monotonic() - frozen
        else:
            await asyncio.sleep(LEASE_SECONDS + 0.5)
        await asyncio.sleep(world.rng.uniform(0, 1))
    finally:
        victim.running.process.send_signal(signal.SIGCONT)
    return seconds


async def freeze_before(world: World) -> float | None:
    return await _frozen_in(world, "before", before=600)


async def freeze_open(world: World) -> float | None:
    return await _frozen_in(world, "open", open=600)


async def freeze_after(world: World) -> float | None:
    return await _frozen_in(world, "after", after=600)


async def freeze_commit(world: World) -> float | None:
    """Freeze a replica in the middle of a dozen commits."""
    runs = [await world.ask("pay", open=world.rng.randint(0, 150)) for _ in range(12)]
    victim = await world.holder(world.rng.choice(runs), "commit")
    await asyncio.sleep(world.rng.uniform(0, 0.03))
    victim.running.process.send_signal(signal.SIGSTOP)
    frozen = time.monotonic()
    try:
        await world.succeeded(*runs)
        seconds = time.monotonic() - frozen
        await asyncio.sleep(max(0.0, LEASE_SECONDS + 0.5 - seconds))
    finally:
        victim.running.process.send_signal(signal.SIGCONT)
    return seconds


async def freeze_briefly(world: World) -> float | None:
    """Freeze a replica for less than its lease: nobody takes its runs over."""
    run_id = await world.ask("pay", open=500)
    victim = await world.holder(run_id, "open")
    victim.running.process.send_signal(signal.SIGSTOP)
    # Less than what ends an idle transaction, which is two thirds of the lease.
    await asyncio.sleep(world.rng.uniform(0.1, LEASE_SECONDS / 3))
    victim.running.process.send_signal(signal.SIGCONT)
    await world.succeeded(run_id)
    assert await world.attempt_of(run_id) == 1
    return None


async def block_loop(world: World) -> float | None:
    """Block the event loop for longer than the lease: the run stays its own."""
    milliseconds = int(LEASE_SECONDS * 1000 * world.rng.uniform(1.2, 1.8))
    run_id = await world.ask("block", milliseconds=milliseconds)
    await world.holder(run_id, "blocked")
    await world.succeeded(run_id)
    assert await world.attempt_of(run_id) == 1
    return None


# The server


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
        while time.monotonic() < until_over:
            await world.value(TERMINATE, [row["pid"] for row in await world.fetch(BACKENDS)])
            await fill()
        for replica in world.replicas:
            assert await replica.answers("/readyz") == 503
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


# Stopping


async def _stopped(victim: Replica, statuses: set[int]) -> None:
    before = time.monotonic()
    status = await victim.running.stop()
    assert status in statuses
    assert time.monotonic() - before < SHUTDOWN_SECONDS + LEAVING_SECONDS + 1


async def _stopped_in(world: World, phase: str, **milliseconds: int) -> float | None:
    """Ask a replica to stop; what it cannot finish in time starts elsewhere within a second."""
    run_id = await world.ask("pay", **milliseconds)
    victim = await world.holder(run_id, phase)
    attempt = await world.attempt_of(run_id)
    await _stopped(victim, {0})
    given_back = """
        select a.outcome, extract(epoch from b.started_at - a.ended_at)::float8 as seconds
          from bon_scheduler.attempts a
          join bon_scheduler.attempts b on b.run_id = a.run_id and b.attempt = a.attempt + 1
         where a.run_id = $1 and a.attempt = $2
    """
    if phase == "after":
        return None
    await world.next_started(run_id, attempt)
    [row] = await world.fetch(given_back, run_id, attempt)
    assert row["outcome"] == "given_back"
    return float(row["seconds"])


async def stop_idle(world: World) -> float | None:
    await _stopped(world.rng.choice(world.replicas), {0})
    return None


async def stop_before(world: World) -> float | None:
    return await _stopped_in(world, "before", before=2500)


async def stop_open(world: World) -> float | None:
    return await _stopped_in(world, "open", open=STAYS_OPEN_MS)


async def stop_after(world: World) -> float | None:
    return await _stopped_in(world, "after", after=2500)


async def stop_blocked(world: World) -> float | None:
    """Ask a replica to stop whose event loop is blocked: it is ended from outside the loop."""
    run_id = await world.ask("block", milliseconds=8000)
    victim = await world.holder(run_id, "blocked")
    await _stopped(victim, {1})
    # Its next attempt would block another replica for as long; nobody needs it.
    cancel = """
        with cancelled as (update bon_scheduler.runs set state = 'cancelled', finished_at = now()
                            where id = $1 and state <> 'succeeded' returning id, attempt)
        update bon_scheduler.attempts a set ended_at = now(), outcome = 'cancelled'
          from cancelled c where a.run_id = c.id and a.attempt = c.attempt
    """
    await world.value(cancel, run_id)
    world.asked.remove(run_id)
    return None


async def stop_cut_off(world: World) -> float | None:
    """Ask a replica to stop that the database does not answer."""
    run_id = await world.ask("pay", open=STAYS_OPEN_MS)
    victim = await world.holder(run_id, "open")
    attempt = await world.attempt_of(run_id)
    before = time.monotonic()
    async with victim.proxy.black_hole():
        await _stopped(victim, {0, 1})
        await world.next_started(run_id, attempt)
    return time.monotonic() - before


# The queue


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
    double = """
        insert into bon_scheduler.pgqueuer (priority, entrypoint, payload, execute_after, dedupe_key, status)
        select priority, entrypoint, payload, execute_after, null, 'queued'
          from bon_scheduler.pgqueuer cross join generate_series(1, 2)
    """
    await world.execute(double)
    return await _delivered(world, runs)


async def stale_queue(world: World) -> float | None:
    """Have queue rows look picked by a worker that has gone."""
    runs = [await world.ask("pay", before=200) for _ in range(20)]
    stale = """
        update bon_scheduler.pgqueuer
           set status = 'picked', queue_manager_id = gen_random_uuid(), heartbeat = now() - interval '1 hour',
               execute_after = now() + interval '1 hour'
         where status = 'queued'
    """
    await world.execute(stale)
    return await _delivered(world, runs)


async def _delivered(world: World, runs: list[UUID]) -> float | None:
    before = time.monotonic()
    await world.succeeded(*runs)
    return time.monotonic() - before


RESCUE, RESUME, GIVE_BACK = RESCUED_SECONDS, RESUMED_SECONDS, GIVEN_BACK_SECONDS
FAMILIES = MappingProxyType(
    {
        "kills": {
            "kill_before": Fault(kill_before, RESCUE),
            "kill_open": Fault(kill_open, RESCUE),
            "kill_commit": Fault(kill_commit, RESCUE),
            "kill_after": Fault(kill_after, RESCUE),
            "poison": Fault(poison, RESCUE),
        },
        "freezes": {
            "freeze_before": Fault(freeze_before, RESCUE),
            "freeze_open": Fault(freeze_open, RESCUE),
            "freeze_commit": Fault(freeze_commit, RESCUE),
            "freeze_after": Fault(freeze_after, RESCUE),
            "freeze_briefly": Fault(freeze_briefly, RESUME),
            "block_loop": Fault(block_loop, RESUME),
        },
        "server": {
            "restart_immediate": Fault(restart_immediate, RESUME),
            "restart_fast": Fault(restart_fast, RESUME),
            "outage": Fault(outage, RESUME),
            "connection_limit": Fault(connection_limit, RESUME),
            "read_only": Fault(read_only, RESUME),
            "disk_full": Fault(disk_full, RESUME),
        },
        "connections": {
            "terminate_one": Fault(terminate_one, RESUME),
            "terminate_all": Fault(terminate_all, RESUME),
            "terminate_listener": Fault(terminate_listener, RESUME),
            "reset": Fault(reset, RESUME),
            "latency": Fault(latency, RESUME),
            "black_hole_for_one": Fault(black_hole_for_one, RESUME),
            "black_hole_for_all": Fault(black_hole_for_all, RESUME),
        },
        "stops": {
            "stop_idle": Fault(stop_idle, GIVE_BACK),
            "stop_before": Fault(stop_before, GIVE_BACK),
            "stop_open": Fault(stop_open, GIVE_BACK),
            "stop_after": Fault(stop_after, GIVE_BACK),
            "stop_blocked": Fault(stop_blocked, GIVE_BACK),
            "stop_cut_off": Fault(stop_cut_off, RESCUE + SHUTDOWN_SECONDS + LEAVING_SECONDS),
        },
        "queue": {
            "delete_queue": Fault(delete_queue, RESCUE),
            "truncate_queue": Fault(truncate_queue, RESCUE),
            "double_queue": Fault(double_queue, RESCUE),
            "stale_queue": Fault(stale_queue, RESCUE),
        },
    }
)
"""By family: one world serves a whole family, fault after fault."""
A_MINUTE = Fault(black_hole_for_a_minute, RESUME)
