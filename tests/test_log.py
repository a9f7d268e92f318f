"""What is logged and said of an error."""

import asyncio
import errno
import os
import socket
from pathlib import Path

import asyncpg
import pytest

from bon_scheduler.log import describe_error


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
