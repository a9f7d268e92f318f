"""
Accepting connections on HEALTH_PORT, so few and so short that whoever holds them keeps nobody from the probes.

Each connection is for one request and ends after `LIFE_SECONDS`, whatever its peer does. Of many a few are kept: a new
one ends an old one of the address that holds the most. A process that has no file descriptor left ends connections of
these first, and keeps one descriptor in reserve, so that a probe is still answered. asyncio's own accepting does none
of this: without descriptors it repeats a whole traceback without end.
"""

import asyncio
import os
import resource
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import structlog

from bon_scheduler.log import describe_error, is_out_of_descriptors

__all__ = ["Connections", "Seldom"]

log = structlog.get_logger()
MOST_CONNECTIONS = 32
SHARE_OF_DESCRIPTORS = 8
"""One of so many descriptors at most is for this port."""
LIFE_SECONDS = 10.0
LOOK_SECONDS = 1.0
MAKE_ROOM_SECONDS = 0.002
"""After a connection was ended for a new one; also how often at most, so that a flood of them leaves the loop alone."""
RETRY_SECONDS = 0.1
"""After a connection that could not be accepted, until the next is."""
SELDOM_SECONDS = 60.0
WAITING = 64
"""Connections that the system keeps until they are accepted."""


class Seldom:
    """Says yes at most once in `seconds`, so that a log which others can fill stays short."""

    def __init__(self, seconds: float = SELDOM_SECONDS) -> None:
        self._seconds = seconds
        self._next = float("-inf")
        self._unsaid = 0

    def take(self, now: float) -> int | None:
        """Return how many times it said no since it last said yes, or None for no. `now` is in seconds."""
        if now < self._next:
            self._unsaid += 1
            return None
        self._next, unsaid = now + self._seconds, self._unsaid
        self._unsaid = 0
        return unsaid


@dataclass(slots=True, eq=False)
class _Held:
    """A connection until its descriptor is closed."""

    socket: socket.socket
    address: str
    since: float
    transport: asyncio.Transport | None = None

    def end(self) -> None:
        """End it without a word: what is still to be sent would wait for its reader."""
        if self.transport is not None:
            self.transport.abort()


def most_connections() -> int:
    """Return how many connections this port may hold, by how many descriptors this process may."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft < 0 else max(2, min(MOST_CONNECTIONS, soft // SHARE_OF_DESCRIPTORS))


@dataclass(slots=True)
class Connections:
    """What is accepted, each connection for a protocol of its own that `make_protocol` makes."""

    make_protocol: Callable[[], asyncio.Protocol]
    answering: set[asyncio.BaseTransport] = field(default_factory=set)
    """Whose request is being answered: others end first. Kept by whoever answers."""
    _most: int = field(default_factory=most_connections)
    _held: list[_Held] = field(default_factory=list)
    _reserve: int | None = None
    _said: Seldom = field(default_factory=Seldom)

    @asynccontextmanager
    async def accepted(self, host: str, port: int) -> AsyncIterator[int]:
        """Accept for the duration of the context; yield the port. Raises OSError where nothing can listen."""
        listeners = await _listen(host, port)
        self._keep_reserve()
        tasks = [asyncio.create_task(self._accept(each), name="health-accept") for each in listeners]
        tasks.append(asyncio.create_task(self._look(), name="health-connections"))
        try:
            yield int(listeners[0].getsockname()[1])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for listener in listeners:
                listener.close()
            if self._reserve is not None:
                os.close(self._reserve)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # BEFORE accepting, which without a descriptor fails whether or not anybody has come.
            await _until_readable(listener)
            try:
                accepted, peer = listener.accept()
            except BlockingIOError:
                continue  # who came has left
            except OSError as error:
                await self._recover(error)
                continue
            accepted.setblocking(False)
            held = _Held(accepted, str(peer[0]), loop.time())
            self._held.append(held)
            if len(self._open()) > self._most and self._end_one():
                await asyncio.sleep(MAKE_ROOM_SECONDS)
            try:
                held.transport, _ = await loop.connect_accepted_socket(self.make_protocol, accepted)
            except OSError:
                accepted.close()

    async def _recover(self, error: OSError) -> None:
        """Make room for the connection that could not be accepted; BEFORE the reserve, what others hold here."""
        if not is_out_of_descriptors(error):
            await asyncio.sleep(RETRY_SECONDS)
            return
        if (unsaid := self._said.take(asyncio.get_running_loop().time())) is not None:
            held = len(self._open())
            log.warning("health.not_accepted", error=describe_error(error), connections=held, unsaid=unsaid)
        if self._end_one():
            await asyncio.sleep(MAKE_ROOM_SECONDS)
        elif self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None
        else:
            await asyncio.sleep(RETRY_SECONDS)

    def _open(self) -> list[_Held]:
        self._held = [held for held in self._held if held.socket.fileno() >= 0]
        return self._held

    def _end_one(self) -> bool:
        """
        End the oldest connection of the address that holds the most, one that is being answered only if all are.

        Return whether there was one; its descriptor is closed in the loop's next turn.
        """
        held = [each for each in self._open() if each.transport is not None]
        many = Counter(each.address for each in held)
        theirs = [each for each in held if many[each.address] == max(many.values())]
        if not theirs:
            return False
        idle = [each for each in theirs if each.transport not in self.answering]
        ended = (idle or theirs)[0]
        self._held.remove(ended)
        ended.end()
        return True

    async def _look(self) -> None:
        """End what is too old, and keep the reserve."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = asyncio.get_running_loop().time()
            for held in self._open():
                if now - held.since > LIFE_SECONDS:
                    held.end()
            self._keep_reserve()

    def _keep_reserve(self) -> None:
        if self._reserve is None:
            with suppress(OSError):
                self._reserve = os.open(os.devnull, os.O_RDONLY)


async def _until_readable(listener: socket.socket) -> None:
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listener, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(listener)


async def _listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen at each address of the host, as asyncio makes them."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, host, port, start_serving=False)
    listeners = [each.dup() for each in server.sockets]
    server.close()
    try:
        for listener in listeners:
            listener.listen(WAITING)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners
