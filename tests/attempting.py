"""One attempt at a certain run, claimed as the foreground does, without an engine."""

from uuid import UUID

from bon_scheduler import claims
from bon_scheduler.attempts import RunRef
from bon_scheduler.claims import Claimant
from bon_scheduler.jobs import AnyJob, Connection
from bon_scheduler.service import Machinery
from bon_scheduler.workers import Worker


async def attempt(parts: Machinery, run_id: UUID, job: AnyJob) -> None:
    """Claim the run, whether or not its time has come, and make the attempt."""
    async with parts.control.acquire() as connection:
        await connection.execute("update bon_scheduler.runs set ready = true where id = $1", run_id)
        answer = await parts.runner.claim_one(connection, run_id, job)
    assert answer.claim is not None, answer.verdict
    await parts.runner.execute(job, answer.claim, job.retry)


async def hold(connection: Connection, run_id: UUID, worker: Worker) -> RunRef:
    """Claim the run for a worker of the test's."""
    by = Claimant(worker.id, worker.host, None)
    answer = await claims.claim_one(connection, run_id, sends_mail=False, by=by)
    assert answer.claim is not None, answer.verdict
    return answer.claim.ref
