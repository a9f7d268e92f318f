"""A real service whose PostgreSQL is stopped: what it logs, and what its metrics say meanwhile."""

import asyncio
import re
import signal
import time
from collections.abc import Iterator

import aiohttp
import pytest

from bon_scheduler import declared
from bon_scheduler.database import connections
from bon_scheduler.demo import postgres
from bon_scheduler.demo.sample import create_tables
from tests.chaos.cluster import Cluster, running_cluster
from tests.process import Service, run_command, serve
from tests.waiting import until

pytestmark = pytest.mark.slow
NO_SCHEDULES = {f"SCHEDULE_{job.name.replace('-', '_').upper()}": "" for job in declared.JOBS}
ONCE_IN_FOUR_YEARS = {**NO_SCHEDULES, "SCHEDULE_SESSION_CLEANUP": "0 0 29 2 *"}
AWAY_SECONDS = 10
UNKNOWN = (
    "bon_queue_depth",
    "bon_ticks_unaccounted",
    "bon_email_unknown",
    "email_unknown",
    "bon_shaam_token_min_ttl_seconds",
    "shaam_token_min_ttl_seconds",
    "bon_shaam_needs_reauth",
    "bon_consent_braked",
    'bon_health_check_status{dependency="mail"}',
    'bon_health_check_status{dependency="metrics-queue"}',
)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture
async def url(cluster: Cluster) -> str:
    """A database of BON's on a server that can be stopped, with a job that succeeded before."""
    async with connections.connect(cluster.url()) as connection:
        await create_tables(connection)
    assert (await run_command("migrate", DATABASE_URL=cluster.url())).status == 0
    assert (await run_command("run-once", "session-cleanup", DATABASE_URL=cluster.url())).status == 0
    async with connections.connect(cluster.url()) as connection:
        await connection.execute("select bon_scheduler.enqueue('generate-pdf')")
    return cluster.url()


async def scrape(service: Service) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{service.port}/metrics") as answer:
        return await answer.text()


def value(text: str, sample: str) -> float | None:
    """Return the value of a sample, None where there is none of that name."""
    found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else None


async def test_an_outage_is_two_lines_and_unknown_metrics_are_absent(
    cluster: Cluster, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": "9", "SMTP_TLS": "none"}
    async with serve(DATABASE_URL=url, **ONCE_IN_FOUR_YEARS, **mail) as service:
        before = away = await scrape(service)
        said, stopped_at = len(service.events), time.monotonic()
        await asyncio.to_thread(cluster.stop, signal.SIGINT)
        while time.monotonic() - stopped_at < AWAY_SECONDS:
            away = await scrape(service)
            await asyncio.sleep(1)
        monkeypatch.setattr(postgres, "_free_port", lambda: cluster.port)
        cluster.start()
        await until(service.ready, seconds=30)

        async def back() -> bool:
            return service.saw("database.back")

        await until(back, seconds=30)
        lines = service.events[said:]
        after = await scrape(service)
    assert [line["event"] for line in lines] == ["database.away", "database.back"]
    assert "does not answer (Connection refused)" in lines[0]["error"]
    assert AWAY_SECONDS - 1 < lines[1]["seconds"] < time.monotonic() - stopped_at
    for sample in UNKNOWN:
        if "shaam_token" not in sample:  # nobody has a token here
            assert re.search(rf"^{re.escape(sample)}", before, re.MULTILINE), sample
            assert re.search(rf"^{re.escape(sample)}", after, re.MULTILINE), sample
        assert not re.search(rf"^{re.escape(sample)}(?:[ {{]|$)", away, re.MULTILINE), sample
    database = 'bon_health_check_status{dependency="database"}'
    assert [value(text, database) for text in (before, away, after)] == [1, 0, 1]


async def test_the_first_scrape_shows_what_was_before_and_counts_from_0(url: str) -> None:
    async with serve(DATABASE_URL=url, **NO_SCHEDULES) as service:
        text = await scrape(service)
    last = value(text, 'bon_job_last_success_timestamp_seconds{job_name="session-cleanup"}')
    assert last is not None
    assert 0 < time.time() - last < 300
    assert value(text, 'bon_job_last_success_timestamp_seconds{job_name="draft-cleanup"}') is None
    for zero in (
        'bon_job_runs_total{job_name="overdue-detection",state="dead"}',
        'bon_ticks_missed_total{job_name="overdue-detection"}',
        'bon_runs_rescued_total{job_name="overdue-detection"}',
        'bon_email_sent_total{status="refused"}',
        'email_sent_total{status="refused"}',
        'bon_shaam_requests_total{result="misconfigured"}',
    ):
        assert value(text, zero) == 0, zero
    assert re.search(r'^bon_build_info\{python="3\.\d+\.\d+",version="\d+\.\d+\.\d+"\} 1\.0$', text, re.MULTILINE)
    assert (value(text, "process_resident_memory_bytes") or 0) > 1e6
    assert value(text, 'bon_health_check_status{dependency="mail"}') is None


async def test_every_old_name_is_there_and_says_the_same(url: str) -> None:
    async with serve(DATABASE_URL=url, **NO_SCHEDULES) as service:
        text = await scrape(service)
    samples = dict(re.findall(r"^((?:email|shaam|db_pool|health_check|event_loop)_\S+) (\S+)$", text, re.MULTILINE))
    assert {name.partition("{")[0] for name in samples} >= {
        "email_sent_total",
        "email_send_duration_seconds_count",
        "email_unknown",
        "db_pool_connections",
        "health_check_status",
        "health_check_duration_seconds_bucket",
        "event_loop_lag_seconds_count",
        "shaam_requests_total",
        "shaam_request_duration_seconds_sum",
        "shaam_needs_reauth",
        "shaam_failing",
    }
    assert {name: value(text, f"bon_{name}") for name in samples} == {name: float(v) for name, v in samples.items()}
