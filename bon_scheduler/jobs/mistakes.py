"""
What may be wrong in a job's declaration, told with the file, the line and the remedy.

Checked when `@job` is executed, so that a mistake is found before anything runs and never by a run.
"""

import functools
import inspect
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import CodeType

__all__ = [
    "JobDeclarationError",
    "code_of",
    "declared_at",
    "faults_of_function",
    "faults_of_name",
    "faults_of_options",
    "payload_of",
    "shown",
]

NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
LONGEST_NAME = 100
LONGEST_SHOWN = 60
MOST_TIMES = 1_000_000
"""Attempts, and runs at once: the ledger keeps them as 32-bit integers."""
LARGEST_FACTOR = 1000
SHORTEST_GRACE = timedelta(seconds=1)
"""Every fire time is noticed some milliseconds late."""
LONGEST_SPAN = timedelta(days=366)
"""What is longer is meant otherwise, and leads beyond the calendars of Python and PostgreSQL."""
SIGNATURE = "async def {name}(ctx: JobContext, payload: NoPayload) -> Counts"


class JobDeclarationError(Exception):
    """A job that cannot be used as it is declared. `at` is file and line; `job` its name, where that can be read."""

    def __init__(self, at: str, job: str | None, faults: list[str]) -> None:
        whose = f'job "{job}": ' if job else ""
        super().__init__(f"{at}: {whose}{' '.join(faults)}")
        self.at, self.job, self.faults = at, job, tuple(faults)


def shown(path: str) -> str:
    """Return a file's name as an author types it: below the working directory without that."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def code_of(handler: object) -> CodeType | None:
    """Return the code that a handler executes; None of what is no Python function."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    function = inspect.unwrap(handler) if callable(handler) else handler
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None and callable(function) and not isinstance(function, type):
        code = getattr(type(function).__call__, "__code__", None)
    return code if isinstance(code, CodeType) else None


def declared_at(handler: object) -> str:
    """Return the file and line of a handler."""
    code = code_of(handler)
    if code is None:
        return getattr(handler, "__module__", None) or type(handler).__name__
    return f"{shown(code.co_filename)}:{code.co_firstlineno}"


def faults_of_name(name: object) -> Iterator[str]:
    """Yield what is wrong with a job's name, with the remedy."""
    if not isinstance(name, str):
        yield f'Its name is {_kind(name)}. Give a text first: @job("its-name").'
    elif len(name) > LONGEST_NAME or not NAME.fullmatch(name):
        words = "-".join(re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()))
        better = words[:LONGEST_NAME].strip("-")
        hint = f', as in "{better}"' if NAME.fullmatch(better) else ""
        most = f"{LONGEST_NAME} characters at most"
        yield f"Its name is not usable. Write lower-case words joined by hyphens, {most}{hint}."


def faults_of_options(options: Mapping[str, object], kinds: Mapping[str, type]) -> Iterator[str]:
    """
    Yield what is wrong with the arguments of `@job`, with the remedies.

    `kinds` are the classes that `schedule`, `catch_up`, `retry` and `exclusive` are made of.
    """
    schedule, retry, exclusive = options["schedule"], options["retry"], options["exclusive"]
    if schedule is not None and not isinstance(schedule, kinds["schedule"]):
        text = repr(schedule)[:LONGEST_SHOWN] if isinstance(schedule, str) else '"0 6 * * *"'
        yield f"Its schedule is {_kind(schedule)}. Write schedule=Cron({text})."
    elif schedule is not None:
        yield from _faults_of_cron(schedule, kinds["catch_up"])
    if retry is not None and not isinstance(retry, kinds["retry"]):
        number = retry if isinstance(retry, int) and retry > 1 else 3
        yield f"Its retry is {_kind(retry)}. Write retry=Retry(attempts={number})."
    elif retry is not None:
        yield from _faults_of_retry(retry)
    if exclusive is not None and not isinstance(exclusive, kinds["exclusive"]):
        yield f"Its exclusive is {_kind(exclusive)}. Write exclusive=Exclusive.JOB, .BUSINESS or .NO."
    yield from _faults_of_span("timeout", options["timeout"])
    for name in ("at_once", "at_once_here"):
        limit = options[name]
        if limit is not None and not _is_number(limit):
            yield f"Its {name} is {_kind(limit)}. Give a whole number from 1 to {MOST_TIMES:,}, or leave it out."
        elif isinstance(limit, int) and limit > 1 and exclusive == "job":
            yield f"Its {name} is {limit}, and exclusive=Exclusive.JOB allows one run at a time. Leave one of them out."
    if not isinstance(options["sends_mail"], bool):
        yield f"Its sends_mail is {_kind(options['sends_mail'])}. Give True or False."


def _faults_of_cron(schedule: typing.Any, catch_up: type) -> Iterator[str]:  # noqa: ANN401 - read attribute by attribute
    if not isinstance(schedule.expression, str):
        yield f'The expression of its Cron is {_kind(schedule.expression)}. Write Cron("0 6 * * *").'
    if not isinstance(schedule.catch_up, catch_up):
        yield f"The catch_up of its Cron is {_kind(schedule.catch_up)}. Write CatchUp.LATEST, .ALL or .SKIP."
    told = list(_faults_of_span("grace", schedule.grace, of=" of its Cron"))
    if not told and schedule.grace < SHORTEST_GRACE:
        told = [
            f"The grace of its Cron is {schedule.grace}, and each fire time is noticed later. Give a second or more."
        ]
    yield from told


