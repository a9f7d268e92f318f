"""A real mail server on loopback, with STARTTLS and AUTH, that answers, hangs or hangs up as it is told."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any, TypeAlias

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

PASSWORD = "correct horse"
Hook: TypeAlias = Callable[[SMTP], Awaitable[str]]


@dataclass
class Server:
    """A mail server; `on` says, by command, what it does instead of accepting."""

    tls: ssl.SSLContext
    offer_tls: bool = True
    implicit: bool = False
    auth: bool = True
    utf8: bool = True
    on: dict[str, str | Hook] = field(default_factory=dict)
    received: list[EmailMessage] = field(default_factory=list)
    recipients: list[str] = field(default_factory=list)
    connections: int = 0
    sessions: list[SMTP] = field(default_factory=list)
    mails: int = 0
    logins: int = 0
    farewells: int = 0
    port: int = 0

    async def _answer(self, command: str, server: SMTP, default: str) -> str:
        told = self.on.get(command, default)
        return told if isinstance(told, str) else await told(server)

    async def handle_EHLO(  # noqa: N802 - aiosmtpd's hook
        self, server: SMTP, session: Session, envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        session.host_name = hostname
        await self._answer("EHLO", server, "")
        return responses

    def handle_STARTTLS(self, server: SMTP, session: Session, envelope: Envelope) -> bool:  # noqa: N802 - as above
        if "STARTTLS" in self.on:
            abort(server)
        return True

    async def handle_MAIL(  # noqa: N802 - aiosmtpd's hook
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        self.mails += 1
        envelope.mail_from = address
        return await self._answer("MAIL", server, "250 OK")

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's hook
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        envelope.rcpt_tos.append(address)
        return await self._answer("RCPT", server, "250 OK")

    async def handle_RSET(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - as above
        return await self._answer("RSET", server, "250 OK")

    async def handle_QUIT(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - as above
        self.farewells += 1
        return "221 Bye"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - as above
        assert isinstance(envelope.content, bytes)
        answer = await self._answer("DATA", server, "250 queued as 42")
        if answer.startswith("2"):
            self.received.append(message_from_bytes(envelope.content, policy=policy.default))
            self.recipients.extend(envelope.rcpt_tos)
        return answer

    def authenticate(self, *arguments: Any) -> AuthResult:
        self.logins += 1
        told = self.on.get("AUTH")
        if isinstance(told, str):
            return AuthResult(success=False, handled=False, message=told)
        if told is not None:
            abort(arguments[0])
        data = arguments[-1]
        right = isinstance(data, LoginPassword) and data.password == PASSWORD.encode()
        return AuthResult(success=right, handled=False) if not right else AuthResult(success=True)

    def session(self) -> SMTP:
        self.connections += 1
        session = SMTP(
            self,
            hostname="127.0.0.1",
            enable_SMTPUTF8=self.utf8,
            tls_context=self.tls if self.offer_tls and not self.implicit else None,
            auth_required=self.auth,
            auth_require_tls=False,
            authenticator=self.authenticate,
            loop=asyncio.get_running_loop(),
        )
        self.sessions.append(session)
        return session

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        server = await asyncio.get_running_loop().create_server(
            self.session, "127.0.0.1", 0, ssl=self.tls if self.implicit else None
        )
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            await server.wait_closed()


def abort(server: SMTP) -> None:
    assert isinstance(server.transport, asyncio.WriteTransport)
    server.transport.abort()


async def hang_up(server: SMTP) -> str:
    abort(server)
    return "250 never heard"


async def hang(_: SMTP) -> str:
    await asyncio.sleep(3_600)
    return "250 never said"
