"""
The demo: the real service on one machine, with a database, BON's tables, mail and SHAAM of its own.

The jobs are asked for and worked on by the service itself while its schedules are off, so that no
tick comes between and what must happen is known beforehand. Then, unless `--once`, the service
goes on with its schedules until Ctrl-C. The environment is not read, so that no setting of a
real deployment can reach it, and nothing outside this process tree is left behind.
"""

import asyncio
import secrets
import signal
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

from bon_scheduler import database, declared, ledger, service
from bon_scheduler.config import Settings
from bon_scheduler.demo.postgres import find_binaries, running_postgres
from bon_scheduler.demo.sample import SampleFacts, create_tables, load_sample
from bon_scheduler.demo.shaam_simulator import Misbehaviour, ShaamSimulator, shaam_simulator
from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from bon_scheduler.jobs import Connection, Counts
from bon_scheduler.ledger import OPEN_STATES, Origin, Request, Row
from bon_scheduler.report import Report, add_counts, format_counts
from bon_scheduler.service import Serving
from bon_scheduler.shaam import TokenCipher

__all__ = ["run_demo"]

JOBS = ("overdue-detection", "draft-cleanup", "session-cleanup", "shaam-token-refresh")
KEY = secrets.token_hex(32)
"""Of this demo alone: the next one makes the database anew."""
CLIENT = {"SHAAM_CLIENT_ID": "demo-client", "SHAAM_CLIENT_SECRET": "demo-secret"}
LOOK_AGAIN_SECONDS = 0.05
LONGEST_SECONDS = 60
MILLISECOND = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class Ended:
    """A job and all its runs that the demo caused: a state that is not success if any, and summed counts."""

    job: str
    state: str
    runs: int
    counts: Counts
    took: timedelta
    """From the first start to the last end."""


@dataclass(frozen=True, slots=True)
class World:
    """What stands in for the outside, and what the jobs must make of it."""

    facts: SampleFacts
    settings: Mapping[str, str]
    sink: SmtpSink


def run_demo(*, port: int, keep: Path | None, once: bool, report: Report) -> int:
    """
    Show every job on sample data; return 0 if each ended as the data says it must.

    Raises PostgresUnavailableError, and CannotListenError for a port that is taken.
    """
    # The digests of the last demo go AFTER the server is up: another demo may be using the directory.
    with running_postgres(find_binaries(), directory=keep) as url, _home(keep) as home:
        return asyncio.run(_demonstrate(url, home, port, once=once, report=report))


@contextmanager
def _home(keep: Path | None) -> Iterator[Path]:
    """Give a directory for the digests, which goes with the demo unless it is to be kept."""
    if keep is not None:
        # Only what a demo's mail server wrote: a directory of that name may be somebody's own.
        for path in (keep / "digests").glob("[0-9][0-9]*-*.*"):
            if path.suffix in {".eml", ".html"}:
                path.unlink()
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="bon-demo-") as name:
        yield Path(name)


async def _demonstrate(url: str, home: Path, port: int, *, once: bool, report: Report) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with _world(url, home, port) as world:
        without_schedules = {f"SCHEDULE_{job.name.replace('-', '_').upper()}": "" for job in declared.JOBS}
        settings = declared.read_settings({**world.settings, **without_schedules})
        await service.prepare(settings)
        async with service.serving(settings) as serving:
            ended = await _run_jobs(serving, world.facts, stop, report)
        faults = _compare(ended, world)
        _tell(report, ended, faults, world)
        if not once and not stop.is_set():
            async with service.serving(declared.read_settings(world.settings)) as serving:
                _say_where_to_look(report, serving, world, home)
                await stop.wait()
    return 1 if faults else 0


@asynccontextmanager
async def _world(url: str, home: Path, port: int) -> AsyncIterator[World]:
    """Build BON's database with sample data, a mail server and the authority's simulator."""
    async with AsyncExitStack() as stack:
        sink = await stack.enter_async_context(smtp_sink(home / "digests"))
        simulator = await stack.enter_async_context(
            shaam_simulator(client_id=CLIENT["SHAAM_CLIENT_ID"], client_secret=CLIENT["SHAAM_CLIENT_SECRET"])
        )
        settings = {
            "DATABASE_URL": await _new_database(url),
            "HEALTH_HOST": "127.0.0.1",
            "HEALTH_PORT": str(port),
            "SHUTDOWN_SECONDS": "5",
            "SHAAM_TIMEOUT_SECONDS": "4",
            "EMAIL_RATE_PER_SECOND": "50",
            "APP_ORIGIN": "https://app.bon.example",
            "SMTP_HOST": sink.host,
            "SMTP_PORT": str(sink.port),
            "SMTP_TLS": "none",
            "SHAAM_MODE": "sandbox",
            "SHAAM_TOKEN_URL": simulator.token_url,
            "SHAAM_ENCRYPTION_KEY": KEY,
            **CLIENT,
        }
        facts = await _load(declared.read_settings(settings), simulator)
        yield World(facts, settings, sink)


async def _new_database(url: str) -> str:
    """Make the database `bon` anew; return its address."""
    async with database.connect(url) as connection:
        await connection.execute("drop database if exists bon with (force)")
        await connection.execute("create database bon")
    return urlunsplit(urlsplit(url)._replace(path="/bon"))


async def _load(settings: Settings, simulator: ShaamSimulator) -> SampleFacts:
    async with database.connect(settings.database_url.get_secret_value()) as connection:
        await create_tables(connection)
        facts = await load_sample(
            connection,
            now=datetime.now(UTC),
            zone=settings.bon_timezone,
            encrypt=TokenCipher(KEY).encrypt,
            refresh_tokens=lambda business: simulator.issue(str(business)),
        )
    simulator.spoil.update({str(business): Misbehaviour(spoil) for business, spoil in facts.spoiled.items()})
    return facts


