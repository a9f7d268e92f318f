"""
How an attempt ended: what its handler's result or exception means for the run.

A handler may raise anything. Only the cancellation by which the runner stops it passes as one; a SystemExit or a
cancellation of its own making is an error like any other.
"""

import asyncio
import inspect
from dataclasses import dataclass, field
from datetime import timedelta

import asyncpg
import structlog

from bon_scheduler.engine.awaited import noticing_unawaited
from bon_scheduler.engine.mistakes import EscapedError, MistakeError, explain, fault_of_counts
from bon_scheduler.jobs import (
    AnyJob,
    Counts,
    HeldError,
    JobContext,
    LostRunError,
    NeverRetryError,
    NotNowError,
    Payload,
    RetryLaterError,
    declared_at,
)
from bon_scheduler.log import describe_error, is_out_of_descriptors, where

__all__ = ["Outcome", "invoke", "judge"]

log = structlog.get_logger()
# BON altered a table since a statement was planned; the server or the role has no connection left.
MENDED_BY_ANOTHER_TRY = (
    asyncpg.InvalidCachedStatementError | asyncpg.OutdatedSchemaCacheError | asyncpg.TooManyConnectionsError
)
"""
What is no fault of the handler's, and of which nothing was committed: it costs no attempt. Neither does what comes of
this process, or this machine, having no file descriptor left.
"""
SHORTLY = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended: its outcome, and what the run becomes."""

    name: str
    """One of the ledger's outcomes of an attempt, or `dead`: a failure that no other attempt may mend."""
    counts: Counts = field(default_factory=dict)
    error: str | None = None
    wait: timedelta | None = None
    """Until the next attempt; None for none."""


async def invoke(job: AnyJob, ctx: JobContext, payload: Payload) -> Counts:
    """Call the handler; whatever it raises is an Exception, but for the cancellation of this task."""
    try:
        with noticing_unawaited():
            counts = await job.handler(ctx, payload)
    except Exception:
        raise
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        # As it is, it would end the event loop, or pass for a cancellation of ours.
        raise EscapedError(explain(error, job)) from error
    if inspect.iscoroutine(counts):
        counts.close()
        raise NeverRetryError(
            f'The handler of "{job.name}" at {declared_at(job.handler)} returned {counts.__qualname__} and did not '
            'await it, so that it was not done. Write "return await".'
        )
    if (fault := fault_of_counts(counts)) is not None:
        raise NeverRetryError(
            f'The handler of "{job.name}" at {declared_at(job.handler)} did not return counts, but {fault}, '
            "or what ctx.finish returned."
        )
    return counts


def judge(job: AnyJob, handler: asyncio.Task[Counts], wait: timedelta | None) -> Outcome:
    """Return what the end of a job's handler means for the run; `wait` is its policy's."""
    error = handler.exception()
    if error is None:
        return Outcome("succeeded", handler.result())
    if isinstance(error, MistakeError):
        return Outcome("dead", error=explain(error, job))
    if (told := _as_told(error)) is not None:
        return told
    if isinstance(error, RetryLaterError):
        return Outcome("failed", error=describe_error(error), wait=None if wait is None else error.after or wait)
    text = explain(error, job)
    log.warning("handler.raised", error=text, where=where(error))
    return Outcome("failed", error=text, wait=wait)


def _as_told(error: BaseException) -> Outcome | None:
    """Return what an exception says by its kind that is to become of the run."""
    if isinstance(error, LostRunError):
        return Outcome("lost", error=str(error))
    if isinstance(error, HeldError):
        return Outcome("held", error.figures, error=str(error))
    if isinstance(error, NotNowError | MENDED_BY_ANOTHER_TRY) or is_out_of_descriptors(error):
        after = error.after if isinstance(error, NotNowError) else SHORTLY
        return Outcome("given_back", error=describe_error(error), wait=after)
    return Outcome("dead", error=describe_error(error)) if isinstance(error, NeverRetryError) else None
