"""A session of ours is ours, whatever the role or the database sets: each setting, and each job on BON's tables."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from bon_scheduler import Counts, JobContext, NoPayload, Retry, job, service
from bon_scheduler.database import connections
from handlers.draft_cleanup import draft_cleanup
from handlers.overdue_detection import overdue_detection
from handlers.session_cleanup import session_cleanup
from tests import arrange
from tests.conftest import Connection, MakeSettings, RunJob
from tests.pooler import answers, needs_pgbouncer, other_clients, pgbouncer
from tests.process import run_command
from tests.waiting import until

HOSTILE = {
    "default_transaction_isolation": ["'serializable'", "'repeatable read'"],
    "default_transaction_read_only": ["on"],
    "default_transaction_deferrable": ["on"],
    "statement_timeout": ["'100ms'"],
    "lock_timeout": ["'1ms'"],
    "idle_in_transaction_session_timeout": ["'1ms'"],
    "idle_session_timeout": ["'200ms'"],
    "search_path": ["evil, public", "evil", "''"],
    '"DateStyle"': ["'SQL, DMY'"],
    '"IntervalStyle"': ["'sql_standard'"],
    '"TimeZone"': ["'Asia/Tokyo'"],
    "standard_conforming_strings": ["off"],
}
CASES = [(name, value) for name, values in HOSTILE.items() for value in values]
WAYS = ["directly", pytest.param("pooled", marks=needs_pgbouncer), pytest.param("left", marks=needs_pgbouncer)]
"""Said by the database, directly or behind a pooler; or left on a pooler's servers by its last client."""
DECOYS = """
    create schema evil;
    create table evil.sessions as table public.sessions;
    create table evil.invoices as table public.invoices;
    create table evil.businesses as table public.businesses;
    create function evil.now() returns timestamptz language sql as $$ select timestamptz '2100-01-01' $$;
"""


async def load(connection: Connection) -> None:
    """An invoice that is overdue, a draft that is stale, a session that has expired; and decoys of each in `evil`."""
    long_past = datetime.now(UTC) - timedelta(days=40)
    business = await arrange.business(connection)
    owner = await arrange.owner(connection, business, "owner@shop.example")
    await arrange.invoice(connection, business, due_date=long_past.date())
    draft = await arrange.draft(connection, business)
    await connection.execute("update invoices set updated_at = $2 where id = $1", draft, long_past)
    await arrange.session(connection, owner, long_past)
    await connection.execute(DECOYS)
    await connection.execute("insert into evil.sessions select * from public.sessions")


@asynccontextmanager
async def hostile(directory: Path, url: str, way: str, setting: tuple[str, str]) -> AsyncIterator[dict[str, str]]:
    """Have sessions begin with a setting; yield the addresses that lead to them."""
    name, value = setting
    if way != "left":
        async with connections.connect(url) as connection:
            database = await connection.fetchval("select current_database()")
            await connection.execute(f'alter database "{database}" set {name} to {value}')
    if way == "directly":
        yield {"DATABASE_URL": url}
        return
    with pgbouncer(directory, url) as through:
        await answers(through)
        if way == "left":
            async with other_clients(through) as clients:
                for client in clients:
                    await client.execute(f"set {name} to {value}; commit")
        yield {"DATABASE_URL": through, "DATABASE_LISTEN_URL": url}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", CASES, ids="-".join)
