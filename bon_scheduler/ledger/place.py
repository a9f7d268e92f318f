"""
Where the ledger lives, and whether a process works with it there.

A copy has all that the original has, also what waits and what is due. Whoever starts on one would write to every owner
and spend every token a second time. So the ledger remembers its place, and who finds another is refused (`fault`),
until a person says that this is the place now (`adopt`). `mark` grows while anybody serves: who has seen a higher one
than the ledger holds knows that it went back in time, and says so in `behind`, for all the others.
"""

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

import asyncpg

from bon_scheduler.addresses import read_database_address
from bon_scheduler.config import Settings
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger.changes import RefusedError
from bon_scheduler.ledger.entries import CALL_TIMEOUT_SECONDS

__all__ = [
    "REMEDY",
    "Caller",
    "Found",
    "Place",
    "Whereabouts",
    "adopt",
    "fault",
    "find_place",
    "mark_place",
    "remember_place",
    "report_behind",
]

USUAL_PORT = "5432"
SOCKET = "socket"
MOST_ADDRESSES = 20
REMEDY = (
    "Nothing is sent, recorded as due or run here. If this is the place from now on, say so with the settings of the "
    "service: bon-scheduler adopt --reason …"
)

FIND = """
    select w.server, w.version, w.database, w.ledger, w.started, w.timeline, p.id, p.deployment, p.addresses,
           p.server as its_server, p.version as its_version, p.database as its_database, p.ledger as its_ledger,
           p.started as its_started, p.mark, p.behind, p.since
      from bon_scheduler.whereabouts() w
      left join bon_scheduler.place p on true
"""
# $1 deployment or null, $2 addresses: text[].
REMEMBER = """
    insert into bon_scheduler.place (deployment, addresses, server, version, database, ledger, started, mark)
    select $1, $2, w.server, w.version, w.database, w.ledger, w.started, 1
      from bon_scheduler.whereabouts() w
        on conflict do nothing
 returning mark
"""
# $1 deployment or null, $2 addresses: text[], $3 the mark that was found: bigint. Of a ledger that went back meanwhile,
# or is another, nothing is marked.
MARK = """
    update bon_scheduler.place p
       set mark = p.mark + 1, deployment = coalesce(p.deployment, $1), addresses = $2,
           server = coalesce(w.server, p.server), version = w.version, started = w.started
      from bon_scheduler.whereabouts() w
     where p.mark >= $3 and p.behind is null and p.database = w.database and p.ledger = w.ledger
 returning p.mark
"""
# $1 the highest mark that was seen: bigint, $2 addresses: text[].
REPORT_BEHIND = """
    insert into bon_scheduler.place (addresses, server, version, database, ledger, started, mark, behind)
    select $2, w.server, w.version, w.database, w.ledger, w.started, 0, $1
      from bon_scheduler.whereabouts() w
        on conflict (only_one) do update set behind = greatest(place.behind, excluded.behind)
"""
LOCK = "select from bon_scheduler.place for update"
# $1 deployment or null, $2 addresses: text[], $3 by, $4 reason. The mark rises above all that anybody has seen.
ADOPT = """
    with adopted as (
        update bon_scheduler.place p
           set deployment = $1, addresses = $2, server = w.server, version = w.version, database = w.database,
               ledger = w.ledger, started = w.started, mark = greatest(p.mark, p.behind) + 1, behind = null,
               since = clock_timestamp()
          from bon_scheduler.whereabouts() w
        returning p.id
    )
    insert into bon_scheduler.operator_actions (by, action, target, reason) select $3, 'adopt', 'place', $4 from adopted
"""


