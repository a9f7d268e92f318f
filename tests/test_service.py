"""The whole service, in this process and as real processes with real signals."""

import asyncio
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import aiohttp
import pytest

import health
from bon_scheduler import Counts, Cron, JobContext, NoPayload, Retry, declared, job, service
from bon_scheduler.cli.work import LEAVING
from bon_scheduler.database import connections
from bon_scheduler.database.connections import Pool
from bon_scheduler.database.migrations import SchemaBehindError
from bon_scheduler.jobs import AnyJob
from bon_scheduler.service import Serving
from tests.conftest import Connection, MakeSettings
from tests.waiting import until

ASK = "select bon_scheduler.enqueue('a-test')"
MAKE_WITNESS = "create table witness (run_id uuid, worker text)"


@job("a-test", retry=Retry(attempts=3, delay=timedelta(milliseconds=50)))
async def witness(ctx: JobContext, _: NoPayload) -> Counts:
    async with ctx.transaction() as tx:
        await tx.execute("insert into witness values ($1, '')", ctx.run_id)
        return await ctx.finish({"rows": 1}, on=tx)


def failing(times: int) -> AnyJob:
    @job("a-test", retry=Retry(attempts=3, delay=timedelta(milliseconds=50)))
    async def fail(ctx: JobContext, _: NoPayload) -> Counts:
        if ctx.attempt <= times:
            raise ConnectionError("away")
        return {}

    return fail


def sleeping(seconds: float) -> AnyJob:
    @job("a-test")
    async def sleep(_: JobContext, __: NoPayload) -> Counts:
        await asyncio.sleep(seconds)
        return {}

    return sleep


async def state_of(connection: Connection, run_id: UUID) -> str:
    return str(await connection.fetchval("select state from bon_scheduler.runs where id = $1", run_id))


async def until_state(connection: Connection, run_id: UUID, *states: str) -> str:
    async def look() -> str | None:
        state = await state_of(connection, run_id)
        return state if state in states else None

    return str(await until(look))


