"""A failure stops what it belongs to and nothing else: a job's schedule, a metric, a business."""

from typing import Any

import aiohttp
import pytest

from bon_scheduler import Counts, Cron, JobContext, NoPayload, job, service
from bon_scheduler.schedule.audit import audit_ticks
from bon_scheduler.service import Serving
from tests.conftest import Connection, MakeSettings
from tests.process import run_command
from tests.waiting import until

OTHER = "generate-pdf"
UNREADABLE = {
    "a zone nobody has": ("-1 day", "0 6 * * *", "Mars/Olympus", "latest", "1 hour"),
    "a zone that is a path": ("-1 day", "0 6 * * *", "../../etc/passwd", "latest", "1 hour"),
    "an empty zone": ("-1 day", "0 6 * * *", "", "latest", "1 hour"),
    "an expression of another version": ("-1 day", "@nightly-ish", "UTC", "latest", "1 hour"),
    "an expression that never fires": ("-1 day", "0 0 30 2 *", "UTC", "latest", "1 hour"),
    "a policy of another version": ("-1 day", "0 6 * * *", "UTC", "twice", "1 hour"),
    "a grace beyond any calendar": ("-1 day", "0 6 * * *", "UTC", "latest", "170000000 years"),
}
IN_SHORT = ("a zone nobody has", "an expression of another version", "a policy of another version")
DAMAGE = """
    insert into bon_scheduler.schedules (job, effective_from, expression, timezone, catch_up, grace, declared_by)
    values ($1, now() + $2::text::interval, $3, $4, $5, $6::text::interval, '9')
"""
LOOSEN = "alter table bon_scheduler.schedules drop constraint schedules_catch_up_check"
LONG_AGO = "update bon_scheduler.jobs set last_tick = now() - interval '1 day' where name = $1"


@job("a-test", schedule=Cron("* * * * * *"))
async def each_second(_: JobContext, __: NoPayload) -> Counts:
    return {}


async def get(serving: Serving, path: str) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{serving.port}{path}") as answer,
    ):
        body = await answer.text() if path == "/metrics" else await answer.json()
        return answer.status, body


async def ticks_go_on(connection: Connection) -> None:
    count = "select count(*) from bon_scheduler.runs where job = 'a-test' and state = 'succeeded'"
    before = await connection.fetchval(count)

    async def more() -> bool:
        return bool(await connection.fetchval(count) >= before + 2)

    await until(more)


async def damage(connection: Connection, job_name: str, how: str) -> None:
    await connection.execute(LOOSEN)
    await connection.execute(DAMAGE, job_name, *UNREADABLE[how])
    await connection.execute(
        "update bon_scheduler.jobs set last_tick = now() - interval '1 day' where name = $1", job_name
    )


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=() if how in IN_SHORT else pytest.mark.long) for how in UNREADABLE]
)
@pytest.mark.samples(1)
async def test_a_schedule_that_cannot_be_read_stops_its_own_ticks_and_is_named_everywhere(
    make_settings: MakeSettings, connection: Connection, database_url: str, how: str
) -> None:
    async with service.serving(make_settings(), jobs=[each_second]) as serving:
        await ticks_go_on(connection)
        await damage(connection, OTHER, how)

        async def unready() -> bool:
            return (await get(serving, "/readyz"))[0] == 503

        await until(unready, seconds=20)
        await ticks_go_on(connection)
        _, ready = await get(serving, "/readyz")
        assert list(ready["checks"]["schedules"]["unusable"]) == [OTHER]
        assert (await get(serving, "/livez"))[0] == 200
        status, metrics = await get(serving, "/metrics")
        assert (status, f'bon_ticks_unaccounted{{job_name="{OTHER}"}} 1.0' in metrics) == (200, True)
        assert 'bon_job_runs_total{job_name="a-test",state="succeeded"}' in metrics
        since = await connection.fetchval("select now() - interval '1 hour'")
        found = await audit_ticks(connection, since)
        assert (found.sound, list(found.unusable)) == (False, [OTHER])
        audited = await run_command("audit", "--since", "1h", DATABASE_URL=database_url)
        assert (audited.status, f"{OTHER}: its schedule in the ledger cannot be read here" in audited.out) == (1, True)
        await connection.execute("delete from bon_scheduler.schedules where job = $1", OTHER)

        async def mended() -> bool:
            return (await get(serving, "/readyz"))[0] == 200

        await until(mended, seconds=20)


async def test_a_schedule_of_its_own_that_was_damaged_is_declared_anew(
    make_settings: MakeSettings, connection: Connection
) -> None:
    async with service.serving(make_settings(), jobs=[each_second]) as serving:
        await ticks_go_on(connection)
        await connection.execute(LOOSEN)
        await connection.execute(DAMAGE, "a-test", "0 seconds", "@nightly-ish", "UTC", "latest", "1 hour")
        await ticks_go_on(connection)
        assert (await get(serving, "/readyz"))[0] == 200


async def test_a_metric_that_cannot_be_read_hides_no_other(make_settings: MakeSettings, connection: Connection) -> None:
    async with service.serving(make_settings(), jobs=[each_second]) as serving:
        await ticks_go_on(connection)
        await connection.execute("select bon_scheduler.enqueue($1)", OTHER)
        await connection.execute("alter table business_shaam_credentials rename column needs_reauth to asked")
        status, metrics = await get(serving, "/metrics")
        assert status == 200
        assert 'health_check_status{dependency="metrics-shaam"} 0.0' in metrics
        assert f'bon_queue_depth{{job_name="{OTHER}",state="queued"}} 1.0' in metrics
        await connection.execute("alter table business_shaam_credentials rename column asked to needs_reauth")

        async def shown_again() -> bool:
            return 'health_check_status{dependency="metrics-shaam"} 1.0' in (await get(serving, "/metrics"))[1]

        await until(shown_again)
