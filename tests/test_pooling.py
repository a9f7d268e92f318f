"""The service behind a real PgBouncer: works with DATABASE_LISTEN_URL, and is refused without it."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest

from bon_scheduler import Counts, JobContext, NoPayload, db, job, service
from bon_scheduler.db import PoolerError
from tests.conftest import Connection, MakeSettings
from tests.process import run_command
from tests.waiting import until

pytestmark = pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="needs pgbouncer (Debian: pgbouncer)")

AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups") if os.geteuid() == 0 else ()
# Servers in turn: what needs to meet on the same one does so only where something keeps it together.
CONFIGURATION = """
[databases]
* = host={host} port={port} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own_port}
auth_type = any
pool_mode = {mode}
server_round_robin = 1
default_pool_size = 8
min_pool_size = 4
unix_socket_dir =
{more}
"""
TOLERANT = "ignore_startup_parameters = idle_in_transaction_session_timeout,client_connection_check_interval"


@contextmanager
def pgbouncer(directory: Path, url: str, *, mode: str = "transaction", more: str = "") -> Iterator[str]:
    """Run a pooler in front of the database; yield the address through it."""
    target = urlsplit(url)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        own_port = probe.getsockname()[1]
    configuration = directory / "pgbouncer.ini"
    text = CONFIGURATION.format(
        host=target.hostname, port=target.port, user=target.username, own_port=own_port, mode=mode, more=more
    )
    configuration.write_text(text)
    # Read on a descriptor: the pooler's own user may not enter the test's directory.
    with configuration.open() as readable:
        os.set_inheritable(readable.fileno(), True)
        command = [*AS_NOBODY, "pgbouncer", "-q", f"/proc/self/fd/{readable.fileno()}"]
        with subprocess.Popen(command, pass_fds=[readable.fileno()], stderr=subprocess.DEVNULL) as process:
            try:
                yield urlunsplit(target._replace(netloc=f"{target.username}@127.0.0.1:{own_port}"))
            finally:
                process.kill()


async def answers(url: str) -> None:
    async def look() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", urlsplit(url).port or 0)) == 0

    await until(look)


@pytest.mark.parametrize("more", ["", TOLERANT])
async def test_a_pooler_in_transaction_mode_is_refused_with_the_remedy(
    tmp_path: Path, database_url: str, more: str
) -> None:
    with pgbouncer(tmp_path, database_url, more=more) as url:
        await answers(url)
        ended = await run_command("serve", DATABASE_URL=url)
    assert ended.status == 2
    assert "Set DATABASE_LISTEN_URL to the server's own address" in " ".join(ended.err.split())


async def test_a_listen_address_that_is_a_pooler_too_is_refused(tmp_path: Path, make_settings: MakeSettings) -> None:
    direct = make_settings().database_url.get_secret_value()
    with pgbouncer(tmp_path, direct, more=TOLERANT) as url:
        await answers(url)
        with pytest.raises(PoolerError, match="DATABASE_LISTEN_URL leads to"):
            await db.require_sessions(make_settings(DATABASE_URL=direct, DATABASE_LISTEN_URL=url))


async def test_check_names_a_pooler_that_loses_notifications(tmp_path: Path, database_url: str) -> None:
    with pgbouncer(tmp_path, database_url, more=TOLERANT) as url:
        await answers(url)
        ended = await run_command("check", "--json", DATABASE_URL=url)
    [finding] = [line for line in ended.document["findings"] if line["name"] == "notifications"]
    assert (ended.status, finding["level"]) == (1, "failure")
    assert "DATABASE_LISTEN_URL" in finding["remedy"]


async def test_with_a_listen_address_the_service_works_behind_a_pooler(
    tmp_path: Path, make_settings: MakeSettings, connection: Connection, database_url: str
) -> None:
    """No statement is sought on a server that does not know it, and the limits are the transaction's own."""
    await connection.execute("create table effects (run_id uuid, servers int, idle_limit text)")

    @job("a-test")
    async def effect(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.connection() as unfenced:
            servers = {await unfenced.fetchval("select pg_backend_pid() where $1", True) for _ in range(6)}
        async with ctx.transaction() as tx:
            limit = await tx.fetchval("show idle_in_transaction_session_timeout")
            await tx.execute("insert into effects values ($1, $2, $3)", ctx.run_id, len(servers), limit)
            return await ctx.finish({"rows": 1}, on=tx)

    async def all_ended() -> bool:
        left = "select count(*) from bon_scheduler.runs where state <> 'succeeded'"
        return int(await connection.fetchval(left)) == 0

    with pgbouncer(tmp_path, database_url) as url:
        await answers(url)
        settings = make_settings(DATABASE_URL=url, DATABASE_LISTEN_URL=database_url)
        async with service.serving(settings, jobs=[effect]):
            await connection.execute("select bon_scheduler.enqueue('a-test') from generate_series(1, 100)")
            await until(all_ended, seconds=30)
    rows = await connection.fetch("select * from effects")
    assert len({row["run_id"] for row in rows}) == len(rows) == 100
    assert max(row["servers"] for row in rows) > 1, "the pooler never changed servers: this test proves nothing"
    assert {row["idle_limit"] for row in rows} == {"10s"}
    assert await connection.fetchval("select max(attempt) from bon_scheduler.runs") == 1
