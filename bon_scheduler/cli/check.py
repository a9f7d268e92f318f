"""
Is this deployment sound? One finding a line: ok, warning or failure, and the remedy.

Reads only, as the role and with the settings that a handler has. What cannot be looked at is a finding too, and the
other looks go on.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

import asyncpg

from bon_scheduler import database
from bon_scheduler.cli.checks.bon import check_columns, check_hidden_rows, check_indexes, check_privileges
from bon_scheduler.cli.checks.findings import Finding, Level, ok, split_failure
from bon_scheduler.cli.checks.outside import check_mail, check_schedules_off, check_shaam, check_spool
from bon_scheduler.cli.checks.own import (
    check_consent,
    check_functions,
    check_jobs,
    check_letters,
    check_own_tables,
    check_place,
    check_schedules,
    check_schema,
)
from bon_scheduler.cli.checks.server import (
    check_clock,
    check_protection,
    check_room,
    check_same_database,
    check_same_role,
    check_server,
    check_session,
    check_sessions,
    check_zone,
)
from bon_scheduler.cli.checks.work import check_paused, check_runs, check_service, check_ticks
from bon_scheduler.cli.parsing import BADLY, DONE
from bon_scheduler.clock import Clock
from bon_scheduler.config import Settings
from bon_scheduler.database import DatabaseUnavailableError
from bon_scheduler.jobs import Connection
from bon_scheduler.log import describe_error
from bon_scheduler.report import Column, Report

__all__ = ["Finding", "Level", "check", "check_deployment"]

LOOK_SECONDS = 20.0
"""A table that somebody has locked must not keep the other findings back."""


async def check_deployment(settings: Settings, clock: Clock) -> list[Finding]:
    """Look at everything; an unreachable database ends the looks at it."""
    findings = [ok("settings", "every setting is usable"), *check_jobs(), *check_protection(settings)]
    try:
        findings += await _check_database(settings, clock)
    except DatabaseUnavailableError as error:
        findings.append(split_failure("database", error))
    outside = [*check_spool(settings), *await check_shaam(settings), *await check_mail(settings)]
    return [*findings, *check_schedules_off(settings), *outside]


async def _check_database(settings: Settings, clock: Clock) -> list[Finding]:
    # BEFORE the connection that looks, otherwise a role with a limit of three has none left for them.
    sessions = await check_sessions(settings)
    found = [sessions, *await check_same_database(settings)]
    kept = sessions.level is Level.OK
    async with _looking(settings, as_working=kept) as connection:

        async def look(name: str, at: Callable[[Connection], Awaitable[list[Finding]]]) -> list[Finding]:
            try:
                async with asyncio.timeout(LOOK_SECONDS), connection.transaction():
                    return await at(connection)
            except asyncpg.PostgresConnectionError:
                raise
            except (asyncpg.PostgresError, TimeoutError) as error:
                why = f"no answer in {LOOK_SECONDS:g} s" if isinstance(error, TimeoutError) else describe_error(error)
                what = f"cannot be looked at: {why}"
                return [Finding(name, Level.FAILURE, what, "See the other findings; then look again.")]

        schema = await look("schema", check_schema)
        ours = all(each.level is Level.OK for each in schema)
        return [
            *await look("database", check_server),
            *found,
            *(await look("session", lambda on: check_session(on, settings)) if kept else ()),
            *await look("same role", lambda on: check_same_role(on, settings)),
            *await look("connections", lambda on: check_room(on, settings, known=ours)),
            *await look("clock", lambda on: check_clock(on, clock)),
            *await look("time zone", lambda on: check_zone(on, settings.bon_timezone, clock.now())),
            *await look("BON's tables", check_columns),
            *await look("privileges", check_privileges),
            *await look("row security", check_hidden_rows),
            *await look("indexes", check_indexes),
            *schema,
            *[each for each in await look("our tables", check_own_tables) if ours or each.level is not Level.OK],
            *[each for each in await look("functions", check_functions) if ours or _grants(each)],
            *(await look("place", lambda on: check_place(on, settings)) if ours else ()),
            *(await look("schedules", check_schedules) if ours else ()),
            *(await look("deliveries", check_letters) if ours else ()),
            *(await look("consent", check_consent) if ours else ()),
            *(await _check_work(look, settings) if ours else ()),
        ]


def _grants(finding: Finding) -> bool:
    """Whether a finding is mended by a GRANT: a role that may not even look at the schema is told all at once."""
    return (finding.remedy or "").startswith("grant ")


Look: TypeAlias = Callable[[str, Callable[[Connection], Awaitable[list[Finding]]]], Awaitable[list[Finding]]]


async def _check_work(look: Look, settings: Settings) -> list[Finding]:
    """Look whether anybody is at work, and what is left undone."""
    return [
        *await look("workers", lambda on: check_service(on, settings)),
        *await look("ticks", check_ticks),
        *await look("runs", check_runs),
        *await look("paused", check_paused),
    ]


@asynccontextmanager
async def _looking(settings: Settings, *, as_working: bool) -> AsyncIterator[Connection]:
    """Connect as a handler does, or so that nothing stays on the servers of a pooler that nobody told us of."""
    if as_working:
        async with database.open_pool(settings) as pool, pool.acquire() as connection:
            yield connection
    else:
        async with database.connect(settings.listen_url, pooled=True) as connection:
            yield connection


async def check(settings: Settings, report: Report, clock: Clock) -> int:
    """Report whether this deployment is sound."""
    findings = await check_deployment(settings, clock)
    levels = {finding.level for finding in findings}
    grade = next(level for level in (Level.FAILURE, Level.WARNING, Level.OK) if level in levels)
    sound = grade is not Level.FAILURE
    if report.as_json:
        keys = ("name", "level", "what", "remedy")
        report.document(
            {"sound": sound, "grade": grade, "findings": [{key: getattr(f, key) for key in keys} for f in findings]}
        )
    else:
        rows = [(f.level, f.name, f"{f.what}\n→ {f.remedy}" if f.remedy else f.what) for f in findings]
        report.table(["", "what", Column("found", wraps=24)], rows)
    return DONE if sound else BADLY
