"""Wrong calls, made in this process: status 2 and the remedy, before anything else is looked at."""

import logging
import sys
from collections.abc import Callable, Iterator

import pytest
import structlog

from bon_scheduler.cli.app import main

NOWHERE = "postgresql://bon@127.0.0.1:1/bon"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """Call the program with arguments, its environment beside them; return status, output and errors."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level

    def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bon-scheduler", *arguments])
        for name, value in {"DATABASE_URL": NOWHERE, "NO_COLOR": "1", **environ}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, " ".join(err.split())

    yield run
    root.handlers[:] = before
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["runs", "--since", "999999d"], '"999999d" is too long a span of time. The longest is 36500d.'),
        (["runs", "--since", "9" * 5000 + "d"], "is too long a span of time"),
        (["audit", "--since", "9999999d"], '"9999999d" is too long a span of time'),
        (["audit", "--since", "2999-01-01"], "--since 2999-01-01 is in the future"),
        (["audit", "--since", "0001-01-01"], "Give a year from 1900 to 2999"),
        (["enqueue", "generate-pdf", "--in", "9999999999d"], "is too long a span of time"),
        (["run-once", "overdue-detection", "--fire-time", "0001-01-01"], '"0001-01-01" is out of range.'),
        (["timeline", "--from", "9999-12-31"], '"9999-12-31" is out of range. Give a year from 1900 to 2999.'),
        (["timeline", "--from", "9999-12-31T23:00:00-05:00"], "is out of range"),
        (["enqueue", "generate-pdf", "--priority", "101"], "less than or equal to 100"),
        (["enqueue", "generate-pdf", "--payload", '{"a": ["x\\u0000"]}'], "holds the character \\u0000"),
        (["enqueue", "generate-pdf", "--payload", '{"\\\\\\u0000": 1}'], "holds the character \\u0000"),
        (["run-once", "overdue-digest", "--payload", '{"as_of": "\\u0000"}'], "holds the character \\u0000"),
        (["enqueue", "generate-pdf", "--payload", '{"a": "\\ud800"}'], "--payload is not JSON"),
        (["enqueue", "generate-pdf", "--payload", '{"a":' * 300 + "1" + "}" * 300], "Nest it less deeply"),
        (["enqueue", "generate-pdf", "--key", ""], "--key is empty"),
        (["enqueue", "generate-pdf", "--key", "ש" * 501], "--key has 1,002 bytes. Give at most 1,000"),
        (["enqueue", "generate-pdf", "--key", "\udcff"], "Argument 4 is not UTF-8"),
        (["pause", "draft-cleanup", "--reason", "\udcff"], "Argument 4 is not UTF-8"),
        (["migrate", "--sql", "--json"], "Leave one of them out"),
        (["demo", "--keep", "/proc/x"], '--keep "/proc/x" cannot be made a directory: No such file or directory.'),
        (["demo", "--keep", "/dev/null"], '--keep "/dev/null" cannot be made a directory: File exists.'),
    ],
)
def test_what_cannot_be_meant_or_kept_is_status_2_with_the_remedy(call: Call, arguments: list[str], says: str) -> None:
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert says in err
    assert "LOG_LEVEL=debug" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "--since", "36500d"],
        ["audit", "--since", "1900-01-01"],
        ["enqueue", "generate-pdf", "--in", " 5200w ", "--priority", "-100"],
        ["enqueue", "generate-pdf", "--payload", '{"a": "\\\\u0000"}', "--key", "ש" * 500],
    ],
)
def test_what_can_be_kept_goes_on_to_the_database(call: Call, arguments: list[str]) -> None:
    status, _, err = call(*arguments)
    assert status == 1
    assert "Cannot connect: the database bon at 127.0.0.1:1" in err


@pytest.mark.parametrize("start", ["1900-01-01", "2999-12-31"])
def test_a_timeline_may_begin_anywhere_in_range(call: Call, start: str) -> None:
    status, out, _ = call("timeline", "--from", start, "--days", "1", "--job", "draft-cleanup")
    assert status == 0
    assert "draft-cleanup" in out
