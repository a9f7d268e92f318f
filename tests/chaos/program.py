"""
The real service with jobs that bear witness: `python -m tests.chaos.program`.

Each handler says in the log which phase it is in, so that a fault can be timed, and leaves one row for each effect
in the transaction that makes it. What it did must then agree with what the ledger says of its run.
"""

import asyncio
import os
import signal
import sys
import time
from datetime import timedelta

import structlog

from bon_scheduler import Counts, Exclusive, JobContext, Payload, Retry, declared, job
from bon_scheduler.cli.signals import run
from bon_scheduler.cli.work import serve
from bon_scheduler.config import Settings
from bon_scheduler.log import configure_logging, where_now

# $1 account: int. A row of the business's: whoever is frozen with it locked would block a successor.
PAY = "update account set paid = paid + 1 where id = $1"
# $1 run, $2 attempt, $3 step: int.
WITNESS = "insert into witness (run_id, attempt, step) values ($1, $2, $3)"
# Held by the session until it ends, as it does when its worker is taken for dead.
TAKE_SEAT = "select pg_try_advisory_lock(1234)"
LEAVE_SEAT = "select pg_advisory_unlock_all()"
# $1 run.
NOT_ALONE = "insert into not_alone (run_id) values ($1)"
# $1 run.
STEPS_DONE = "select count(*) from witness where run_id = $1"

MANY = Retry(attempts=50, delay=timedelta(milliseconds=100), longest=timedelta(seconds=1))
log = structlog.get_logger()


class Pay(Payload):
    """One effect, and how long each phase of making it takes, in milliseconds."""

    account: int
    before: int = 0
    open: int = 0
    after: int = 0
    steps: int = 1


class Block(Payload):
    """For how many milliseconds to block the event loop."""

    account: int
    milliseconds: int
    steps: int = 1


async def _phase(name: str, milliseconds: int) -> None:
    log.info("witness.phase", phase=name)
    await asyncio.sleep(milliseconds / 1000)


@job("pay", retry=MANY, timeout=timedelta(seconds=60))
async def pay(ctx: JobContext, payload: Pay) -> Counts:
    """Make one effect; each phase can be hurt."""
    await _phase("before", payload.before)
    async with ctx.transaction() as tx:
        await tx.execute(PAY, payload.account)
        await tx.execute(WITNESS, ctx.run_id, ctx.attempt, 0)
        await _phase("open", payload.open)
        counts = await ctx.finish({"paid": 1}, on=tx)
        log.info("witness.phase", phase="commit")
    await _phase("after", payload.after)
    return counts


@job("pay-in-steps", retry=MANY, timeout=timedelta(seconds=60))
async def pay_in_steps(ctx: JobContext, payload: Pay) -> Counts:
    """Make several effects, a transaction each; what an earlier attempt committed is not made again."""
    async with ctx.connection() as connection:
        done = await connection.fetchval(STEPS_DONE, ctx.run_id)
    for step in range(done, payload.steps):
        async with ctx.transaction() as tx:
            await tx.execute(PAY, payload.account)
            await tx.execute(WITNESS, ctx.run_id, ctx.attempt, step)
            await _phase("open", payload.open)
            if step == payload.steps - 1:
                await ctx.finish({"paid": payload.steps}, on=tx)
    return {"paid": payload.steps}


@job("block", retry=MANY, timeout=timedelta(seconds=60))
async def block(ctx: JobContext, payload: Block) -> Counts:
    """Block the event loop, then make one effect."""
    log.info("witness.phase", phase="blocked")
    time.sleep(payload.milliseconds / 1000)  # noqa: ASYNC251 - this is the fault
    return await pay.handler(ctx, Pay(account=payload.account))


@job("poison", retry=Retry(attempts=3, delay=timedelta(milliseconds=100)))
async def poison(ctx: JobContext, payload: Pay) -> Counts:
    """Kill the worker in the middle of a transaction, each time."""
    async with ctx.transaction() as tx:
        await tx.execute(PAY, payload.account)
        await tx.execute(WITNESS, ctx.run_id, ctx.attempt, 0)
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


@job("nothing", retry=MANY, timeout=timedelta(seconds=60))
async def nothing(_: JobContext, __: Pay) -> Counts:
    """Have no effect: how it ends is recorded afterwards, together with others."""
    return {}


@job("alone", retry=MANY, timeout=timedelta(seconds=60), exclusive=Exclusive.JOB)
async def alone(ctx: JobContext, payload: Pay) -> Counts:
    """Be witness that no other run of the job is at work, in whichever replica."""
    async with ctx.connection() as connection:
        if not await connection.fetchval(TAKE_SEAT):
            await connection.execute(NOT_ALONE, ctx.run_id)
        await asyncio.sleep(payload.before / 1000)
        # BEFORE the end, with whose commit another may begin.
        await connection.execute(LEAVE_SEAT)
    return await pay.handler(ctx, Pay(account=payload.account))


JOBS = (pay, pay_in_steps, block, poison, nothing, alone)


def _say_where() -> None:
    for task in asyncio.all_tasks():
        if task.get_name().startswith(("attempt ", *(f"{each.name} " for each in JOBS))):
            log.info("witness.task", task=task.get_name(), where=where_now(task))


async def _serve(settings: Settings) -> int:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _say_where)
    return await serve(settings, jobs=JOBS)


def main() -> int:
    """Serve; SIGUSR1 has it say where its attempts are."""
    settings = declared.read_settings()
    configure_logging(settings.log_level, settings.log_format)
    return run(_serve(settings))


if __name__ == "__main__":
    sys.exit(main())
