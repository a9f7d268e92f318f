"""
Structured logs on standard error: JSON for machines, colours for people.

The runner binds `job, run_id, attempt, fire_time` once and every line of an
attempt carries them. Fields that could hold a secret, an address or a person's
name are blanked whatever a caller passes, and addresses inside texts are masked.
"""

import asyncio
import base64
import binascii
import errno
import html
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import FrameType
from typing import Any, cast
from urllib.parse import quote, quote_plus

import asyncpg
import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

from bon_scheduler.config import LogFormat, LogLevel

__all__ = [
    "configure_logging",
    "cut",
    "describe_error",
    "frames_now",
    "is_out_of_descriptors",
    "mask",
    "silence_logging",
    "where",
    "withhold",
]

_SENSITIVE = re.compile(r"token|secret|password|authorization|email|recipient|address|customer|url|dsn", re.IGNORECASE)
_ADDRESS = re.compile(r"[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[\w-]{1,63}")
"""Bounded, as RFC 5321 §4.5.3.1 bounds addresses: a pattern without bounds takes the square of a long word's length."""
_QUOTED = re.compile(r"""(["']).*\1""")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]{1,1024}@")
_UNSEEN = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Controls, ends of lines and marks of direction that JSON may hold as they are: a terminal would obey them."""
LONGEST_VALUE = 2_000
"""Of a field of a log line, in characters."""
LONGEST_LINE = 16_000
MARGIN = 400
"""An address that a cut would leave in halves is shorter."""
REDACTED = "[redacted]"
_IN_BASE64 = frozenset("abcdefghijklmnopqrstuvwxyz0123456789+/=_-")
"""In lower case."""
_SHORTEST_PART = 6
"""Of a base64 text inside a longer one, in characters: a shorter one stands in words by chance."""
FRAMES_OF_LIBRARIES = 3
_TYPE = r"'?[\w.]{1,60}'?"
_TYPES = re.compile(
    rf"\((?:expected [A-Za-z_.,\[\] ]{{1,80}}, got {_TYPE}|{_TYPE} object has no attribute '\w{{1,40}}'"
    rf"|{_TYPE} object cannot be interpreted as an integer|must be real number, not {_TYPE}"
    rf"|(?:an integer|a boolean|a sized iterable container|a list or tuple)[a-z ]{{0,40}} ?\(?got type {_TYPE}\)?"
    rf"|a bytes-like object is required, not {_TYPE}|value out of (?:u?int|float)\d\d range)\)\Z"
)
"""What asyncpg says of the types of a parameter, after its value, in the only forms that hold no value."""
_NO_DATE = re.compile(rf"({_TYPE}) object has no attribute 'toordinal'")
FRAMES = ("cr_frame", "gi_frame", "ag_frame")
AWAITED = ("cr_await", "gi_yieldfrom", "ag_await")
_OF_SEVERAL_LINES = frozenset({"exception", "stack"})
_LEVELS = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}


def cut(text: str, longest: int = LONGEST_VALUE) -> str:
    """Return a text of somebody else's, cut to a length BEFORE anything looks at it; never in the middle of a word."""
    if len(text) <= longest:
        return text
    kept = text[:longest]
    last_word = re.split(r"\s", kept[-MARGIN:])[-1]
    return f"{kept[: longest - len(last_word)]}… ({len(text):,} characters)"


def mask(text: str) -> str:
    """Blank e-mail addresses and the credentials of URLs inside a text."""
    if "@" not in text:
        return text
    return _ADDRESS.sub("[address]", _CREDENTIALS.sub("[credentials]@", text))


def withhold(text: str, secrets: Iterable[str]) -> str:
    """
    Return the text with each of our secrets cut out, in every form in which it travels.

    The forms: as it is, percent-encoded, escaped for JSON and HTML, in hexadecimal, and in base64, alone or
    anywhere inside a longer text (`user:password` of HTTP Basic, AUTH PLAIN, AUTH LOGIN). Whatever the case.
    """
    folded = "".join(map(_fold, text))
    found = sorted(span for secret in secrets if secret for form in _forms(secret) for span in _spans(form, folded))
    kept, end = [], 0
    for start, stop in found:
        if stop > end:
            kept += [text[end : max(start, end)], REDACTED]
            end = stop
    return "".join([*kept, text[end:]])


def _fold(character: str) -> str:
    lower = character.lower()
    return lower if len(lower) == 1 else character


def _spans(form: str, folded: str) -> Iterator[tuple[int, int]]:
    """Return where a form stands, with the rest of the word: of base64 the rest would tell its first and last bits."""
    form, end = "".join(map(_fold, form)), 0
    while (start := folded.find(form, end)) >= 0:
        first, end = start, start + len(form)
        while first > 0 and folded[first - 1] in _IN_BASE64:
            first -= 1
        while end < len(folded) and folded[end] in _IN_BASE64:
            end += 1
        yield first, end


def _forms(secret: str) -> set[str]:
    encoded = secret.encode("utf-8", "surrogatepass")
    escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], html.escape(secret)}
    # RFC 6749 §2.3.1 has id and secret percent-encoded BEFORE they are joined and put in base64.
    percent = {quote(encoded), quote(encoded, safe=""), quote_plus(encoded)}
    in_base64 = {form for text in {secret, *percent} for form in _base64(text.encode("utf-8", "surrogatepass"))}
    return (
        {secret, html.escape(secret, quote=False), binascii.hexlify(encoded).decode()} | escaped | percent | in_base64
    )


