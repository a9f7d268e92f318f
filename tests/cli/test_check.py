"""`check` as a role that is not a superuser: what it cannot use is named, with the statement that mends it."""

import pytest

from bon_scheduler.cli import check
from bon_scheduler.cli.check import Finding, Level, check_deployment
from bon_scheduler.clock import SystemClock
from bon_scheduler.report import Report
from tests.conftest import Connection, MakeSettings
from tests.process import run_command
from tests.roles import Role, all_privileges, limited_role, revoke


@pytest.fixture
def look(make_settings: MakeSettings, role: Role) -> "Look":
    return Look(make_settings, role)


class Look:
    """`check` as the role."""

    def __init__(self, make_settings: MakeSettings, role: Role) -> None:
        self._make_settings = make_settings
        self._role = role

    async def all(self, **environ: str) -> list[Finding]:
        return await check_deployment(self._make_settings(DATABASE_URL=self._role.url, **environ), SystemClock())

    async def of(self, name: str, **environ: str) -> list[Finding]:
        return [finding for finding in await self.all(**environ) if finding.name == name]

    async def failures(self, **environ: str) -> list[tuple[str, str, str | None]]:
        found = await self.all(**environ)
        return [(each.name, each.what, each.remedy) for each in found if each.level is Level.FAILURE]


async def test_each_privilege_that_is_missing_is_named_and_its_remedy_mends_it(
    connection: Connection, look: Look, role: Role
) -> None:
    assert await look.failures() == []
    for privilege in all_privileges():
        await revoke(connection, role, privilege)
        kind = "update" if privilege.kind == "lock" else privilege.kind
        column = f" ({privilege.column})" if privilege.column else ""
        [(name, found, remedy)] = await look.failures()
        assert name == "privileges"
        assert remedy == f"grant {kind}{column} on public.{privilege.table} to {role.name};"
        said = f"{kind} {privilege.table}{column}"
        assert (said if privilege.kind != "lock" else f"lock rows of {privilege.table}") in found
        await connection.execute(remedy)
    assert await look.failures() == []


async def test_who_needs_a_privilege_is_told_by_the_command_with_status_1(connection: Connection, role: Role) -> None:
    await connection.execute(f"revoke select (due_date) on public.invoices from {role.name}")
    for arguments in ([], ["--json"]):
        checked = await run_command("check", *arguments, DATABASE_URL=role.url)
        assert checked.status == 1
        out = " ".join(checked.out.replace('\\"', '"').split())
        assert f"role {role.name} may not select invoices (due_date)" in out
        assert "needed by overdue-detection, overdue-digest, rehearsal, send-overdue-digest" in out
        assert f"grant select (due_date) on public.invoices to {role.name};" in out
    await connection.execute(f"grant select (due_date) on public.invoices to {role.name}")
    assert (await run_command("check", DATABASE_URL=role.url)).status == 0


