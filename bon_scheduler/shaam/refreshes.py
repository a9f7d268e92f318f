"""
The ledger of SHAAM refreshes: who is at a business's tokens, what was sent, and what came of it.

It must survive a worker that dies or freezes at any statement, beside others that do the same. So a token is
sent only by whoever has committed a claim: a lease on the business, and the intent to send this very token. A
claim is refused while another's lease lasts; for a token that is not known to be this business's (`ownership`); for
one that is known to be spent; and for one whose answer may lie in another replica's spool, until that replica says it
does not, or its patience is over.

Saving is not fenced: what the authority has done is done. It is a compare-and-set on the token that was sent, as
it is stored, so that a consent or a rotation that came meanwhile is never overwritten by an older token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

from bon_scheduler.jobs import Connection

__all__ = [
    "Claimed",
    "Credential",
    "End",
    "Exchange",
    "Rotated",
    "State",
    "Verdict",
    "claim",
    "flag",
    "is_claimed",
    "is_flagged",
    "note",
    "release_abandoned",
    "save",
    "settle",
]

CALL_TIMEOUT_SECONDS = 10.0

# $1 business, $2 the refresh token to send, as stored, $3 its fingerprint, $4 the exchange: uuid, $5 lease:
# interval, $6 our spool: uuid or null, $7 patience with another's spool: interval. Index: shaam_refreshes_pkey,
# shaam_tokens_pkey.
# `for share` waits for whoever is changing the credentials and looks at what they become: otherwise a claim that
# began before a save committed would send the token that the save replaced.
CLAIM = """
    insert into bon_scheduler.shaam_refreshes as r
           (business_id, state, holder, lease_until, token_fingerprint, unanswered, spool)
    select c.business_id, 'sending', $4, clock_timestamp() + $5::interval, $3, 1, $6
      from public.business_shaam_credentials c
     where c.business_id = $1
       and c.encrypted_refresh_token = $2
       and c.needs_reauth = false
       and exists (select from bon_scheduler.shaam_tokens t where t.fingerprint = $3 and t.business_id = $1)
       for share of c
    on conflict (business_id) do update
       set state = 'sending',
           holder = excluded.holder,
           lease_until = excluded.lease_until,
           unanswered = case when r.token_fingerprint = excluded.token_fingerprint then r.unanswered + 1 else 1 end,
           token_fingerprint = excluded.token_fingerprint,
           spool = excluded.spool,
           changed_at = clock_timestamp()
     where (r.holder is null or r.lease_until <= clock_timestamp())
       and (r.unanswered = 0
            or r.token_fingerprint is distinct from excluded.token_fingerprint
            or r.spool is null
            or r.spool = excluded.spool
            or r.lease_until <= clock_timestamp() - $7::interval)
       and (r.state not in ('refreshed', 'spent') or r.token_fingerprint is distinct from excluded.token_fingerprint)
    returning unanswered, failures
"""

# Why a claim was refused. $1 business, $2 the refresh token, as stored, $3 its fingerprint. Index:
# shaam_refreshes_pkey, shaam_tokens_pkey. Whose it is BEFORE what this business did last, which says nothing of it.
FIND_REFUSAL = """
    select case when not exists (select from public.business_shaam_credentials c
                                  where c.business_id = $1
                                    and c.encrypted_refresh_token = $2
                                    and c.needs_reauth = false)
                then 'superseded'
                when t.fingerprint is null then 'unknown'
                when t.business_id is distinct from $1 then 'foreign'
                when r.holder is not null and r.lease_until > clock_timestamp() then 'held'
                when r.state = 'refreshed' and r.token_fingerprint = $3 then 'spent'
                when r.state = 'spent' and r.token_fingerprint = $3 then 'braked'
                else 'waits' end
      from (select $1::uuid as business_id) asked
      left join bon_scheduler.shaam_refreshes r on r.business_id = asked.business_id
      left join bon_scheduler.shaam_tokens t on t.fingerprint = $3
"""

# Whether a claim stands: an answer that is saved late ends it. $1 business, $2 the exchange.
# Index: shaam_refreshes_pkey.
IS_CLAIMED = """
    select exists (select from bon_scheduler.shaam_refreshes where business_id = $1 and holder = $2)