def _base64(encoded: bytes) -> set[str]:
    """Return the base64 of a text, and what of it is the same whatever stands before and after the text."""
    whole = base64.b64encode(encoded).decode().rstrip("=")
    parts = []
    for before in range(3):
        text = base64.b64encode(b"\0" * before + encoded).decode()
        # Characters that also carry bits of what stands before or after are left out.
        parts.append(text[(before * 8 + 5) // 6 : (before + len(encoded)) * 8 // 6])
    found = {whole, *(part for part in parts if len(part) >= _SHORTEST_PART)}
    return found | {text.replace("+", "-").replace("/", "_") for text in found}


@lru_cache(maxsize=1024)
def _is_sensitive(key: str) -> bool:
    return _SENSITIVE.search(key) is not None


def _redact(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if _is_sensitive(key):
            event[key] = "[redacted]"
        elif isinstance(value, str):
            event[key] = mask(cut(value))
    return event


def _shorten_traceback(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Put the error and its innermost frames in place of a library's traceback, which takes kilobytes."""
    raised = event.pop("exc_info", None)
    error = raised[1] if isinstance(raised, tuple) else raised
    if isinstance(error, BaseException):
        event["error"], event["where"] = describe_error(error), where(error)[-FRAMES_OF_LIBRARIES:]
    return event


def _to_json(event: Any, **_: Any) -> str:  # noqa: ANN401 - structlog's serializer protocol
    try:
        line = orjson.dumps(event, default=str).decode()
    except TypeError:  # half a character, or a number of more than 64 bits
        line = json.dumps(event, default=str)
    line = _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
    if len(line) <= LONGEST_LINE:
        return line
    kept = {name: event[name] for name in ("timestamp", "level", "event", "job", "run_id", "attempt") if name in event}
    return orjson.dumps({**kept, "cut_from_characters": len(line)}, default=str).decode()


def _show(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Write controls out: a terminal is to show what a text holds, and no value is to begin a line of its own."""
    from bon_scheduler.report import show_controls  # noqa: PLC0415 - JSON needs none of it, and rich takes long to load

    for key, value in event.items():
        if isinstance(value, str):
            shown = show_controls(value)
            event[key] = shown if key in _OF_SEVERAL_LINES else shown.replace("\n", "\\n")
    return event


def configure_logging(level: LogLevel, style: LogFormat) -> None:
    """Send structlog and the standard library's loggers to standard error, redacted."""
    rendering: list[structlog.typing.Processor]
    if style is LogFormat.JSON:
        rendering = [structlog.processors.JSONRenderer(serializer=_to_json)]
    else:
        rendering = [_show, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _redact,
    ]
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        # Straight to the stream: by way of the standard library's loggers a line costs twice as much.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    foreign = shared if level is LogLevel.DEBUG else [_shorten_traceback, *shared]
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=foreign,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[level])
    # Libraries that log every request or every retry of their own: the ledger says it once.
    for name in ("aiohttp.access", "aiosmtplib", "asyncio", "mail.log"):
        logging.getLogger(name).setLevel(max(logging.WARNING, _LEVELS[level]))
    # It warns of each connection that it cannot make while the database is away, which `Outage` reports.
    logging.getLogger("asyncpg").setLevel(logging.DEBUG if level is LogLevel.DEBUG else logging.ERROR)


def silence_logging() -> None:
    """Have nothing logged: a person at a terminal is shown progress and a result instead."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.getLogger().setLevel(logging.CRITICAL)


def describe_error(error: BaseException) -> str:
    """
    Return an exception's type and first line, masked, as any text column and any log takes it.

    PostgreSQL's DETAIL is left out: it quotes whole rows, names and addresses included. So are the values in what
    it says of unusable data, and the file of an OSError, whose first argument is a number.
    """
    told = error.strerror if isinstance(error, OSError) else None
    first = cut(str(told or (error.args[0] if error.args else error))).strip().partition("\n")[0]
    if isinstance(error, asyncpg.DataError):
        types = _TYPES.search(str(error))
        kinds = _NO_DATE.sub(r"expected a date, got \1", types[0]) if types else ""
        first = f"{_QUOTED.sub('…', first.partition(': ')[0])} {kinds}".rstrip()
    name = type(error).__name__
    text = mask(f"{name}: {first}" if first else name)[:500]
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def is_out_of_descriptors(error: BaseException | None) -> bool:
    """Say whether an exception comes of this process, or this machine, having no file descriptor left."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
            return True
        error = error.__cause__ or error.__context__
    return False


def where(error: BaseException) -> list[str]:
    """Return the frames an exception came through, innermost last, without any values."""
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)][
        -12:
    ]


def where_now(task: "asyncio.Task[object]") -> list[str]:
    """Return the frames a task waits in, innermost last, without any values."""
    return [f"{f.f_code.co_filename}:{f.f_lineno} {f.f_code.co_name}" for f in frames_now(task)][-12:]


def frames_now(task: "asyncio.Task[object]") -> list[FrameType]:
    """Return the frames a task waits in, innermost last. The task's own stack holds the outermost only."""
    frames, awaited = [], cast("Any", task.get_coro())
    while awaited is not None:
        frame = next((f for name in FRAMES if (f := getattr(awaited, name, None)) is not None), None)
        if frame is not None:
            frames.append(frame)
        awaited = next((a for name in AWAITED if (a := getattr(awaited, name, None)) is not None), None)
    return frames
