"""Where businesses' refreshes stand: one business, or all at a glance. Reads only."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from bon_scheduler.jobs import Connection
from bon_scheduler.shaam.refreshes import CALL_TIMEOUT_SECONDS, State

__all__ = ["Standing", "Summary", "find_standing", "summarise"]

# $1 business. Index: shaam_refreshes_pkey.
FIND_STANDING = """
    select state, error, changed_at, holder is not null and lease_until > clock_timestamp() as held,
           greatest(silent_until - clock_timestamp(), '0') as silence
      from bon_scheduler.shaam_refreshes
     where business_id = $1
"""

# One row a business, read once a scrape.
SUMMARISE = """
    select extract(epoch from min(c.token_expires_at) filter (where not c.needs_reauth) - clock_timestamp())::float8
               as min_ttl_seconds,
           count(*) filter (where c.needs_reauth) as needs_reauth,
           count(*) filter (where not c.needs_reauth and r.state in ('deferred', 'failed')) as failing
      from public.business_shaam_credentials c
      join public.businesses b on b.id = c.business_id
      left join bon_scheduler.shaam_refreshes r on r.business_id = c.business_id
     where b.is_active = true
       and b.deleted_at is null
"""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a business's refreshes stand."""

    state: State
    error: str | None
    held: bool
    """Whether an exchange is under way."""
    changed_at: datetime
    silence: timedelta
    """For how long the authority asked to be left alone."""


@dataclass(frozen=True, slots=True)
class Summary:
    """All businesses at a glance."""

    min_ttl_seconds: float | None
    needs_reauth: int
    failing: int


async def find_standing(connection: Connection, business_id: UUID) -> Standing | None:
    """Read where a business stands; None when it was never tried."""
    row = await connection.fetchrow(FIND_STANDING, business_id, timeout=CALL_TIMEOUT_SECONDS)
    if row is None:
        return None
    return Standing(
        State(row["state"]), row["error"], row["held"] or False, row["changed_at"], row["silence"] or timedelta(0)
    )


async def summarise(connection: Connection) -> Summary:
    """Read all businesses at a glance."""
    row = await connection.fetchrow(SUMMARISE, timeout=CALL_TIMEOUT_SECONDS)
    if row is None:
        raise LookupError("an aggregate always returns one row")
    return Summary(row["min_ttl_seconds"], row["needs_reauth"], row["failing"])
