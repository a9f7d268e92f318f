"""A database of the version before, upgraded with runs in every state; and the old program beside the new."""

import ast
import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest

from bon_scheduler import Counts, JobContext, NoPayload, Retry, declared, job, service
from bon_scheduler.config import Settings
from bon_scheduler.database import connections
from bon_scheduler.database.migrations import SchemaBehindError
from bon_scheduler.demo.sample import create_tables
from bon_scheduler.jobs import NeverRetryError
from bon_scheduler.mail import read_key, recipient_hash
from tests.conftest import Connection
from tests.waiting import until

OLD_SCHEMA = Path(__file__).parent / "data" / "schema_0009.sql"
OLD_VERSION = "93ba4c6"
ROOT = Path(__file__).parents[2]

COLUMNS = """
    select table_name || '.' || column_name || ' ' || udt_name || ' ' || is_nullable || ' '
           || coalesce(column_default, '') || ' '
           || coalesce(col_description(('bon_scheduler.' || table_name)::regclass, ordinal_position::int), '')
      from information_schema.columns
     where table_schema = 'bon_scheduler'
"""
TABLES = """
    select c.relname || ' ' || coalesce(obj_description(c.oid), '') || ' '
           || coalesce(array_to_string(c.reloptions, ' '), '')
      from pg_class c
     where c.relnamespace = 'bon_scheduler'::regnamespace and c.relkind = 'r'
"""
INDEXES = "select indexdef from pg_indexes where schemaname = 'bon_scheduler'"
CONSTRAINTS = """
    select c.conrelid::regclass || ' ' || c.conname || ' ' || pg_get_constraintdef(c.oid)
      from pg_constraint c
     where c.connamespace = 'bon_scheduler'::regnamespace
"""
FUNCTIONS = """
    select pg_get_functiondef(p.oid) || coalesce(obj_description(p.oid), '')
      from pg_proc p
     where p.pronamespace = 'bon_scheduler'::regnamespace
"""
TYPES = """
    select t.typname || ' ' || coalesce((select string_agg(e.enumlabel, ' ' order by e.enumsortorder)
                                          from pg_enum e where e.enumtypid = t.oid), '')
      from pg_type t
     where t.typnamespace = 'bon_scheduler'::regnamespace and t.typtype = 'e'
"""
SEQUENCES = "select sequencename from pg_sequences where schemaname = 'bon_scheduler'"
EVERYTHING = (COLUMNS, TABLES, INDEXES, CONSTRAINTS, FUNCTIONS, TYPES, SEQUENCES)

# Runs of the old version as it left them, each with what becomes of it. $1 a living worker.
FILL = """
    insert into bon_scheduler.jobs (name) values ('a-test'), ('nightly');
    insert into bon_scheduler.workers (id, host, pid, version, lease) values ('{worker}', 'old', 1, '0.1.0', '2 s');
    select bon_scheduler.enqueue('a-test', '{{"case": "waits"}}');
    select bon_scheduler.enqueue('a-test', '{{"case": "put off"}}', run_at => now() + interval '1 hour');
    select bon_scheduler.enqueue('a-test', '{{"case": "its time has come"}}', run_at => now() + interval '1 hour');
    select bon_scheduler.enqueue('a-test', '{{"case": "retrying"}}');
    select bon_scheduler.enqueue('a-test', '{{"case": "runs"}}');
    select bon_scheduler.enqueue('a-test', '{{"case": "keyed"}}', dedupe_key => 'k');
    select bon_scheduler.enqueue('a-test', '{{"case": "of a business", "business_id": "b"}}');
    select bon_scheduler.enqueue('nightly', '{{"case": "tick"}}', fire_time => now(), origin => 'schedule');
    update bon_scheduler.runs set run_at = now() - interval '1 minute' where payload ->> 'case' = 'its time has come';
    update bon_scheduler.runs set state = 'retrying', attempt = 1, run_at = now() + interval '1 hour', timed_at = now()
     where payload ->> 'case' = 'retrying';
    update bon_scheduler.runs set state = 'running', attempt = 1, worker = '{worker}', started_at = now()
     where payload ->> 'case' = 'runs';
    insert into bon_scheduler.attempts (run_id, attempt, worker, host, started_at)
    select id, 1, '{worker}', 'old', now() from bon_scheduler.runs where attempt = 1;
    insert into bon_scheduler.runs (job, origin, state, finished_at, payload)
    select 'a-test', 'program', state, now(), jsonb_build_object('case', state)
      from unnest(enum_range(null::bon_scheduler.run_state)) as s (state)
     where state not in ('queued', 'running', 'retrying');
"""
OLD_WORKER = "11111111-1111-1111-1111-111111111111"
ROWS = "select payload ->> 'case' as name, * from bon_scheduler.runs"


