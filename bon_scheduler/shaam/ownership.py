"""
Whose a refresh token is: the business's in whose row of BON's it was first seen, or for whose token it was given.

A stored token that was copied into another business's row opens there as well: the key is the same for all. Spent
there it would be the other's consent that is used and its owner that is asked. So a token is sent only once the
ledger knows it for this business. What nobody knows yet is looked at in all rows at once (a census), in one
transaction: a token that several rows hold is nobody's, whichever of them would have been called first.

The census is one statement's picture of BON's table, so a claim that began before it committed finds the token
unknown and takes another. Looked at are only rows whose text is not the one that was registered for that business.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from bon_scheduler.database import Pool
from bon_scheduler.jobs import Connection
from bon_scheduler.shaam.cipher import TokenCipher, UnreadableTokenError

__all__ = ["CENSUS_TIMEOUT_SECONDS", "SEVERAL_HOLD", "Census", "find_owner"]

CENSUS_TIMEOUT_SECONDS = 60.0

SEVERAL_HOLD = (
    "token.foreign: when the stored token was first seen, another row held it too, or it was stored as an access token"
)

# One census at a time: two at once could wait for each other. It keeps out nobody but VACUUM.
LOCK = "lock table bon_scheduler.shaam_tokens in share update exclusive mode"

# Rows whose text is not known as this business's, and whether it is stored somewhere as an access token, which is never
# to be sent as a refresh token. Index: shaam_tokens_sealed; BON's table is read once.
LOOK_AT_ROWS = """
    declare census no scroll cursor for
    select c.business_id, c.encrypted_refresh_token, sha256(convert_to(c.encrypted_refresh_token, 'UTF8')) as sealed,
           a.stored is not null as is_access
      from public.business_shaam_credentials c
      left join (select distinct encrypted_access_token as stored from public.business_shaam_credentials) a
        on a.stored = c.encrypted_refresh_token
     where not exists (select from bon_scheduler.shaam_tokens t
                        where t.sealed = sha256(convert_to(c.encrypted_refresh_token, 'UTF8'))
                          and t.business_id = c.business_id)
     order by c.business_id
"""
NEXT_ROWS = "fetch 500 from census"

# $1 fingerprints: bytea[], $2 whose each is: uuid[], null where several rows of this census held it, $3 the SHA-256 of
# each one's text: bytea[]. Index: shaam_tokens_pkey. Whose a token is never changes; but one that this very census has
# registered a few rows before, for another, is nobody's. What is seen in any row is not forgotten.
REGISTER = """
    insert into bon_scheduler.shaam_tokens as t (fingerprint, business_id, sealed)
    select * from unnest($1::bytea[], $2::uuid[], $3::bytea[]) order by 1
    on conflict (fingerprint) do update
       set business_id = case when t.known_since <> now() or t.business_id = excluded.business_id then t.business_id
                         end,
           sealed = case when t.business_id = excluded.business_id then excluded.sealed else t.sealed end,
           seen_at = now()
"""

# $1 fingerprint. Index: shaam_tokens_pkey.
FIND_OWNER = "select business_id from bon_scheduler.shaam_tokens where fingerprint = $1"


class Census:
    """Registers every stored token that nobody has seen yet, for one process; callers share one that is under way."""

    def __init__(self, pool: Pool, cipher: TokenCipher) -> None:
        self._pool = pool
        self._cipher = cipher
        self._one_at_a_time = asyncio.Lock()
        self._done = 0
        self.begun = 0
        """How many have begun; read BEFORE what is to be in the next one."""

    async def take(self, *, after: int | None = None) -> None:
        """
        Look at all rows; not again where one that began `after` so many has ended well.

        Raises what the database raises.
        """
        async with self._one_at_a_time:
            if after is not None and self._done > after:
                return
            self.begun += 1
            number = self.begun
            async with (
                asyncio.timeout(CENSUS_TIMEOUT_SECONDS),
                self._pool.acquire() as connection,
                connection.transaction(),
            ):
                await connection.execute(LOCK)
                await connection.execute(LOOK_AT_ROWS)
                while rows := await connection.fetch(NEXT_ROWS):
                    await self._register(connection, rows)
            self._done = number

    async def _register(self, connection: Connection, rows: Iterable[Any]) -> None:
        holders: dict[bytes, set[UUID]] = defaultdict(set)
        sealed: dict[bytes, bytes] = {}
        never: set[bytes] = set()
        for row in rows:
            try:
                fingerprint = self._cipher.fingerprint(self._cipher.decrypt(row["encrypted_refresh_token"]))
            except UnreadableTokenError:
                continue  # it is never sent, and reported when its turn comes
            holders[fingerprint].add(row["business_id"])
            sealed[fingerprint] = row["sealed"]
            if row["is_access"]:
                never.add(fingerprint)
        owners = [None if token in never else _only(businesses) for token, businesses in holders.items()]
        await connection.execute(REGISTER, list(holders), owners, [sealed[token] for token in holders])


async def find_owner(connection: Connection, fingerprint: bytes) -> UUID | None:
    """Return whose a token is; None where it is nobody's, or not known."""
    owner: UUID | None = await connection.fetchval(FIND_OWNER, fingerprint)
    return owner


def _only(businesses: Iterable[UUID]) -> UUID | None:
    first, *others = businesses
    return None if others else first
