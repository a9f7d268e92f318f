"""
What is done to processes: killed, frozen, blocked, asked to stop.

Each function hurts the world once, with random timing, and returns for how many seconds the service was hindered: from
the fault (a process that died), or from its end (a database that answers again), until work went on. None when work
was never hindered.
"""

import asyncio
import signal
import time

from tests.chaos.world import LEASE_SECONDS, SHUTDOWN_SECONDS, Replica, World
from tests.waiting import until

LEAVING_SECONDS = 3.0
STAYS_OPEN_MS = 1500
"""Longer than SHUTDOWN_SECONDS, and less than what ends an idle transaction: two thirds of the lease."""
# $1 run, $2 attempt.
GIVEN_BACK = """
    select a.outcome, extract(epoch from b.started_at - a.ended_at)::float8 as seconds
      from bon_scheduler.attempts a
      join bon_scheduler.attempts b on b.run_id = a.run_id and b.attempt = a.attempt + 1
     where a.run_id = $1 and a.attempt = $2
"""
# $1 run.
CANCEL = """
    with cancelled as (
        update bon_scheduler.runs
           set state = 'cancelled', finished_at = now()
         where id = $1 and state <> 'succeeded'
        returning id, attempt
    )
    update bon_scheduler.attempts a
       set ended_at = now(), outcome = 'cancelled'
      from cancelled c
     where a.run_id = c.id and a.attempt = c.attempt
"""


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
    if phase == "after":
        return None
    await world.next_started(run_id, attempt)
    [row] = await world.fetch(GIVEN_BACK, run_id, attempt)
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
    await world.value(CANCEL, run_id)
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
