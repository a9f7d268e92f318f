"""
What BON's indexes cost the jobs: those that are missing, and those that make marking expensive.

`check` recommends what is better, with the reason and what was measured (`python -m benchmarks.indexes`). A run of
draft clean-up that goes without its two says so as well. BON's structure is BON's: nothing here changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bon_scheduler.jobs import Connection

__all__ = ["Advice", "costs_of_marking", "missing_indexes", "unindexed_searches"]

# $1 table: text, $2 column: text, $3 indexes that do not count, by their qualified names: text[]. Whether some index
# begins with the column. True where there is no table.
HAS_INDEX_ON = """
    select to_regclass($1) is null
        or exists (select from pg_index i
                     join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
                    where i.indrelid = to_regclass($1)
                      and i.indisvalid
                      and i.indexrelid <> all ($3::text[]::regclass[])
                      and a.attname = $2)
"""
# $1 invoices: text, $2 indexes that do not count: text[]. Whether some index serves the search for stale drafts: it
# begins with their age, or holds drafts alone. True where there is no table.
HAS_INDEX_OF_DRAFTS = """
    select to_regclass($1) is null
        or exists (select from pg_index i
                     join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
                    where i.indrelid = to_regclass($1)
                      and i.indisvalid
                      and i.indexrelid <> all ($2::text[]::regclass[])
                      and (a.attname = 'updated_at'
                           or pg_get_expr(i.indpred, i.indrelid) ~ '^\\(status = ''draft''::[a-z_."]+\\)$'))
"""
# $1 invoices: text. The indexes on it that hold a column which marking changes, or name it in their predicate: with
# one of them no update of that column is HOT. Those of BRIN are an exception, from PostgreSQL 16 on.
IN_THE_WAY = """
    select format('%I.%I', n.nspname, c.relname) as name, changed.attname as column_name
      from pg_index i
      join pg_class c on c.oid = i.indexrelid
      join pg_namespace n on n.oid = c.relnamespace
      join pg_am m on m.oid = c.relam
      join pg_attribute changed
        on changed.attrelid = i.indrelid and changed.attname in ('is_overdue', 'updated_at')
     where i.indrelid = to_regclass($1)
       and (m.amname <> 'brin' or current_setting('server_version_num')::int < 160000)
       and (changed.attnum = any (i.indkey::int2[])
            or pg_get_expr(i.indpred, i.indrelid) ~ ('\\m' || changed.attname || '\\M')
            or pg_get_expr(i.indexprs, i.indrelid) ~ ('\\m' || changed.attname || '\\M'))
     order by changed.attname, c.relname
"""
# $1 invoices: text. How full inserts make each of its pages, in percent.
FILLFACTOR = """
    select coalesce((select o.option_value::int from pg_options_to_table(c.reloptions) o
                      where o.option_name = 'fillfactor'), 100)
      from pg_class c
     where c.oid = to_regclass($1)
"""
INVOICES = "public.invoices"
REFERENCES_TO_DRAFTS = (
    (INVOICES, "credited_invoice_id"),
    ("public.emergency_allocation_numbers", "used_for_invoice_id"),
)
CANDIDATES_INDEX = (
    "CREATE INDEX CONCURRENTLY ON public.invoices (due_date, status)"
    " WHERE due_date IS NOT NULL AND status IN ('finalized', 'sent', 'partially_paid')"
)
DRAFTS_INDEX = "CREATE INDEX CONCURRENTLY ON public.invoices (created_at) WHERE status = 'draft'"
SESSIONS_INDEX = "CREATE INDEX CONCURRENTLY ON public.sessions (expires_at)"
"""What serves the jobs' searches, and holds no column that marking changes."""
MOST_FULL = 90
"""Percent. A page that inserts fill further has no room for the marks of its invoices."""
ROOM = "ALTER TABLE public.invoices SET (fillfactor = 85)"


@dataclass(frozen=True, slots=True)
class Advice:
    """What would serve the jobs better: what is so now and costs, and the statements that change it."""

    what: str
    statements: Sequence[str]


async def missing_indexes(connection: Connection) -> dict[str, str]:
    """Return `table.column` of each index that deleting drafts lacks, and the statement that creates it."""
    return {
        f"{table.removeprefix('public.')}.{column}": (
            f"CREATE INDEX CONCURRENTLY ON {table} ({column}) WHERE {column} IS NOT NULL"
        )
        for table, column in REFERENCES_TO_DRAFTS
        if not await connection.fetchval(HAS_INDEX_ON, table, column, [])
    }


async def unindexed_searches(connection: Connection) -> list[Advice]:
    """Return what jobs search by, each night, without an index that serves them."""
    found = []
    if not await connection.fetchval(HAS_INDEX_ON, INVOICES, "due_date", []):
        what = "no index on invoices.due_date: overdue-detection reads all invoices for each batch"
        found.append(Advice(what, [CANDIDATES_INDEX]))
    if not await connection.fetchval(HAS_INDEX_OF_DRAFTS, INVOICES, []):
        found.append(Advice("no index of drafts: draft-cleanup reads all invoices for each batch", [DRAFTS_INDEX]))
    if not await connection.fetchval(HAS_INDEX_ON, "public.sessions", "expires_at", []):
        what = "no index on sessions.expires_at: session-cleanup reads all sessions for each batch"
        found.append(Advice(what, [SESSIONS_INDEX]))
    return found


async def costs_of_marking(connection: Connection) -> Advice | None:
    """Return what keeps marks from being HOT updates, and what would let them; None where nothing does."""
    in_the_way: dict[str, list[str]] = {}
    for row in await connection.fetch(IN_THE_WAY, INVOICES):
        in_the_way.setdefault(row["name"], []).append(row["column_name"])
    full = (await connection.fetchval(FILLFACTOR, INVOICES) or 0) > MOST_FULL
    if not in_the_way and not full:
        return None
    reasons = [f"{name} names {' and '.join(columns)}" for name, columns in in_the_way.items()]
    reasons += ["inserts leave no room in a page"] if full else []
    instead = []
    names = list(in_the_way)
    if names and not await connection.fetchval(HAS_INDEX_ON, INVOICES, "due_date", names):
        instead.append(CANDIDATES_INDEX)
    if names and not await connection.fetchval(HAS_INDEX_OF_DRAFTS, INVOICES, names):
        instead.append(DRAFTS_INDEX)
    dropped = [f"DROP INDEX CONCURRENTLY {name}" for name in names]
    return Advice("; ".join(reasons), [*instead, *dropped, *([ROOM] if full else [])])
