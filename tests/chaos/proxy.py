"""
A TCP proxy in front of PostgreSQL that hurts what passes: resets, latency, black holes, errors in the server's name.

Everything is forwarded as it is but in one mode: while it refuses, statements that a client executes are answered
with an error in the protocol's own form, and never reach the server.
"""

import asyncio
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit, urlunsplit

CHUNK_BYTES = 1 << 16
SSL_REQUEST = 80877103
NO_TLS = b"N"
CLAIM = b"bon_scheduler.claim("
TAKEN = b'"account"'
"""What stands in the answer to a claim that took a run of the program's."""
TRANSACTION_OPEN, TRANSACTION_FAILED = b"T", b"E"


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def _error(sqlstate: str, text: str) -> bytes:
    fields = {b"S": "ERROR", b"V": "ERROR", b"C": sqlstate, b"M": text}
    return _message(b"E", b"".join(key + value.encode() + b"\0" for key, value in fields.items()) + b"\0")


class _Link:
    """One client's connection to the server."""

    def __init__(self, proxy: "Proxy", client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self.client = client
        self.server = server
        self.status = b"I"
        """The transaction's, as the server last said."""
        self.claims = False
        """Whether runs are claimed on it."""

    def abort(self) -> None:
        for writer in (self.client, self.server):
            writer.transport.abort()

    async def forward_client(self, source: asyncio.StreamReader) -> None:
        """Forward what the client says, batch by batch, until the first thing that wants an answer."""
        batch, executes = b"", False
        await self._forward_startup(source)
        while True:
            kind = await source.readexactly(1)
            length = await source.readexactly(4)
            body = await source.readexactly(struct.unpack("!i", length)[0] - 4)
            batch += kind + length + body
            self.claims = self.claims or CLAIM in body
            executes = executes or kind == b"E"
            if kind in {b"B", b"E"}:
                continue
            await self._proxy.slot()
            if executes and kind == b"S" and self._proxy.refuses():
                self._refuse()
            else:
                self.server.write(batch)
                await self.server.drain()
            batch, executes = b"", False

    async def _forward_startup(self, source: asyncio.StreamReader) -> None:
        while True:
            length = await source.readexactly(4)
            body = await source.readexactly(struct.unpack("!i", length)[0] - 4)
            if len(body) == struct.calcsize("!i") and struct.unpack("!i", body)[0] == SSL_REQUEST:
                self.client.write(NO_TLS)
                continue
            await self._proxy.slot()
            self.server.write(length + body)
            return

    def _refuse(self) -> None:
        if self.status == TRANSACTION_OPEN:
            self.status = TRANSACTION_FAILED
        self.client.write(_error(*self._proxy.refusal) + _message(b"Z", self.status))

    async def forward_server(self, source: asyncio.StreamReader) -> None:
        """Forward what the server says, and remember how the transaction stands."""
        lost = False
        while True:
            head = await source.readexactly(5)
            body = await source.readexactly(struct.unpack("!i", head[1:])[0] - 4)
            if head[:1] == b"Z":
                self.status = body
            await self._proxy.slot()
            lost = lost or (self.claims and self._proxy.loses_claim(head, body))
            if lost and head[:1] == b"Z":
                return  # the server has committed, and nobody is told
            if not lost:
                self.client.write(head + body)
                await self.client.drain()


class Proxy:
    """Listens on `port`; `target_port` may change while it does."""

    def __init__(self, target_port: int, rng: random.Random) -> None:
        self.target_port = target_port
        self.port = 0
        self.refusal = ("53100", "could not extend file: No space left on device")
        self._rng = rng
        self._open = asyncio.Event()
        self._open.set()
        self._longest_delay_seconds = 0.0
        self._refused_share = 0.0
        self._claims_to_lose = 0
        self.swallowed = 0
        """How many connections were opened that never heard a word."""
        self._swallows = False
        self._links: set[_Link] = set()
        self._serving: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["Proxy"]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self._open.set()
            self.reset()
            if self._serving:
                await asyncio.wait(self._serving)

    def reset(self) -> int:
        """Cut every connection with a TCP reset; return how many."""
        links = list(self._links)
        for link in links:
            link.abort()
        return len(links)

    @asynccontextmanager
    async def black_hole(self) -> AsyncIterator[None]:
        """Let nothing pass inside the block; connections are neither refused nor cut."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    @asynccontextmanager
    async def swallowing(self) -> AsyncIterator[None]:
        """Lose what is sent inside the block: connections that are used or opened meanwhile never hear a word again."""
        self._swallows = True
        try:
            yield
        finally:
            self._swallows = False

    @asynccontextmanager
    async def latency(self, longest_seconds: float) -> AsyncIterator[None]:
        """Delay everything inside the block, each message by a random time."""
        self._longest_delay_seconds = longest_seconds
        try:
            yield
        finally:
            self._longest_delay_seconds = 0.0

    @asynccontextmanager
    async def refusing(self, share: float) -> AsyncIterator[None]:
        """Refuse that share of the statements inside the block, as a server whose disk is full does."""
        self._refused_share = share
        try:
            yield
        finally:
            self._refused_share = 0.0

    def lose_claims(self, claims: int) -> None:
        """Cut the connection in the middle of the answer to each of so many claims that take a run."""
        self._claims_to_lose = claims

    def loses_claim(self, head: bytes, body: bytes) -> bool:
        if not self._claims_to_lose or head[:1] != b"D" or TAKEN not in body:
            return False
        self._claims_to_lose -= 1
        return True

    @property
    def claims_to_lose(self) -> int:
        return self._claims_to_lose

    def refuses(self) -> bool:
        return self._rng.random() < self._refused_share

    async def slot(self) -> None:
        """Wait until something may pass."""
        await self._open.wait()
        if self._swallows:
            await asyncio.get_running_loop().create_future()
        if self._longest_delay_seconds:
            await asyncio.sleep(self._rng.uniform(0, self._longest_delay_seconds))

    def _accept(self, from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.swallowed += self._swallows
        task = asyncio.create_task(self._serve(from_client, client))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            from_server, server = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            client.transport.abort()
            return
        link = _Link(self, client, server)
        self._links.add(link)
        pumps = [
            asyncio.create_task(link.forward_client(from_client)),
            asyncio.create_task(link.forward_server(from_server)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            with suppress(ConnectionError):
                # What the server said last, why it ends the connection, is heard before the end.
                await client.drain()
        finally:
            self._links.discard(link)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for writer in (client, server):
                writer.close()


@asynccontextmanager
async def in_front_of(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """Yield a proxy in front of a database, and the database's address through it."""
    parts = urlsplit(url)
    assert parts.port is not None
    async with Proxy(parts.port, random.Random(1)).listening() as proxy:
        yield proxy, urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{proxy.port}"))