async def contents(connection: Connection) -> list[list[str]]:
    return [sorted(str(row[0]) for row in await connection.fetch(query)) for query in EVERYTHING]


@pytest.fixture
async def old(empty_database_url: str) -> AsyncIterator[Connection]:
    """A database of the version before, with BON's tables and runs."""
    async with connections.connect(empty_database_url) as connection:
        await create_tables(connection)
        await connection.execute(OLD_SCHEMA.read_text())
        yield connection


@pytest.fixture
def settings(empty_database_url: str) -> Settings:
    return declared.read_settings(
        {"DATABASE_URL": empty_database_url, "HEALTH_PORT": "0", "HEALTH_HOST": "127.0.0.1", "LEASE_SECONDS": "2"}
    )


async def test_an_upgraded_database_equals_a_new_one(
    old: Connection, settings: Settings, connection: Connection
) -> None:
    await old.execute(FILL.format(worker=OLD_WORKER))
    await service.prepare(settings)
    upgraded, new = await contents(old), await contents(connection)
    assert upgraded == new
    assert len(upgraded[0]) > 80


async def test_an_upgrade_loses_no_run_and_keeps_what_waits_for_its_time(old: Connection, settings: Settings) -> None:
    await old.execute(FILL.format(worker=OLD_WORKER))
    before = {row["id"]: (row["name"], row["state"], row["attempt"]) for row in await old.fetch(ROWS)}
    put_off = "select payload ->> 'case', run_at from bon_scheduler.runs where run_at > now() and state <> 'paused'"
    instants = set(map(tuple, await old.fetch(put_off)))
    await service.prepare(settings)
    rows = await old.fetch(ROWS)
    assert {row["id"]: (row["name"], row["state"], row["attempt"]) for row in rows} == before
    assert set(map(tuple, await old.fetch(put_off))) == instants
    waiting = {row["name"]: row["ready"] for row in rows if row["state"] in {"queued", "retrying"}}
    later = {"put off", "retrying"}
    assert waiting == {name: name not in later for name in waiting}
    assert {row["name"] for row in rows if row["run_at"] is None and row["name"] in waiting} == {
        "waits", "its time has come", "keyed", "of a business", "tick",
    }  # fmt: skip
    keys = {row["name"]: (row["business"], row["concurrency_key"]) for row in rows if row["name"] in waiting}
    assert keys["of a business"] == ("b", None)
    assert keys["tick"] == (None, "nightly")


async def test_an_upgrade_knows_whose_the_tokens_are_that_were_sent_last(old: Connection, settings: Settings) -> None:
    sent = {UUID(int=1): b"one", UUID(int=2): b"two", UUID(int=3): b"two", UUID(int=4): None}
    insert = (
        "insert into bon_scheduler.shaam_refreshes (business_id, state, token_fingerprint) values ($1, 'failed', $2)"
    )
    await old.executemany(insert, list(sent.items()))
    await service.prepare(settings)
    known = await old.fetch("select fingerprint, business_id from bon_scheduler.shaam_tokens")
    assert {row["fingerprint"]: row["business_id"] for row in known} == {b"one": UUID(int=1), b"two": None}


async def test_what_an_old_replica_had_is_run_again_once_it_is_gone(old: Connection, settings: Settings) -> None:
    await old.execute(FILL.format(worker=OLD_WORKER))
    ran: list[UUID] = []

    class AnyPayload(NoPayload, extra="allow"):
        pass

    @job("a-test", retry=Retry(attempts=3))
    async def a_test(ctx: JobContext, _: AnyPayload) -> Counts:
        ran.append(ctx.run_id)
        return {}

    @job("nightly")
    async def nightly(ctx: JobContext, _: AnyPayload) -> Counts:
        ran.append(ctx.run_id)
        return {}

    await service.prepare(settings, jobs=[a_test, nightly])
    async with service.serving(settings, jobs=[a_test, nightly]):

        async def done() -> bool:
            open_now = (
                "select count(*) from bon_scheduler.runs"
                " where state = 'running' or ready and state in ('queued', 'retrying')"
            )
            return not await old.fetchval(open_now)

        await until(done, seconds=15)
    rows = {row["name"]: row for row in await old.fetch(ROWS)}
    succeeded = {name for name, row in rows.items() if row["state"] == "succeeded"} - {"succeeded"}
    assert succeeded == {"waits", "its time has come", "runs", "keyed", "of a business", "tick"}
    assert rows["runs"]["attempt"] == 2
    assert len(ran) == len(set(ran)) == 6


