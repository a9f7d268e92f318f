"""Session clean-up on real PostgreSQL."""

import importlib
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from handlers.session_cleanup import session_cleanup
from tests import arrange
from tests.conftest import Connection, RunJob

FIRED = datetime(2026, 11, 23, 2, tzinfo=UTC)
"""04:00 in Israel."""
INSTANT = timedelta(microseconds=1)


async def sessions(connection: Connection) -> set[UUID]:
    return {row["id"] for row in await connection.fetch("select id from sessions")}


@pytest.mark.parametrize(
    ("after", "stays"),
    [(-timedelta(days=400), False), (-INSTANT, False), (timedelta(0), True), (INSTANT, True)],
)
async def test_a_session_that_expired_before_the_fire_time_is_deleted_and_no_other(
    run_job: RunJob, connection: Connection, after: timedelta, stays: bool
) -> None:
    await arrange.session(connection, await arrange.user(connection), FIRED + after)
    await run_job(session_cleanup, fire_time=FIRED)
    assert bool(await sessions(connection)) is stays


async def test_what_expired_since_the_fire_time_is_left_to_the_next_night(
    run_job: RunJob, connection: Connection
) -> None:
    since = await arrange.session(connection, await arrange.user(connection), FIRED + timedelta(hours=1))
    await run_job(session_cleanup, fire_time=FIRED, now=FIRED + timedelta(hours=9))
    assert await sessions(connection) == {since}


@pytest.mark.parametrize("expired", [0, 2, 3, 4, 7])
async def test_more_than_a_batch_is_deleted_batch_by_batch(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch, expired: int
) -> None:
    monkeypatch.setattr(importlib.import_module("handlers.session_cleanup"), "AT_ONCE", 3)
    user = await arrange.user(connection)
    for age in range(expired):
        await arrange.session(connection, user, FIRED - timedelta(minutes=age + 1))
    report = await run_job(session_cleanup, fire_time=FIRED)
    assert (report.run["counts"], await sessions(connection)) == ({"deleted": expired}, set())


async def test_a_second_run_finds_nothing_left_to_delete(run_job: RunJob, connection: Connection) -> None:
    await arrange.session(connection, await arrange.user(connection), FIRED - INSTANT)
    await run_job(session_cleanup, fire_time=FIRED)
    again = await run_job(session_cleanup, fire_time=FIRED)
    assert again.run["counts"] == {"deleted": 0}


async def test_a_session_that_is_in_use_is_left_alone_and_keeps_nothing_else(
    run_job: RunJob, connection: Connection
) -> None:
    user = await arrange.user(connection)
    in_use = await arrange.session(connection, user, FIRED - timedelta(hours=2))
    await arrange.session(connection, user, FIRED - timedelta(hours=1))
    async with connection.transaction():
        await connection.execute("update sessions set last_accessed_at = now() where id = $1", in_use)
        await run_job(session_cleanup, fire_time=FIRED)
    assert await sessions(connection) == {in_use}


async def test_the_user_of_an_expired_session_stays(run_job: RunJob, connection: Connection) -> None:
    await arrange.session(connection, await arrange.user(connection), FIRED - INSTANT)
    await run_job(session_cleanup, fire_time=FIRED)
    assert await connection.fetchval("select count(*) from users") == 1
