"""What is logged and said of an error."""

import asyncio
import base64
import errno
import html
import io
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import asyncpg
import pytest
import structlog

from bon_scheduler.config import LogFormat, LogLevel
from bon_scheduler.log import configure_logging, describe_error, withhold


def test_an_error_of_the_system_is_told_in_its_words_without_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        (tmp_path / "a-customers-name").read_text()
    assert describe_error(caught.value) == "FileNotFoundError: No such file or directory"


async def test_a_host_that_is_not_known_is_told_so() -> None:
    with pytest.raises(socket.gaierror) as caught:
        await asyncio.open_connection("nowhere.invalid", 1)
    assert describe_error(caught.value).startswith("gaierror: ")
    assert "-" not in describe_error(caught.value)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("no number, only words"), "OSError: no number, only words"),
        (OSError(errno.EIO, "at dana@bon.example"), "OSError: at [address]"),
        (OSError(), "OSError"),
        (TimeoutError(), "TimeoutError"),
        (BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)), "BrokenPipeError: Broken pipe"),
        (asyncpg.PostgresError("first line\nDETAIL: a row"), "PostgresError: first line"),
        (ValueError("postgresql://bon:s3cret@h/bon"), "ValueError: postgresql://[credentials]@h/bon"),
    ],
)
def test_an_error_is_told_in_one_line_without_what_is_private(error: Exception, told: str) -> None:
    assert describe_error(error) == told


NASTY = "a\x1b]0;title\x07\x9b2J\u202eb\u2028c\nrun.failed d\ud800"


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """What is logged for people from here on; call it to read."""
    written, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", written)
    configure_logging(LogLevel.DEBUG, LogFormat.CONSOLE)
    yield written.getvalue
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.parametrize("way", ["a value", "an event", "another library", "in a list", "an error"])
def test_the_console_shows_what_a_text_holds_and_does_not_obey_it(console: Callable[[], str], way: str) -> None:
    log = structlog.get_logger()
    match way:
        case "a value":
            log.warning("run.refused", reason=NASTY)
        case "an event":
            log.warning(NASTY)
        case "another library":
            logging.getLogger("other").warning("said %s", NASTY[:-1])  # pytest keeps what it says, and takes no halves
        case "in a list":
            log.warning("run.refused", reasons=[NASTY])
        case "an error":
            log.warning("run.refused", exc_info=ValueError(NASTY))
    told = console()
    assert not [c for c in told if not c.isprintable() and c != "\n"]
    assert "\\x1b]0;title" in told
    assert len(told.splitlines()) == 1 or way == "an error"


def test_json_is_exact_whatever_a_text_holds(logged: Callable[[], str]) -> None:
    structlog.get_logger().info("run.refused", reason=NASTY, number=2**70, more=["\ud800"])
    structlog.get_logger().info("run.refused", reason=NASTY[:-1])
    assert logged().replace("\n", "").isprintable()
    first, second = map(json.loads, logged().splitlines())
    assert (first["reason"], first["number"], first["more"]) == (NASTY, 2**70, ["\ud800"])
    assert second["reason"] == NASTY[:-1]


@pytest.mark.parametrize("secret", ["s3cret", "Pa55/w\u00f6rd+ &=", "x" * 30_000])
@pytest.mark.parametrize(
    "form",
    [
        str,
        str.upper,
        quote,
        quote_plus,
        lambda s: quote(s, safe=""),
        lambda s: json.dumps(s)[1:-1],
        html.escape,
        lambda s: s.encode().hex(),
        lambda s: base64.b64encode(s.encode()).decode(),
        lambda s: base64.urlsafe_b64encode(s.encode()).decode().rstrip("="),
        lambda s: base64.b64encode(f"client-id:{s}".encode()).decode(),
        lambda s: base64.b64encode(f"client+id:{quote_plus(s)}".encode()).decode(),
        lambda s: base64.b64encode(f"\0user\0{s}\0".encode()).decode(),
        lambda s: base64.b64encode(f"{s}:s3cond".encode()).decode(),
    ],
)
def test_no_form_of_a_secret_is_kept(secret: str, form: Callable[[str], str]) -> None:
    told = withhold(f"rejected: {form(secret)} at 10:00", [secret, ""])
    assert told == "rejected: [redacted] at 10:00"


def test_cutting_out_secrets_takes_what_a_text_is_long() -> None:
    before = time.process_time()
    for text in ("y" * 29_999 + "z" + "y" * 29_999, "s3cret" * 10_000, "s3cret " * 10_000, "\u05d0" * 65_000):
        withhold(text, ["s3cret", "y" * 30_000, "client"])
    assert time.process_time() - before < 2


def test_a_librarys_traceback_is_its_error_and_where_it_was_raised(
    logged: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    del logged  # which puts the loggers back
    configure_logging(LogLevel.INFO, LogFormat.JSON)
    try:
        json.loads("{" * 500)
    except ValueError as error:
        logging.getLogger("a.library").exception("could not read", exc_info=error)
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert "exception" not in line
    assert line["error"].startswith("JSONDecodeError: Expecting property name")
    assert 1 <= len(line["where"]) <= 3
    assert len(json.dumps(line)) < 1000
