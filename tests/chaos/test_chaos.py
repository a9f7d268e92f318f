"""
A run survives whatever happens to its process, its database or its clock.

`python3 dev.py test -m chaos`: real processes, a real PostgreSQL, a proxy in between. Each family of faults has a
world of its own, in which each kind strikes CHAOS_ROUNDS times (8) with random timing. CHAOS_SEED repeats a run of
the dice; CHAOS_KINDS=kill_open,reset lets only these strike. After each strike everything that was asked for must
have ended as it should (`World.settle`), and work must have gone on in time. Figures by kind stand in the summary.
"""

import asyncio
import os
import random
from collections.abc import Callable

import pytest

from tests.chaos.faults import A_MINUTE, FAMILIES, Fault
from tests.chaos.world import World, world

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "8"))
SEED = os.environ.get("CHAOS_SEED") or str(random.SystemRandom().randrange(1 << 32))
FULL_ROUNDS = 8
ONLY = set(filter(None, os.environ.get("CHAOS_KINDS", "").split(",")))
MOST_GROWTH_BYTES = 24 << 20
STORM_STRIKES = 4
"""Of two faults at a time, a round."""
ONE_OF = ("kill_open", "kill_commit", "freeze_open", "freeze_commit", "stop_open", "terminate_all", "read_only")
OTHERS = ("terminate_one", "reset", "disk_full", "wake_up_lost", "claim_unanswered", "latency")
"""Not two that need a replica each that still works."""
Record = Callable[[str, object], None]


async def strike(hurt: World, kind: str, fault: Fault, record: Record) -> None:
    """Strike once, let everything settle, and claim that work went on in time."""
    seconds = await fault.strike(hurt)
    await hurt.settle()
    record("chaos", (kind, seconds))
    if seconds is not None and seconds > fault.bound_seconds:
        replicas = "\n".join(str(replica) for replica in hurt.replicas)
        raise AssertionError(f"{kind}: work went on after {seconds:.1f} s\n{replicas}")


@pytest.mark.parametrize("family", FAMILIES)
async def test_nothing_is_lost_doubled_or_stuck_whatever_strikes(family: str, record_property: Record) -> None:
    rng = random.Random(f"{SEED}/{family}")
    strikes = [(kind, fault) for kind, fault in FAMILIES[family].items() for _ in range(ROUNDS)]
    if family == "connections" and ROUNDS >= FULL_ROUNDS:
        strikes += [("black_hole_for_a_minute", A_MINUTE)] * 2
    strikes = [(kind, fault) for kind, fault in strikes if not ONLY or kind in ONLY]
    if not strikes:
        pytest.skip("no kind of this family was asked for")
    rng.shuffle(strikes)
    async with world(rng) as hurt:
        await hurt.settle()
        survivors = {replica.pid: replica.memory_bytes for replica in hurt.replicas}
        for kind, fault in strikes:
            await strike(hurt, kind, fault, record_property)
        await summarise(hurt, record_property)
        for replica in hurt.replicas:
            if (before := survivors.get(replica.pid)) is not None:
                assert replica.memory_bytes - before < MOST_GROWTH_BYTES


async def test_faults_that_come_on_top_of_one_another_lose_and_double_nothing(record_property: Record) -> None:
    """Two faults at a time, and the next two before the world has settled."""
    rng = random.Random(f"{SEED}/storm")
    faults = {kind: fault for family in FAMILIES.values() for kind, fault in family.items()}

    async def hurry(hurt: World, kind: str) -> None:
        await asyncio.sleep(rng.uniform(0, 1))
        # What one fault waits for, the other may keep from happening: only the end counts here.
        try:
            await faults[kind].strike(hurt)
        except (TimeoutError, AssertionError, OSError, LookupError):
            record_property("overlapped", kind)

    async with world(rng) as hurt:
        await hurt.settle()
        for _ in range(ROUNDS):
            for _ in range(STORM_STRIKES):
                pair = [rng.choice(ONE_OF), rng.choice(OTHERS)]
                await asyncio.gather(*(hurry(hurt, kind) for kind in pair))
                for kind in pair:
                    record_property("chaos", (f"storm: {kind}", None))
                await hurt.revive()
            await hurt.settle()
        await summarise(hurt, record_property)


async def summarise(hurt: World, record: Record) -> None:
    record("seed", SEED)
    record("runs", await hurt.value("select count(*) from bon_scheduler.runs"))
    record("fenced", hurt.logged("run.ended", outcome="lost"))
    record("rescued", hurt.logged("run.rescued"))
