"""
A letter and its form: the message with its headers, and the names it goes by in the ledger.

Nothing here sends anything; `mail` does.
"""

from dataclasses import dataclass, field
from datetime import date, datetime
from email.errors import MessageError
from email.header import Header
from email.headerregistry import Address, BaseHeader, HeaderRegistry, UnstructuredHeader
from email.message import EmailMessage
from email.policy import SMTP, EmailPolicy, Policy
from typing import Any
from uuid import UUID

from bon_scheduler.addresses import Mailbox, read_mailbox
from bon_scheduler.config import Settings
from bon_scheduler.jobs import NeverRetryError
from bon_scheduler.log import cut
from bon_scheduler.mail.keys import keyed, recipient_hash

__all__ = ["Letter", "Written", "compose", "message_id", "printable", "write"]

LONGEST_SUBJECT = 300
"""In characters; RFC 5322 allows lines of 998 bytes."""
LARGEST_BYTES = 1024 * 1024
"""Of a letter as it is sent. The longest digest has two thirds of it, whatever its rows say."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One e-mail to one recipient. (kind, business, day, recipient) is sent once."""

    kind: str
    business_id: UUID
    as_of: date
    recipient: str = field(repr=False)
    subject: str = field(repr=False)
    text: str = field(repr=False)
    html: str = field(repr=False)
    language: str


@dataclass(frozen=True, slots=True)
class Written:
    """A letter as a server is given it."""

    content: bytes = field(repr=False)
    mailbox: Mailbox
    """Whose it is."""


class _UnfoldedHeader(UnstructuredHeader, BaseHeader):
    """A header on one line: Python would encode a URL longer than 78 characters (RFC 2369 forbids it)."""

    def fold(self, *, policy: "Policy[Any]") -> str:
        return f"{self.name}: {self}{policy.linesep}"


class _EncodedHeader(UnstructuredHeader, BaseHeader):
    """A subject as RFC 2047 words: Python's own folding loses the space between two of them."""

    def fold(self, *, policy: "Policy[Any]") -> str:
        text = str(self)
        words = Header(text, "us-ascii" if text.isascii() else "utf-8", header_name=self.name)
        return f"{self.name}: {words.encode(linesep=policy.linesep)}{policy.linesep}"


def _policy() -> "EmailPolicy[EmailMessage]":
    registry = HeaderRegistry()
    registry.map_to_type("list-unsubscribe", _UnfoldedHeader)
    registry.map_to_type("subject", _EncodedHeader)
    return SMTP.clone(header_factory=registry)


POLICY = _policy()
"""How a letter is written as bytes."""


def message_id(letter: Letter, email_from: str, key: bytes) -> str:
    """Return the Message-ID of a letter: the same for the same kind, business, day and recipient."""
    who = recipient_hash(key, letter.business_id, letter.recipient)
    name = keyed(key, f"{letter.kind}:{letter.as_of.isoformat()}:{who}")
    return f"<{name[:32]}@{email_from.rpartition('@')[2]}>"


def compose(letter: Letter, mailbox: Mailbox, settings: Settings, *, now: datetime, key: bytes) -> EmailMessage:
    """
    Build the message: plain text and HTML, both UTF-8, with the headers of automatic mail.

    `mailbox` is the recipient's, `now` (aware) its Date, `key` the deployment's.
    """
    message = EmailMessage(policy=POLICY)
    message["Date"] = now
    message["Message-ID"] = message_id(letter, settings.email_from, key)
    message["From"] = Address("BON", addr_spec=settings.email_from)
    # Not addr_spec: it refuses what an e-mail parser would read differently, and names it in the error.
    local, _, domain = mailbox.address.rpartition("@")
    message["To"] = Address(username=local, domain=domain)
    # Names come from people: a line break would begin a header of its own.
    message["Subject"] = " ".join(printable(cut(letter.subject, LONGEST_SUBJECT)).split())
    message["Auto-Submitted"] = "auto-generated"
    if settings.unsubscribe_url is not None:
        message["List-Unsubscribe"] = f"<{settings.unsubscribe_url}>"
        message["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    # base64, not 8bit: no server's 8BITMIME is needed, and no line gets too long.
    message.set_content(letter.text, charset="utf-8", cte="base64")
    message.add_alternative(letter.html, subtype="html", charset="utf-8", cte="base64")
    # AFTER the alternatives, otherwise it moves into the first one with the other Content headers.
    message["Content-Language"] = letter.language
    return message


def write(letter: Letter, settings: Settings, *, now: datetime, key: bytes) -> Written | None:
    """
    Write the message as bytes; `now` and `key` as in `compose`. None: the recipient is not one e-mail address.

    Raises NeverRetryError where no letter can be written with these settings, and for one above LARGEST_BYTES. Asked
    BEFORE anybody hears of the letter: it is neither used up then, nor is a server blamed.
    """
    mailbox = read_mailbox(letter.recipient)
    if mailbox is None:
        return None
    try:
        message = compose(letter, mailbox, settings, now=now, key=key)
        content = message.as_bytes(policy=POLICY.clone(utf8=mailbox.utf8))
    except (MessageError, ValueError) as error:
        # Its text may quote an address; the class says enough.
        raise NeverRetryError(
            f"A letter cannot be written ({type(error).__name__}). EMAIL_FROM must be one e-mail address and "
            "UNSUBSCRIBE_URL a web address, both in ASCII. Correct them, then: bon-scheduler retry RUN_ID "
            "--reason …"
        ) from None
    if len(content) > LARGEST_BYTES:
        raise NeverRetryError(f"A letter of {len(content):,} bytes is not sent; at most {LARGEST_BYTES:,} are.")
    return Written(content, mailbox)


def printable(text: str) -> str:
    """Blank control characters and what UTF-8 cannot hold."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(" " if ord(c) < 0x20 or 0x7F <= ord(c) <= 0x9F else c for c in whole)  # noqa: PLR2004 - C0, DEL, C1
