"""A PostgreSQL with TLS, on this machine's own address as well, and servers that only pretend to be one."""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import pytest

from tests.waiting import until

SSL_REQUEST = struct.pack("!ii", 8, 80877103)
CANCEL = struct.pack("!ii", 16, 80877102)
PASSWORD = "hunter2-S3c"
ASK_FOR_PASSWORD = b"R" + struct.pack("!ii", 8, 3)
HBA = """
host    all postgres  all          trust
host    all secret    all          scram-sha-256
hostssl all certified all          cert
host    all ghost     all          trust
host    all nologin   all          trust
host    all outsider  all          trust
host    all tight     all          trust
hostssl all encrypted all          trust
"""
ROLES = f"""
    create role secret login password '{PASSWORD}';
    create role certified login;
    create role nologin;
    create role outsider login;
    create role tight login connection limit 0;
    create role encrypted login;
    create role unlisted login;
    create database bon;
    revoke connect on database bon from public;
    create database closed allow_connections false;
"""


def own_address() -> str:
    """Return an address of this machine that is not its loopback's; skip where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: the system only chooses
        except OSError:
            pytest.skip("this machine has no address but its loopback's")
        found = str(probe.getsockname()[0])
    if found.startswith("127."):
        pytest.skip("this machine has no address but its loopback's")
    return found


@dataclass(frozen=True, slots=True)
class TlsServer:
    """A PostgreSQL that has a certificate for `outside` and `localhost`, not for 127.0.0.1."""

    outside: str
    port: int
    directory: Path

    def url(self, user: str, *, host: str | None = None, database: str = "postgres", more: str = "") -> str:
        """Return its address for a user who may bring a password."""
        return f"postgresql://{user}@{host or self.outside}:{self.port}/{database}{more}"

    @property
    def root(self) -> Path:
        """The file of the authority that signed its certificate."""
        return self.directory / "root.pem"


async def make_roles(url: str) -> None:
    connection = await asyncpg.connect(url)
    for statement in filter(str.strip, ROLES.split(";")):
        await connection.execute(statement)
    await connection.close()


@dataclass(slots=True)
class Pretender:
    """A server that answers as it was told, and keeps all that it is sent in the clear."""

    host: str
    port: int = 0
    heard: list[bytes] = field(default_factory=list)

    def url(self, more: str = "") -> str:
        """Return its address, with a password."""
        return f"postgresql://bon:{PASSWORD}@{self.host}:{self.port}/bon{more}"


@asynccontextmanager
async def leaving_nothing_open() -> AsyncIterator[None]:
    """Wait until no more is open than before: a connection in TLS that was refused takes a moment to close."""

    def count() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    async def closed() -> bool:
        return count() <= before

    before = count()
    yield
    await until(closed)


@asynccontextmanager
async def pretending(host: str, answer: bytes, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Pretender]:
    """
    Run a server that answers a request for TLS with `answer`, and whatever comes next in the clear with a request
    for the password; with `tls` it takes a client that goes on to TLS.
    """
    pretender = Pretender(host)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(4096):
                pretender.heard.append(chunk)
                if chunk != SSL_REQUEST:
                    writer.write(ASK_FOR_PASSWORD)
                    continue
                writer.write(answer)
                await writer.drain()
                if tls is not None:
                    await writer.start_tls(tls)
                elif len(answer) > 1:
                    break
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, 0)
    pretender.port = server.sockets[0].getsockname()[1]
    async with server:
        yield pretender


@asynccontextmanager
async def listened_to(host: str, port: int) -> AsyncIterator[Pretender]:
    """Run a relay to a server: whoever is on the way, and hears how each connection begins."""
    relay = Pretender(host)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, keep: bool) -> None:
        try:
            first = True
            while chunk := await reader.read(65536):
                if keep and first:
                    relay.heard.append(chunk)
                    first = False
                writer.write(chunk)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(host, port)
        await asyncio.gather(pass_on(reader, to_writer, keep=True), pass_on(to_reader, writer, keep=False))

    server = await asyncio.start_server(serve, host, 0)
    relay.port = server.sockets[0].getsockname()[1]
    async with server:
        yield relay
