"""Tells a job's author where an attempt failed: file, line and statement, without any values."""

import asyncio
import os
import traceback
from collections.abc import Iterator, Mapping
from types import FrameType, TracebackType

import asyncpg

from bon_scheduler.jobs import AnyJob, code_of, shown
from bon_scheduler.log import describe_error, frames_now

__all__ = ["are_counts", "explain", "waits_at"]

LARGEST_COUNT = 2**63 - 1


def explain(error: BaseException, job: AnyJob) -> str:
    """Return what a handler raised, the innermost place of the author's code it came through, and the statement."""
    text = describe_error(error)
    if isinstance(error, asyncpg.UndefinedTableError | asyncpg.UndefinedColumnError):
        text += ". See what BON's database lacks with: bon-scheduler check"
    home = _home(job)
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _is_theirs(frame.f_code.co_filename, home)
    ]
    at = [f"at {shown(frames[-1][0].f_code.co_filename)}:{frames[-1][1]}"] if frames else []
    if isinstance(error, asyncpg.PostgresError) and (query := _query(error.__traceback__)) is not None:
        position = str(getattr(error, "position", None) or "")
        which = _statement(query, [frame for frame, _ in frames], int(position) if position.isdecimal() else None)
        at += [which] if which else []
    return f"{text} ({', '.join(at)})" if at else text


def waits_at(job: AnyJob, handler: "asyncio.Task[object]") -> str | None:
    """Return the innermost place of the author's code that a handler waits at, and what it waits in."""
    frames = list(frames_now(handler))
    home = _home(job)
    theirs = [frame for frame in frames if _is_theirs(frame.f_code.co_filename, home)]
    if not theirs:
        return None
    last = theirs[-1]
    inside = frames[-1].f_code.co_qualname if frames[-1] is not last else None
    return f"{shown(last.f_code.co_filename)}:{last.f_lineno}{f', in {inside}' if inside else ''}"


def _home(job: AnyJob) -> str:
    """Return the directory the author's code is in."""
    code = code_of(job.handler)
    return "" if code is None else os.path.dirname(code.co_filename)  # noqa: PTH120 - compared as a text


def _is_theirs(filename: str, home: str) -> bool:
    return bool(home) and filename.startswith(f"{home}{os.sep}")


def _query(trace: TracebackType | None) -> str | None:
    """Return the statement that asyncpg was given."""
    found = None
    for frame, _ in traceback.walk_tb(trace):
        if "asyncpg" in frame.f_code.co_filename and isinstance(query := frame.f_locals.get("query"), str):
            found = query
    return found


def _statement(query: str, frames: list[FrameType], position: int | None) -> str | None:
    """Return the name of a statement and the line of the file the error is in; of one without a name only its line."""
    line = None if position is None else query.count("\n", 0, position - 1) + 1
    for name, file in _names_of(query, frames):
        begins = _begins(query, file)
        if begins is None:
            return f"in {name}{f', line {line}' if line else ''}"
        return f"in {name} at {shown(file)}:{begins + (line or 1) - 1}"
    return f"in line {line} of its statement" if line else None


def _names_of(query: str, frames: list[FrameType]) -> Iterator[tuple[str, str]]:
    for frame in reversed(frames):
        for name, value in frame.f_globals.items():
            if isinstance(value, str) and value == query and name.isupper():
                yield name, str(frame.f_globals.get("__file__", frame.f_code.co_filename))


def _begins(query: str, file: str) -> int | None:
    """Return the line of a file that a statement begins in."""
    try:
        with open(file, encoding="utf-8") as opened:  # noqa: PTH123 - a text, not a path
            text = opened.read()
    except OSError:
        return None
    start = text.find(query)
    return None if start < 0 else text.count("\n", 0, start) + 1


def are_counts(result: object) -> bool:
    """Whether it is what a handler may return and finish with: names, and whole numbers from 0 that a bigint holds."""
    return isinstance(result, Mapping) and all(
        isinstance(name, str) and isinstance(number, int) and 0 <= number <= LARGEST_COUNT
        for name, number in result.items()
    )
