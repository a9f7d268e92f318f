"""
Random lives of two to five workers against a model: claims, ends, deaths, zombies, and people who cancel and retry.

Each step is made through the real functions on a real database, and checked against a few dictionaries. Whatever
happens, no two runs of one key work at once, totals hold, an attempt's number only grows, what has lost its run changes
nothing, a run is dead just when its attempts are used up, and at the end everything that waits can be claimed.
"""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bon_scheduler.database import connections
from bon_scheduler.jobs import LostRunError
from bon_scheduler.ledger import attempts, changes, claims
from bon_scheduler.ledger.attempts import RunRef
from bon_scheduler.ledger.changes import Action
from bon_scheduler.ledger.claims import Claimant, Verdict, Wanted
from bon_scheduler.ledger.workers import Worker, declare_dead, last_beats, register_worker
from tests.conftest import Connection

ALLOWED = 3
TOTAL = 2
FREE, ALONE, BY_BUSINESS, FEW = "free", "alone", "by-business", "few"
JOBS = {FREE: "no", ALONE: "job", BY_BUSINESS: "business", FEW: "no"}
WAITING = {"queued", "retrying"}
MAKE_JOBS = """
    truncate bon_scheduler.runs, bon_scheduler.workers cascade;
    insert into bon_scheduler.jobs (name, exclusive, attempts)
    values ('free', 'no', 3), ('alone', 'job', 3), ('by-business', 'business', 3), ('few', 'no', 3)
    on conflict do nothing
"""
LEDGER = "select id, state::text, attempt, given_back, ready, worker from bon_scheduler.runs"
UNENDED = """
    select count(*)
      from bon_scheduler.attempts a
      join bon_scheduler.runs r on r.id = a.run_id
     where a.ended_at is null and not (r.state = 'running' and r.attempt = a.attempt)
"""


@dataclass
class Run:
    """What the model knows of a run."""

    job: str
    business: str | None
    state: str = "queued"
    attempt: int = 0
    given_back: int = 0
    ready: bool = True
    worker: UUID | None = None

    @property
    def key(self) -> str | None:
        if self.job == ALONE or (self.job == BY_BUSINESS and self.business is None):
            return self.job
        return f"{self.job}/{self.business}" if self.job == BY_BUSINESS else None