async def test_an_upgrade_names_recipients_with_a_key_and_nobody_gets_a_letter_again(
    old: Connection, settings: Settings
) -> None:
    await old.execute(FILL.format(worker=OLD_WORKER))
    insert = """
        insert into bon_scheduler.deliveries
               (kind, business_id, as_of, recipient_hash, state, message_id, run_id, attempt)
        select 'overdue-digest', $1, date '2026-11-23', $2, $3, '<1@bon>', id, 1 from bon_scheduler.runs limit 1
        returning id
    """
    business, states = uuid4(), ("intended", "sent", "refused", "unknown", "released")
    # What version 9 computed.
    names = {state: hashlib.sha256(f"{business}:{state}@shop.example".encode()).hexdigest() for state in states}
    ids = {state: await old.fetchval(insert, business, names[state], state) for state in states}
    await service.prepare(settings)
    key = await read_key(old)
    found = {row["id"]: row["recipient_hash"] for row in await old.fetch("select * from bon_scheduler.deliveries")}
    assert found == {ids[state]: recipient_hash(key, business, f"{state}@Shop.example ") for state in states}
    assert not set(found.values()) & set(names.values())
    # A replica of version 9 that is at work begins no letter: it would not find what has been sent.
    with pytest.raises(asyncpg.CheckViolationError):
        await old.execute(insert, business, hashlib.sha256(b"another").hexdigest(), "intended")
    # It settles the one that it has begun.
    settle = "update bon_scheduler.deliveries set state = 'sent' where id = $1 and state = 'intended' returning true"
    assert await old.fetchval(settle, ids["intended"])


async def test_each_deployment_has_a_key_of_its_own_that_stays(
    old: Connection, settings: Settings, connection: Connection
) -> None:
    await service.prepare(settings)
    key = await read_key(old)
    await service.prepare(settings)
    assert await read_key(old) == key
    assert len({key, await read_key(connection)}) == 2
    await connection.execute("delete from bon_scheduler.mail_key")
    with pytest.raises(NeverRetryError, match="Restore its row from a backup"):
        await read_key(connection)


async def test_an_upgrade_that_fails_leaves_the_old_version_as_it_was(old: Connection, settings: Settings) -> None:
    await old.execute(FILL.format(worker=OLD_WORKER))
    await old.execute("create view in_the_way as select timed_at from bon_scheduler.runs")
    before = await contents(old)
    with pytest.raises(Exception, match="depend"):
        await service.prepare(settings)
    assert await contents(old) == before


async def test_a_version_from_which_no_upgrade_leads_is_refused(old: Connection, settings: Settings) -> None:
    await old.execute("delete from bon_scheduler.migrations where version > 7")
    with pytest.raises(SchemaBehindError, match="at version 7, from which no upgrade leads to"):
        await service.prepare(settings)


# The old version's program beside the new

PROGRAM = '''
"""A service of one job that takes a while and leaves a mark in its last transaction."""
import asyncio, sys
from datetime import timedelta
from bon_scheduler import Counts, JobContext, NoPayload, Retry, job, service
try:
    from bon_scheduler.cli.work import serve
    from bon_scheduler.declared import read_settings
except ImportError:  # the old version's
    from bon_scheduler.commands.work import serve
    from bon_scheduler.service import read_settings
from bon_scheduler.log import configure_logging

@job("mark", retry=Retry(attempts=20, delay=timedelta(milliseconds=100)), timeout=timedelta(seconds=60))
async def mark(ctx: JobContext, _: NoPayload) -> Counts:
    await asyncio.sleep(0.3)
    async with ctx.transaction() as tx:
        await tx.execute("insert into marks (run_id, by) values ($1, $2)", ctx.run_id, sys.argv[1])
        return await ctx.finish({}, on=tx)

settings = read_settings()
configure_logging(settings.log_level, settings.log_format)
sys.exit(asyncio.run(serve(settings, [mark])))
'''


