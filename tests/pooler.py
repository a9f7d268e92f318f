"""A real PgBouncer in front of a test's database."""

import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from tests.waiting import until

needs_pgbouncer = pytest.mark.skipif(
    shutil.which("pgbouncer") is None, reason="needs PgBouncer: apt-get install pgbouncer"
)
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
SERVERS = 8
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


@asynccontextmanager
async def other_clients(url: str) -> AsyncIterator[list[asyncpg.Connection]]:
    """As many clients as the pooler has servers, each in a transaction, as BON's API is: without any setting."""
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(SERVERS):
            clients.append(client := await asyncpg.connect(url, statement_cache_size=0))
            stack.callback(client.terminate)
            await client.execute("begin")
        yield clients
