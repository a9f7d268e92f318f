"""The cipher BON stores its SHAAM tokens with, both ways; nothing here logs or raises a token."""

import base64
import hashlib
import hmac
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["TokenCipher", "UnreadableTokenError"]

KEY_BYTES = 32
IV_BYTES = 12
TAG_BYTES = 16
KEY_ID_LENGTH = 16
_URL_SAFE = str.maketrans("-_", "+/")


class UnreadableTokenError(Exception):
    """A stored token cannot be decrypted: it is damaged, or sealed with another key. Never holds the blob."""


class TokenCipher:
    """
    Encrypts and decrypts tokens as BON does: AES-256-GCM without associated data, stored as
    base64(iv[12] ‖ tag[16] ‖ ciphertext), UTF-8 (BON's contract, "Token encryption").
    """

    __slots__ = ("_aead", "_fingerprint_key", "key_id")

    def __init__(self, key_hex: str) -> None:
        key = bytes.fromhex(key_hex)
        if len(key) != KEY_BYTES:
            raise ValueError(f"SHAAM_ENCRYPTION_KEY must be {KEY_BYTES} bytes, it has {len(key)}")
        self._aead = AESGCM(key)
        self._fingerprint_key = hmac.digest(key, b"bon_scheduler fingerprint", hashlib.sha256)
        self.key_id = hmac.digest(key, b"bon_scheduler key id", hashlib.sha256).hex()[:KEY_ID_LENGTH]

    def encrypt(self, plaintext: str) -> str:
        """Seal a token under a fresh random iv: the same token never gives the same text twice."""
        iv = os.urandom(IV_BYTES)
        sealed = self._aead.encrypt(iv, plaintext.encode(), None)
        ciphertext, tag = sealed[:-TAG_BYTES], sealed[-TAG_BYTES:]
        return base64.b64encode(iv + tag + ciphertext).decode()

    def decrypt(self, stored: str) -> str:
        """
        Open a stored token; accepts unpadded and URL-safe base64 as well.

        Raises UnreadableTokenError, whose message says which way it is unreadable.
        """
        blob = _decode_base64(stored)
        if len(blob) < IV_BYTES + TAG_BYTES:
            raise UnreadableTokenError(f"it has {len(blob)} bytes, fewer than iv and tag take")
        iv, tag, ciphertext = blob[:IV_BYTES], blob[IV_BYTES:][:TAG_BYTES], blob[IV_BYTES + TAG_BYTES :]
        try:
            return self._aead.decrypt(iv, ciphertext + tag, None).decode()
        except InvalidTag:
            raise UnreadableTokenError("it fails authentication: another key, or it was altered") from None
        except UnicodeDecodeError:
            raise UnreadableTokenError("what is inside is not UTF-8") from None

    def fingerprint(self, token: str) -> bytes:
        """Return what stands for a token in the ledger: a keyed SHA-256, which tells nothing without the key."""
        return hmac.digest(self._fingerprint_key, token.encode(), hashlib.sha256)


def _decode_base64(text: str) -> bytes:
    compact = "".join(text.split()).translate(_URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except ValueError:
        raise UnreadableTokenError("it is not base64") from None
