"""The server and the session that works: version, notifications, settings, room for connections, clocks and zones."""

import zoneinfo
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from zoneinfo import ZoneInfo

from bon_scheduler import database, ledger
from bon_scheduler.cli.checks.findings import Finding, Level, ok, split_failure
from bon_scheduler.clock import Clock
from bon_scheduler.config import Settings
from bon_scheduler.database import OtherDatabaseError, PoolerError, Room, how_much_room, look_at_session, offsets
from bon_scheduler.jobs import Connection
from bon_scheduler.schedule import transitions

__all__ = [
    "check_clock",
    "check_room",
    "check_same_database",
    "check_same_role",
    "check_server",
    "check_session",
    "check_sessions",
    "check_zone",
]

SUPPORTED_VERSIONS = range(15, 19)
CLOCK_TOLERANCE = timedelta(seconds=5)
BESIDE_THE_POOL = 6
"""As DATABASE_POOL_SIZE says: one listens and claims, one is the heartbeat, four are the control pool's."""
ZONE_AHEAD = timedelta(days=400)


def check_protection(settings: Settings) -> list[Finding]:
    """Say of each address of the database how the way there is protected."""
    return [
        Finding("encryption", Level.WARNING if found.remedy else Level.OK, f"{name}: {found.what}", found.remedy)
        for name, found in database.protections(settings).items()
    ]


async def check_server(connection: Connection) -> list[Finding]:
    """Ask for the version, and which database it is."""
    number = int(await connection.fetchval("select current_setting('server_version_num')")) // 10000
    if number in SUPPORTED_VERSIONS:
        return [ok("database", f"PostgreSQL {number} answers; the database is {await database.name_of(connection)}")]
    what = f"PostgreSQL {number} is not one this version was tried on"
    return [Finding("database", Level.WARNING, what, "Use 15 to 18.")]


async def check_sessions(settings: Settings) -> Finding:
    """Listen, and be notified."""
    try:
        await database.require_sessions(settings)
    except PoolerError as error:
        return split_failure("notifications", error)
    return ok("notifications", "LISTEN hears what is notified")


async def check_same_database(settings: Settings) -> list[Finding]:
    """Compare where the two addresses lead."""
    if settings.database_listen_url is None:
        return []
    try:
        await database.require_same_database(settings)
    except OtherDatabaseError as error:
        return [split_failure("same database", error)]
    return [ok("same database", "DATABASE_URL leads where DATABASE_LISTEN_URL does")]


async def check_same_role(connection: Connection, settings: Settings) -> list[Finding]:
    """Compare the roles of the two addresses: one must be able to end the connections of the other."""
    if settings.database_listen_url is None:
        return []
    query = "select current_user::text"
    async with database.connect(settings.listen_url, pooled=True) as listener:
        listens_as = await listener.fetchval(query)
    works_as = await connection.fetchval(query)
    if works_as == listens_as:
        return [ok("same role", f"both addresses log in as {works_as}")]
    what = (
        f"DATABASE_URL logs in as {works_as} and DATABASE_LISTEN_URL as {listens_as}, who cannot end a dead worker's "
        "connections and was not looked at here"
    )
    return [Finding("same role", Level.WARNING, what, "Name one role in both.")]


async def check_session(connection: Connection, settings: Settings) -> list[Finding]:
    """Look at what a handler's session really has."""
    found = await look_at_session(connection, settings)
    name, findings = "session", []
    if found.standby:
        what = "the server is a standby, on which nothing can be written"
        findings.append(Finding(name, Level.FAILURE, what, "Have DATABASE_URL lead to the primary."))
    elif found.different:
        listed = ", ".join(f"{setting} = {value}" for setting, value in found.different.items())
        remedy = "; ".join(f"alter role {found.logs_in_as} reset {setting}" for setting in found.different)
        what = f"is not as it must be: {listed}"
        findings.append(Finding(name, Level.FAILURE, what, f"{remedy}; or the same of the database."))
    if found.expires is not None:
        what = f"the password of {found.logs_in_as} is valid until {found.expires}: then nothing connects any more"
        remedy = f"alter role {found.logs_in_as} valid until 'infinity';"
        findings.append(Finding(name, Level.WARNING, what, remedy))
    if not found.durable:
        what = "synchronous_commit is off: a crash of the server forgets letters that were sent and tokens"
        remedy = f"alter role {found.logs_in_as} set synchronous_commit to on;"
        findings.append(Finding(name, Level.WARNING, what, remedy))
    who = f"as {found.works_as}" + ("" if found.works_as == found.logs_in_as else f", logged in as {found.logs_in_as}")
    replaced = ", ".join(f"{setting} = {value}" for setting, value in found.inherited.items())
    instead = f"; replaces what role or database set: {replaced}" if replaced else ""
    what = f"{who}, {found.isolation}, no time-out but ours{instead}"
    return findings or [ok(name, what)]


