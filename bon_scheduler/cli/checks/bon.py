"""BON's tables: there, of the types that statements take them for, and usable by the role that works."""

from collections.abc import Collection

from bon_scheduler.cli.checks.findings import Finding, Level, ok
from bon_scheduler.database import (
    COLUMNS,
    Advice,
    Refusal,
    costs_of_marking,
    hidden_tables,
    missing_columns,
    missing_indexes,
    missing_tables,
    other_columns,
    refusals,
    unindexed_searches,
)
from bon_scheduler.jobs import Connection

__all__ = ["check_columns", "check_hidden_rows", "check_indexes", "check_privileges", "refused"]

SCANS = "0.27 ms at 100,000 invoices and 3.5 ms at a million; with both, 29,000 drafts there take 1.3 s and not 96 s"
"""Measured: docs/decisions/0034-rehearsals-and-advice.md, and `python -m benchmarks.indexes`."""
HOT = (
    "Where nothing else of BON's needs what is dropped, have BON run all of it. Marking then takes 0.23 times the time "
    "and 0.30 times the WAL; a part of it gains next to nothing. A night with nothing to mark takes 0.2 s instead of "
    "0.06 s at 100,000 invoices. The room is for pages written from then on."
)
INDEXED = ("invoices", "emergency_allocation_numbers", "sessions")
"""The tables on whose indexes there is advice."""
MIGRATE_BON = "Run BON's own migrations on this database, or point DATABASE_URL at BON's."


async def check_columns(connection: Connection) -> list[Finding]:
    """Look for each column, and at its type."""
    name, missing = "BON's tables", await missing_columns(connection)
    absent = sorted({row["table_name"] for row in missing if row["no_table"]})
    findings = [Finding(name, Level.FAILURE, f"table {table} is missing", MIGRATE_BON) for table in absent]
    findings += [
        Finding(name, Level.FAILURE, f"column {row['table_name']}.{row['column_name']} is missing", MIGRATE_BON)
        for row in missing
        if not row["no_table"]
    ]
    findings += [
        Finding(
            name,
            Level.FAILURE,
            f"column {column.name} {column.fault}",
            "Run a version of bon_scheduler that knows BON's tables as they are now, or undo the change.",
        )
        for column in await other_columns(connection)
    ]
    count = sum(map(len, COLUMNS.values()))
    return findings or [ok(name, f"{len(COLUMNS)} tables, {count} columns as expected")]


async def check_privileges(connection: Connection) -> list[Finding]:
    """Ask for each privilege that some job needs."""
    role = await connection.fetchval("select quote_ident(current_user)")
    found = [refused(role, each) for each in await refusals(connection)]
    found += await _unjudged(connection, "privileges", COLUMNS)
    return found or [ok("privileges", f"role {role} may do in BON's tables what jobs, metrics and commands need")]


def refused(role: str, refusal: Refusal) -> Finding:
    """Return a refusal as a failure."""
    users = f"; needed by {', '.join(refusal.users)}" if refusal.users else ""
    return Finding("privileges", Level.FAILURE, f"role {role} may not {refusal.what}{users}", refusal.grant)


async def check_hidden_rows(connection: Connection) -> list[Finding]:
    """Look for tables whose rows a policy may hide: each statement on one is an error, by row_security = off."""
    role = await connection.fetchval("select quote_ident(current_user)")
    remedy = f"alter role {role} bypassrls; -- as a superuser"
    found = [
        Finding("row security", Level.FAILURE, f"{table} hides rows from role {role}, so jobs that use it fail", remedy)
        for table in await hidden_tables(connection)
    ]
    return found + await _unjudged(connection, "row security", COLUMNS) or [ok("row security", "hides no rows")]


async def check_indexes(connection: Connection) -> list[Finding]:
    """Look for the indexes that BON lacks, and for those that make marking expensive; tell what was measured."""
    found = [
        Finding(
            "indexes",
            Level.WARNING,
            f"no index on {where}: each deleted draft scans the table, {SCANS}",
            f"Have BON run: {statement}",
        )
        for where, statement in (await missing_indexes(connection)).items()
    ]
    found += [
        Finding("indexes", Level.WARNING, advice.what, "\n".join(["Have BON run:", *_lines(advice)]))
        for advice in await unindexed_searches(connection)
    ]
    if (advice := await costs_of_marking(connection)) is not None:
        what = f"marking an invoice overdue is no HOT update, it writes to each of its indexes: {advice.what}"
        found.append(Finding("indexes", Level.WARNING, what, "\n".join([HOT, *_lines(advice)])))
    found += await _unjudged(connection, "indexes", INDEXED)
    return found or [ok("indexes", "the recommended ones exist, and marks can be HOT updates")]


async def _unjudged(connection: Connection, name: str, tables: Collection[str]) -> list[Finding]:
    """Return, as a warning, that a look found nothing to look at, because tables are missing."""
    if not (absent := sorted(set(tables) & set(await missing_tables(connection)))):
        return []
    which = "none of BON's tables is there" if len(absent) == len(tables) else f"not there: {', '.join(absent)}"
    return [Finding(name, Level.WARNING, f"could not be judged: {which}", "See `BON's tables`; then look again.")]


def _lines(advice: Advice) -> list[str]:
    return [f"{statement};" for statement in advice.statements]
