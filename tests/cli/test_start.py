"""The command line answers at once what needs no database."""

import os
import subprocess
import sys

import pytest

HEAVY = ("aiohttp", "aiosmtplib", "asyncpg", "babel", "handlers", "jinja2")
NOT_TO_READ = (
    "aiocron", "aiohttp", "aiosmtplib", "babel", "cryptography", "email_validator", "jinja2", "prometheus_client",
)  # fmt: skip
LOADED = """
import sys
sys.argv = ["bon-scheduler", *sys.argv[1:]]
from bon_scheduler.cli.app import main
try:
    main()
except SystemExit as end:
    print("status", end.code)
print("loaded", *(name for name in {names} if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], "0"),
        (["--version"], "0"),
        (["run-once", "--help"], "0"),
        (["no-such-command"], "2"),
        (["show"], "2"),
    ],
)
def test_help_and_wrong_calls_load_nothing_heavy(arguments: list[str], status: str) -> None:
    program = LOADED.format(names=HEAVY)
    ended = subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-2:] == [f"status {status}", "loaded"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["jobs"],
        ["runs"],
        ["timeline", "--days", "1"],
        ["audit"],
        ["runs", "--json"],
        ["show", "0000"],
        ["enqueue", "session-cleanup"],
    ],
)
def test_commands_that_work_on_nothing_load_no_mailer_no_shaam_client_no_babel(
    database_url: str, arguments: list[str]
) -> None:
    program = LOADED.format(names=NOT_TO_READ)
    environ = {**os.environ, "DATABASE_URL": database_url}
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True, env=environ
    )
    assert ended.stdout.splitlines()[-1] == "loaded", ended.stderr
