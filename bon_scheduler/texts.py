"""
Texts of somebody else's, before they are shown or kept: controls written out, secrets of ours cut out.

Pure, and at the bottom: the log, reports, mail and the SHAAM client use it.
"""

import base64
import binascii
import html
import json
import unicodedata
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus

__all__ = ["show_controls", "withhold"]

BYTE = 0xFF
REDACTED = "[redacted]"
IN_BASE64 = frozenset("abcdefghijklmnopqrstuvwxyz0123456789+/=_-")
"""In lower case."""
SHORTEST_PART = 6
"""Of a base64 text inside a longer one, in characters: a shorter one stands in words by chance."""


def show_controls(text: str) -> str:
    """
    Return the text with its control characters written out, so that a terminal shows them and does not obey them.

    Also those of direction, which would show another order, and lone surrogates. Ends of lines stay.
    """
    return "".join(_show(character) if not character.isprintable() else character for character in text)


def _show(character: str) -> str:
    if character in "\n \u00a0" or unicodedata.category(character) in {"Zs", "Co", "Cn"}:
        return character
    return f"\\x{ord(character):02x}" if ord(character) <= BYTE else f"\\u{ord(character):04x}"


def withhold(text: str, secrets: Iterable[str]) -> str:
    """
    Return the text with each of our secrets cut out, in every form in which it travels.

    The forms: as it is, percent-encoded, escaped for JSON and HTML, in hexadecimal, and in base64, alone or
    anywhere inside a longer text (`user:password` of HTTP Basic, AUTH PLAIN, AUTH LOGIN). Whatever the case.
    """
    folded = "".join(map(_fold, text))
    found = sorted(span for secret in secrets if secret for form in _forms(secret) for span in _spans(form, folded))
    kept, end = [], 0
    for start, stop in found:
        if stop > end:
            kept += [text[end : max(start, end)], REDACTED]
            end = stop
    return "".join([*kept, text[end:]])


def _fold(character: str) -> str:
    lower = character.lower()
    return lower if len(lower) == 1 else character


def _spans(form: str, folded: str) -> Iterator[tuple[int, int]]:
    """Return where a form stands, with the rest of the word: of base64 the rest would tell its first and last bits."""
    form, end = "".join(map(_fold, form)), 0
    while (start := folded.find(form, end)) >= 0:
        first, end = start, start + len(form)
        while first > 0 and folded[first - 1] in IN_BASE64:
            first -= 1
        while end < len(folded) and folded[end] in IN_BASE64:
            end += 1
        yield first, end


def _forms(secret: str) -> set[str]:
    encoded = secret.encode("utf-8", "surrogatepass")
    escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], html.escape(secret)}
    # RFC 6749 §2.3.1 has id and secret percent-encoded BEFORE they are joined and put in base64.
    percent = {quote(encoded), quote(encoded, safe=""), quote_plus(encoded)}
    in_base64 = {form for text in {secret, *percent} for form in _base64(text.encode("utf-8", "surrogatepass"))}
    return {secret, html.escape(secret, quote=False), binascii.hexlify(encoded).decode()} | escaped | percent | in_base64


def _base64(encoded: bytes) -> set[str]:
    """Return the base64 of a text, and what of it is the same whatever stands before and after the text."""
    whole = base64.b64encode(encoded).decode().rstrip("=")
    parts = []
    for before in range(3):
        text = base64.b64encode(b"\0" * before + encoded).decode()
        # Characters that also carry bits of what stands before or after are left out.
        parts.append(text[(before * 8 + 5) // 6 : (before + len(encoded)) * 8 // 6])
    found = {whole, *(part for part in parts if len(part) >= SHORTEST_PART)}
    return found | {text.replace("+", "-").replace("/", "_") for text in found}
