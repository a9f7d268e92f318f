"""`check` on the authority's host, time zone data and a pooler; what a role with its privileges does in the service."""

import shutil
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import web
from aiohttp.test_utils import TestServer

from bon_scheduler.demo.shaam_simulator import Misbehaviour, shaam_simulator
from bon_scheduler.demo.smtp_sink import smtp_sink
from bon_scheduler.jobs import AnyJob
from handlers.draft_cleanup import draft_cleanup
from handlers.overdue_detection import overdue_detection
from handlers.session_cleanup import session_cleanup
from handlers.shaam_token_refresh import shaam_token_refresh
from tests import arrange, tax
from tests.conftest import Connection, RunJob
from tests.database.test_pooling import residue
from tests.pooler import TOLERANT, answers, pgbouncer
from tests.process import run_command, serve
from tests.roles import Role

ZONES = Path("/usr/share/zoneinfo")


async def finding(name: str, **environ: str) -> dict[str, Any]:
    checked = await run_command("check", "--json", **environ)
    [found] = [each for each in checked.document["findings"] if each["name"] == name]
    assert (checked.status == 1) == any(each["level"] == "failure" for each in checked.document["findings"])
    return dict(found)


async def test_the_authoritys_host_is_reached_without_a_request(database_url: str) -> None:
    requests: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        requests.append(request.path)
        return web.Response()

    def server(**options: Any) -> TestServer:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", answer)
        return TestServer(application, host="localhost", **options)

    async with server() as plain:
        url = f"http://localhost:{plain.port}/token"
        found = await finding("shaam", DATABASE_URL=database_url, **tax.environ(url))
        assert (found["level"], found["what"]) == ("ok", f"localhost:{plain.port} can be reached (no token was sent)")
    gone = await finding("shaam", DATABASE_URL=database_url, **tax.environ(url))
    assert gone["level"] == "failure"
    assert gone["what"].startswith(found["what"].partition(" can be")[0] + " cannot be reached: ")
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    secure = server(scheme="https")
    await secure.start_server(ssl=context)
    environ = {"DATABASE_URL": database_url, **tax.environ(f"https://localhost:{secure.port}/token")}
    with authority.cert_pem.tempfile() as certificates:
        trusted = await finding("shaam", SSL_CERT_FILE=certificates, **environ)
    distrusted = await finding("shaam", **environ)
    await secure.close()
    assert (trusted["level"], "its certificate is valid" in trusted["what"]) == ("ok", True)
    assert (distrusted["level"], "CERTIFICATE_VERIFY_FAILED" in distrusted["what"]) == ("failure", True)
    assert requests == []


@pytest.mark.skipif(not (ZONES / "Asia" / "Tokyo").exists(), reason="needs time zone data: apt-get install tzdata")
async def test_zones_that_differ_between_this_machine_and_the_database_are_named(
    database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "Asia").mkdir()
    shutil.copy(ZONES / "UTC", tmp_path / "UTC")
    (tmp_path / "+VERSION").write_text("1999z\n")
    shutil.copy(ZONES / "Asia" / "Tokyo", tmp_path / "Asia" / "Jerusalem")
    shutil.copy(ZONES / "Asia" / "Tokyo", tmp_path / "Asia" / "Atlantis")
    environ = {"DATABASE_URL": database_url, "PYTHONTZPATH": str(tmp_path)}
    other = await finding("time zone", **environ)
    assert other["level"] == "warning"
    assert other["what"].startswith("Asia/Jerusalem (time zone data 1999z) is +09:00 here and +0")
    unknown = await finding("time zone", **environ, BON_TIMEZONE="Asia/Atlantis")
    assert unknown["what"] == "the database does not know Asia/Atlantis (time zone data 1999z)"
    same = await finding("time zone", DATABASE_URL=database_url)
    assert (same["level"], "clocks change next at " in same["what"]) == ("ok", True)


@pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="needs PgBouncer: apt-get install pgbouncer")
@pytest.mark.parametrize("more", ["", TOLERANT])
async def test_behind_a_pooler_the_role_that_works_is_looked_at_and_nothing_stays(
    connection: Connection, role: Role, database_url: str, tmp_path: Path, more: str
) -> None:
    await connection.execute(f"alter role {role.name} set default_transaction_isolation to serializable")
    with pgbouncer(tmp_path, role.url, more=more) as url:
        await answers(url)
        environ = {"DATABASE_URL": url, "DATABASE_LISTEN_URL": role.url}
        sound = await run_command("check", "--json", **environ)
        levels = {each["name"]: each["level"] for each in sound.document["findings"]}
        assert (sound.status, levels["same role"], levels["privileges"]) == (0, "ok", "ok"), sound.out
        [session] = [each["what"] for each in sound.document["findings"] if each["name"] == "session"]
        assert session == (
            f"as {role.name}, read committed, no time-out but ours;"
            " replaces what role or database set: default_transaction_isolation = serializable"
        )
        await connection.execute(f"revoke delete on public.sessions from {role.name}")
        found = await finding("privileges", **environ)
        assert found["remedy"] == f"grant delete on public.sessions to {role.name};"
        two = await finding("same role", DATABASE_URL=url, DATABASE_LISTEN_URL=database_url)
        assert (two["level"], two["remedy"]) == ("warning", "Name one role in both.")
        assert await residue(url) == []


