"""
The real service with handlers that behave badly: `python -m tests.stubborn`.

`sleep` waits, `swallow` ignores its cancellation, `block` blocks the event loop; each for longer than a test lasts.
"""

import asyncio
import sys
import time
from contextlib import suppress

from bon_scheduler import Counts, JobContext, NoPayload, declared, job
from bon_scheduler.cli.signals import run
from bon_scheduler.cli.work import serve
from bon_scheduler.log import configure_logging

LONG_SECONDS = 300


@job("sleep")
async def sleep(_: JobContext, __: NoPayload) -> Counts:
    """Wait."""
    await asyncio.sleep(LONG_SECONDS)
    return {}


@job("swallow")
async def swallow(ctx: JobContext, _: NoPayload) -> Counts:
    """Ignore every cancellation, with a transaction open."""
    async with ctx.transaction():
        for _nap in range(LONG_SECONDS):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(1)
    return {}


@job("block")
async def block(_: JobContext, __: NoPayload) -> Counts:
    """Block the event loop."""
    time.sleep(LONG_SECONDS)  # noqa: ASYNC251 - this is the fault
    return {}


@job("thread")
async def thread(_: JobContext, __: NoPayload) -> Counts:
    """Leave a thread behind."""
    await asyncio.to_thread(time.sleep, LONG_SECONDS)
    return {}


JOBS = (sleep, swallow, block, thread)


def main() -> int:
    """Serve."""
    settings = declared.read_settings()
    configure_logging(settings.log_level, settings.log_format)
    return run(serve(settings, jobs=JOBS))


if __name__ == "__main__":
    sys.exit(main())
