"""
Change rows many at a time, each time by one statement in a transaction of its own.

It waits 50 ms for whoever uses one of the rows. Where that is not enough, or BON's database refuses a row, all of them
are left as they are: `batches.sweep` does what is left, row by row where it must.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from bon_scheduler import Counts, JobContext
from bon_scheduler.jobs import Connection
from handlers import batches

__all__ = ["FOUND_AT_ONCE", "Piece", "change_pieces", "commit_at_once", "rows_of_piece"]

FOUND_AT_ONCE = 200_000
"""How many ids are read at a time, and held in memory: 37 bytes each."""
PIECES = 5
"""Of the largest batch: a smaller one has fewer of them."""

Piece = tuple[str, int]
"""Ids as PostgreSQL writes an array of them, which nobody here needs to read, and how many."""


def rows_of_piece() -> int:
    """Return how many ids a piece has."""
    return max(batches.LARGEST // PIECES, 1)


async def commit_at_once(ctx: JobContext, change: Callable[[Connection], Awaitable[Counts]]) -> bool:
    """Change rows and commit; return False, with nothing changed, where one of them is in use or refused."""
    try:
        async with ctx.transaction() as tx:
            async with batches.bounded(tx):
                counts = await change(tx)
            await ctx.progress(counts, on=tx)
    except batches.NotChangedError:
        return False
    return True


async def change_pieces(
    ctx: JobContext, pieces: Sequence[Piece], change: Callable[[str, Connection], Awaitable[Counts]], *, ends: float
) -> bool:
    """
    Change the rows of all pieces, as many pieces at a time as make a batch; return whether all went.

    `change` is given their ids together. `ends`: on the monotonic clock, when to stop.
    """
    size, complete, first = batches.LARGEST, True, 0
    while first < len(pieces):
        began = time.monotonic()
        if began >= ends:
            return False
        after = _end_of_batch(pieces, first, size)
        if after == first:  # batches have become smaller than a piece
            return False
        complete &= await commit_at_once(ctx, partial(change, _joined(pieces[first:after])))
        size, first = batches.next_size(size, time.monotonic() - began), after
    return complete


def _end_of_batch(pieces: Sequence[Piece], first: int, size: int) -> int:
    """Return up to which piece, without it, those from `first` have `size` rows at most."""
    rows, after = 0, first
    while after < len(pieces) and rows + pieces[after][1] <= size:
        rows, after = rows + pieces[after][1], after + 1
    return after


def _joined(pieces: Sequence[Piece]) -> str:
    return "{" + ",".join(ids[1:-1] for ids, _ in pieces) + "}"