@pytest.mark.parametrize("job", [draft_cleanup, session_cleanup, overdue_detection])
async def test_a_role_with_these_privileges_does_the_nightly_jobs(
    connection: Connection, role: Role, run_job: RunJob, tmp_path: Path, job: AnyJob
) -> None:
    """What the statements' own rows need as well: cascades, foreign keys, the ledger, what a job causes."""
    long_past = datetime.now(UTC) - timedelta(days=40)
    business = await arrange.business(connection)
    owner = await arrange.owner(connection, business, "owner@shop.example")
    await arrange.invoice(connection, business, due_date=long_past.date())
    draft = await arrange.draft(connection, business)
    await arrange.insert(
        connection,
        "invoice_items",
        {"invoice_id": draft, "position": 1, "description": "x", "quantity": 1}
        | {"unit_price_minor_units": 1, "vat_rate_basis_points": 1800},
    )
    await connection.execute("update invoices set updated_at = $2 where id = $1", draft, long_past)
    await arrange.session(connection, owner, long_past)
    async with smtp_sink(tmp_path) as sink:
        smtp = {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none"}
        ran = await run_job(job, DATABASE_URL=role.url, **smtp)
    assert ran.run["state"] == "succeeded", ran.run
    assert [run["state"] for run in ran.caused] == ["succeeded"] * len(ran.caused)
    assert len(sink.messages) == (1 if job is overdue_detection else 0)
    assert sum(count for name, count in ran.run["counts"].items() if name in {"deleted", "marked"}) == 1


async def test_a_role_with_these_privileges_refreshes_tokens_and_flags_businesses(
    connection: Connection, role: Role, run_job: RunJob
) -> None:
    async with shaam_simulator(client_id=tax.CLIENT_ID, client_secret=tax.CLIENT_SECRET) as simulator:
        bon = tax.Bon(connection, simulator)
        for subject in ("a", "b"):
            await arrange.owner(connection, await bon.business(subject), f"{subject}@shop.example")
        simulator.spoil["b"] = Misbehaviour.INVALID_GRANT
        ran = await run_job(shaam_token_refresh, DATABASE_URL=role.url, **tax.environ(simulator.token_url))
    assert (ran.run["counts"]["refreshed"], ran.run["counts"]["needs_reauth"], ran.run["counts"]["failed"]) == (1, 1, 0)
    assert [(run["job"], run["state"]) for run in ran.caused] == [("notify-reauth", "succeeded")]


async def test_commands_and_metrics_work_as_the_role(connection: Connection, role: Role) -> None:
    business = str(await arrange.business(connection))
    for arguments in (
        ["enqueue", "session-cleanup"],
        ["pause", "draft-cleanup", "--reason", "x"],
        ["pause", "--business", business, "--reason", "x"],
        ["resume", "--business", business[:8], "--reason", "x"],
        ["run-once", "ledger-pruning"],
        ["jobs"],
        ["runs"],
        ["audit"],
    ):
        answer = await run_command(*arguments, DATABASE_URL=role.url)
        assert answer.status == 0, (arguments, answer.err)
    async with (
        serve(DATABASE_URL=role.url) as service,
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{service.port}/metrics") as metrics,
    ):
        text = await metrics.text()
    assert not service.saw("metrics.failed")
    assert "health_check_status" in text


async def test_the_service_logs_at_its_start_what_the_role_may_not_do(connection: Connection, role: Role) -> None:
    await connection.execute(f"revoke delete on public.sessions from {role.name}")
    await connection.execute("alter table public.invoice_items enable row level security")
    async with serve(DATABASE_URL=role.url) as service:
        [missing] = service.of("privilege.missing")
        [hidden] = service.of("rows.hidden")
    assert (missing["may_not"], missing["needed_by"]) == ("delete sessions", ["session-cleanup"])
    assert missing["remedy"] == f"grant delete on public.sessions to {role.name};"
    assert hidden["table"] == "public.invoice_items"
