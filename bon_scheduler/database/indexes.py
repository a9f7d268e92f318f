"""
The indexes that BON lacks and draft clean-up wants: `check` recommends them, and so does a run that goes without.

Without them each deleted draft scans a table, so that its foreign keys can be checked: 29,000 drafts among a million
invoices take 96 s, and 1.3 s with them. BON's structure is BON's: nothing here creates one.
"""

from bon_scheduler.jobs import Connection

__all__ = ["missing_indexes"]

# $1 table: text, $2 column: text. Whether some index begins with the column.
HAS_INDEX_ON = """
    select exists (select from pg_index i
                     join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
                    where i.indrelid = to_regclass($1) and a.attname = $2 and i.indisvalid)
"""
RECOMMENDED_INDEXES = (
    ("invoices", "credited_invoice_id"),
    ("emergency_allocation_numbers", "used_for_invoice_id"),
)


async def missing_indexes(connection: Connection) -> dict[str, str]:
    """Return `table.column` of each index that is missing, and the statement that creates it."""
    return {
        f"{table}.{column}": f"CREATE INDEX CONCURRENTLY ON {table} ({column}) WHERE {column} IS NOT NULL"
        for table, column in RECOMMENDED_INDEXES
        if not await connection.fetchval(HAS_INDEX_ON, table, column)
    }