async def get(serving: Serving, path: str, **headers: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{serving.port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, await answer.text()


async def until_ready(serving: Serving) -> None:
    async def look() -> bool:
        return (await get(serving, "/readyz"))[0] == 200

    await until(look)


async def test_a_run_asked_for_in_sql_is_run(make_settings: MakeSettings, connection: Connection) -> None:
    await connection.execute(MAKE_WITNESS)
    async with service.serving(make_settings(), jobs=[witness]):
        run_id = await connection.fetchval(ASK)
        assert await until_state(connection, run_id, "succeeded", "dead") == "succeeded"
    assert await connection.fetchval("select count(*) from witness") == 1


async def test_a_request_rolled_back_never_existed(make_settings: MakeSettings, connection: Connection) -> None:
    await connection.execute(MAKE_WITNESS)
    async with service.serving(make_settings(), jobs=[witness]):
        transaction = connection.transaction()
        await transaction.start()
        await connection.fetchval(ASK)
        await transaction.rollback()
        later = await connection.fetchval(ASK)
        await until_state(connection, later, "succeeded")
    assert [row["run_id"] for row in await connection.fetch("select run_id from witness")] == [later]


async def test_a_run_is_not_seen_before_its_transaction_commits(
    make_settings: MakeSettings, connection: Connection, database_url: str
) -> None:
    await connection.execute(MAKE_WITNESS)
    async with service.serving(make_settings(), jobs=[witness]), connections.connect(database_url) as other:
        transaction = other.transaction()
        await transaction.start()
        hidden = await other.fetchval(ASK)
        shown = await connection.fetchval(ASK)
        await until_state(connection, shown, "succeeded")
        assert await connection.fetchval("select count(*) from witness where run_id = $1", hidden) == 0
        await transaction.commit()
        await until_state(connection, hidden, "succeeded")


async def test_a_handlers_exception_never_stops_the_service(
    make_settings: MakeSettings, connection: Connection
) -> None:
    async with service.serving(make_settings(), jobs=[failing(1)]):
        first = await connection.fetchval(ASK)
        await until_state(connection, first, "succeeded")
        second = await connection.fetchval(ASK)
        await until_state(connection, second, "succeeded")
    assert await connection.fetchval("select attempt from bon_scheduler.runs where id = $1", first) == 2


async def test_a_run_that_always_fails_is_retried_and_then_dead(
    make_settings: MakeSettings, connection: Connection
) -> None:
    async with service.serving(make_settings(), jobs=[failing(99)]):
        run_id = await connection.fetchval(ASK)
        assert await until_state(connection, run_id, "dead", "succeeded") == "dead"
    starts = [row[0] for row in await connection.fetch("select started_at from bon_scheduler.attempts order by 1")]
    assert len(starts) == 3
    assert starts[1] - starts[0] >= timedelta(milliseconds=25)
    assert starts[2] - starts[1] >= timedelta(milliseconds=50)


async def test_each_of_many_runs_is_run_once_by_two_services(
    make_settings: MakeSettings, connection: Connection
) -> None:
    await connection.execute(MAKE_WITNESS)
    await service.prepare(make_settings(), jobs=[witness])
    await connection.execute("select bon_scheduler.enqueue('a-test') from generate_series(1, 300)")
    async with (
        service.serving(make_settings(), jobs=[witness]),
        service.serving(make_settings(), jobs=[witness]),
    ):

        async def all_ended() -> bool:
            left = "select count(*) from bon_scheduler.runs where state <> 'succeeded'"
            return int(await connection.fetchval(left)) == 0

        await until(all_ended)
    row = await connection.fetchrow("select count(*), count(distinct run_id) from witness")
    assert row is not None
    assert tuple(row) == (300, 300)
    assert await connection.fetchval("select count(distinct worker) from bon_scheduler.attempts") == 2


async def test_two_services_record_and_run_each_tick_once(make_settings: MakeSettings, connection: Connection) -> None:
    await connection.execute(MAKE_WITNESS)

    @job("a-test", schedule=Cron("* * * * * *"))
    async def every_second(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.transaction() as tx:
            await tx.execute("insert into witness values ($1, $2)", ctx.run_id, ctx.fire_time.isoformat())
            return await ctx.finish({}, on=tx)

    async def four_ran() -> bool:
        return int(await connection.fetchval("select count(*) from witness")) >= 4

    async with (
        service.serving(make_settings(), jobs=[every_second]),
        service.serving(make_settings(), jobs=[every_second]),
    ):
        await until(four_ran)
    fire_times = [row[0] for row in await connection.fetch("select worker from witness order by 1")]
    assert len(fire_times) == len(set(fire_times))
    assert all(f.endswith("+00:00") and "." not in f for f in fire_times)


def test_a_schedule_overridden_with_nothing_never_fires(make_settings: MakeSettings) -> None:
    settings = make_settings(SCHEDULE_SESSION_CLEANUP="", SCHEDULE_DRAFT_CLEANUP="*/5 * * * * *")
    schedules = declared.schedules_of(settings)
    assert "session-cleanup" not in schedules
    assert schedules["draft-cleanup"].expression == "*/5 * * * * *"
    assert schedules["draft-cleanup"].grace == timedelta(hours=24)


async def test_at_the_end_attempts_may_finish(make_settings: MakeSettings, connection: Connection) -> None:
    async with service.serving(make_settings(), jobs=[sleeping(0.5)]):
        run_id = await connection.fetchval(ASK)
        await until_state(connection, run_id, "running")
    assert await state_of(connection, run_id) == "succeeded"


async def test_at_the_end_what_takes_too_long_is_given_back(
    make_settings: MakeSettings, connection: Connection
) -> None:
    async with service.serving(make_settings(SHUTDOWN_SECONDS="0.2"), jobs=[sleeping(60)]):
        run_id = await connection.fetchval(ASK)
        await until_state(connection, run_id, "running")
    assert await state_of(connection, run_id) == "queued"
    assert await connection.fetchval("select outcome from bon_scheduler.attempts") == "given_back"
    assert await connection.fetchval("select count(*) from bon_scheduler.workers") == 0


async def test_new_runs_are_worked_on_after_every_connection_was_killed(
    make_settings: MakeSettings, connection: Connection
) -> None:
    await connection.execute(MAKE_WITNESS)
    async with service.serving(make_settings(), jobs=[witness]) as serving:
        await until_ready(serving)
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        run_id = await connection.fetchval(ASK)
        await until_state(connection, run_id, "succeeded")
        await until_ready(serving)


async def test_new_runs_need_not_wait_for_an_old_handler_after_the_connections_were_killed(
    make_settings: MakeSettings, connection: Connection
) -> None:
    @job("a-quick-test")
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    async with service.serving(make_settings(SHUTDOWN_SECONDS="0.1"), jobs=[sleeping(60), quick]) as serving:
        await until_ready(serving)
        long = await connection.fetchval(ASK)
        await until_state(connection, long, "running")
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        await until_state(
            connection, await connection.fetchval("select bon_scheduler.enqueue('a-quick-test')"), "succeeded"
        )
        assert await state_of(connection, long) == "running"


async def test_probes_say_what_they_mean(make_settings: MakeSettings) -> None:
    async with service.serving(make_settings(), jobs=[witness]) as serving:
        await until_ready(serving)
        for path in ("/livez", "/health", "/readyz", "/health/ready"):
            assert (await get(serving, path))[0] == 200
        _, body = await get(serving, "/readyz")
        assert '"status":"healthy"' in body
        assert '"latency_ms"' in body
        assert (await get(serving, "/nothing-here"))[0] == 404


async def test_readiness_fails_and_liveness_does_not_where_the_schema_is_behind(
    make_settings: MakeSettings, connection: Connection
) -> None:
    async with service.serving(make_settings(), jobs=[witness]) as serving:
        await until_ready(serving)
        await connection.execute("delete from bon_scheduler.migrations")
        status, body = await get(serving, "/readyz")
        assert (status, "bon-scheduler migrate" in body) == (503, True)
        assert (await get(serving, "/livez"))[0] == 200


async def test_readiness_fails_while_draining(make_settings: MakeSettings, connection: Connection) -> None:
    serving_ended = asyncio.Event()
    answers: list[int] = []

    async def serve() -> None:
        async with service.serving(make_settings(), jobs=[sleeping(1)]) as serving:
            run_id = await connection.fetchval(ASK)
            await until_state(connection, run_id, "running")
            answers.append((await get(serving, "/readyz"))[0])
            watcher = asyncio.create_task(watch(serving))
        serving_ended.set()
        await watcher

    async def watch(serving: Serving) -> None:
        while not serving_ended.is_set():
            try:
                answers.append((await get(serving, "/readyz"))[0])
            except aiohttp.ClientError:
                return
            await asyncio.sleep(0.05)

    await serve()
    assert answers[0] == 200
    assert 503 in answers


async def test_metrics_count_runs_and_show_the_queue(make_settings: MakeSettings, connection: Connection) -> None:
    await connection.execute(MAKE_WITNESS)
    async with service.serving(make_settings(), jobs=[witness]) as serving:
        run_id = await connection.fetchval(ASK)
        await until_state(connection, run_id, "succeeded")
        await connection.execute("select bon_scheduler.enqueue('generate-pdf')")

        async def counted() -> str | None:
            text = (await get(serving, "/metrics"))[1]
            return text if 'bon_job_runs_total{job_name="a-test",state="succeeded"} 1.0' in text else None

        text = str(await until(counted))
    for expected in (
        'bon_job_rows_total{count="rows",job_name="a-test"} 1.0',
        'bon_job_duration_seconds_count{job_name="a-test"} 1.0',
        'bon_queue_depth{job_name="generate-pdf",state="queued"} 1.0',
        'bon_job_last_success_timestamp_seconds{job_name="a-test"}',
        'db_pool_connections{state="idle"}',
        "event_loop_lag_seconds_count",
    ):
        assert expected in text


@pytest.mark.parametrize(("headers", "status"), [({}, 401), ({"Authorization": "Bearer s3cret"}, 200)])
async def test_metrics_ask_for_their_token(
    make_settings: MakeSettings, headers: Mapping[str, Any], status: int
) -> None:
    async with service.serving(make_settings(METRICS_TOKEN="s3cret"), jobs=[witness]) as serving:
        assert (await get(serving, "/metrics", **headers))[0] == status


async def test_a_token_that_is_not_text_is_refused_like_any_wrong_one(make_settings: MakeSettings) -> None:
    async with service.serving(make_settings(METRICS_TOKEN="s3cret"), jobs=[witness]) as serving:
        reader, writer = await asyncio.open_connection("127.0.0.1", serving.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer \xff\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
        writer.close()


@pytest.mark.parametrize(
    ("host", "why"), [("127.0.0.1", "Address already in use"), ("nowhere.invalid", "Name or service not known")]
)
async def test_where_nothing_can_listen_is_said_with_the_settings_that_mend_it(
    make_settings: MakeSettings, connection: Connection, host: str, why: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(health.CannotListenError) as caught:
            async with service.serving(make_settings(HEALTH_HOST=host, HEALTH_PORT=str(port)), jobs=[witness]):
                pass
    assert str(caught.value).startswith(f"Cannot listen on HEALTH_HOST {host}, HEALTH_PORT {port}: {why}. Set them")
    assert await connection.fetchval("select count(*) from bon_scheduler.workers") == 0


async def test_a_schema_that_is_behind_is_refused_at_start(empty_database_url: str) -> None:
    settings = declared.read_settings({"DATABASE_URL": empty_database_url, "HEALTH_PORT": "0"})
    with pytest.raises(SchemaBehindError, match="bon-scheduler migrate"):
        async with service.serving(settings):
            pass


async def test_the_pool_gives_up_a_frozen_transaction_before_its_lease_ends(pool: Pool) -> None:
    async with pool.acquire() as connection:
        limit = await connection.fetchval("show idle_in_transaction_session_timeout")
    assert limit == "10s"


@pytest.mark.parametrize("way", ["connection", "transaction"])
async def test_a_handler_that_swallows_its_cancellation_does_not_keep_the_service(
    make_settings: MakeSettings, connection: Connection, way: str
) -> None:
    """Whatever it holds: a transaction, or a connection that nothing fences."""
    over = asyncio.Event()

    @job("a-test")
    async def stubborn(ctx: JobContext, _: NoPayload) -> Counts:
        async with ctx.connection() if way == "connection" else ctx.transaction():
            while not over.is_set():
                with suppress(asyncio.CancelledError):
                    await over.wait()
        return {}

    async with service.serving(make_settings(SHUTDOWN_SECONDS="0.1"), jobs=[stubborn]):
        await until_state(connection, await connection.fetchval(ASK), "running")
        before = time.monotonic()
    seconds = time.monotonic() - before
    over.set()
    assert seconds < 0.1 + LEAVING.total_seconds()