async def test_a_narrow_terminal_shows_each_finding_whole(
    connection: Connection, role: Role, make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    for privilege in all_privileges():
        await revoke(connection, role, privilege)
    report = Report(as_json=False)
    report.console.width = 80
    assert await check.check(make_settings(DATABASE_URL=role.url), report, SystemClock()) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    found = " ".join(line[8:].strip() for line in lines)
    assert f"→ grant delete on public.sessions to {role.name};" in found


async def test_a_role_with_no_privilege_is_told_all_it_needs_at_once(
    connection: Connection, database_url: str, make_settings: MakeSettings
) -> None:
    """Also without USAGE on the schemas: nothing else can be looked at, and the other looks go on."""
    async with limited_role(connection, database_url, ours=False) as role:
        await connection.execute(
            f"revoke usage on schema public, bon_scheduler from {role.name}; revoke usage on schema public from public"
        )
        for _ in range(2):  # what only then can be seen is told the second time
            findings = await check_deployment(make_settings(DATABASE_URL=role.url), SystemClock())
            grants = [each.remedy for each in findings if each.level is Level.FAILURE]
            for statement in grants:
                if statement and statement.startswith("grant "):
                    await connection.execute(statement)
        findings = await check_deployment(make_settings(DATABASE_URL=role.url), SystemClock())
        assert [each for each in findings if each.level is Level.FAILURE] == []


@pytest.mark.parametrize("table", ["public.sessions", "bon_scheduler.runs"])
async def test_rows_that_a_policy_would_hide_are_a_failure(
    connection: Connection, look: Look, role: Role, table: str
) -> None:
    await connection.execute(f"alter table {table} enable row level security")
    await connection.execute(f"create policy everything on {table} using (true)")
    found = [each for each in await look.failures() if each[0] == "row security"]
    assert [what for _, what, _ in found] == [f"{table} hides rows from role {role.name}, so jobs that use it fail"]
    await connection.execute(f"alter role {role.name} bypassrls")
    assert await look.failures() == []


async def test_a_policy_does_not_concern_a_tables_owner_unless_it_is_forced(
    connection: Connection, look: Look, role: Role
) -> None:
    await connection.execute(f"alter table public.sessions owner to {role.name}")
    await connection.execute("alter table public.sessions enable row level security")
    assert await look.failures() == []
    await connection.execute("alter table public.sessions force row level security")
    assert [name for name, _, _ in await look.failures()] == ["row security"]


@pytest.mark.parametrize(
    ("column", "statement", "fault"),
    [
        ("invoices.due_date", "alter column due_date type timestamptz", "is timestamp with time zone"),
        ("invoices.due_date", "alter column due_date type text", "is text"),
        ("invoices.total_incl_vat_minor_units", "alter column total_incl_vat_minor_units type numeric", "is numeric"),
        ("invoices.updated_at", "alter column updated_at type timestamp", "is timestamp without time zone"),
        ("sessions.expires_at", "alter column expires_at type date", "is date"),
        ("invoice_payments.amount_minor_units", "alter column amount_minor_units type float8", "is double precision"),
    ],
)
async def test_a_column_of_another_type_is_named(
    connection: Connection, look: Look, column: str, statement: str, fault: str
) -> None:
    if column.startswith("invoices"):
        await connection.execute("drop index invoices_overdue_candidates_idx")
    await connection.execute(f"alter table public.{column.partition('.')[0]} {statement}")
    [(name, what, _)] = await look.failures()
    assert (name, what.startswith(f"column {column} {fault}, and this version takes it for ")) == ("BON's tables", True)


@pytest.mark.parametrize(
    "statement",
    [
        "alter table public.users alter column email type varchar(200)",
        "alter table public.invoices alter column total_incl_vat_minor_units type bigint",
        "create domain public.amount as integer check (value >= 0);"
        " alter table public.invoice_payments alter column amount_minor_units type public.amount",
        "alter type public.invoice_status add value 'disputed'",
        "alter table public.user_businesses alter column role type text",
    ],
)
async def test_a_column_that_is_as_good_is_not_named(connection: Connection, look: Look, statement: str) -> None:
    await connection.execute(statement)
    assert await look.failures() == []


async def test_an_enumeration_that_lacks_a_word_is_named(connection: Connection, look: Look) -> None:
    await connection.execute("alter type public.invoice_status rename value 'partially_paid' to 'part_paid'")
    [(_, what, _)] = await look.failures()
    assert what == "column invoices.status cannot hold partially_paid any more"


@pytest.mark.parametrize("of", ["role", "database"])
async def test_a_limit_of_connections_below_what_a_replica_takes_is_a_failure(
    connection: Connection, look: Look, role: Role, of: str
) -> None:
    name = role.name if of == "role" else await connection.fetchval("select current_database()")
    await connection.execute(f"alter {of} {name} connection limit 3")
    [(found, what, remedy)] = await look.failures()
    assert found == "connections"
    assert what == f"1 replica takes up to 16 connections; {of} {name} allows 3, of which others use 0"
    assert remedy == f"alter {of} {name} connection limit 16; Or lower DATABASE_POOL_SIZE."
    await connection.execute(str(remedy).partition(";")[0])
    assert await look.failures() == []
    [crowded] = await look.of("connections", DATABASE_POOL_SIZE="11")
    assert crowded.level is Level.FAILURE


async def test_what_living_replicas_take_counts(connection: Connection, look: Look, role: Role) -> None:
    await connection.execute(f"alter role {role.name} connection limit 20")
    assert await look.failures() == []
    await connection.execute(
        "insert into bon_scheduler.workers (id, host, pid, version, serves, lease)"
        " select gen_random_uuid(), 'here', n, '1', true, interval '15 s' from generate_series(1, 2) as n"
    )
    [(_, what, _)] = await look.failures()
    assert what.startswith("2 replicas take up to 32 connections")


async def test_a_role_without_a_connection_left_is_told_so(connection: Connection, look: Look, role: Role) -> None:
    await connection.execute(f"alter role {role.name} connection limit 0")
    [(name, what, remedy)] = await look.failures()
    assert (name, "takes no more connections" in what) == ("database", True)
    assert remedy is not None
    assert "limit" in remedy


async def test_what_a_role_sets_and_we_replace_is_told_and_does_no_harm(
    connection: Connection, look: Look, role: Role
) -> None:
    for setting in ("default_transaction_isolation to serializable", "statement_timeout to '100ms'"):
        await connection.execute(f"alter role {role.name} set {setting}")
    [found] = await look.of("session")
    assert found.level is Level.OK
    assert found.what.startswith(
        f"as {role.name}, read committed, no time-out but ours; replaces what role or database"
    )
    assert "default_transaction_isolation = serializable, statement_timeout = 100ms" in found.what


@pytest.mark.parametrize(
    ("setting", "level", "said"),
    [
        ("session_replication_role to replica", Level.FAILURE, "session_replication_role = replica"),
        ("transaction_timeout to '1h'", Level.FAILURE, "transaction_timeout = 1h"),
        ("synchronous_commit to off", Level.WARNING, "synchronous_commit is off"),
        ("client_min_messages to error; alter role {} valid until '2026-01-01'", Level.WARNING, "2026-01-01 00:00 UTC"),
    ],
)
async def test_what_a_role_sets_and_nobody_replaces_is_named(
    connection: Connection, look: Look, role: Role, setting: str, level: Level, said: str
) -> None:
    if setting.startswith("transaction_timeout") and connection.get_server_version().major < 17:
        pytest.skip("transaction_timeout is PostgreSQL 17's")
    await connection.execute(f"alter role {role.name} set {setting.format(role.name)}")
    [found] = await look.of("session")
    assert (found.level, said in found.what) == (level, True)
    assert found.remedy is not None
    await connection.execute(found.remedy.partition(";")[0])
    assert [each.level for each in await look.of("session")] == [Level.OK]


async def test_a_function_that_may_not_be_executed_is_named(connection: Connection, look: Look, role: Role) -> None:
    names = await connection.fetch(
        "select oid::regprocedure::text as name from pg_proc where pronamespace = 'bon_scheduler'::regnamespace"
        " and prorettype <> 'trigger'::regtype"
    )
    assert names
    for signature in (row["name"] for row in names):
        await connection.execute(f"revoke execute on function {signature} from public, {role.name}")
        [found] = await look.of("functions")
        remedy = found.remedy or ""
        assert (found.level, remedy) == (Level.FAILURE, f"grant execute on function {signature} to {role.name};")
        await connection.execute(remedy)


async def test_a_function_that_is_missing_or_another_is_named(connection: Connection, look: Look) -> None:
    await connection.execute(
        "create or replace function bon_scheduler.is_alive(worker uuid) returns boolean language sql as 'select true'"
    )
    [found] = await look.of("functions")
    assert (found.level, found.what) == (Level.WARNING, "not as this version has them: is_alive")
    await connection.execute("drop function bon_scheduler.shown")
    first, *_ = await look.of("functions")
    assert (first.level, first.what) == (Level.FAILURE, "function shown is missing")


async def test_a_locked_table_keeps_no_other_finding_back(
    connection: Connection, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "LOOK_SECONDS", 0.5)
    async with connection.transaction():
        await connection.execute("lock table bon_scheduler.deliveries")
        assert [(name, what) for name, what, _ in await look.failures()] == [
            ("deliveries", "cannot be looked at: no answer in 0.5 s")
        ]


async def test_what_needs_no_database_is_looked_at_without_one(make_settings: MakeSettings) -> None:
    settings = make_settings(DATABASE_URL="postgresql://bon@127.0.0.1:1/bon")
    found = await check_deployment(settings, SystemClock())
    assert [(each.name, each.level) for each in found] == [
        ("settings", Level.OK),
        ("jobs", Level.OK),
        ("encryption", Level.OK),
        ("database", Level.FAILURE),
        ("shaam", Level.OK),
        ("mail", Level.OK),
    ]


async def test_before_migrate_nothing_is_said_of_our_tables(
    empty_database_url: str, make_settings: MakeSettings
) -> None:
    findings = await check_deployment(make_settings(DATABASE_URL=empty_database_url), SystemClock())
    names = {each.name: each.level for each in findings}
    assert names["schema"] is Level.FAILURE
    assert {"our tables", "functions", "schedules", "deliveries", "consent"} & set(names) == set()


async def test_each_table_of_ours_that_may_not_be_written_is_named(
    connection: Connection, look: Look, role: Role
) -> None:
    await connection.execute(f"revoke delete, insert on bon_scheduler.workers from {role.name}")
    [(_, what, remedy)] = await look.failures()
    assert what == f"role {role.name} may not insert, delete bon_scheduler.workers"
    assert remedy == f"grant insert, delete on bon_scheduler.workers to {role.name};"
    await connection.execute(f"revoke delete, insert on bon_scheduler.runs from {role.name}")
    [(_, _, remedy)] = await look.failures()
    assert remedy == f"grant insert, delete on bon_scheduler.runs, bon_scheduler.workers to {role.name};"
    await connection.execute(remedy)
    assert await look.failures() == []


async def test_a_schedule_that_cannot_be_read_is_named(connection: Connection, look: Look) -> None:
    await connection.execute(
        "insert into bon_scheduler.schedules (job, effective_from, expression, timezone, catch_up, grace, declared_by)"
        " values ('draft-cleanup', now(), '0 3 * * *', 'Asia/Atlantis', 'latest', interval '1 h', '1')"
    )
    [(name, what, _)] = await look.failures()
    assert name == "schedules"
    assert what.startswith("draft-cleanup: its schedule in the ledger cannot be read here")


async def test_a_role_that_may_do_all_that_is_needed_is_told_for_whom(look: Look, role: Role) -> None:
    [found] = await look.of("privileges")
    assert found.what == f"role {role.name} may do in BON's tables what jobs, metrics and commands need"