def _faults_of_retry(retry: typing.Any) -> Iterator[str]:  # noqa: ANN401 - read attribute by attribute
    if not _is_number(retry.attempts):
        yield f"The attempts of its Retry are {_kind(retry.attempts)}. Give a whole number from 1 to {MOST_TIMES:,}."
    factor = retry.factor if isinstance(retry.factor, int | float) and not isinstance(retry.factor, bool) else math.nan
    if not 1 <= factor <= LARGEST_FACTOR:  # nan is neither
        yield f"The factor of its Retry is {_kind(retry.factor)}. Give a number from 1 to {LARGEST_FACTOR}."
    spans = {"delay": retry.delay, "longest": retry.longest}
    told = [
        fault for name, span in spans.items() for fault in _faults_of_span(name, span, of=" of its Retry", zero=True)
    ]
    yield from told
    if not told and retry.delay > retry.longest:
        yield (
            f"The delay of its Retry is {retry.delay}, and no wait is longer than its longest, {retry.longest}. "
            "Give longest=timedelta(…) too, not below the delay."
        )


def _faults_of_span(name: str, span: object, *, of: str = "", zero: bool = False) -> Iterator[str]:
    whose = f"The {name}{of}" if of else f"Its {name}"
    if not isinstance(span, timedelta):
        yield f"{whose} is {_kind(span)}. Write {name}=timedelta(minutes=10), for example."
    elif span < timedelta(0) or (not span and not zero):
        yield f"{whose} is {span}. Give a longer one."
    elif span > LONGEST_SPAN:
        yield f"{whose} is {span}. Give {LONGEST_SPAN.days} days at most."


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_TIMES


def faults_of_function(handler: object, payload_class: type) -> Iterator[str]:
    """Yield what is wrong with a handler itself: no coroutine function, parameters that nobody can fill."""
    if not callable(handler) or isinstance(handler, type):
        yield f"It decorates {_kind(handler)}. Put @job above an async def."
        return
    name = getattr(handler, "__name__", type(handler).__name__)
    called = handler if code_of(handler) is None or inspect.isroutine(handler) else type(handler).__call__
    function = handler.func if isinstance(handler, functools.partial) else called
    if inspect.isasyncgenfunction(function):
        yield f"{name} has a yield, so that it returns no counts. Take the yield out."
    elif not inspect.iscoroutinefunction(function):
        yield f'{name} is no coroutine function. Write "async def {name}" instead of "def {name}".'
    yield from _faults_of_parameters(handler, name, payload_class)


def _faults_of_parameters(handler: Callable[..., object], name: str, payload_class: type) -> Iterator[str]:
    wanted = f"Write {SIGNATURE.format(name=name)}."
    parameters = list(inspect.signature(handler).parameters.values())
    given = [each for each in parameters if each.kind in {each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD}]
    more = [
        each.name
        for each in parameters
        if each.default is each.empty and (each in given[2:] or each.kind is each.KEYWORD_ONLY)
    ]
    if len(given) < 2 or more:  # noqa: PLR2004 - a context and a payload
        count = len(given) + sum(each not in given for each in parameters if each.name in more)
        yield f"{name} takes {count} parameter{'' if count == 1 else 's'} instead of two. {wanted}"
        return
    try:
        hints = _read_hints(handler)
    except (NameError, TypeError, SyntaxError, AttributeError) as error:
        why = f'"{error.name}" is not defined' if isinstance(error, NameError) else str(error)
        yield f"The annotations of {name} cannot be read: {why}. Import it in this file, not under TYPE_CHECKING."
        return
    first, second = (hints.get(each.name) for each in given[:2])
    if isinstance(first, type) and issubclass(first, payload_class):
        yield f"The parameters of {name} are swapped. The context comes first: {wanted[6:]}"
    elif second is None:
        remedy = "Annotate it with NoPayload or with a class made of Payload."
        yield f'Nothing says what "{given[1].name}" of {name} is. {remedy}'
    elif not (isinstance(second, type) and issubclass(second, payload_class)):
        told = second.__name__ if isinstance(second, type) else str(second)
        yield (
            f'"{given[1].name}" of {name} is {told}, which is no Payload. Annotate it with NoPayload or with a class '
            "made of Payload, as in: class Greeting(Payload): name: str."
        )
    if hints.get("return") is type(None):
        yield f'{name} says that it returns None. Return counts, as in {{"deleted": 2}}, and write -> Counts.'


def _kind(value: object) -> str:
    """Return what a wrong argument is, in words: a small number as it is, otherwise its type."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)[:LONGEST_SHOWN]
    if inspect.isroutine(value):
        return "a function"
    return {"str": "a text"}.get(type(value).__name__, f"of type {type(value).__name__}")


def _read_hints(handler: Callable[..., object]) -> dict[str, typing.Any]:
    while isinstance(handler, functools.partial):
        handler = handler.func
    return typing.get_type_hints(inspect.unwrap(handler) if inspect.isroutine(handler) else type(handler).__call__)


def payload_of(handler: Callable[..., object]) -> typing.Any:  # noqa: ANN401 - checked by `faults_of_function`
    """Return what the second parameter of a handler is declared to be."""
    return _read_hints(handler)[list(inspect.signature(handler).parameters)[1]]
