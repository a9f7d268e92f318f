"""
One run, now, in the foreground, by this process: then the runs it caused, and theirs.

The run goes through the ledger like any other. It is asked for and claimed by one statement, so that
no other replica can take it; runs it causes may be taken by others, and are then waited for.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import structlog

from bon_scheduler import ledger
from bon_scheduler.database import Pool
from bon_scheduler.engine.attempt import to_its_end
from bon_scheduler.engine.runner import Runner
from bon_scheduler.jobs import AnyJob, Connection, Payload, Retry
from bon_scheduler.ledger import OPEN_STATES, Action, Claim, Foreground, NewRun, Row, RunRef, Verdict

__all__ = ["AlreadyRunningError", "JobPausedError", "Order", "RunReport", "run_once"]

T = TypeVar("T")
log = structlog.get_logger()
ONE_ATTEMPT = Retry(attempts=1)
LOOK_AGAIN_SECONDS = 0.2
WATCH_SECONDS = 1.0
LONGEST_LOOK_SECONDS = 5.0
LOOKED_AT_A_SECOND = 5000
"""Unfinished runs: many that wait are looked at less often."""


class AlreadyRunningError(Exception):
    """Another run of the job is active, and the job allows only one."""


class JobPausedError(Exception):
    """Nothing of the job is begun until it is resumed."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run that ended, as `show` gives it, what it did for businesses, and the runs it caused."""

    run: Row
    businesses: Row
    caused: list[Row]
    sample: list[Row] = field(default_factory=list)
    """Of a dry run: what would be done for some of the businesses."""

    @property
    def why(self) -> str | None:
        """Why it did not end well, or is held."""
        why: str | None = self.run["error"] or self.run["reason"]
        return why

    @property
    def held(self) -> bool:
        """Whether the brake holds this run or one that it caused."""
        return any(run["state"] == "held" for run in [self.run, *self.caused])

    @property
    def went_well(self) -> bool:
        """Whether this run and all it caused succeeded."""
        return all(state == "succeeded" for state in [self.run["state"], *(r["state"] for r in self.caused)])

    def as_json(self) -> dict[str, Any]:
        """Return the document of `run-once --json`."""
        started, finished = self.run["started_at"], self.run["finished_at"]
        took = round((finished - started).total_seconds() * 1000) if started and finished else None
        return {
            **{name: self.run[name] for name in ("run_id", "job", "fire_time", "state")},
            "dry_run": self.run["dry_run"],
            "attempt": self.run["attempt"],
            "duration_ms": took,
            "counts": self.run["counts"],
            "businesses": self.businesses,
            "error": self.why,
            "caused": [
                {name: run[name] for name in ("run_id", "job", "state", "counts", "error")} for run in self.caused
            ],
            **({"sample": self.sample} if self.run["dry_run"] else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A run that a person asks for in the foreground."""

    job: AnyJob
    payload: Payload
    fire_time: datetime
    asked_by: str
    released_for: str | None = None
    """Why it may pass the brake; None: it may not."""
    begun: Callable[[UUID], None] = lambda _: None
    """Called once, with the run, when it is taken."""


async def run_once(
    pool: Pool,
    runner: Runner,
    jobs: Mapping[str, AnyJob],
    order: Order,
    *,
    concurrency: int,
) -> RunReport:
    """Make one attempt at a new run, work through what it causes, and report when all has ended."""
    job, asked_by = order.job, order.asked_by

    async def cancel(connection: Connection, ref: RunRef) -> None:
        # Never given back: a person who interrupts does not want another replica to go on with it.
        await ledger.change(
            connection, Action.CANCEL, [ref.run_id], states=OPEN_STATES, by=asked_by, reason="interrupted"
        )

    async def ask() -> Foreground:
        async with pool.acquire() as connection:
            arguments = order.payload.model_dump(mode="json")
            wanted = NewRun(job, arguments, order.fire_time, asked_by, order.released_for)
            return await runner.claim_new(connection, wanted)

    async def undo(answer: Foreground) -> None:
        if answer.claim is not None:
            async with pool.acquire() as connection:
                await cancel(connection, answer.claim.ref)
            runner.forget(answer.claim.ref)

    claim: Claim | None = None
    while claim is None:
        answer = await _whole(ask(), undo)
        claim = answer.claim
        if claim is None:
            await _wait_for(job, answer)
    run_id = claim.ref.run_id
    order.begun(run_id)
    await runner.execute(job, claim, ONE_ATTEMPT, leave=cancel)
    await _work_through(pool, runner, jobs, run_id, concurrency)
    async with pool.acquire() as connection:
        run = await ledger.find_run(connection, run_id)
        if run is None:
            raise LookupError(f"run {run_id} vanished from the ledger while it was being worked on")
        return RunReport(
            run,
            await ledger.outcome_totals(connection, run_id),
            await ledger.descendants(connection, run_id),
        )


async def _whole(work: Coroutine[Any, Any, T], undo: Callable[[T], Awaitable[None]]) -> T:
    """Await work that must be known to its end: when this task is cancelled meanwhile, it is undone."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await to_its_end(_undone(task, undo))
        raise


async def _undone(task: "asyncio.Task[T]", undo: Callable[[T], Awaitable[None]]) -> None:
    await undo(await task)


async def _wait_for(job: AnyJob, answer: Foreground) -> None:
    """Wait before the run is asked for again; raises AlreadyRunningError and JobPausedError."""
    if answer.verdict is Verdict.PAUSED:
        raise JobPausedError(
            f'"{job.name}" is paused, and nothing of it is begun. See why with: bon-scheduler jobs; '
            f"end the pause with: bon-scheduler resume {job.name} --reason …"
        )
    if answer.verdict is not Verdict.BUSY:
        log.info("run.waits", job=job.name, seconds=round(answer.wait_seconds, 2))  # no letter may go yet
        await asyncio.sleep(answer.wait_seconds)
    elif answer.holder_silent:
        # Until the reconciler declares that worker dead, or it is heard: there may be no other to do it.
        log.info("holder.watched", job=job.name)
        await asyncio.sleep(WATCH_SECONDS)
    else:
        since = f"{answer.holder_since:%Y-%m-%d %H:%M:%S} UTC" if answer.holder_since else "an unknown time"
        raise AlreadyRunningError(
            f'"{job.name}" is already running on {answer.holder_host or "another worker"} since {since}. '
            "Wait for it to end; see it with: bon-scheduler runs --state running; "
            "stop it with: bon-scheduler cancel RUN_ID --reason …"
        )


async def _work_through(pool: Pool, runner: Runner, jobs: Mapping[str, AnyJob], root: UUID, concurrency: int) -> None:
    """Run what the run caused, and what that causes, until all has ended, here or elsewhere, or waits for a resume."""
    slots = asyncio.Semaphore(concurrency)
    paused: set[UUID] = set()

    async def work(run: Row) -> None:
        job = jobs[run["job"]]
        async with slots:
            async with pool.acquire() as connection:
                answer = await runner.claim_one(connection, run["run_id"], job)
            if answer.claim is not None:
                await runner.execute(job, answer.claim, job.retry)
            elif answer.verdict is Verdict.PAUSED:
                paused.add(run["run_id"])
            elif answer.verdict is Verdict.WAITS:
                await asyncio.sleep(answer.wait_seconds)

    causes = {root}
    while True:
        async with pool.acquire() as connection:
            open_runs = await ledger.unfinished(connection, causes, jobs.keys())
            unfinished = [run for run in open_runs if run["run_id"] not in paused]
            if not unfinished:
                # What a run caused that has ended already is found here, and seldom: all of the family is read.
                family = await ledger.descendants(connection, root)
                left = {run["caused_by"] for run in family if _works_here(run, jobs, paused)}
                if not left:
                    return
                causes = {root, *left}
                continue
        due = [run for run in unfinished if run["state"] != "running" and run["wait_seconds"] <= 0]
        # Each to its end, whatever becomes of another: the pools close when this returns.
        ends = await asyncio.gather(*(work(run) for run in due), return_exceptions=True)
        for error in ends:
            if error is not None:
                raise error
        pause = min(LOOK_AGAIN_SECONDS + len(unfinished) / LOOKED_AT_A_SECOND, LONGEST_LOOK_SECONDS)
        await asyncio.sleep(pause if not due else 0)


def _works_here(run: Row, jobs: Mapping[str, AnyJob], paused: Collection[UUID]) -> bool:
    """Whether a run has not ended and can be worked on here."""
    return run["state"] in OPEN_STATES and run["job"] in jobs and run["run_id"] not in paused
