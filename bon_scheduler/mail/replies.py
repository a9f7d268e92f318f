"""
What a mail server's answers come to, and as much of them as may be kept.

Pure. A server may quote what it was sent: nothing that is returned here holds an address, a subject, a name that
stands in the subject, or an amount.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from bon_scheduler.log import cut, mask
from bon_scheduler.mail.message import Letter, printable

__all__ = ["CLOSING", "Answer", "Delivery", "clean_reply", "judge"]

REPLY_LENGTH = 200
CLOSING = 421
"""RFC 5321 §3.8: the server closes the connection."""
ABOUT_OUR_LOGIN = frozenset({530, 534, 535, 538})
"""RFC 4954 §6: these speak about our authentication, whatever command they answer."""
_WORD = re.compile(r"\w+")
_SHORT_NUMBER = re.compile(r"\d{1,3}")
"""Counts in a subject; also what enhanced status codes (RFC 3463) are made of."""
_ENCODED_WORD = re.compile(r"=\?\S*")
"""RFC 2047: a subject as it was sent, perhaps cut off."""
_AMOUNT = re.compile(r"(?<![\w.])\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\w)|(?<![\w.,])\d+\.\d{2,3}(?![\w.])")
_SUBJECT = "[subject]"
_SUBJECTS = re.compile(r"\[subject\](?:\W{0,5}\[subject\])+")


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


def clean_reply(code: int, text: str, letter: Letter) -> str:
    """Return a server's answer without what it quotes of the letter, at most 200 characters."""
    text, address = cut(text), letter.recipient.strip()
    for needle in (address, address.rpartition("@")[0]):
        text = re.sub(rf"(?<!\w){re.escape(needle)}(?!\w)", "[address]", text, flags=re.IGNORECASE)
    text = _without_subject(mask(printable(text)), letter.subject)
    return " ".join(f"{code} {_AMOUNT.sub('[amount]', text)}".split())[:REPLY_LENGTH]


def _without_subject(text: str, subject: str) -> str:
    """Blank each word that stands in the subject too: a server quotes it whole, in part, or as it was encoded."""
    words = {word.casefold() for word in _WORD.findall(subject) if not _SHORT_NUMBER.fullmatch(word)}
    text = _ENCODED_WORD.sub(_SUBJECT, text)
    return _SUBJECTS.sub(_SUBJECT, _WORD.sub(lambda word: _SUBJECT if word[0].casefold() in words else word[0], text))
