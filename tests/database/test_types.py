"""No statement makes a fresh connection ask the database for a type: that costs more than most statements."""

import pytest

import bon_scheduler
import handlers
import health
from bon_scheduler.database import connections
from tests.conftest import Connection
from tests.handlers.test_sql import statements

ASKS_FOR_TYPES = "typeinfo_tree"


async def asked_for_types(connection: Connection, sql: str) -> bool:
    asked: list[str] = []
    with connection.query_logger(lambda record: asked.append(record.query)):
        await connection.prepare(sql)
    return any(ASKS_FOR_TYPES in query for query in asked)


async def test_no_statement_asks_for_a_type(database_url: str) -> None:
    found = dict(statements(bon_scheduler, handlers, health))
    for name, sql in found.items():
        async with connections.connect(database_url) as connection:
            assert not await asked_for_types(connection, sql), name


@pytest.mark.parametrize("sql", ["select 'queued'::bon_scheduler.run_state", "select $1::bon_scheduler.run_state"])
async def test_the_question_for_a_type_is_seen(connection: Connection, sql: str) -> None:
    assert await asked_for_types(connection, sql)
