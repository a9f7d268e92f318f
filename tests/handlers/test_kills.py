"""
The process that changes BON's rows is killed (SIGKILL) within each batch, before and after it; another one finishes.

Rows go in batches of two. The batch of that number waits within its transaction, so that it never commits.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from bon_scheduler.declared import JOBS
from tests import arrange
from tests.conftest import Connection
from tests.process import serve
from tests.waiting import until

pytestmark = pytest.mark.slow

ENVIRON = {f"SCHEDULE_{job.name.replace('-', '_').upper()}": "" for job in JOBS} | {"LEASE_SECONDS": "2"}
PROGRAM = ("tests.small_batches", "serve")
ROWS, BATCH = 7, 2
# While there is a row in `gate`, whose number is how many of BON's rows are changed by then, the change waits.
HALT = """
    create table public.gate (changed integer);
    insert into public.gate values ({changed});
    create function public.halt() returns trigger language plpgsql as $$
    begin
        while exists (select from public.gate where changed <= {done}) loop
            perform pg_sleep(0.02);
        end loop;
        return coalesce(new, old);
    end $$;
    create trigger halt before {change} on {table} for each statement execute function public.halt()
"""
WAITING = "select exists (select from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep')"
CUT = """
    select pg_terminate_backend(pid) from pg_stat_activity
     where datname = current_database() and wait_event = 'PgSleep'
"""
RUN = "select state::text, counts, attempt from bon_scheduler.runs where job = $1"


async def late(connection: Connection) -> None:
    due = datetime.now(UTC).date() - timedelta(days=next(arrange.numbers))
    await arrange.invoice(connection, await arrange.business(connection), due_date=due)


async def late_on_one_day(connection: Connection) -> None:
    due = datetime.now(UTC).date() - timedelta(days=10)
    await arrange.invoice(connection, await arrange.business(connection), due_date=due)


async def settled(connection: Connection) -> None:
    await arrange.invoice(connection, await arrange.business(connection), status="paid", is_overdue=True)


async def draft(connection: Connection) -> None:
    await arrange.item(connection, await arrange.draft(connection, await arrange.business(connection)))


async def session(connection: Connection) -> None:
    user: UUID = await arrange.user(connection)
    await arrange.session(connection, user, datetime.now(UTC) - timedelta(days=1, seconds=next(arrange.numbers)))


Make = Callable[[Connection], Awaitable[None]]
KINDS: dict[str, tuple[str, Make, str, str, dict[str, int]]] = {
    "mark": (
        "overdue-detection",
        late,
        "(select count(*) from public.invoices where is_overdue)",
        "update on public.invoices",
        {"marked": ROWS},
    ),
    "mark a day that is too large": (
        "overdue-detection",
        late_on_one_day,
        "(select count(*) from public.invoices where is_overdue)",
        "update on public.invoices",
        {"marked": ROWS},
    ),
    "clear": (
        "overdue-detection",
        settled,
        "(select count(*) from public.invoices where not is_overdue)",
        "update on public.invoices",
        {"cleared": ROWS},
    ),
    "drafts": (
        "draft-cleanup",
        draft,
        f"({ROWS} - (select count(*) from public.invoices))",
        "delete on public.invoices",
        {"deleted": ROWS, "items": ROWS},
    ),
    "sessions": (
        "session-cleanup",
        session,
        f"({ROWS} - (select count(*) from public.sessions))",
        "delete on public.sessions",
        {"deleted": ROWS},
    ),
}


@pytest.mark.parametrize("recorded", [False, True], ids=["before the change", "before its record"])
@pytest.mark.parametrize(
    "done", [pytest.param(done, marks=() if done == BATCH else pytest.mark.long) for done in range(0, ROWS, BATCH)]
)
@pytest.mark.parametrize("kind", KINDS)
async def test_killed_within_a_batch_another_process_goes_on_from_there_and_counts_each_row_once(
    connection: Connection, database_url: str, kind: str, done: int, recorded: bool
) -> None:
    job, make, counted, change, expected = KINDS[kind]
    for _ in range(ROWS):
        await make(connection)
    number = done
    if recorded:
        # Within its own transaction the batch sees what it has changed.
        number, change = min(done + BATCH, ROWS), "update of counts on bon_scheduler.runs"
    how, _, table = change.partition(" on ")
    await connection.execute(
        HALT.format(changed=max(number, 1) if recorded else number, done=counted, change=how, table=table)
    )
    environ = {**ENVIRON, "DATABASE_URL": database_url}
    async with serve(program=PROGRAM, **environ) as victim:
        await connection.execute("select bon_scheduler.enqueue($1)", job)
        await until(lambda: connection.fetchval(WAITING), seconds=60)
        victim.process.kill()
        await victim.process.wait()
    await connection.execute(CUT)
    assert await connection.fetchval(f"select {counted}") == done
    await connection.execute("truncate public.gate")
    async with serve(program=PROGRAM, **environ):

        async def ended() -> bool:
            return bool(await connection.fetchval("select finished_at from bon_scheduler.runs where job = $1", job))

        await until(ended, seconds=60)
    row = await connection.fetchrow(RUN, job)
    assert row is not None
    assert (row["state"], row["attempt"]) == ("succeeded", 2)
    assert {name: row["counts"][name] for name in expected} == expected
    assert await connection.fetchval(f"select {counted}") == ROWS
    kept = "select coalesce(sum(cardinality(ids)), 0) from bon_scheduler.changed_rows"
    outcomes = "select count(*) from bon_scheduler.business_outcomes"
    assert await connection.fetchval(kept) == await connection.fetchval(outcomes) == (ROWS if kind != "sessions" else 0)
