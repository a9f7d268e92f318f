"""The service behind a real PgBouncer: works with DATABASE_LISTEN_URL, and is refused without it."""

import asyncio
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from bon_scheduler import Counts, JobContext, NoPayload, Retry, job, service
from bon_scheduler.cli import parsing
from bon_scheduler.cli.check import Level, check_deployment
from bon_scheduler.clock import SystemClock
from bon_scheduler.database import connections, endpoints, pooling
from bon_scheduler.database.endpoints import OtherDatabaseError
from bon_scheduler.database.unavailable import PoolerError
from bon_scheduler.ledger.workers import Worker
from tests.conftest import Connection, MakeSettings
from tests.pooler import SERVERS, TOLERANT, answers, needs_pgbouncer, other_clients, pgbouncer
from tests.process import run_command
from tests.waiting import until

pytestmark = needs_pgbouncer

# The settings that a pooler knows of, and sets back for the next client; and those of a transaction, which end with it.
MINDED = [
    *("application_name", "client_encoding", "DateStyle", "TimeZone", "standard_conforming_strings"),
    *("transaction_isolation", "transaction_read_only"),
]
RESIDUE = """
    select pg_backend_pid() as pid,
           (select jsonb_object_agg(name, setting) from pg_settings
             where source = 'session' and name <> all ($1)) as settings,
           (select jsonb_agg(statement) from pg_prepared_statements where name <> '') as statements,
           (select jsonb_agg(channel) from pg_listening_channels() as channel) as channels,
           (select jsonb_agg(objid) from pg_locks where pid = pg_backend_pid() and locktype = 'advisory') as locks
"""


async def residue(url: str) -> list[dict[str, object]]:
    """Return what any of the pooler's servers has kept of those it served."""
    async with other_clients(url) as clients:
        found = [dict(row) for client in clients for row in await client.fetch(RESIDUE, MINDED)]
    assert len({of.pop("pid") for of in found}) == SERVERS
    return [of for of in found if any(of.values())]


@pytest.mark.parametrize("more", ["", TOLERANT])
async def test_a_pooler_in_transaction_mode_is_refused_with_the_remedy(
    tmp_path: Path, database_url: str, more: str
) -> None:
    """Before anything is left on its servers, which serve others."""
    with pgbouncer(tmp_path, database_url, more=more) as url:
        await answers(url)
        ended = await run_command("serve", DATABASE_URL=url)
        assert await residue(url) == []
    assert ended.status == 2
    assert "Set DATABASE_LISTEN_URL to the server's own address" in " ".join(ended.err.split())


@pytest.mark.parametrize("more", ["", TOLERANT])
async def test_no_command_works_through_a_pooler_that_it_was_not_told_of(
    tmp_path: Path, empty_database_url: str, make_settings: MakeSettings, more: str
) -> None:
    """`migrate` least of all, whose lock would stay on a server, so that the next `migrate` waits for ever."""
    with pgbouncer(tmp_path, empty_database_url, more=more) as url:
        await answers(url)
        settings = make_settings(DATABASE_URL=url)
        with pytest.raises(PoolerError):
            await service.prepare(settings)
        for command in (parsing.reading(settings), service.dry_runner(settings)):
            with pytest.raises(PoolerError):
                await command.__aenter__()
        assert await residue(url) == []


