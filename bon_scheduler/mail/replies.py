"""
What a mail server's answers come to, and as much of them as may be kept.

Pure. A server may quote whatever it was sent, as it was or encoded: login, addresses, subject, text. So what is kept is
what cannot be that: the codes, words of mail in general (`words`), addresses of hosts, and a queue's id.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from bon_scheduler.log import cut, mask, withhold
from bon_scheduler.mail.message import Letter, printable
from bon_scheduler.mail.words import WORDS

__all__ = ["CLOSING", "Answer", "Delivery", "clean_reply", "judge"]

REPLY_LENGTH = 200
ACCEPTED = 250
CLOSING = 421
"""RFC 5321 §3.8: the server closes the connection."""
ABOUT_OUR_LOGIN = frozenset({530, 534, 535, 538})
"""RFC 4954 §6: these speak about our authentication, whatever command they answer."""
_WORD = re.compile(r"\w+")
_SAFE = re.compile(r"[245]\.\d{1,3}\.\d{1,3}|\d{1,3}(?:\.\d{1,3}){3}|TLSv1(?:\.[0-3])?")
"""An enhanced status code (RFC 3463), a host's number, a version of TLS: in what may surround it."""
_AROUND = "[]()<>{}:;,.#'\"-"
_QUEUE_ID = re.compile(r"(?=[A-Za-z-]{0,23}[0-9])[A-Za-z0-9-]{1,24}")
_ADDRESS, LEFT_OUT = "[address]", "…"


class Delivery(StrEnum):
    """What became of a letter; the values are the names of `send-overdue-digest`'s counts."""

    SENT = "sent"
    LOGGED = "logged"
    """No SMTP server is configured; the day's delivery is not used up."""
    REFUSED = "refused"
    UNKNOWN = "unknown"
    ALREADY_SENT = "already_sent"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the conversation came to; `delivery` None: nothing was sent, and another attempt may."""

    delivery: Delivery | None
    reply: str
    away: bool = False
    """Whether the server, and not the letter, was the trouble."""


def judge(stage: str, code: int, reply: str) -> Answer:
    """Classify an answer that was not the expected one (RFC 5321 §4.2.1)."""
    if stage not in {"RCPT", "DATA"} or code in ABOUT_OUR_LOGIN or code == CLOSING:
        return Answer(None, f"{reply} (at {stage})", away=True)
    if code // 100 == 5:  # noqa: PLR2004 - 5yz: never
        return Answer(Delivery.REFUSED, reply)
    if code // 100 == 4 or stage == "RCPT":  # noqa: PLR2004 - 4yz: not now
        return Answer(None, f"{reply} (at {stage})")
    # A 2yz other than 250 still accepts; anything else after DATA is no answer at all.
    return Answer(Delivery.SENT if code // 100 == 2 else Delivery.UNKNOWN, reply)  # noqa: PLR2004


def clean_reply(code: int, text: str, letter: Letter | None, secrets: Collection[str] = ()) -> str:
    """
    Return a server's answer without anything that it may quote, at most 200 characters.

    `letter` is the one that it is about, if any, `secrets` are the login's user and password. "…" stands for what
    is left out: each piece between spaces that holds a word outside WORDS, or one that is also in the subject or a
    secret.
    """
    text, subject = withhold(printable(cut(text)), secrets), letter.subject if letter else ""
    address = letter.recipient.strip() if letter else ""
    for needle in filter(None, (address, address.rpartition("@")[0])):
        text = re.sub(rf"(?<!\w){re.escape(needle)}(?!\w)", _ADDRESS, text, flags=re.IGNORECASE)
    private = {word.casefold() for known in (subject, *secrets) for word in _WORD.findall(known)}
    kept: list[str] = []
    for piece in mask(text).split():
        queued = [word.casefold() for word in kept[-2:]] == ["queued", "as"]
        if _tells_nothing(piece, private) or (queued and _QUEUE_ID.fullmatch(piece) and code == ACCEPTED):
            kept.append(piece)
        elif kept[-1:] != [LEFT_OUT]:
            kept.append(LEFT_OUT)
    return " ".join([str(code), *kept])[:REPLY_LENGTH]


def _tells_nothing(piece: str, private: Collection[str]) -> bool:
    """Return whether what stands between two spaces says nothing of anybody's."""
    if not piece.isascii():
        return False
    if _SAFE.fullmatch(piece.strip(_AROUND)):
        return True
    words = [word.casefold() for word in _WORD.findall(piece.replace(_ADDRESS, ""))]
    return all(word in WORDS and word not in private for word in words)
