"""
Connections to the mail server: verified, logged in, and used again.

A connection is only handed out when it is ready for a letter. One that was used before is asked first
(RSET) whether the server still holds it, so that a server which drops idle ones costs a new connection
and not a letter. There is no way down: without the TLS that is asked for nothing is said, and a password
goes over TLS or to this machine alone.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import aiosmtplib

from bon_scheduler.config import LOOPBACK_HOSTS, Settings, SmtpTls
from bon_scheduler.log import describe_error, withhold
from bon_scheduler.mail.replies import REPLY_LENGTH, clean_reply

__all__ = ["SMTP_TIMEOUT", "Line", "NotConnectedError", "SmtpConnections", "login_of", "try_login"]

SMTP_TIMEOUT = timedelta(seconds=30)
"""For connecting, for each answer of the server, and for both to DATA together."""
MOST_CONNECTIONS = 10
"""At a time, of one process."""
MOST_LETTERS = 100
"""Over one connection: many servers end it after a number of their own."""
IDLE = timedelta(seconds=30)
"""Shorter than servers wait (Postfix: 300 s, under stress 10 s; those are found by asking)."""
QUIT_TIMEOUT = timedelta(seconds=5)
TROUBLE = (aiosmtplib.SMTPException, OSError)


class NotConnectedError(Exception):
    """
    No connection could be made ready. `stage` is how far it got, `said` what the server answered (cleaned), or the
    kind of the trouble; `code` is None where it did not answer.
    """

    def __init__(self, stage: str, said: str, code: int | None) -> None:
        super().__init__(f"{said} (at {stage})")
        self.stage, self.said, self.code = stage, said, code


@dataclass(slots=True, eq=False)
class Line:
    """A connection that is ready for a letter. Who saw it misbehave says that it is not `sound`."""

    client: aiosmtplib.SMTP
    letters: int = 0
    sound: bool = True


class SmtpConnections:
    """The connections of one process; `close` them at the end."""

    def __init__(self, settings: Settings, *, tls_context: ssl.SSLContext | None, timeout: timedelta) -> None:
        self._settings = settings
        self._tls_context = tls_context
        self.timeout_seconds = timeout.total_seconds()
        self._free = asyncio.Semaphore(MOST_CONNECTIONS)
        self._idle: dict[Line, asyncio.TimerHandle] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def line(self) -> AsyncIterator[Line]:
        """Borrow a connection that is ready for a letter; raises NotConnectedError."""
        async with self._free:
            line = await self._awake() or await self._open()
            line.letters += 1
            try:
                yield line
            except BaseException:
                line.client.close()
                raise
            self._put_back(line)

    async def close(self) -> None:
        """Close every idle connection with QUIT."""
        for line in list(self._idle):
            self._dismiss(line)
        if self._leaving:
            await asyncio.wait(self._leaving)

    async def _awake(self) -> Line | None:
        """Return an idle connection that the server still holds, the most recently used first."""
        while self._idle:
            line, timer = self._idle.popitem()
            timer.cancel()
            try:
                await line.client.rset()
            except TROUBLE:
                line.client.close()
            except BaseException:
                line.client.close()
                raise
            else:
                return line
        return None

    def _put_back(self, line: Line) -> None:
        if not line.sound or not line.client.is_connected:
            line.client.close()
            return
        self._idle[line] = asyncio.get_running_loop().call_later(IDLE.total_seconds(), self._dismiss, line)
        if line.letters >= MOST_LETTERS:
            self._dismiss(line)

    def _dismiss(self, line: Line) -> None:
        self._idle.pop(line).cancel()
        leaving = asyncio.create_task(_quit(line.client))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def _open(self) -> Line:
        settings, stage = self._settings, "connect"
        client = self._client()
        try:
            await client.connect()
            if settings.smtp_tls is SmtpTls.STARTTLS:
                stage = "STARTTLS"
                await client.starttls()  # raises where it is not offered: no downgrade
            if settings.smtp_username is not None and settings.smtp_password is not None:
                stage = "AUTH"
                self._refuse_clear_text()
                await client.login(settings.smtp_username, settings.smtp_password.get_secret_value())
        except (*TROUBLE, ValueError) as error:
            # ValueError: the login cannot stand in a command.
            client.close()
            raise self._not_connected(stage, error) from None
        except BaseException:
            client.close()
            raise
        return Line(client)

    def _not_connected(self, stage: str, error: Exception) -> NotConnectedError:
        login = login_of(self._settings)
        if isinstance(error, aiosmtplib.SMTPResponseException):
            return NotConnectedError(stage, clean_reply(error.code, error.message, None, login), error.code)
        return NotConnectedError(stage, withhold(describe_error(error), login)[:REPLY_LENGTH], None)

    def _refuse_clear_text(self) -> None:
        """Raise SMTPException where a password would go in the clear, whatever let such settings pass."""
        if self._settings.smtp_tls is SmtpTls.NONE and self._settings.smtp_host not in LOOPBACK_HOSTS:
            raise aiosmtplib.SMTPException("the password would go in the clear")

    def _client(self) -> aiosmtplib.SMTP:
        settings = self._settings
        if self._tls_context is None and settings.smtp_tls is not SmtpTls.NONE:
            self._tls_context = ssl.create_default_context()  # verifies the chain and the host's name
        return aiosmtplib.SMTP(
            hostname=settings.smtp_host,
            port=settings.smtp_port,
            timeout=self.timeout_seconds,
            use_tls=settings.smtp_tls is SmtpTls.IMPLICIT,
            start_tls=False,  # asked for above, as a stage of its own
            tls_context=self._tls_context,
            # Not this machine's name, which would have to be looked up for each connection.
            local_hostname=settings.email_from.rpartition("@")[2],
        )


def login_of(settings: Settings) -> tuple[str, str]:
    """Return user and password, empty where there are none."""
    password = settings.smtp_password
    return settings.smtp_username or "", password.get_secret_value() if password is not None else ""


async def try_login(settings: Settings) -> None:
    """Make one connection ready for a letter, and leave; raises NotConnectedError."""
    connections = SmtpConnections(settings, tls_context=None, timeout=SMTP_TIMEOUT / 3)
    async with connections.line():
        pass
    await connections.close()


async def _quit(client: aiosmtplib.SMTP) -> None:
    with suppress(*TROUBLE):
        await client.quit(timeout=QUIT_TIMEOUT.total_seconds())
    client.close()
