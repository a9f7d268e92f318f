"""
Notices coroutines that a handler made and never awaited: what they were to do was not done.

Python only warns of them, once, on standard error. Here the attempt that made one ends `dead`, and a transaction of it
is rolled back before it commits.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TextIO

from bon_scheduler.jobs import NeverRetryError, shown

__all__ = ["noticing_unawaited", "require_awaited"]

NEVER_AWAITED = re.compile(r"coroutine '([^']{1,200})' was never awaited")
MOST = 10
HERE = Path(__file__).parent
_noticed: ContextVar[list[str] | None] = ContextVar("noticed", default=None)
_before = warnings.showwarning


def _notice(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Stand in for `warnings.showwarning`."""
    noticed, found = _noticed.get(), NEVER_AWAITED.match(str(message))
    if noticed is None or found is None:
        _before(message, category, filename, lineno, file, line)
    elif len(noticed) < MOST:
        # One that was dropped at the end of the handler is warned of where our code awaited the handler.
        place = "" if Path(filename).parent == HERE else f" at {shown(filename)}:{lineno}"
        noticed.append(f"{found[1]}{place}")


def _listen() -> None:
    """Have warnings come to `_notice`, each time: another may have put its own in our place."""
    global _before  # noqa: PLW0603 - the module `warnings` has one place for it
    if warnings.showwarning is not _notice:
        _before = warnings.showwarning
        warnings.showwarning = _notice
        warnings.filterwarnings("always", message="coroutine .* was never awaited", category=RuntimeWarning)


@contextmanager
def noticing_unawaited() -> Iterator[None]:
    """Notice what the code inside makes and does not await; raise NeverRetryError at its end."""
    _listen()
    token = _noticed.set([])
    try:
        yield
        require_awaited()
    finally:
        _noticed.reset(token)


def require_awaited() -> None:
    """Raise NeverRetryError where the handler of this task has not awaited what it made."""
    if noticed := _noticed.get():
        what = ", ".join(noticed)
        noticed.clear()
        raise NeverRetryError(f'Never awaited, so not done: {what}. Write "await" before it.')
