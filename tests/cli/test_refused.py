"""A role that lacks privileges is named by every command, with the way to the GRANT lines that it lacks."""

from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest

from tests.conftest import Connection
from tests.process import run_command
from tests.roles import Role, limited_role

ID = "019ca98d-0000-4000-8000-000000000001"
COMMANDS = [
    ["serve"],
    ["run-once", "session-cleanup"],
    ["run-once", "session-cleanup", "--dry-run"],
    ["rehearse"],
    ["jobs"],
    ["timeline"],
    ["enqueue", "generate-pdf"],
    ["runs"],
    ["runs", "--business", ID],
    ["show", ID],
    ["show", ID, "--rows"],
    ["history", "--business", ID],
    ["audit"],
    ["pause", "session-cleanup", "--reason", "x"],
    ["resume", "session-cleanup", "--reason", "x"],
    ["resend", ID, "--reason", "x"],
    ["retry", ID, "--reason", "x"],
    ["cancel", ID, "--reason", "x"],
    ["release", ID, "--reason", "x"],
    ["adopt", "--reason", "x"],
]


@pytest.fixture
async def nobody(connection: Connection, database_url: str) -> AsyncIterator[Role]:
    """A role that may log in, and nothing else."""
    async with limited_role(connection, database_url, ours=False) as role:
        await connection.execute(f"revoke usage on schema public, bon_scheduler from {role.name}")
        yield role


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.samples(3)
async def test_a_role_without_privileges_is_named_and_led_to_its_grant_lines(nobody: Role, command: list[str]) -> None:
    refused = await run_command(*command, DATABASE_URL=nobody.url, HEALTH_PORT="0", HEALTH_HOST="127.0.0.1")
    assert (refused.status, refused.out) == (1, "")
    said = refused.err.splitlines()[-1]
    database = urlsplit(nobody.url).path.removeprefix("/")
    assert f"Role {nobody.name} lacks a privilege in database {database}: permission denied for schema" in said
    assert "The GRANT lines for it are printed by: " in said
    assert said.endswith(" check")


async def test_what_check_prints_lets_the_commands_work(connection: Connection, nobody: Role) -> None:
    document = (await run_command("check", "--json", DATABASE_URL=nobody.url)).document
    remedies = [each["remedy"] or "" for each in document["findings"]]
    grants = [line for line in remedies if line.startswith("grant ")]
    assert f"grant usage on schema bon_scheduler to {nobody.name};" in grants
    for line in grants:
        await connection.execute(line)
    for command in (["runs"], ["jobs"], ["run-once", "session-cleanup"]):
        assert (await run_command(*command, DATABASE_URL=nobody.url)).status == 0


async def test_who_may_not_migrate_is_told_who_may(nobody: Role, connection: Connection) -> None:
    owner = await connection.fetchval("select quote_ident(current_user)")
    await connection.execute("update bon_scheduler.functions set hash = '' where name = 'is_alive'")
    await connection.execute(f"grant usage on schema bon_scheduler to {nobody.name}")
    refused = await run_command("migrate", DATABASE_URL=nobody.url)
    assert refused.status == 1
    assert f"Role {nobody.name} may not migrate in database " in refused.err
    assert f"Migrate as role {owner}, which owns schema bon_scheduler." in refused.err
    await connection.execute("drop schema bon_scheduler cascade")
    empty = await run_command("migrate", DATABASE_URL=nobody.url)
    assert f"grant create on database {urlsplit(nobody.url).path.removeprefix('/')} to {nobody.name};" in empty.err