async def test_a_pooler_that_keeps_the_limits_but_not_the_sessions_is_refused(
    tmp_path: Path,
    database_url: str,
    make_settings: MakeSettings,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the database has the same limit for everybody."""
    monkeypatch.setattr(pooling, "PROBE_SECONDS", 0.2)
    name = urlsplit(database_url).path.lstrip("/")
    await connection.execute(f"alter database \"{name}\" set idle_in_transaction_session_timeout = '10s'")
    last_first = TOLERANT + "\nserver_round_robin = 0"
    with pgbouncer(tmp_path, database_url, more=last_first) as url:
        await answers(url)
        with pytest.raises(PoolerError, match="DATABASE_URL leads to"):
            await endpoints.require_sessions(make_settings(DATABASE_URL=url))
        assert await residue(url) == []


async def test_two_addresses_that_lead_to_two_databases_are_refused(
    make_settings: MakeSettings, database_url: str, empty_database_url: str
) -> None:
    """Runs would be claimed in the one and worked on in the other."""
    settings = make_settings(DATABASE_URL=empty_database_url, DATABASE_LISTEN_URL=database_url)
    with pytest.raises(OtherDatabaseError, match="Have both lead to the same database"):
        async with service.machinery(settings):
            pass
    [finding] = [one for one in await check_deployment(settings, SystemClock()) if one.name == "same database"]
    assert finding.level is Level.FAILURE
    ended = await run_command("migrate", DATABASE_URL=empty_database_url, DATABASE_LISTEN_URL=database_url)
    assert (ended.status, "Have both lead to the same database" in " ".join(ended.err.split())) == (2, True)


async def test_a_listen_address_that_is_a_pooler_too_is_refused(tmp_path: Path, make_settings: MakeSettings) -> None:
    direct = make_settings().database_url.get_secret_value()
    with pgbouncer(tmp_path, direct, more=TOLERANT) as url:
        await answers(url)
        with pytest.raises(PoolerError, match="DATABASE_LISTEN_URL leads to"):
            await endpoints.require_sessions(make_settings(DATABASE_URL=direct, DATABASE_LISTEN_URL=url))


async def test_check_names_a_pooler_that_loses_notifications(tmp_path: Path, database_url: str) -> None:
    with pgbouncer(tmp_path, database_url, more=TOLERANT) as url:
        await answers(url)
        ended = await run_command("check", "--json", DATABASE_URL=url)
        assert await residue(url) == []
    [finding] = [line for line in ended.document["findings"] if line["name"] == "notifications"]
    assert (ended.status, finding["level"]) == (1, "failure")
    assert "DATABASE_LISTEN_URL" in finding["remedy"]


async def test_with_a_listen_address_the_service_works_behind_a_pooler(
    tmp_path: Path, make_settings: MakeSettings, connection: Connection, database_url: str
) -> None:
    """No statement is sought on a server that does not know it, and the limits are the transaction's own."""
    await connection.execute("create table effects (run_id uuid, servers int, idle_limit text, peer_check text)")

    @job("a-test")
    async def effect(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.connection() as unfenced:
            servers = {await unfenced.fetchval("select pg_backend_pid() where $1", True) for _ in range(6)}
        async with ctx.transaction() as tx:
            limit = await tx.fetchval("show idle_in_transaction_session_timeout")
            check = await tx.fetchval("show client_connection_check_interval")
            await tx.execute("insert into effects values ($1, $2, $3, $4)", ctx.run_id, len(servers), limit, check)
            return await ctx.finish({"rows": 1}, on=tx)

    async def all_ended() -> bool:
        left = "select count(*) from bon_scheduler.runs where state <> 'succeeded'"
        return int(await connection.fetchval(left)) == 0

    with pgbouncer(tmp_path, database_url) as url:
        await answers(url)
        settings = make_settings(DATABASE_URL=url, DATABASE_LISTEN_URL=database_url)
        async with service.serving(settings, jobs=[effect]):
            await connection.execute("select bon_scheduler.enqueue('a-test') from generate_series(1, 100)")
            await until(all_ended, seconds=30)
    rows = await connection.fetch("select * from effects")
    assert len({row["run_id"] for row in rows}) == len(rows) == 100
    assert max(row["servers"] for row in rows) > 1, "the pooler never changed servers: this test proves nothing"
    assert {(row["idle_limit"], row["peer_check"]) for row in rows} == {("10s", "5s")}
    assert await connection.fetchval("select max(attempt) from bon_scheduler.runs") == 1


async def test_what_leads_through_a_pooler_leaves_nothing_on_its_servers(
    tmp_path: Path, make_settings: MakeSettings, database_url: str
) -> None:
    """No setting, no statement's name: others are served by the same servers, other processes choose the same names."""
    with pgbouncer(tmp_path, database_url) as url:
        await answers(url)
        settings = make_settings(DATABASE_URL=url, DATABASE_LISTEN_URL=database_url)
        async with connections.open_pool(settings, worker=Worker().id) as pool:
            # A type that is looked up, outside and inside of a transaction.
            assert await pool.fetchval("select 'queued'::bon_scheduler.run_state") == "queued"
            async with pool.acquire() as one, one.transaction():
                assert await one.fetchval("select '{queued}'::bon_scheduler.run_state[]") == ["queued"]
                found = await one.cursor("select * from generate_series(1, $1)", 10)
                assert len(await found.fetch(5)) == 5
            await pool.fetchval("select $1::int", 1)
            assert await residue(url) == []


async def test_a_statement_that_was_never_executed_keeps_no_server(
    tmp_path: Path, make_settings: MakeSettings, database_url: str, connection: Connection
) -> None:
    """Its plan has been asked for, which locks its table, when its arguments turn out to be wrong."""
    locks = "select count(*) from pg_locks where relation = 'bon_scheduler.runs'::regclass"
    with pgbouncer(tmp_path, database_url) as url:
        await answers(url)
        settings = make_settings(DATABASE_URL=url, DATABASE_LISTEN_URL=database_url)
        async with connections.open_pool(settings) as pool:
            with pytest.raises(asyncpg.DataError):
                await pool.fetch("select from bon_scheduler.runs where attempt = $1", "one")
            assert await connection.fetchval(locks) == 0


async def test_cutting_off_a_worker_ends_its_transactions_and_nobody_elses(
    tmp_path: Path, make_settings: MakeSettings, database_url: str, connection: Connection
) -> None:
    """Servers have worked for it before they work for others; a successor's claim ends what it still has open."""
    dead = Worker()
    with pgbouncer(tmp_path, database_url) as url:
        await answers(url)
        settings = make_settings(DATABASE_URL=url, DATABASE_LISTEN_URL=database_url)
        async with connections.open_pool(settings, worker=dead.id) as pool:

            async def work() -> None:
                async with pool.acquire() as one, one.transaction():
                    await one.execute("select pg_sleep(0.1)")

            await asyncio.gather(*(work() for _ in range(SERVERS)))
            await asyncio.gather(*(pool.execute("select pg_sleep(0.1)") for _ in range(SERVERS)))
            async with other_clients(url) as clients:
                await connection.execute("select bon_scheduler.cut_off($1)", dead.id)
                for client in clients:
                    await client.execute("commit")


async def test_whoever_takes_a_run_over_ends_its_predecessors_transaction_behind_a_pooler(
    tmp_path: Path, make_settings: MakeSettings, database_url: str, connection: Connection
) -> None:
    await connection.execute("create table counter (n int); insert into counter values (0)")

    @job("a-test", retry=Retry(attempts=3, delay=timedelta(milliseconds=20)))
    async def count(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute("update counter set n = n + 1")
            return await ctx.finish({}, on=tx)

    async def succeeded() -> bool:
        return await connection.fetchval("select state = 'succeeded' from bon_scheduler.runs") is True

    frozen = Worker()
    with pgbouncer(tmp_path, database_url) as url:
        await answers(url)
        settings = make_settings(DATABASE_URL=url, DATABASE_LISTEN_URL=database_url, LEASE_SECONDS="2")
        await service.prepare(settings, jobs=[count])
        async with connections.open_pool(settings, worker=frozen.id) as pool, pool.acquire() as held:
            transaction = held.transaction()
            await transaction.start()
            await held.execute("set local idle_in_transaction_session_timeout = 0")
            await held.execute("update counter set n = n + 100")
            await connection.execute("select bon_scheduler.enqueue('a-test')")
            await connection.execute(
                "update bon_scheduler.runs set state = 'running', attempt = 1, worker = $1", frozen.id
            )
            async with service.serving(settings, jobs=[count]):
                await until(succeeded)
    assert await connection.fetchval("select n from counter") == 1
