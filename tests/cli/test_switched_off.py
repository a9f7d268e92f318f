"""What is off is said everywhere, and a run that a default keeps from its work is `partial`."""

import re
from datetime import UTC, datetime, timedelta
from uuid import UUID

import aiohttp
import pytest

from bon_scheduler import declared
from tests import arrange
from tests.conftest import Connection
from tests.process import run_command, serve
from tests.waiting import until

BY_DEFAULT = {"SHAAM_MODE": "", "EMAIL_MODE": ""}
CHOSEN = {"SHAAM_MODE": "mock", "EMAIL_MODE": "log"}
NO_SCHEDULES = {f"SCHEDULE_{job.name.replace('-', '_').upper()}": "" for job in declared.JOBS}


async def owes(connection: Connection) -> UUID:
    """Make a business with an overdue invoice, an owner and a token that expires."""
    business = await arrange.business(connection)
    await arrange.owner(connection, business, "owner@bon.example")
    customer = await arrange.customer(connection, business)
    yesterday = datetime.now(UTC).date() - timedelta(days=2)
    await arrange.invoice(connection, business, customer_id=customer, due_date=yesterday)
    return business


@pytest.mark.parametrize(
    ("job", "worker", "count", "setting"),
    [
        ("overdue-detection", "send-overdue-digest", "logged", "SMTP_HOST is not set"),
        ("shaam-token-refresh", "shaam-token-refresh", "mocked", "SHAAM_MODE is not set"),
    ],
)
async def test_a_run_that_a_default_keeps_from_its_work_is_partial_and_says_which_setting(
    connection: Connection, database_url: str, job: str, worker: str, count: str, setting: str
) -> None:
    await owes(connection)
    ran = await run_command("run-once", job, DATABASE_URL=database_url, **BY_DEFAULT)
    assert ran.status == 1
    assert setting in ran.out.splitlines()[-1] or setting in " ".join(ran.out.splitlines()[-3:])
    row = await connection.fetchrow(
        "select state::text, error, counts::text from bon_scheduler.runs where job = $1", worker
    )
    assert row is not None
    assert row["state"] == "partial"
    assert setting in row["error"]
    assert f'"{count}"' in row["counts"]


@pytest.mark.parametrize("job", ["overdue-detection", "shaam-token-refresh"])
async def test_a_run_succeeds_that_does_nothing_because_the_settings_say_so(
    connection: Connection, database_url: str, job: str
) -> None:
    await owes(connection)
    ran = await run_command("run-once", job, DATABASE_URL=database_url, **CHOSEN)
    assert ran.status == 0
    assert "Not done: " in ran.out
    states = await connection.fetch("select distinct state::text, error from bon_scheduler.runs")
    assert [tuple(row) for row in states] == [("succeeded", None)]


@pytest.mark.parametrize(("modes", "level"), [(BY_DEFAULT, "warning"), (CHOSEN, "info")])
async def test_the_service_says_at_start_what_is_off_and_its_metrics_do_not_call_it_up(
    connection: Connection, database_url: str, modes: dict[str, str], level: str
) -> None:
    await connection.execute("insert into bon_scheduler.pauses (job, by, reason) values ('draft-cleanup', 'd', 'r')")
    await connection.execute(
        "insert into bon_scheduler.runs (job, origin, state) values ('draft-cleanup', 'run', 'held')"
    )
    async with serve(DATABASE_URL=database_url, **NO_SCHEDULES, **modes) as service:
        url = f"http://127.0.0.1:{service.port}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            metrics = await answer.text()
    told = {line["name"]: (line["level"], line["what"]) for line in service.of("service.stands_aside")}
    assert {name: told[name][0] for name in ("mail", "shaam")} == {"mail": level, "shaam": level}
    assert "SHAAM_MODE" in told["shaam"][1]
    # What is set already is no advice.
    remedies = {line["name"]: line["remedy"] for line in service.of("service.stands_aside")}
    assert ("EMAIL_MODE=log" in remedies["mail"]) is (modes is BY_DEFAULT)
    assert ("SHAAM_MODE=mock" in remedies["shaam"]) is (modes is BY_DEFAULT)
    assert told["schedule session-cleanup"][0] == "info"
    assert "draft-cleanup" in told["paused"][1]
    assert told["paused"][0] == told["held"][0] == "warning"
    assert 'bon_health_check_status{dependency="database"} 1.0' in metrics
    assert 'health_check_status{dependency="mail"}' not in metrics


async def test_a_run_that_did_nothing_by_default_is_no_success_to_whoever_watches(database_url: str) -> None:
    quarter = {**NO_SCHEDULES, "SCHEDULE_SHAAM_TOKEN_REFRESH": "* * * * * */1"}
    async with serve(DATABASE_URL=database_url, **quarter, **BY_DEFAULT) as service:

        async def ended() -> bool:
            return service.saw("run.ended")

        await until(ended, seconds=30)
        url = f"http://127.0.0.1:{service.port}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            metrics = await answer.text()
    assert service.of("run.ended")[0]["outcome"] == "partial"
    assert service.of("run.ended")[0]["level"] == "warning"
    assert re.search(
        r'^bon_job_runs_total\{job_name="shaam-token-refresh",state="partial"\} [1-9]', metrics, re.MULTILINE
    )
    assert 'bon_job_last_success_timestamp_seconds{job_name="shaam-token-refresh"}' not in metrics


async def test_check_has_a_row_for_each(connection: Connection, database_url: str) -> None:
    await connection.execute("insert into bon_scheduler.pauses (job, by, reason) values ('draft-cleanup', 'd', 'r')")
    off = {"SCHEDULE_DRAFT_CLEANUP": ""}
    found = {}
    for modes in (BY_DEFAULT, CHOSEN):
        checked = await run_command("check", "--json", DATABASE_URL=database_url, **modes, **off)
        rows = {row["name"]: row["level"] for row in checked.document["findings"]}
        found[modes["SHAAM_MODE"]] = [rows[name] for name in ("mail", "shaam", "paused", "schedule draft-cleanup")]
    assert found == {"": ["warning", "warning", "warning", "ok"], "mock": ["ok", "ok", "warning", "ok"]}


@pytest.mark.parametrize(
    ("environ", "fault"),
    [
        ({"EMAIL_MODE": "smtp"}, "SMTP_HOST: is not set; EMAIL_MODE=smtp needs it"),
        ({"EMAIL_MODE": "log", "SMTP_HOST": "mail.bon.example"}, "EMAIL_MODE: log sends nothing, and SMTP_HOST is set"),
        ({"EMAIL_MODE": "none"}, "EMAIL_MODE: input should be 'smtp' or 'log'"),
    ],
)
async def test_a_mode_of_mail_that_contradicts_the_server_is_refused(
    database_url: str, environ: dict[str, str], fault: str
) -> None:
    checked = await run_command("jobs", DATABASE_URL=database_url, **environ)
    assert checked.status == 2
    assert fault in checked.err