async def _run_jobs(serving: Serving, facts: SampleFacts, stop: asyncio.Event, report: Report) -> list[Ended]:
    ended: list[Ended] = []
    async with serving.machinery.pool.acquire() as connection:
        for job in JOBS:
            if stop.is_set():
                break
            with report.progress(f"{job} …"):
                run_id = await _ask(connection, job, facts.now)
                family = await _until_ended(connection, run_id)
            ended += _sum_up(family)
    return ended


async def _ask(connection: Connection, job: str, fire_time: datetime) -> UUID:
    request = Request(job, {}, fire_time=fire_time, origin=Origin.PERSON, asked_by="demo")
    run_id = await ledger.enqueue(connection, request)
    if run_id is None:
        raise LookupError(f"the ledger gave no run for {job}")
    return run_id


async def _until_ended(connection: Connection, run_id: UUID) -> list[Row]:
    """Wait for the run and all it causes; return them."""
    async with asyncio.timeout(LONGEST_SECONDS):
        while True:
            # The run BEFORE what it caused, and their states in one look: a run that has ended has its own
            # in the same look, because they commit together.
            root = await ledger.find_run(connection, run_id)
            caused = await ledger.descendants(connection, run_id)
            family = [*([root] if root else []), *caused]
            if all(run["state"] not in OPEN_STATES for run in family):
                found = [await ledger.find_run(connection, run["run_id"]) for run in family]
                return [run for run in found if run]
            await asyncio.sleep(LOOK_AGAIN_SECONDS)


def _sum_up(family: Iterable[Row]) -> list[Ended]:
    """Sum the runs up by job, in the order they were asked for."""
    by_job: dict[str, list[Row]] = {}
    for run in family:
        by_job.setdefault(run["job"], []).append(run)
    return [
        Ended(
            job,
            next((run["state"] for run in runs if run["state"] != "succeeded"), "succeeded"),
            len(runs),
            add_counts(run["counts"] for run in runs),
            max(run["finished_at"] for run in runs) - min(run["started_at"] for run in runs),
        )
        for job, runs in by_job.items()
    ]


def _expected(facts: SampleFacts) -> dict[str, tuple[str, Counts]]:
    """Return, by job, the state and counts that the sample data demands."""
    recipients = [len(addresses) for addresses in facts.digest_recipients.values()]
    spoiled = len(facts.spoiled)
    kinds = list(facts.spoiled.values())
    return {
        "overdue-detection": ("succeeded", {"marked": facts.marked, "cleared": facts.cleared}),
        "overdue-digest": (
            "succeeded",
            {
                "businesses": len(recipients),
                "invoices": facts.digest_invoices,
                "deliveries": sum(recipients),
            },
        ),
        "send-overdue-digest": ("succeeded", {"sent": sum(recipients), "no_recipient": recipients.count(0)}),
        "draft-cleanup": (
            "succeeded",
            {"deleted": facts.drafts_deleted, "items": facts.draft_items, "kept": facts.drafts_kept},
        ),
        "session-cleanup": ("succeeded", {"deleted": facts.sessions_expired}),
        "shaam-token-refresh": (
            "partial",
            {
                "due": len(facts.shaam_due),
                "refreshed": len(facts.shaam_due) - spoiled,
                "needs_reauth": kinds.count("invalid_grant"),
                "deferred": kinds.count("unavailable"),
                "failed": kinds.count("garbage"),
            },
        ),
        "notify-reauth": ("succeeded", {"sent": facts.consent_letters}),
    }


def _compare(ended: list[Ended], world: World) -> list[str]:
    """Return what is not as the sample data demands."""
    found = {job.job: job for job in ended}
    faults = []
    for name, (state, counts) in _expected(world.facts).items():
        job = found.get(name)
        if job is None:
            faults.append(f"{name} did not run")
        elif job.state != state or any(job.counts.get(key) != count for key, count in counts.items()):
            faults.append(
                f"{name} ended {job.state} with {format_counts(job.counts)}; the sample data demands "
                f"{state} with {format_counts(counts)}"
            )
    facts = world.facts
    letters = sum(map(len, facts.digest_recipients.values())) + facts.consent_letters
    if (kept := len(world.sink.messages)) != letters:
        faults.append(f"the mail server received {kept} letters, and not {letters}")
    return faults


def _tell(report: Report, ended: list[Ended], faults: list[str], world: World) -> None:
    if report.as_json:
        report.document(
            {
                "jobs": [
                    {
                        "job": e.job,
                        "state": e.state,
                        "runs": e.runs,
                        "counts": e.counts,
                        "took_ms": e.took // MILLISECOND,
                    }
                    for e in ended
                ],
                "letters": len(world.sink.messages),
                "faults": faults,
            }
        )
        return
    report.table(
        ["job", "state", "runs", "took", "counts"],
        [(e.job, e.state, e.runs, f"{e.took // MILLISECOND} ms", format_counts(e.counts)) for e in ended],
    )
    for fault in faults:
        report.say(f"Not as it must be: {fault}")
    if not faults:
        report.say(
            f"\nAs the sample data demands: {len(world.sink.messages)} letters sent, and SHAAM refused "
            f"exactly the {len(world.facts.spoiled)} businesses its simulator spoils on purpose."
        )


def _say_where_to_look(report: Report, serving: Serving, world: World, home: Path) -> None:
    address = f"http://127.0.0.1:{serving.port}"
    report.say(f"\nDigests as HTML files:  {home / 'digests'}")
    report.say(f"Probes and metrics:     {address}/readyz  {address}/metrics")
    report.say(f"Its database:           DATABASE_URL={world.settings['DATABASE_URL']}")
    report.say("Serving, with its schedules, until Ctrl-C.")