@asynccontextmanager
async def replica(
    python: Path, source: Path, name: str, url: str, log: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the program with the code of a version."""
    program = log.with_suffix(".py")
    program.write_text(PROGRAM)
    environ = {"DATABASE_URL": url, "HEALTH_PORT": "0", "HEALTH_HOST": "127.0.0.1", "LEASE_SECONDS": "3"}
    with log.open("w") as out:
        process = await asyncio.create_subprocess_exec(
            str(python), str(program), name, cwd=source, env={**environ, "PYTHONPATH": str(source)}, stderr=out
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def events(log: Path) -> list[str]:
    return [json.loads(line)["event"] for line in log.read_text().splitlines() if line.startswith("{")]


# When the worker that came first last took a run.
NEWEST_OF_OLDEST = """
    select max(started_at)
      from bon_scheduler.attempts
     where worker = (select id from bon_scheduler.workers order by started_at limit 1)
"""


def install_old(directory: Path) -> tuple[Path, Path]:
    """Bring the old version's source and a Python with what it needs; return both."""
    known = subprocess.run(["git", "cat-file", "-e", OLD_VERSION], cwd=ROOT, check=False, capture_output=True)
    if known.returncode:
        pytest.skip(f"this clone does not have commit {OLD_VERSION}, whose program is run here")
    source, python = directory / "old", directory / "venv" / "bin" / "python"
    source.mkdir()
    archive = subprocess.run(["git", "archive", OLD_VERSION], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
    subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True)
    requirements = str(source / "requirements" / "base.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", "--require-hashes", "-r", requirements], check=True)
    return source, python


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_the_old_version_beside_the_new_takes_no_more_and_nothing_is_lost_or_doubled(
    old: Connection, settings: Settings, tmp_path: Path
) -> None:
    source, python = await asyncio.to_thread(install_old, tmp_path)
    url = settings.database_url.get_secret_value()
    await old.execute("create table marks (run_id uuid, by text)")
    await old.execute("insert into bon_scheduler.jobs (name) values ('mark')")
    ask = "select bon_scheduler.enqueue('mark') from generate_series(1, 200)"
    await old.execute(ask)
    logs = tmp_path / "before.log", tmp_path / "after.log"
    async with replica(python, source, "old", url, logs[0]) as before:

        async def some_marked() -> bool:
            return bool(await old.fetchval("select count(*) > 20 from marks"))

        await until(some_marked, seconds=60)

        @job("mark")
        async def mark(_: JobContext, __: NoPayload) -> Counts:
            return {}

        await service.prepare(settings, jobs=[mark])
        await old.execute(ask)
        async with replica(Path(sys.executable), ROOT, "new", url, logs[1]):

            async def all_succeeded() -> bool:
                return not await old.fetchval("select count(*) from bon_scheduler.runs where state <> 'succeeded'")

            await until(all_succeeded, seconds=120)
            assert before.returncode is None  # it lives, and has had time to take more
            newest = await old.fetchval(NEWEST_OF_OLDEST)
            migrated = await old.fetchval("select applied_at from bon_scheduler.migrations where version = 10")
            assert newest < migrated + timedelta(seconds=1)
    marks = await old.fetchrow("select count(*), count(distinct run_id), count(distinct by) from marks")
    assert marks is not None
    assert tuple(marks) == (400, 400, 2)
    assert "engine.rebuilding" in events(logs[0])


# Statements of the old version's program that cannot be made any more, and what its replicas then do, until they stop.
CANNOT: dict[str, str] = {
    "attempts.CLAIM": "takes nothing more; its queue is gone",
    "attempts.FAIL": "cannot record a failure: the run is taken over once the replica has gone",
    "attempts.GIVE_BACK": "the same",
    "history.DESCENDANTS": "a person's run-once cannot follow what it caused",
    "ledger.ENQUEUE": "a handler that asks for runs fails, and see attempts.FAIL; a tick is recorded by a new replica",
    "ledger.REDELIVER": "by its reconciliation pass, for the queue that is gone",
    "ledger.ORPHANS": "the same",
    "retention.PRUNE_QUEUE_LOG": "prunes nothing more; a new replica does",
    "retention.PRUNE_QUEUE_STATISTICS": "the same",
    "revise.RETRY": "a person uses the new version's commands",
    "revise.CANCEL": "the same",
}


def old_statements() -> dict[str, str]:
    """Return the SQL constants of the old version's program, by module and name."""
    found: dict[str, str] = {}
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", OLD_VERSION, "bon_scheduler", "handlers", "health"],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip(f"this clone does not have commit {OLD_VERSION}, whose statements are tried here")
    for path in listed.stdout.split():
        if not path.endswith(".py") or "/demo/" in path:
            continue
        source = subprocess.run(
            ["git", "show", f"{OLD_VERSION}:{path}"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        for node in ast.parse(source.stdout).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and _is_sql(node.value.value):
                found[f"{Path(path).stem}.{ast.unparse(node.targets[0])}"] = str(node.value.value)
    return found


def _is_sql(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().lower().startswith(
        ("select", "insert", "update", "delete", "with")
    )


async def test_what_a_replica_of_the_old_version_says_is_understood_but_for_what_is_named(
    old: Connection, settings: Settings
) -> None:
    statements = await asyncio.to_thread(old_statements)
    await service.prepare(settings)
    failing = set()
    for name, statement in statements.items():
        try:
            await old.prepare(statement)
        except (asyncpg.UndefinedFunctionError, asyncpg.UndefinedColumnError, asyncpg.UndefinedTableError):
            failing.add(name)
    assert len(statements) > 60
    assert failing == set(CANNOT)
