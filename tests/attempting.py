"""Claims of certain runs and of any, for workers of the test's, without an engine."""

import asyncio
from datetime import timedelta
from uuid import UUID

from bon_scheduler.jobs import AnyJob, Connection
from bon_scheduler.ledger import claims
from bon_scheduler.ledger.attempts import RunRef
from bon_scheduler.ledger.claims import Claim, Claimant, Claims, Foreground, Verdict, Wanted
from bon_scheduler.ledger.workers import Worker
from bon_scheduler.service import Machinery


async def attempt(parts: Machinery, run_id: UUID, job: AnyJob) -> None:
    """Claim the run, whether or not its time has come, once its letter may go, and make the attempt."""
    async with parts.control.acquire() as connection:
        await connection.execute("update bon_scheduler.runs set ready = true where id = $1", run_id)
        answer = await parts.runner.claim_one(connection, run_id, job)
        for _ in range(50):
            if answer.verdict is not Verdict.WAITS:
                break
            await asyncio.sleep(answer.wait_seconds)  # for its letter's turn
            answer = await parts.runner.claim_one(connection, run_id, job)
    assert answer.claim is not None, answer.verdict
    await parts.runner.execute(job, answer.claim, job.retry)


async def claim_one(connection: Connection, run_id: UUID, worker: Worker) -> Foreground:
    """Claim a certain run."""
    by = Claimant(worker.id, worker.host, None)
    return await claims.claim_one(connection, run_id, sends_mail=False, by=by)


async def hold(connection: Connection, run_id: UUID, worker: Worker) -> RunRef:
    """Claim a certain run, which can be claimed."""
    answer = await claim_one(connection, run_id, worker)
    assert answer.claim is not None, answer.verdict
    return answer.claim.ref


async def claim(
    connection: Connection,
    worker: Worker,
    *wanted: str | Wanted,
    room: int = 20,
    reserve: int = 0,
    letters_apart: timedelta | None = None,
    oldest_first: bool = False,
) -> Claims:
    """Claim what there is of these jobs, by name or with what bounds them."""
    return await claims.claim(
        connection,
        claims.Demand(
            worker=worker.id,
            host=worker.host,
            room=room,
            reserve=reserve,
            wanted=[Wanted(each, room, 0, None, False) if isinstance(each, str) else each for each in wanted],
            letters_apart=letters_apart,
            look_at_clock=True,
            oldest_first=oldest_first,
        ),
    )


async def take_any(
    connection: Connection,
    worker: Worker,
    *wanted: str | Wanted,
    room: int = 20,
    reserve: int = 0,
    oldest_first: bool = False,
) -> list[UUID]:
    """Claim what there is of these jobs; return the runs, in the order in which they were asked for."""
    answer = await claim(connection, worker, *wanted, room=room, reserve=reserve, oldest_first=oldest_first)
    ids = [each.ref.run_id for each in answer.taken]
    rows = await connection.fetch("select id from bon_scheduler.runs where id = any ($1) order by enqueued_at", ids)
    return [row["id"] for row in rows]


def refs(taken: list[Claim]) -> list[RunRef]:
    """Return the attempts of claims."""
    return [each.ref for each in taken]