"""

# $1 business, $2 the refresh token that was sent, $3 the new access token, $4 the new refresh token (each as
# stored), $5 how long the access token lives: interval, $6 scope: text or null, $7 the sent token's fingerprint,
# $8 how long the new refresh token lives: interval or null, $9 the new refresh token's fingerprint.
# Indexes: unique (business_id), shaam_refreshes_pkey, shaam_tokens_pkey.
# It also matches $4, so that a save whose reply was lost on the way is known again when it is repeated. BON's row
# BEFORE ours: a claim locks them in that order. Ours whoever holds the lease: the token is spent for all, unless
# it was given back as its own successor, which the authority is not seen to do and OAuth allows.
SAVE = """
    with saved as (
        update public.business_shaam_credentials
           set encrypted_access_token = $3,
               encrypted_refresh_token = $4,
               token_expires_at = now() + $5::interval,
               scope = coalesce($6, scope),
               needs_reauth = false,
               updated_at = now()
         where business_id = $1
           and encrypted_refresh_token in ($2, $4)
        returning business_id
    ), settled as (
        update bon_scheduler.shaam_refreshes r
           set state = 'refreshed', holder = null, lease_until = null, unanswered = 0, spool = null, failures = 0,
               next_attempt_at = null, silent_until = null, error = null, changed_at = clock_timestamp(),
               refresh_expires_at = clock_timestamp() + $8::interval, token_fingerprint = nullif($7, $9)
          from (select count(*) from saved) first
         where r.business_id = $1
           and r.token_fingerprint = $7
    ), known as (
        insert into bon_scheduler.shaam_tokens as t (fingerprint, business_id, sealed)
        select $9, business_id, sha256(convert_to($4, 'UTF8')) from saved
        on conflict (fingerprint) do update
           set sealed = excluded.sealed, seen_at = excluded.seen_at
         where t.business_id = excluded.business_id
    )
    select exists (select from saved)
"""

# $1 business, $2 the refresh token that was refused, as stored. Index: unique (business_id).
ASK_FOR_CONSENT = """
    update public.business_shaam_credentials
       set needs_reauth = true, updated_at = now()
     where business_id = $1
       and encrypted_refresh_token = $2
       and needs_reauth = false
    returning business_id
"""
# $1 business, $2 the refresh token, as stored. Index: unique (business_id).
IS_FLAGGED = """
    select exists (select from public.business_shaam_credentials
                    where business_id = $1 and encrypted_refresh_token = $2 and needs_reauth)
"""

# $1 business, $2 the exchange, $3 state: text (one of ours, so not a literal), $4 whether an answer told that the
# token was not spent: boolean, $5 wait before the next attempt: interval or null (no failure of this business),
# $6 how long the authority asked to be left alone: interval or null, $7 error: text or null.
# Index: shaam_refreshes_pkey.
SETTLE = """
    update bon_scheduler.shaam_refreshes
       set state = $3,
           holder = null,
           lease_until = null,
           spool = null,
           unanswered = case when $3 in ('needs_reauth', 'spent') then 0 when $4 then greatest(unanswered - 1, 0)
                             else unanswered end,
           failures = failures + case when $5::interval is null then 0 else 1 end,
           next_attempt_at = clock_timestamp() + greatest($5::interval, $6::interval),
           silent_until = clock_timestamp() + $6::interval,
           error = $7,
           changed_at = clock_timestamp()
     where business_id = $1
       and holder = $2
"""

# $1 business, $2 state: text (one of ours), $3 error: text. Index: shaam_refreshes_pkey. Nobody was called, so
# nothing else changes.
NOTE = """
    insert into bon_scheduler.shaam_refreshes as r (business_id, state, error) values ($1, $2, $3)
    on conflict (business_id) do update
       set state = excluded.state, error = excluded.error, changed_at = clock_timestamp()
     where r.holder is null
        or r.lease_until <= clock_timestamp()
"""

# $1 our spool, $2 fingerprints of the tokens whose answers the database refuses: bytea[]. Index:
# shaam_refreshes_spool. What it held is applied: an answer that is not there never came. Others' patience with what
# is there begins anew.
RELEASE_ABANDONED = """
    update bon_scheduler.shaam_refreshes
       set spool = case when token_fingerprint = any ($2) then spool end,
           lease_until = case when token_fingerprint = any ($2) then clock_timestamp() else lease_until end
     where spool = $1
       and lease_until <= clock_timestamp()
"""


class State(StrEnum):
    """How a business's last exchange stands or ended."""

    SENDING = "sending"
    REFRESHED = "refreshed"
    SPENT = "spent"
    """The authority says so; whether its owner is asked is not decided yet."""
    NEEDS_REAUTH = "needs_reauth"
    DEFERRED = "deferred"
    FAILED = "failed"


