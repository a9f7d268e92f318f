"""
The key of this deployment's letters: recipients and Message-IDs get names with it that nobody can guess.

It is made once, by `migrate`, and is in the database, so that all replicas have the same one and a restart changes
nothing: with another key a letter that was sent would look like one that was not. Whoever reads the whole schema has
it; whoever has a Message-ID, the files of a dry run or the deliveries alone does not (docs/decisions/0026).
"""

import hashlib
import hmac
from uuid import UUID

from bon_scheduler.database import Pool
from bon_scheduler.jobs import Connection, NeverRetryError

__all__ = ["keyed", "read_key", "recipient_hash"]

READ_KEY = "select key from bon_scheduler.mail_key"


async def read_key(source: "Pool | Connection") -> bytes:
    """Read the key; raise NeverRetryError where it is gone, because nobody knows then who was written to."""
    key: bytes | None = await source.fetchval(READ_KEY)
    if key is None:
        raise NeverRetryError(
            "The table bon_scheduler.mail_key is empty: without its key nobody knows to whom letters were sent. "
            "Restore its row from a backup; a new key would send today's letters again."
        )
    return key


def keyed(key: bytes, name: str) -> str:
    """Return a name that tells nothing to who does not have the key: HMAC-SHA-256, hex."""
    return hmac.new(key, name.encode(), hashlib.sha256).hexdigest()


def recipient_hash(key: bytes, business_id: UUID, address: str) -> str:
    """Return what stands for an address in the ledger; upper and lower case are one."""
    # Of a SHA-256: that is what version 9 kept, and `0010_from_0009.sql` turns it into the same name.
    plain = hashlib.sha256(f"{business_id}:{address.strip().lower()}".encode()).hexdigest()
    return f"hmac:{keyed(key, plain)}"