@dataclass
class Life:
    """One database, its workers, and the model."""

    connection: Connection
    dice: random.Random
    workers: list[Worker] = field(default_factory=list)
    dead: set[UUID] = field(default_factory=set)
    runs: dict[UUID, Run] = field(default_factory=dict)
    most: int = 0
    """How many runs there are: of few, each has many attempts."""
    refs: list[RunRef] = field(default_factory=list)
    """Every attempt there ever was: any may be used again, as a zombie does."""

    def owns(self, ref: RunRef) -> Run | None:
        run = self.runs[ref.run_id]
        return run if (run.state, run.attempt, run.worker) == ("running", ref.attempt, ref.worker) else None

    async def ask(self) -> None:
        if len(self.runs) >= self.most:
            return
        job, business = self.dice.choice(list(JOBS)), self.dice.choice([None, "a", "b", "c"])
        later = self.dice.random() < 0.2
        run_id = await self.connection.fetchval(
            "select bon_scheduler.enqueue($1, $2, priority => $3,"
            " run_at => case when $4 then now() + interval '1 hour' end)",
            job,
            {"business_id": business} if business else {},
            self.dice.randint(-100, 100),
            later,
        )
        self.runs[run_id] = Run(job, business, ready=not later)

    async def claim(self, worker: Worker | None = None) -> int:
        worker = worker or self.dice.choice(self.workers)
        jobs = self.dice.sample(list(JOBS), self.dice.randint(1, len(JOBS)))
        room = self.dice.randint(1, 6)
        active = Counter(run.job for run in self.runs.values() if run.worker == worker.id and run.state == "running")
        answer = await claims.claim(
            self.connection,
            claims.Demand(
                worker=worker.id,
                host=worker.host,
                room=room,
                reserve=self.dice.randint(0, room - 1),
                wanted=[Wanted(job, room, active[job], TOTAL if job == FEW else None, False) for job in jobs],
                letters_apart=None,
                look_at_clock=self.dice.random() < 0.5,
                oldest_first=self.dice.random() < 0.3,
            ),
        )
        assert len(answer.taken) <= room
        for taken in answer.taken:
            run = self.runs[taken.ref.run_id]
            assert run.job in jobs
            self.take(taken.ref)
        return len(answer.taken)

    async def claim_one(self) -> None:
        worker, run_id = self.dice.choice(self.workers), self.dice.choice(list(self.runs))
        run = self.runs[run_id]
        answer = await claims.claim_one(
            self.connection, run_id, sends_mail=False, by=Claimant(worker.id, worker.host, None)
        )
        busy = run.key is not None and any(
            other.key == run.key and other.state == "running" for other in self.runs.values() if other is not run
        )
        if run.state == "running":
            expected = Verdict.HELD
        elif run.state not in WAITING:
            expected = Verdict.ENDED
        elif not run.ready:
            expected = Verdict.WAITS
        else:
            expected = Verdict.BUSY if busy else Verdict.CLAIMED
        assert answer.verdict is expected
        if answer.claim is not None:
            self.take(answer.claim.ref)

    def take(self, ref: RunRef) -> None:
        run = self.runs[ref.run_id]
        assert (run.state in WAITING, run.ready) == (True, True)
        assert ref.attempt == run.attempt + 1
        run.state, run.attempt, run.worker = "running", ref.attempt, ref.worker
        self.refs.append(ref)

    async def end(self) -> None:
        if not self.refs:
            return
        ref = self.dice.choice(self.refs)
        run = self.owns(ref)
        how = self.dice.choice(["finish", "fail", "fail for good", "give back", "fence", "let go"])
        await self.check_fence(ref, holds=run is not None)
        try:
            if how == "finish":
                await attempts.finish(self.connection, ref, {})
            elif how == "fence":
                await attempts.fence(self.connection, ref)
            elif how == "give back":
                assert await attempts.give_back(self.connection, ref) == (run is not None)
            elif how == "let go":
                await attempts.let_go(self.connection, ref.worker, [ref])
            else:
                wait = None if how == "fail for good" else self.dice.choice([timedelta(0), timedelta(hours=1)])
                await attempts.fail(self.connection, ref, outcome="failed", error="away", wait=wait)
                if run is not None:
                    run.ready = wait != timedelta(hours=1)
        except LostRunError:
            assert run is None
            return
        assert run is not None or how in {"give back", "let go"}
        if run is None or how == "fence":
            return
        if how == "let go":
            run.worker = None
            return
        run.state = {"finish": "succeeded", "fail": "retrying", "fail for good": "dead", "give back": "queued"}[how]
        if how == "give back":
            run.given_back, run.ready, run.worker = run.given_back + 1, True, None

    async def check_fence(self, ref: RunRef, *, holds: bool) -> None:
        """Whoever holds its run passes the fence, and nobody else."""
        try:
            await attempts.fence(self.connection, ref)
        except LostRunError:
            assert not holds
        else:
            assert holds

    async def end_many(self) -> None:
        worker = self.dice.choice(self.workers)
        mine = [ref for ref in self.refs if ref.worker == worker.id]
        some = self.dice.sample(mine, min(len(mine), self.dice.randint(1, 4)))
        if not some:
            return
        owned = {ref.run_id for ref in some if self.owns(ref)}
        ended = await attempts.finish_many(self.connection, [(ref, {"n": 1}) for ref in some])
        assert set(ended) == owned
        for run_id in ended:
            self.runs[run_id].state = "succeeded"

    async def die(self) -> None:
        """Declare a worker dead, of which others have heard nothing; it may go on as a zombie, or come back."""
        worker = self.dice.choice(self.workers)
        beats = [beat.id for beat in await last_beats(self.connection) if beat.worker == worker.id]
        await declare_dead(self.connection, beats)
        self.dead.add(worker.id)
        if self.dice.random() < 0.8:
            await self.release()
        if self.dice.random() < 0.6:
            await register_worker(self.connection, worker)
            self.dead.discard(worker.id)

    async def release(self) -> None:
        released = {run.run_id: run.state for run in await attempts.release_lost(self.connection)}
        expected = {}
        for run_id, run in self.runs.items():
            if run.state == "running" and (run.worker is None or run.worker in self.dead):
                run.state = "dead" if run.attempt - run.given_back >= ALLOWED else "retrying"
                run.worker, run.ready = None, True
                expected[run_id] = run.state
        assert released == expected

    async def change(self) -> None:
        action = self.dice.choice([Action.CANCEL, Action.RETRY])
        some = self.dice.sample(list(self.runs), min(len(self.runs), self.dice.randint(1, 3)))
        await changes.change(self.connection, action, some, states=action.changes, by="dana", reason="a test")
        for run in (self.runs[run_id] for run_id in some):
            if run.state not in action.changes:
                continue
            if action is Action.CANCEL:
                run.state = "cancelled"
            else:
                run.state, run.given_back, run.ready, run.worker = "queued", run.attempt, True, None

    async def let_time_come(self) -> None:
        await self.connection.execute(
            "update bon_scheduler.runs set run_at = now() where not ready; select bon_scheduler.make_ready()"
        )
        for run in self.runs.values():
            run.ready = run.ready or run.state in WAITING

    async def check(self) -> None:
        rows = {row["id"]: row for row in await self.connection.fetch(LEDGER)}
        for run_id, run in self.runs.items():
            row = rows[run_id]
            assert (row["state"], row["attempt"], row["given_back"]) == (run.state, run.attempt, run.given_back)
            if run.state in WAITING:
                assert row["ready"] == run.ready
            if run.state == "running":
                assert row["worker"] == run.worker
        running = [run for run in self.runs.values() if run.state == "running"]
        assert all(count == 1 for key, count in Counter(run.key for run in running).items() if key)
        assert await self.connection.fetchval(UNENDED) == 0

    async def drain(self) -> None:
        """All that waits for its turn can be claimed, once what runs has ended and times have come."""
        await self.let_time_come()
        worker = Worker()
        await register_worker(self.connection, worker)
        self.dead |= {each.id for each in self.workers}
        await self.connection.execute("update bon_scheduler.workers set last_word = null where id <> $1", worker.id)
        await self.release()
        for _ in range(2 * len(self.runs) + 2):
            answer = await claims.claim(
                self.connection,
                claims.Demand(
                    worker=worker.id,
                    host=worker.host,
                    room=20,
                    reserve=0,
                    wanted=[Wanted(job, 20, 0, TOTAL if job == FEW else None, False) for job in JOBS],
                    letters_apart=None,
                    look_at_clock=False,
                    oldest_first=False,
                ),
            )
            few = sum(self.runs[taken.ref.run_id].job == FEW for taken in answer.taken)
            assert few <= TOTAL
            for taken in answer.taken:
                self.take(taken.ref)
            await self.check()
            for taken in answer.taken:
                await attempts.finish(self.connection, taken.ref, {})
                self.runs[taken.ref.run_id].state = "succeeded"
            if not answer.taken:
                break
        assert not [run for run in self.runs.values() if run.state in {*WAITING, "running"}]

    async def live(self, steps: int) -> None:
        await self.connection.execute(MAKE_JOBS)
        self.most = self.dice.choice([2, 4, 12])
        for _ in range(self.dice.randint(2, 5)):
            worker = Worker()
            await register_worker(self.connection, worker)
            self.workers.append(worker)
        await self.ask()
        moves: list[Any] = [
            *[self.ask] * 4, *[self.claim] * 5, *[self.end] * 5, self.end_many, self.claim_one, self.claim_one,
            self.die, self.die, self.release, self.release, self.change, self.let_time_come,
        ]  # fmt: skip
        for _ in range(steps):
            await self.dice.choice(moves)()
            await self.check()
        await self.drain()


async def live(url: str, seed: int, steps: int) -> None:
    async with connections.connect(url) as connection:
        await Life(connection, random.Random(seed)).live(steps)


@pytest.mark.parametrize("part", range(3))
async def test_whatever_happens_the_ledger_is_what_the_model_says(database_url: str, part: int) -> None:
    for seed in range(20):
        await live(database_url, part * 1000 + seed, 40)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(4))
def test_whatever_happens_in_two_thousand_lives_the_ledger_is_what_the_model_says(database_url: str, part: int) -> None:
    del part  # each has a database of its own, so that they may live at once

    @settings(max_examples=500, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(min_value=0, max_value=2**48), steps=st.integers(min_value=5, max_value=60))
    def lives(seed: int, steps: int) -> None:
        asyncio.run(live(database_url, seed, steps))

    lives()
