"""
What a demo leaves in a directory beside its database, so that the next one goes on with it: the key and the port.

The key is that of the tokens in the database. The port is the database's, so that an address that somebody has copied
stays good.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from bon_scheduler.files import write_private

__all__ = ["CannotGoOnError", "Kept", "keep", "read_kept"]

FILE = "demo.json"


class CannotGoOnError(Exception):
    """What is in the directory does not allow what is asked for; the message ends with the remedy."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The key of the tokens, in hexadecimal, and the port that the database had last."""

    key: str
    port: int


def read_kept(directory: Path) -> Kept | None:
    """Return what was left in a directory; None where nothing was, or what is there is not it."""
    try:
        found = json.loads((directory / FILE).read_bytes())
        return Kept(key=str(found["key"]), port=int(found["port"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def keep(directory: Path, kept: Kept) -> None:
    """Leave it in a directory, readable by this user alone. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        write_private(descriptor, FILE, json.dumps(asdict(kept)).encode())
    finally:
        os.close(descriptor)