@pytest.mark.samples(4)
async def test_whatever_the_database_sets_the_jobs_do_what_they_do(
    connection: Connection, run_job: RunJob, tmp_path: Path, database_url: str, way: str, setting: tuple[str, str]
) -> None:
    await load(connection)
    decoys = await connection.fetchval("select count(*) from evil.sessions")
    async with hostile(tmp_path, database_url, way, setting) as environ:
        jobs = (draft_cleanup, session_cleanup, overdue_detection)
        ended = {each.name: (await run_job(each, **environ)).run for each in jobs}
    assert {run["state"] for run in ended.values()} == {"succeeded"}
    assert ended["draft-cleanup"]["counts"]["deleted"] == 1
    assert ended["session-cleanup"]["counts"]["deleted"] == 1
    assert ended["overdue-detection"]["counts"]["marked"] == 1
    assert await connection.fetchval("select count(*) from evil.sessions") == decoys


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("setting", CASES, ids="-".join)
@pytest.mark.samples(2)
async def test_whatever_the_database_sets_the_service_works_and_commands_answer(
    make_settings: MakeSettings,
    connection: Connection,
    tmp_path: Path,
    database_url: str,
    way: str,
    setting: tuple[str, str],
) -> None:
    @job("a-test")
    async def a_test(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.transaction() as tx:
            await tx.fetchval("select pg_sleep(0.3)")
            return await ctx.finish({}, on=tx)

    async def ended() -> bool:
        succeeded = "select count(*) from bon_scheduler.runs where state = 'succeeded' and attempt = 1"
        return bool(await connection.fetchval(succeeded) == 3)

    async with hostile(tmp_path, database_url, way, setting) as environ:
        async with service.serving(make_settings(**environ), jobs=[a_test]) as serving:
            await connection.execute("select bon_scheduler.enqueue('a-test') from generate_series(1, 3)")
            await until(ended)
            assert serving.engine.connected
        for command in (["runs"], ["jobs"], ["audit"]):
            answer = await run_command(*command, **environ)
            assert answer.status == 0, answer.err


@pytest.fixture
async def restricted(connection: Connection, database_url: str) -> AsyncIterator[str]:
    """The address of the database for a role that row level security applies to."""
    role = f"restricted_{await connection.fetchval('select current_database()')}"
    await connection.execute(
        f"create role {role} login; grant usage on schema public, bon_scheduler to {role};"
        f" grant all on all tables in schema public, bon_scheduler to {role};"
        f" grant all on all functions in schema bon_scheduler to {role};"
        " alter table public.sessions enable row level security;"
        " create policy hidden on public.sessions using (false)"
    )
    yield database_url.replace("//postgres@", f"//{role}@")
    await connection.execute(f"drop owned by {role}; drop role {role}")


async def test_rows_that_a_policy_hides_are_an_error_and_not_nothing_to_do(
    connection: Connection, restricted: str
) -> None:
    await load(connection)
    ran = await run_command("run-once", "session-cleanup", DATABASE_URL=restricted)
    assert ran.status == 1
    error = await connection.fetchval("select error from bon_scheduler.runs")
    assert "row-level security" in error


async def test_a_plan_that_a_change_of_bons_tables_made_stale_costs_no_attempt(
    make_settings: MakeSettings, connection: Connection
) -> None:
    @job("a-test", retry=Retry(attempts=1))
    async def read(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.connection() as some:
            await some.fetch("select * from public.sessions")
        return {}

    async def ended() -> bool:
        waiting = "select count(*) from bon_scheduler.runs where state not in ('succeeded', 'dead')"
        return bool(await connection.fetchval(waiting) == 0)

    async with service.serving(make_settings(DATABASE_POOL_SIZE="2"), jobs=[read]):
        for change in ("add column extra integer", "alter column extra type text", "drop column extra"):
            await connection.execute("select bon_scheduler.enqueue('a-test')")
            await until(ended)
            await connection.execute(f"alter table public.sessions {change}")
        await connection.execute("select bon_scheduler.enqueue('a-test') from generate_series(1, 5)")
        await until(ended)
    assert await connection.fetchval("select count(*) from bon_scheduler.runs where state = 'dead'") == 0


async def test_too_many_connections_cost_no_attempt(make_settings: MakeSettings, connection: Connection) -> None:
    full = [True]

    @job("a-test", retry=Retry(attempts=1))
    async def crowded(_: JobContext, __: NoPayload) -> Counts:
        if full:
            full.clear()
            raise asyncpg.TooManyConnectionsError("sorry, too many clients already")
        return {}

    async with service.serving(make_settings(), jobs=[crowded]):
        await connection.execute("select bon_scheduler.enqueue('a-test')")

        async def ended() -> bool:
            return bool(await connection.fetchval("select state = 'succeeded' from bon_scheduler.runs"))

        await until(ended)
    assert await connection.fetchval("select array_agg(outcome order by attempt) from bon_scheduler.attempts") == [
        "given_back",
        "succeeded",
    ]


async def test_a_handlers_statement_has_no_time_out_but_its_jobs(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "COMMAND_TIMEOUT_SECONDS", 0.2)
    async with connections.open_pool(make_settings()) as pool, pool.acquire() as connection:
        await connection.execute("select pg_sleep(0.5)")
