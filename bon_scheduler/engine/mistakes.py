"""Tells a job's author where an attempt failed: file, line and statement, without any values."""

import asyncio
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from types import FrameType, TracebackType

import asyncpg

from bon_scheduler.jobs import AnyJob, Connection, Job, NeverRetryError, code_of, shown
from bon_scheduler.log import describe_error, frames_now

__all__ = [
    "EscapedError",
    "MistakeError",
    "explain",
    "fault_of_counts",
    "require_counts",
    "require_job",
    "require_request",
    "require_transaction",
    "waits_at",
]

LARGEST_COUNT = 2**63 - 1
LONGEST_NAME = 100
MOST_OF_A_GROUP = 3
FIRST_WORDS = re.compile(r"\s*([A-Za-z_.]+(?:\s+[A-Za-z_.]+){0,2})(?=\s|$)")
COUNTS_ARE = 'Counts are a mapping of names without blanks to whole numbers from 0, as in {"deleted": 2}'


class MistakeError(NeverRetryError):
    """What an author did wrong; the run's error tells the line."""


class EscapedError(Exception):
    """What a handler raised that is no Exception, described."""


def explain(error: BaseException, job: AnyJob) -> str:
    """Return what a handler raised, the innermost place of the author's code it came through, and the statement."""
    if isinstance(error, EscapedError):
        return str(error)
    if isinstance(error, BaseExceptionGroup):
        some = [explain(each, job) for each in error.exceptions[:MOST_OF_A_GROUP]]
        return f"{type(error).__name__} of {len(error.exceptions)}: {'; '.join(some)}"
    text = describe_error(error)
    if isinstance(error, SystemExit | KeyboardInterrupt):
        text += ". A handler does not end the process. To end its run for good, raise NeverRetryError"
    if isinstance(error, asyncpg.InterfaceError) and "released back to the pool" in text:
        text += ". Use it inside of its `async with`"
    if isinstance(error, asyncpg.UndefinedTableError | asyncpg.UndefinedColumnError):
        text += ". See what BON's database lacks with: bon-scheduler check"
    home = _home(job)
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _is_theirs(frame.f_code.co_filename, home)
    ]
    at = [f"at {shown(frames[-1][0].f_code.co_filename)}:{frames[-1][1]}"] if frames else []
    if (
        isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError)
        and (query := _query(error.__traceback__)) is not None
    ):
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
    words = FIRST_WORDS.match(query)
    # No more than words: what follows may be a value that somebody wrote into the text.
    called = f'"{" ".join(words[1].split())} …"' if words else "its statement"
    return f"in {f'line {line} of ' if line else ''}{called}"


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


def fault_of_counts(result: object) -> str | None:
    """Return why it is not what a handler may return and finish with: names, and whole numbers that a bigint holds."""
    if not isinstance(result, Mapping):
        return f"{'None' if result is None else f'something of type {type(result).__name__}'}. {COUNTS_ARE}"
    for name, number in result.items():
        if not isinstance(name, str):
            return f"a mapping that has a name of type {type(name).__name__}. {COUNTS_ARE}"
        if not 0 < len(name) <= LONGEST_NAME or not name.isprintable() or " " in name:
            return f"a mapping of which a name is empty, longer than {LONGEST_NAME} or has blanks. {COUNTS_ARE}"
        if not isinstance(number, int):
            return f'a mapping whose "{name}" is of type {type(number).__name__}. {COUNTS_ARE}'
        if not 0 <= number <= LARGEST_COUNT:
            return f'a mapping whose "{name}" is below 0 or beyond 64 bits. {COUNTS_ARE}'
    return None


def require_counts(counts: object) -> None:
    """Raise MistakeError where `ctx.finish` is given what is no counts."""
    if (fault := fault_of_counts(counts)) is not None:
        raise MistakeError(f"ctx.finish was not given counts, but {fault}.")


def require_job(job: object) -> None:
    """Raise MistakeError where a run is asked for of what is no job."""
    if not isinstance(job, Job):
        raise MistakeError(
            f"A run was asked for with something of type {type(job).__name__} in place of a job. "
            "Import the job, and give it as it is: ctx.enqueue(the_job, ThePayload(…), on=tx)."
        )


def require_request(job: AnyJob, payload: object) -> None:
    """Raise MistakeError where a run is asked for of what is no job, or with a payload that is not its own."""
    require_job(job)
    if not isinstance(payload, job.payload):
        given, its = type(payload).__name__, job.payload.__name__
        raise MistakeError(f'A run of "{job.name}" was asked for with a {given} as its payload. Give it a {its}.')


def require_transaction(connection: Connection) -> None:
    """Raise MistakeError where a handler has ended the transaction that it was given."""
    if not connection.is_closed() and not connection.is_in_transaction():
        raise MistakeError(
            "The handler has ended its transaction by a statement of its own. Take COMMIT or ROLLBACK out: it commits "
            "at the end of its `async with`, and rolls back when an exception leaves it."
        )
