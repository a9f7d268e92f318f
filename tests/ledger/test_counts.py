"""What `/metrics` counts of the queue reads no more rows than it tells, however many runs wait."""

import pytest

from bon_scheduler import ledger
from bon_scheduler.ledger.history import MOST_COUNTED, READ_QUEUE
from tests.conftest import Connection

RUNS = 4 * MOST_COUNTED
# $1 how many: int. In each state, of several jobs; the last of them are put off.
FILL = """
    insert into bon_scheduler.runs (job, origin, state, ready, run_at, enqueued_at, finished_at)
    select case when n % 10 = 0 then 'generate-pdf' else 'send-invoice-email' end, 'program',
           case when n % 7 = 0 then 'retrying' else 'queued' end::bon_scheduler.run_state,
           n % 4 <> 0, case when n % 4 = 0 then now() + interval '1 day' end, now() - n * interval '1 second', null
      from generate_series(1, $1) as n
"""
DIE = "update bon_scheduler.runs set state = 'dead', finished_at = now() where job = 'generate-pdf'"
SOME = 100
"""More rows than there are jobs."""
# Rows of the table that this transaction has read so far, by whatever way.
ROWS_READ = """
    select sum(pg_stat_get_xact_tuples_returned(relation))
      from (select 'bon_scheduler.runs'::regclass::oid as relation
            union all
            select indexrelid from pg_index where indrelid = 'bon_scheduler.runs'::regclass) as r
"""


async def rows_read(connection: Connection, most: int) -> int:
    """Return how many rows of runs counting them takes."""
    async with connection.transaction():
        before = await connection.fetchval(ROWS_READ)
        await connection.fetch(READ_QUEUE, most)
        return int(await connection.fetchval(ROWS_READ) - before)


@pytest.fixture
async def filled(connection: Connection) -> Connection:
    await connection.execute("set session_replication_role = replica")
    await connection.execute(FILL.replace("$1", str(RUNS)))
    await connection.execute("reset session_replication_role")
    return connection


@pytest.mark.parametrize("analyzed", [False, True])
@pytest.mark.parametrize("dead", [False, True])
async def test_counting_reads_no_more_than_it_tells(filled: Connection, analyzed: bool, dead: bool) -> None:
    if dead:
        await filled.execute(DIE)
    if analyzed:
        await filled.execute("vacuum analyze bon_scheduler.runs")
    # What may start, what is put off and what is dead, of two jobs.
    assert MOST_COUNTED < await rows_read(filled, MOST_COUNTED) <= 4 * MOST_COUNTED + SOME
    assert await rows_read(filled, 100) <= 4 * 100 + SOME


async def test_a_short_queue_is_counted_exactly_and_a_long_one_up_to_a_bound(connection: Connection) -> None:
    await connection.execute(FILL.replace("$1", "400"))
    queue = await ledger.read_queue(connection)
    told = "select job, state::text as state, count(*) as runs from bon_scheduler.runs group by 1, 2"
    assert queue.depths == {(row["job"], row["state"]): row["runs"] for row in await connection.fetch(told)}
    assert queue.ages["send-invoice-email"] == pytest.approx(399, abs=5)
    await connection.execute(FILL.replace("$1", str(2 * MOST_COUNTED)))
    depths = (await ledger.read_queue(connection)).depths
    emails = sum(count for (job, _), count in depths.items() if job == "send-invoice-email")
    assert MOST_COUNTED <= emails <= 2 * MOST_COUNTED  # what may start, and what is put off


async def test_a_put_off_request_is_not_overdue_since_it_was_asked_for(connection: Connection) -> None:
    await connection.execute(
        "insert into bon_scheduler.runs (job, origin, run_at, enqueued_at) values"
        " ('generate-pdf', 'program', now() - interval '10 seconds', now() - interval '1 hour'),"
        " ('generate-pdf', 'program', null, now() - interval '20 seconds')"
    )
    assert (await ledger.read_queue(connection)).ages["generate-pdf"] == pytest.approx(20, abs=5)