async def check_room(connection: Connection, settings: Settings, *, known: bool) -> list[Finding]:
    """Compare the limits of connections with what the living replicas take at most; `known`: our tables exist."""
    replicas = max(1, await ledger.count_serving(connection)) if known else 1
    each = BESIDE_THE_POOL if settings.database_listen_url else BESIDE_THE_POOL + settings.database_pool_size
    needed = replicas * each
    who = f"{replicas} {'replica takes' if replicas == 1 else 'replicas take'} up to {needed} connections"
    findings = [_crowded(room, needed, who) for room in await how_much_room(connection)]
    return [each for each in findings if each] or [ok("connections", f"{who}, and there is room")]


def _crowded(room: Room, needed: int, who: str) -> Finding | None:
    if room.most is None or room.most - room.others >= needed:
        return None
    level = Level.FAILURE if room.most < needed else Level.WARNING
    what = f"{who}; {room.of} allows {room.most}, of which others use {room.others}"
    more = f"{room.remedy}{needed + room.others};" if room.remedy else "Raise max_connections."
    return Finding("connections", level, what, f"{more} Or lower DATABASE_POOL_SIZE.")


async def check_clock(connection: Connection, clock: Clock) -> list[Finding]:
    """Compare this machine's clock with the database's."""
    before = clock.now()
    theirs = await connection.fetchval("select clock_timestamp()")
    apart = abs(theirs - (before + (clock.now() - before) / 2))
    what = f"this clock and the database's are {apart.total_seconds():.3f} s apart"
    if apart <= CLOCK_TOLERANCE:
        return [ok("clock", what)]
    return [Finding("clock", Level.WARNING, what, "Synchronise both machines (NTP); schedules depend on it.")]


async def check_zone(connection: Connection, zone: ZoneInfo, now: datetime) -> list[Finding]:
    """Compare the zone as Python knows it with what the database does, now and around its next changes."""
    changes = [each.instant for each in transitions(zone, now, now + ZONE_AHEAD)]
    days = [now + timedelta(days=day) for day in range(ZONE_AHEAD.days)]
    instants = sorted({*days, *changes, *(change - timedelta(seconds=1) for change in changes)})
    theirs = await offsets(connection, zone.key, instants)
    name, ours = "time zone", f"{zone.key} (time zone data {_zone_version()})"
    remedy = "Update the tzdata of this machine and of the database's server; BON's own SQL uses the latter."
    if theirs is None:
        return [Finding(name, Level.WARNING, f"the database does not know {ours}", remedy)]
    for instant, offset in zip(instants, theirs, strict=True):
        if (here := instant.astimezone(zone).utcoffset()) != offset:
            what = (
                f"{ours} is {_signed(here)} here and {_signed(offset)} in the database on {instant:%Y-%m-%d %H:%M} UTC"
            )
            return [Finding(name, Level.WARNING, what, remedy)]
    until = f"; clocks change next at {changes[0]:%Y-%m-%d %H:%M} UTC" if changes else ""
    return [ok(name, f"{ours} is the same in the database{until}")]


def _signed(offset: timedelta | None) -> str:
    minutes = int((offset or timedelta(0)).total_seconds() // 60)
    return f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}"


def _zone_version() -> str:
    """Return the version of the data that `zoneinfo` reads: the system's, else that of package tzdata."""
    for directory in map(Path, zoneinfo.TZPATH):
        if (directory / "UTC").exists():
            for name in ("+VERSION", "tzdata.zi"):
                if (file := directory / name).exists():
                    with file.open(encoding="ascii", errors="replace") as lines:
                        return lines.readline().removeprefix("# version").strip()
            return "of the system"
    return metadata.version("tzdata")
