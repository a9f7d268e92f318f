"""The dead man's switch, against a real HTTP server on loopback."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta

import pytest
from aiohttp import web
from pydantic import SecretStr

from bon_scheduler import Counts, JobContext, NoPayload, Retry, job, service
from bon_scheduler.engine import Deadman
from bon_scheduler.environment import SettingsError
from bon_scheduler.jobs import AnyJob
from tests.conftest import Connection, MakeSettings, RunJob
from tests.waiting import until


class Watcher:
    """What a watcher like healthchecks.io heard, and how it answers."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.answers: list[int] = []
        self.url = ""

    async def hear(self, request: web.Request) -> web.Response:
        self.heard.append(request.path)
        return web.Response(status=self.answers.pop(0) if self.answers else 200)


@pytest.fixture
async def watcher() -> AsyncIterator[Watcher]:
    found = Watcher()
    app = web.Application()
    app.router.add_get("/{path:.*}", found.hear)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}/a-secret-uuid"
    yield found
    await runner.cleanup()


@job("session-cleanup", retry=Retry(attempts=2, delay=timedelta(milliseconds=10)))
async def failing(_: JobContext, __: NoPayload) -> Counts:
    raise ConnectionError("away")


@job("session-cleanup")
async def succeeding(_: JobContext, __: NoPayload) -> Counts:
    return {}


@job("session-cleanup")
async def kept_from_its_work(ctx: JobContext, _: NoPayload) -> Counts:
    async with ctx.transaction() as tx:
        return await ctx.finish({}, on=tx, undone="SMTP_HOST is not set")


@pytest.mark.parametrize(
    ("a_job", "heard"),
    [
        (kept_from_its_work, ["/a-secret-uuid/start"]),
        (succeeding, ["/a-secret-uuid/start", "/a-secret-uuid"]),
        (failing, ["/a-secret-uuid/start", "/a-secret-uuid/fail"]),
    ],
)
async def test_a_start_and_an_end_are_told(run_job: RunJob, watcher: Watcher, a_job: AnyJob, heard: list[str]) -> None:
    await run_job(a_job, jobs=[a_job], DEADMAN_URL_SESSION_CLEANUP=watcher.url)
    assert sorted(watcher.heard) == sorted(heard)


async def test_a_failure_that_is_retried_is_not_told_as_the_end(
    make_settings: MakeSettings, connection: Connection, watcher: Watcher
) -> None:
    settings = make_settings(DEADMAN_URL_SESSION_CLEANUP=watcher.url)
    async with service.serving(settings, jobs=[failing]):
        await connection.fetchval("select bon_scheduler.enqueue('session-cleanup')")

        async def dead() -> bool:
            return bool(await connection.fetchval("select bool_and(state = 'dead') from bon_scheduler.runs"))

        await until(dead)
    assert [path.removeprefix("/a-secret-uuid") for path in watcher.heard].count("/fail") == 1


async def test_another_jobs_runs_are_not_told(run_job: RunJob, watcher: Watcher) -> None:
    await run_job(succeeding, jobs=[succeeding], DEADMAN_URL_DRAFT_CLEANUP=watcher.url)
    assert watcher.heard == []


async def test_a_watcher_that_answers_badly_is_tried_again(run_job: RunJob, watcher: Watcher) -> None:
    watcher.answers = [500, 500]
    await run_job(succeeding, jobs=[succeeding], DEADMAN_URL_SESSION_CLEANUP=watcher.url)

    async def told() -> bool:
        return len(watcher.heard) >= 3

    await until(told)


async def test_a_watcher_that_is_away_changes_nothing_and_its_address_is_not_logged(
    run_job: RunJob, logged: Callable[[], str]
) -> None:
    async with asyncio.timeout(20):
        report = await run_job(
            succeeding, jobs=[succeeding], DEADMAN_URL_SESSION_CLEANUP="http://127.0.0.1:1/a-secret-uuid"
        )
    assert report.run["state"] == "succeeded"
    assert "a-secret-uuid" not in logged()


def test_an_address_that_is_none_is_refused_without_being_shown(make_settings: MakeSettings) -> None:
    with pytest.raises(SettingsError, match="DEADMAN_URL_SESSION_CLEANUP: must be an http") as caught:
        make_settings(DEADMAN_URL_SESSION_CLEANUP="a-secret-uuid", DEADMAN_URL_NO_SUCH_JOB="http://x")
    assert "a-secret-uuid" not in str(caught.value)
    assert "DEADMAN_URL_NO_SUCH_JOB: no such job" in str(caught.value)


async def test_nobody_is_told_while_it_is_to_be_silent(watcher: Watcher) -> None:
    silent = True
    urls = {"session-cleanup": SecretStr(watcher.url)}
    async with Deadman.watching(urls, silent=lambda: silent) as deadman:
        deadman.started("session-cleanup")
        deadman.ended("session-cleanup", "dead")
        silent = False
        deadman.ended("session-cleanup", "succeeded")
    assert watcher.heard == ["/a-secret-uuid"]
