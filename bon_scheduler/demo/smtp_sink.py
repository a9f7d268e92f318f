"""
A mail server that delivers nowhere: it keeps each message as a file a person can open.

It speaks real SMTP on this machine's loopback address, without TLS, in the
event loop that enters it.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from pathlib import Path

from aiosmtpd.smtp import SMTP, Envelope, Session

__all__ = ["SmtpSink", "smtp_sink"]

HOST = "127.0.0.1"
MESSAGE = re.compile(r"(\d{2,})-.+\.eml")


@dataclass(slots=True)
class SmtpSink:
    """Where the server listens and what it has received, oldest first."""

    directory: Path
    host: str
    port: int
    earlier: int = 0
    """The number of the last message that an earlier server left in the directory."""
    messages: list[EmailMessage] = field(default_factory=list)


class _Keeper:
    """Keeps each message BEFORE it is acknowledged, otherwise a sender would be told what is not so."""

    def __init__(self, sink: SmtpSink) -> None:
        self._sink = sink

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd finds it by this name
        content = envelope.content or b""
        raw = content.encode() if isinstance(content, str) else content
        message = message_from_bytes(raw, policy=SMTP_POLICY)
        number = self._sink.earlier + len(self._sink.messages) + 1
        self._sink.messages.append(message)
        _keep(self._sink.directory, f"{number:02d}-{_local_part(envelope)}", raw, message)
        return "250 2.0.0 Kept"


def _local_part(envelope: Envelope) -> str:
    """Return the first recipient's name, fit to be a file's: an address may contain a slash."""
    address = str(envelope.rcpt_tos[0])
    return re.sub(r"[^A-Za-z0-9._+-]", "_", address.rpartition("@")[0]) or "unknown"


def _keep(directory: Path, name: str, raw: bytes, message: EmailMessage) -> None:
    directory.joinpath(f"{name}.eml").write_bytes(raw)
    html = message.get_body(preferencelist=("html",))
    if html is not None:
        directory.joinpath(f"{name}.html").write_text(html.get_content(), encoding="utf-8")


def _empty_sink(directory: Path) -> SmtpSink:
    directory.mkdir(parents=True, exist_ok=True)
    numbers = [int(found[1]) for path in directory.iterdir() if (found := MESSAGE.fullmatch(path.name))]
    return SmtpSink(directory, HOST, 0, earlier=max(numbers, default=0))


@asynccontextmanager
async def smtp_sink(directory: Path) -> AsyncIterator[SmtpSink]:
    """
    Receive mail for the length of the context, on a free port.

    Messages are written to `directory` (made if it is not there) as `NN-<recipient>.eml`, numbered from
    01, or from the last that is there; and their HTML part beside it as `.html`.
    """
    loop = asyncio.get_running_loop()
    sink = _empty_sink(directory)
    connections: list[SMTP] = []

    def accept() -> SMTP:
        # Named here, otherwise aiosmtpd asks the resolver for this machine's name on every connection.
        connections.append(SMTP(_Keeper(sink), hostname="localhost", enable_SMTPUTF8=True, loop=loop))
        return connections[-1]

    server = await loop.create_server(accept, HOST, 0)
    sink.port = server.sockets[0].getsockname()[1]
    try:
        yield sink
    finally:
        server.close()
        # BEFORE waiting: Python 3.12 and newer wait for clients that keep their connection open.
        for connection in connections:
            if connection.transport is not None:
                connection.transport.close()
        await server.wait_closed()