class Verdict(StrEnum):
    """Why a claim was refused."""

    SUPERSEDED = "superseded"
    """The row holds another token by now, or none, or its owner is already asked."""
    UNKNOWN = "unknown"
    """Nobody has seen this token yet, so that nobody knows whose it is."""
    FOREIGN = "foreign"
    """The token is another business's, or several rows held it when it was first seen."""
    HELD = "held"
    """Another exchange of this business is under way."""
    SPENT = "spent"
    """An earlier refresh spent this token, and somebody wrote it over its successor."""
    BRAKED = "braked"
    """The authority called this token spent, and its owner is not asked yet, or the brake on consent holds."""
    WAITS = "waits"
    """An answer to it may lie in the spool of a replica that is not there just now."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A business's refresh token, as stored."""

    business_id: UUID
    stored: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One sending of one token."""

    id: UUID
    credential: Credential
    fingerprint: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A claim that was granted."""

    unanswered: int
    """How often this token was sent, this time included, without an answer that told its fate."""
    failures: int


@dataclass(frozen=True, slots=True)
class Rotated:
    """What the authority gave for a token, sealed as it is to be stored."""

    credential: Credential
    fingerprint: bytes = field(repr=False)
    successor: bytes = field(repr=False)
    """The fingerprint of the new refresh token."""
    access: str = field(repr=False)
    refresh: str = field(repr=False)
    scope: str | None
    expires_in: timedelta
    refresh_expires_in: timedelta | None
    received_at: datetime
    """From when the two are counted (UTC, aware)."""

    def shortened(self, lifetime: timedelta, now: datetime) -> timedelta:
        """Return what is left at `now` of a lifetime that began when the answer came; negative once it is over."""
        return lifetime - max(timedelta(0), now - self.received_at)


async def claim(
    connection: Connection, exchange: Exchange, *, lease: timedelta, spool: UUID | None, patience: timedelta
) -> Claimed | Verdict:
    """Take a business's lease and commit the intent to send its token, or say why not."""
    credential = exchange.credential
    key = credential.business_id, credential.stored, exchange.fingerprint
    timeout = CALL_TIMEOUT_SECONDS
    row = await connection.fetchrow(CLAIM, *key, exchange.id, lease, spool, patience, timeout=timeout)
    if row is not None:
        return Claimed(row["unanswered"], row["failures"])
    return Verdict(await connection.fetchval(FIND_REFUSAL, *key, timeout=timeout))


async def is_claimed(connection: Connection, exchange: Exchange) -> bool:
    """Return whether the exchange still holds its lease."""
    return bool(await connection.fetchval(IS_CLAIMED, exchange.credential.business_id, exchange.id))


async def save(connection: Connection, rotated: Rotated, now: datetime) -> bool:
    """Save what was rotated and end its exchange; False when the row holds another token by now, which stays."""
    credential, refresh_expires_in = rotated.credential, rotated.refresh_expires_in
    return bool(
        await connection.fetchval(
            SAVE,
            credential.business_id,
            credential.stored,
            rotated.access,
            rotated.refresh,
            rotated.shortened(rotated.expires_in, now),
            rotated.scope,
            rotated.fingerprint,
            None if refresh_expires_in is None else rotated.shortened(refresh_expires_in, now),
            rotated.successor,
            timeout=CALL_TIMEOUT_SECONDS,
        )
    )


async def flag(connection: Connection, credential: Credential) -> bool:
    """Ask the owner to consent again; False when the row holds another token by now, or is flagged already."""
    row = await connection.fetchval(ASK_FOR_CONSENT, credential.business_id, credential.stored)
    return row is not None


async def is_flagged(connection: Connection, credential: Credential) -> bool:
    """Return whether the owner is asked already, about this very token."""
    return bool(await connection.fetchval(IS_FLAGGED, credential.business_id, credential.stored))


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How an exchange ended that brought no tokens."""

    state: State
    unspent: bool
    """Whether the token that was sent is known not to be spent."""
    wait: timedelta | None = None
    """Before the next attempt."""
    silence: timedelta | None = None
    """For how long the authority asked to be left alone."""
    error: str | None = None


async def settle(
    connection: Connection,
    exchange: Exchange,
    end: End,
) -> None:
    """End an exchange that brought no tokens; nothing happens if another took the lease over."""
    await connection.execute(
        SETTLE,
        exchange.credential.business_id,
        exchange.id,
        end.state,
        end.unspent,
        end.wait,
        end.silence,
        end.error,
        timeout=CALL_TIMEOUT_SECONDS,
    )


async def note(connection: Connection, business_id: UUID, state: State, error: str) -> None:
    """Remember what is so of a business without asking anybody: its stored token is unreadable, or spent."""
    await connection.execute(NOTE, business_id, state, error, timeout=CALL_TIMEOUT_SECONDS)


async def release_abandoned(connection: Connection, spool: UUID, here: Sequence[bytes]) -> None:
    """Let every replica try the tokens again whose answers are not in this spool, which was applied but for `here`."""
    await connection.execute(RELEASE_ABANDONED, spool, list(here), timeout=CALL_TIMEOUT_SECONDS)
