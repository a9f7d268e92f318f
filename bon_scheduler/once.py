"""
One run, now, in the foreground, by this process: then the runs it caused, and theirs.

The run goes through the ledger like any other. It is asked for and claimed in one transaction, so
no other replica can take it; runs it causes may be taken by others, and are then waited for.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import structlog

from bon_scheduler import history, ledger, revise
from bon_scheduler.attempts import Claim, Verdict
from bon_scheduler.db import Pool
from bon_scheduler.history import OPEN_STATES, Row
from bon_scheduler.jobs import AnyJob, Connection, Payload, Retry
from bon_scheduler.ledger import Origin, Request
from bon_scheduler.revise import Action
from bon_scheduler.runner import Delivery, Runner

__all__ = ["AlreadyRunningError", "RunReport", "run_once"]

log = structlog.get_logger()
ONE_ATTEMPT = Retry(attempts=1)
LOOK_AGAIN_SECONDS = 0.2
WATCH_SECONDS = 1.0


class AlreadyRunningError(Exception):
    """Another run of the job is active, and the job allows only one."""

    worth_watching = False
    """Whether its worker looks silent, so that this process soon knows whether it is dead."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run that ended, as `show` gives it, what it did for businesses, and the runs it caused."""

    run: Row
    businesses: Row
    caused: list[Row]
    sample: list[Row] = field(default_factory=list)
    """Of a dry run: what would be done for some of the businesses."""

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
            "error": self.run["error"],
            "caused": [
                {name: run[name] for name in ("run_id", "job", "state", "counts", "error")} for run in self.caused
            ],
            **({"sample": self.sample} if self.run["dry_run"] else {}),
        }


async def run_once(
    pool: Pool,
    runner: Runner,
    jobs: Mapping[str, AnyJob],
    *,
    job: AnyJob,
    payload: Payload,
    fire_time: datetime,
    asked_by: str,
    concurrency: int,
) -> RunReport:
    """Make one attempt at a new run of `job`, work through what it causes, and report when all has ended."""

    async def cancel(connection: Connection, run_id: UUID) -> None:
        # Never given back: a person who interrupts does not want another replica to go on with it.
        await revise.revise(connection, Action.CANCEL, [run_id], states=OPEN_STATES, by=asked_by, reason="interrupted")

    run_id: UUID | None = None
    try:
        claim: Claim | None = None
        while claim is None or run_id is None:
            try:
                async with pool.acquire() as connection, connection.transaction():
                    run_id = await _ask(connection, job, payload, fire_time, asked_by)
                    claim = await _claim(connection, runner, Delivery(run_id, job))
            except AlreadyRunningError as error:
                if not error.worth_watching:
                    raise
                # Until the reconciler takes that worker for dead, or it speaks: there may be no other to do it.
                log.info("holder.watched", job=job.name)
                await asyncio.sleep(WATCH_SECONDS)
        await runner.execute(job, claim, ONE_ATTEMPT, leave=lambda connection, ref: cancel(connection, ref.run_id))
    except asyncio.CancelledError:
        # Perhaps before the attempt began, while the claim was being committed.
        if run_id is not None:
            async with pool.acquire() as connection:
                await cancel(connection, run_id)
        raise
    await _work_through(pool, runner, jobs, run_id, concurrency)
    async with pool.acquire() as connection:
        run = await history.find_run(connection, run_id)
        if run is None:
            raise LookupError(f"run {run_id} vanished from the ledger while it was being worked on")
        return RunReport(
            run,
            await history.outcome_totals(connection, run_id),
            await history.descendants(connection, run_id),
        )


async def _ask(connection: Connection, job: AnyJob, payload: Payload, fire_time: datetime, asked_by: str) -> UUID:
    run_id = await ledger.enqueue(
        connection,
        Request(
            job.name,
            payload.model_dump(mode="json"),
            fire_time=fire_time,
            origin=Origin.PERSON,
            asked_by=asked_by,
        ),
    )
    if run_id is None:
        raise LookupError("the ledger gave no run for a request without a key")
    return run_id


async def _claim(connection: Connection, runner: Runner, run: Delivery) -> Claim:
    claim = await runner.claim(connection, run, ONE_ATTEMPT)
    if claim.verdict in {Verdict.BUSY, Verdict.LOCKED}:
        since = f"{claim.holder_since:%Y-%m-%d %H:%M:%S} UTC" if claim.holder_since else "an unknown time"
        error = AlreadyRunningError(
            f'"{run.job.name}" is already running on {claim.holder_host or "another worker"} since {since}. '
            "Wait for it to end; see it with: python -m bon_scheduler runs --state running; "
            "stop it with: python -m bon_scheduler cancel RUN_ID --reason …"
        )
        error.worth_watching = claim.holder_silent
        raise error
    return claim


async def _work_through(pool: Pool, runner: Runner, jobs: Mapping[str, AnyJob], root: UUID, concurrency: int) -> None:
    slots = asyncio.Semaphore(concurrency)

    async def work(run: Row) -> None:
        async with slots:
            await runner.attempt(Delivery(run["run_id"], jobs[run["job"]]))

    while True:
        async with pool.acquire() as connection:
            family = await history.descendants(connection, root)
        unfinished = [run for run in family if run["state"] in OPEN_STATES and run["job"] in jobs]
        if not unfinished:
            return
        due = [run for run in unfinished if run["state"] != "running" and run["wait_seconds"] <= 0]
        await asyncio.gather(*(work(run) for run in due))
        if not due:
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
