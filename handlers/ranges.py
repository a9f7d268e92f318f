"""
Change rows range by range, each by one statement in a transaction of its own: no id is read, sent or looked up.

A range waits 50 ms for whoever uses one of its rows. One that waits longer, in which BON's database refuses a row, or
that is too large to go at once, is left as it is: `batches.sweep` does what is left, row by row where it must.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from bon_scheduler import Counts, JobContext
from bon_scheduler.jobs import Connection
from handlers import batches

__all__ = ["Key", "change_ranges", "commit_range"]

Key = tuple[str, int]
"""A value that rows have in common, as text, such as a due date; and how many they are."""


async def commit_range(ctx: JobContext, change: Callable[[Connection], Awaitable[Counts]]) -> Counts | None:
    """Change a range and commit; return what was changed. None: nothing was, because of one of its rows."""
    try:
        async with ctx.transaction() as tx:
            async with batches.bounded(tx):
                counts = await change(tx)
            await ctx.progress(counts, on=tx)
    except batches.NotChangedError:
        return None
    return counts


async def change_ranges(
    ctx: JobContext, keys: Sequence[Key], change: Callable[[str, str, Connection], Awaitable[Counts]], *, ends: float
) -> bool:
    """
    Change all rows of the keys, as many keys at a time as make a batch; return whether all went.

    `change` is given the first and the last of them. `ends`: on the monotonic clock, when to stop.
    """
    size, complete, first = batches.LARGEST, True, 0
    while first < len(keys):
        began = time.monotonic()
        if began >= ends:
            return False
        after = _end_of_batch(keys, first, size)
        if after == first:  # more of one key than go at once
            complete, first = False, first + 1
            continue
        bounds = keys[first][0], keys[after - 1][0]
        complete &= await commit_range(ctx, partial(change, *bounds)) is not None
        size, first = batches.next_size(size, time.monotonic() - began), after
    return complete


def _end_of_batch(keys: Sequence[Key], first: int, size: int) -> int:
    """Return up to which key, without it, those from `first` have `size` rows at most."""
    rows, after = 0, first
    while after < len(keys) and rows + keys[after][1] <= size:
        rows, after = rows + keys[after][1], after + 1
    return after
