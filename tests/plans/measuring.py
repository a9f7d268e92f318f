"""What a statement reads on a full ledger: the indexes of its generic plan, and the rows of all that it calls."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.conftest import Connection

# What this transaction has read so far. Whatever runs inside a function, a trigger or a cascade counts too.
READ = """
    select i.relname as index, pg_stat_get_xact_numscans(i.oid) as scans,
           pg_stat_get_xact_tuples_returned(i.oid) as rows
      from pg_class i
      join pg_index x on x.indexrelid = i.oid
     where i.relnamespace in ('bon_scheduler'::regnamespace, 'public'::regnamespace)
     union all
    select null, 0, sum(pg_stat_get_xact_tuples_returned(t.oid))::bigint
      from pg_class t
     where t.relnamespace in ('bon_scheduler'::regnamespace, 'public'::regnamespace) and t.relkind = 'r'
"""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one execution has read."""

    planned: frozenset[str]
    """The indexes that its own generic plan names."""
    used: frozenset[str]
    """The indexes that were searched, also by what it calls."""
    rows: int
    """Entries of indexes and rows of tables."""


async def measure(connection: Connection, sql: str, arguments: Sequence[str | None]) -> Reading:
    """Execute a statement with its generic plan in a transaction that is rolled back."""
    given = ", ".join("null" if each is None else "'" + each.replace("'", "''") + "'" for each in arguments)
    call = f"execute statement ({given})" if arguments else "execute statement"
    await connection.execute("deallocate all")
    await connection.execute(f"prepare statement as {sql}")
    transaction = connection.transaction()
    await transaction.start()
    try:
        plan: Any = await connection.fetchval(f"explain (format json) {call}")
        # Once before it is measured: planning reads the ends of indexes.
        await connection.execute(f"savepoint once; {call}; rollback to savepoint once")
        before = await _read(connection)
        await connection.execute(call)
        after = await _read(connection)
    finally:
        await transaction.rollback()
    grown = {name: (scans - before[name][0], rows - before[name][1]) for name, (scans, rows) in after.items()}
    return Reading(
        frozenset(_named(json.loads(plan) if isinstance(plan, str) else plan)),
        frozenset(name for name, (scans, _) in grown.items() if name and scans > 0),
        sum(rows for _, rows in grown.values()),
    )


async def _read(connection: Connection) -> dict[str | None, tuple[int, int]]:
    return {row["index"]: (row["scans"], row["rows"] or 0) for row in await connection.fetch(READ)}


def _named(plan: Any) -> set[str]:
    """The indexes that a plan searches, or decides a conflict by."""
    if isinstance(plan, list):
        return set().union(*map(_named, plan))
    if not isinstance(plan, dict):
        return set()
    here = {plan["Index Name"]} if "Index Name" in plan else set()
    return here | set(plan.get("Conflict Arbiter Indexes", ())) | _named(list(plan.values()))


def comment_above(source: str, name: str) -> str:
    """The comment above a constant of a module, as one line."""
    found = re.search(rf"((?:^#[^\n]*\n)+){name}\b[^=\n]*= ", source, re.MULTILINE)
    return " ".join(line.lstrip("# ") for line in found[1].splitlines()) if found else ""


def indexes_in(comment: str) -> frozenset[str]:
    """The names after `Index:` or `Indexes:`, up to the end of that sentence."""
    found = re.search(r"\bIndex(?:es)?: ([^.]*)", comment)
    return (
        frozenset(re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", re.sub(r"\w+ \(.*?\)", "", found[1])))
        if found
        else frozenset()
    )
