"""
JSON as PostgreSQL has it: numbers stay exact, or are refused; never rounded.

`jsonb` takes whole numbers of any length, and nests deeper than any reader. orjson, which is used elsewhere, makes
floats of whole numbers over 64 bits.
"""

import json
import math
from typing import Any

import orjson

__all__ = ["UnreadableJsonError", "read_json", "write_json"]


class UnreadableJsonError(ValueError):
    """A text is no JSON that a program can hold; the message says why, and quotes nothing of it."""


def read_json(text: str) -> Any:  # noqa: ANN401 - whatever the text holds
    """Read JSON; raises UnreadableJsonError."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_refuse)
        if "\\u" in text:
            write_json(value)  # half a character is none
    except RecursionError:
        raise UnreadableJsonError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise UnreadableJsonError(f"{error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        raise UnreadableJsonError(_reason(error)) from None
    return value


def write_json(value: object) -> str:
    """Write JSON; raises UnreadableJsonError for what has none."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        pass
    try:
        # Whole numbers over 64 bits.
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, default=str)
        text.encode()
    except (RecursionError, ValueError, TypeError) as error:
        raise UnreadableJsonError(_reason(error)) from None
    return text


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise UnreadableJsonError("it holds a number that is too large")
    return number


def _refuse(name: str) -> float:
    raise UnreadableJsonError(f"{name} is no JSON")


def _reason(error: Exception) -> str:
    if isinstance(error, UnreadableJsonError):
        return str(error)
    if isinstance(error, UnicodeEncodeError):
        return "it holds half a character"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return (
        "it holds a number that is too large"
        if "digits" in str(error)
        else f"it cannot be held ({type(error).__name__})"
    )
