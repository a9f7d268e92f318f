"""
Standard streams that may be closed, or whose reader may be gone, without any effect on what a command does.

A closed one is opened on nothing BEFORE anything else takes its number: otherwise what is written to it would go to a
connection. What a reader that is gone would have read is dropped.
"""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["flushing", "keep_streams"]

NOBODY_READS = frozenset({errno.EPIPE, errno.EIO})
"""A pipe without a reader, and a terminal that is gone."""


class _Stream(io.FileIO):
    """A file descriptor that drops what nobody reads; with `unfailing` what cannot be written for any other reason."""

    def __init__(self, number: int, *, unfailing: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._unfailing = unfailing

    def write(self, data: "Buffer", /) -> int:
        """Write, or drop."""
        try:
            return super().write(data)
        except OSError as error:
            if not self._unfailing and error.errno not in NOBODY_READS:
                raise
            return memoryview(data).nbytes


def keep_streams() -> None:
    """Have standard streams that fail change nothing. A log never does; a result that a full disk cuts is an error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdout = _kept(sys.stdout, 1)
    sys.stderr = _kept(sys.stderr, 2, unfailing=True)


@contextmanager
def flushing() -> Iterator[None]:
    """Write out what a command has printed while its failure can still be told; raises OSError."""
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - the interpreter flushes it once more, at its end
            raise


def _kept(stream: TextIO | None, number: int, *, unfailing: bool = False) -> TextIO:
    """Return what to write to instead of the interpreter's own stream; another's, as a test's, stays."""
    if stream is not None and type(stream) is not io.TextIOWrapper:
        return stream
    raw = _Stream(number, unfailing=unfailing)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",  # what a terminal cannot show is written in escapes
        line_buffering=unfailing or raw.isatty(),
    )
