"""Reading what a person typed: every fault says what, which value and the remedy."""

import difflib
import getpass
import os
import re
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bon_scheduler import database, declared, ledger
from bon_scheduler.cli.usage import UsageError
from bon_scheduler.config import Settings
from bon_scheduler.database import UnreadableJsonError, read_json, require_endpoints, require_schema, write_json
from bon_scheduler.files import open_private_directory
from bon_scheduler.jobs import AnyJob, Connection, Payload, explain_payload
from bon_scheduler.report import show_controls

__all__ = [
    "BADLY",
    "DONE",
    "HELD",
    "UsageError",
    "find_job",
    "is_span",
    "make_directory",
    "parse_instant",
    "parse_span",
    "person",
    "private_directory",
    "read_key",
    "read_payload",
    "read_reason",
    "reading",
    "require_known",
    "type_payload",
]

DONE, BADLY, HELD = 0, 1, 3
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
SPAN = re.compile(r"\s*(\d+)([smhdw])\s*", re.ASCII)
LONGEST = timedelta(days=36500)
YEARS = range(1900, 3000)
"""Wide enough for any use; added to or taken from a span, still an instant for Python and for PostgreSQL."""
NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
MOST_LEVELS = 199
"""As the door bounds them: what is deeper not every program can hold."""
LONGEST_KEY_BYTES = 1000
"""PostgreSQL's index takes 2,700, of which the job's name needs some."""
NOBODYS = frozenset({"root", "node", "app", "nobody", "nonroot"})
"""Users' names that say nothing of who it is."""


def is_span(text: str) -> bool:
    """Whether the text is meant as a span of time, of whatever length."""
    return SPAN.fullmatch(text) is not None


def parse_span(text: str) -> timedelta:
    """Read `90s`, `10m`, `2h`, `7d` or `1w`."""
    match = SPAN.fullmatch(text)
    if not match:
        raise UsageError(f'"{text}" is not a span of time. Write a number and a unit: 90s, 10m, 2h, 7d, 1w.')
    try:
        span = timedelta(**{UNITS[match[2]]: int(match[1])})
    except (OverflowError, ValueError):
        span = timedelta.max
    if span > LONGEST:
        raise UsageError(f'"{text}" is too long a span of time. The longest is {LONGEST.days}d.')
    return span


def parse_instant(text: str, settings: Settings) -> datetime:
    """Read an ISO instant; one without an offset is meant in BON_TIMEZONE."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(
            f'"{text}" is not an instant. Write it as 2026-11-23T06:00 or 2026-11-23T06:00:00+02:00.'
        ) from error
    if instant.year not in YEARS:
        raise UsageError(f'"{text}" is out of range. Give a year from {YEARS[0]} to {YEARS[-1]}.')
    return (instant if instant.tzinfo else instant.replace(tzinfo=settings.bon_timezone)).astimezone(UTC)


def person(settings: Settings) -> str:
    """
    Return who asks, as a name: `OPERATOR`, else the user's, with the machine's where many are called so.

    In a container nobody in particular asks, and the machine's name is the pod's.
    """
    if settings.operator is not None and settings.operator.strip():
        return show_controls(settings.operator.strip())
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        return f"somebody on {socket.gethostname()}"
    return f"{user} on {socket.gethostname()}" if user in NOBODYS else user


def find_job(name: str) -> AnyJob:
    """Return the job of that name in this version; raises UsageError."""
    by_name = {job.name: job for job in declared.JOBS}
    if name in by_name:
        return by_name[name]
    for fault in (*declared.FAULTS, *declared.unlisted()):
        if name in fault.jobs:
            raise UsageError(f'Job "{name}" cannot be used. {fault}')
    raise UsageError(f'Unknown job "{name}".{_did_you_mean(name, list(by_name))}')


async def require_known(connection: Connection, name: str) -> None:
    """Raise UsageError for a job that neither this version nor the database knows."""
    known = [row["name"] for row in await ledger.job_overview(connection)]
    if name not in known:
        ours = [job.name for job in declared.JOBS]
        raise UsageError(f'Unknown job "{name}".{_did_you_mean(name, [*known, *ours])}')


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    guess = f' Did you mean "{close[0]}"?' if close else ""
    return f"{guess} List them with: bon-scheduler jobs"


def read_reason(text: str) -> str:
    """Read why an operator acts; raises UsageError when nothing is said."""
    if not text.strip():
        raise UsageError("--reason is empty. Say why: it is recorded, and shown by `show`, `jobs` and `audit`.")
    return text.strip()


def read_payload(text: str) -> dict[str, Any]:
    """Read a JSON object; raises UsageError."""
    try:
        value = read_json(text)
    except UnreadableJsonError as error:
        raise UsageError(f'--payload is not JSON: {error}. Write it as \'{{"key": "value"}}\'.') from error
    if not isinstance(value, dict):
        raise UsageError(f"--payload must be a JSON object, not {type(value).__name__}. Write {{}} for none.")
    if (levels := _levels(value)) > MOST_LEVELS:
        raise UsageError(f"--payload is nested {levels} levels deep. Nest it less deeply, {MOST_LEVELS} at most.")
    if NUL.search(write_json(value)):
        raise UsageError("--payload holds the character \\u0000, which PostgreSQL cannot store. Leave it out.")
    return value


def _levels(value: object) -> int:
    """Return how deeply a value is nested, without recursion."""
    levels, inside = 0, [value]
    while inside:
        levels += 1
        inside = [
            inner
            for outer in inside
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return levels


def read_key(text: str) -> str:
    """Read a key that at most one run may hold; raises UsageError."""
    if not text:
        raise UsageError("--key is empty. Give the key that at most one run may hold, or leave --key out.")
    if (size := len(text.encode())) > LONGEST_KEY_BYTES:
        raise UsageError(f"--key has {size:,} bytes. Give at most {LONGEST_KEY_BYTES:,}; a hash of it, for example.")
    return text


def make_directory(option: str, path: Path) -> Path:
    """Return a directory that files can be written to, made if it is not there; raises UsageError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        usable = os.access(path, os.W_OK | os.X_OK)
    except OSError as error:
        raise UsageError(f'{option} "{path}" cannot be made a directory: {error.strerror}. Give another.') from error
    if not usable:
        raise UsageError(f'{option} "{path}" cannot be written to. Give another.')
    return path


@contextmanager
def private_directory(option: str, path: Path) -> Iterator[int]:
    """Open a directory in which nobody else may write, made if it is not there; raises UsageError."""
    remedy = "Give another, or one that is not there yet."
    try:
        descriptor = open_private_directory(path)
    except ValueError as error:
        raise UsageError(f'{option} "{path}" {error}, and what is written there is for you alone. {remedy}') from error
    except OSError as error:
        raise UsageError(
            f'{option} "{path}" cannot be used: {error.strerror}. Links are not followed. {remedy}'
        ) from error
    try:
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=descriptor):
            raise UsageError(f'{option} "{path}" cannot be written to. {remedy}')
        yield descriptor
    finally:
        os.close(descriptor)


def type_payload(job: AnyJob, value: Mapping[str, Any]) -> Payload:
    """Return the payload as the job takes it; raises UsageError."""
    try:
        payload: Payload = job.payload.model_validate(value)
    except ValidationError as error:
        raise UsageError(explain_payload(job, error)) from error
    return payload


@asynccontextmanager
async def reading(settings: Settings) -> AsyncIterator[Connection]:
    """Borrow a connection to a database whose schema is there."""
    await require_endpoints(settings)
    async with database.open_pool(settings) as pool, pool.acquire() as connection:
        await require_schema(connection)
        yield connection
