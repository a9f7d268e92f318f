"""What a session has whose role works: whether each setting is ours, and what the role and the database would set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from bon_scheduler.config import Settings
from bon_scheduler.database.connections import OURS, idle_limit_ms
from bon_scheduler.jobs import Connection

__all__ = ["WorkingSession", "look_at_session", "offsets"]

# $1 settings: text[]. What the server does not know is null.
CURRENT = """
    select name, current_setting(name, true) as value from unnest($1::text[]) as name
"""
# $1 settings: text[]. What role and database set for each session of theirs.
INHERITED = """
    select distinct split_part(item, '=', 1) as name, substr(item, strpos(item, '=') + 1) as value
      from pg_db_role_setting s
     cross join unnest(s.setconfig) as item
     where s.setdatabase in (0, (select oid from pg_database where datname = current_database()))
       and s.setrole in (0, (select oid from pg_roles where rolname = session_user))
       and split_part(item, '=', 1) = any ($1)
     order by 1, 2
"""
# A role whose password expires keeps its connections and gets no new one.
ROLES = """
    select quote_ident(current_user) as works_as, quote_ident(session_user) as logs_in_as,
           pg_is_in_recovery() as standby,
           (select to_char(r.rolvaliduntil at time zone 'UTC', 'YYYY-MM-DD HH24:MI') || ' UTC'
              from pg_roles r
             where r.rolname = session_user
               and r.rolvaliduntil < now() + interval '30 days') as expires
"""
IDLE_LIMIT = """
    select (extract(epoch from current_setting('idle_in_transaction_session_timeout')::interval) * 1000)::bigint
"""
# $1 instants: timestamptz[], $2 zone.
OFFSETS = """
    select (at at time zone $2) - (at at time zone 'UTC') from unnest($1::timestamptz[]) with ordinality as i (at, n)
     order by n
"""
OF_EACH_TRANSACTION = {"transaction_isolation": "read committed", "transaction_read_only": "off", "TimeZone": "UTC"}
NOT_SET = {"transaction_timeout": "0", "session_replication_role": "origin"}
"""What we leave as it is. The first, of PostgreSQL 17, would end transactions; the other would undo foreign keys."""


@dataclass(frozen=True, slots=True)
class WorkingSession:
    """A session as the server has it; values as SHOW writes them."""

    works_as: str
    logs_in_as: str
    """Both as SQL writes them."""
    standby: bool
    expires: str | None
    """When the role's password does, where that is within 30 days."""
    isolation: str
    different: Mapping[str, str]
    """What is not as it must be."""
    durable: bool
    """Whether a commit is on disk once it is reported."""
    inherited: Mapping[str, str]
    """What the role or the database sets, and we replace."""


async def look_at_session(connection: Connection, settings: Settings) -> WorkingSession:
    """Look at the session that a handler would have, within a transaction."""
    wanted = {name: value.strip("'") for name, value in OURS.items() if not name.startswith("default_")}
    wanted |= OF_EACH_TRANSACTION | NOT_SET
    names = [*wanted, "synchronous_commit"]
    have = {row["name"]: row["value"] for row in await connection.fetch(CURRENT, names)}
    different = {name: have[name] for name, value in wanted.items() if have[name] not in (value, None)}
    limit = await connection.fetchval(IDLE_LIMIT)
    if limit != idle_limit_ms(settings):
        different["idle_in_transaction_session_timeout"] = f"{limit} ms"
    replaced = [*OURS, "TimeZone", "idle_in_transaction_session_timeout"]
    inherited = {row["name"]: row["value"] for row in await connection.fetch(INHERITED, replaced)}
    [roles] = await connection.fetch(ROLES)
    isolation, durable = have["transaction_isolation"], have["synchronous_commit"] != "off"
    return WorkingSession(
        **roles,
        isolation=isolation,
        different=different,
        durable=durable,
        inherited=inherited,
    )


async def offsets(connection: Connection, zone: str, instants: Sequence[datetime]) -> list[timedelta] | None:
    """Return how far the zone is from UTC at each instant as the database knows it; None: it does not know the zone."""
    try:
        async with connection.transaction():
            return [row[0] for row in await connection.fetch(OFFSETS, instants, zone)]
    except asyncpg.InvalidParameterValueError:
        return None