@dataclass(frozen=True, slots=True)
class Caller:
    """How a process comes to the ledger, as it was configured."""

    deployment: str | None
    addresses: frozenset[str]
    """Host and port of each server."""

    @classmethod
    def of(cls, settings: Settings) -> "Caller":
        """Read it from the settings. The address is the server's own, whatever pooler stands beside it."""
        servers = read_database_address(settings.listen_url).servers or (("", ""),)
        addresses = (f"{host.lower() or SOCKET}:{port or USUAL_PORT}" for host, port in servers)
        return cls(settings.deployment, frozenset(addresses))


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """Which server, database and tables a connection leads to; see the SQL function `whereabouts`."""

    server: str | None
    version: int
    database: int
    ledger: int
    started: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the ledger lives, as it remembers."""

    id: UUID
    deployment: str | None
    addresses: frozenset[str]
    whereabouts: Whereabouts
    mark: int
    behind: int | None
    since: datetime

    def __str__(self) -> str:
        """Name the deployment, or the addresses."""
        return f"DEPLOYMENT {self.deployment}" if self.deployment else ", ".join(sorted(self.addresses))


@dataclass(frozen=True, slots=True)
class Found:
    """What a look found."""

    here: Whereabouts
    place: Place | None = field(default=None)
    """None: nothing is remembered."""
    timeline: str | None = None
    """Another after a promotion or a recovery; None: the server does not tell."""


def _whereabouts(row: asyncpg.Record, prefix: str = "") -> Whereabouts:
    names = ("server", "version", "database", "ledger", "started")
    return Whereabouts(**{name: row[prefix + name] for name in names})


async def find_place(connection: Connection) -> Found:
    """Look where the connection leads, and what the ledger remembers."""
    row = await connection.fetchrow(FIND, timeout=CALL_TIMEOUT_SECONDS)
    if row is None:
        raise LookupError("whereabouts always returns one row")
    if row["id"] is None:
        return Found(_whereabouts(row), None, row["timeline"])
    place = Place(
        id=row["id"],
        deployment=row["deployment"],
        addresses=frozenset(row["addresses"]),
        whereabouts=_whereabouts(row, "its_"),
        mark=row["mark"],
        behind=row["behind"],
        since=row["since"],
    )
    return Found(_whereabouts(row), place, row["timeline"])


def fault(found: Found, caller: Caller, *, admitted: bool = False) -> str | None:
    """
    Return why this is not the place that the ledger remembers, in a sentence; None: it is, or none is remembered.

    `admitted`: the caller found no fault before. How it comes here has not changed since, so it is not judged again.
    """
    if (place := found.place) is None:
        return None
    its, here = place.whereabouts, found.here
    if place.behind is not None:
        return (
            f"This ledger went back in time, as a restored backup does: it is at mark {place.mark}, and {place.behind} "
            "was seen before"
        )
    # pg_upgrade makes another server and keeps the identifiers of databases and tables; a dump keeps neither.
    upgraded = here.version > its.version and (here.database, here.ledger) == (its.database, its.ledger)
    if None not in (its.server, here.server) and its.server != here.server and not upgraded:
        return f"This ledger lives on another server (system identifier {its.server}, this one's is {here.server})"
    if its.database != here.database:
        return (
            f"This ledger lives in another database (object identifier {its.database}, this one's is {here.database})"
        )
    if its.ledger != here.ledger:
        return "This ledger was restored from a dump: its tables are not those that were written to before"
    return None if admitted else _fault_of_way(place, caller, same_server=its.started == here.started)


def _fault_of_way(place: Place, caller: Caller, *, same_server: bool) -> str | None:
    """Return what is wrong with how the caller comes to a server and database that may be a physical copy."""
    if place.deployment is not None:
        if caller.deployment == place.deployment:
            return None
        named = f'is "{caller.deployment}"' if caller.deployment else "is not set"
        return f'This ledger is of DEPLOYMENT "{place.deployment}", which {named} here'
    if same_server or place.addresses & caller.addresses:
        return None
    return (
        f"This ledger lives at {', '.join(sorted(place.addresses))}, and this process was told to come to "
        f"{', '.join(sorted(caller.addresses))}, where another server runs"
    )


async def remember_place(connection: Connection, caller: Caller) -> bool:
    """Remember that the ledger lives here; False when another place was remembered meanwhile."""
    mark = await connection.fetchval(
        REMEMBER, caller.deployment, sorted(caller.addresses), timeout=CALL_TIMEOUT_SECONDS
    )
    return mark is not None


async def mark_place(connection: Connection, place: Place, caller: Caller) -> int | None:
    """
    Raise the mark, and note how the caller comes here; return the new mark.

    None: the ledger is no longer the one that was found.
    """
    known = sorted(place.addresses | caller.addresses)
    addresses = known if len(known) <= MOST_ADDRESSES else sorted(caller.addresses)
    mark: int | None = await connection.fetchval(
        MARK, caller.deployment, addresses, place.mark, timeout=CALL_TIMEOUT_SECONDS
    )
    return mark


async def report_behind(connection: Connection, seen: int, caller: Caller) -> None:
    """Write down that a higher mark was seen, for every process that did not see it."""
    await connection.execute(REPORT_BEHIND, seen, sorted(caller.addresses), timeout=CALL_TIMEOUT_SECONDS)


async def adopt(connection: Connection, caller: Caller, *, by: str, reason: str) -> str:
    """Have the ledger live here from now on; return what was the matter. Raises RefusedError where nothing is."""
    async with connection.transaction():
        await connection.fetch(LOCK, timeout=CALL_TIMEOUT_SECONDS)
        found = await find_place(connection)
        if (what := fault(found, caller)) is None:
            where = "remembers no place yet" if found.place is None else f"lives here ({found.place})"
            raise RefusedError(
                f"This ledger {where}: nothing is quarantined for this command's settings. "
                "Give it the settings of the process that is."
            )
        await connection.execute(
            ADOPT, caller.deployment, sorted(caller.addresses), by, reason, timeout=CALL_TIMEOUT_SECONDS
        )
    return what
