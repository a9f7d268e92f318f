"""
The demo: the real service on one machine, with a database, BON's tables, mail and SHAAM of its own.

The jobs are asked for and worked on by the service itself while its schedules are off, so that no
tick comes between and what must happen is known beforehand. Then, unless `--once`, the service
goes on with its schedules until Ctrl-C. The environment is not read, so that no setting of a
real deployment can reach it, and nothing outside this process tree is left behind.

In a directory where an earlier demo has kept its database it goes on with that: the jobs are not asked for, since
nobody knows what they must make of it, and the service serves what is there.
"""

import asyncio
import secrets
import signal
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID
from zoneinfo import ZoneInfo

from bon_scheduler import database, declared, ledger, service
from bon_scheduler.demo.kept import CannotGoOnError, Kept, keep, read_kept
from bon_scheduler.demo.postgres import find_binaries, running_postgres
from bon_scheduler.demo.sample import SampleFacts, create_tables, load_sample, spoiled_businesses
from bon_scheduler.demo.shaam_simulator import Misbehaviour, ShaamSimulator, shaam_simulator
from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from bon_scheduler.jobs import Connection, Counts
from bon_scheduler.ledger import OPEN_STATES, Origin, Request, Row
from bon_scheduler.report import Report, add_counts, format_counts
from bon_scheduler.service import Serving
from bon_scheduler.shaam import TokenCipher, UnreadableTokenError

__all__ = ["CannotGoOnError", "run_demo"]

JOBS = ("overdue-detection", "draft-cleanup", "session-cleanup", "shaam-token-refresh")
# No parameters. Read through: the demo has a few.
TOKENS = "select business_id, encrypted_refresh_token from public.business_shaam_credentials"
# No parameters. Read through: the demo has a few.
RUNS = "select count(*) from bon_scheduler.runs"
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
    """What stands in for the outside, and what the jobs must make of it; None where it goes on with what was kept."""

    facts: SampleFacts | None
    settings: Mapping[str, str]
    sink: SmtpSink


@dataclass(frozen=True, slots=True)
class Home:
    """The demo's directory, its server's address, what an earlier demo left (None: it begins anew), and its own."""

    directory: Path
    server: str
    before: Kept | None
    now: Kept

    @property
    def database(self) -> str:
        """The address of BON's database."""
        return urlunsplit(urlsplit(self.server)._replace(path="/bon"))


def run_demo(*, port: int, keep: Path | None, once: bool, report: Report) -> int:
    """
    Show every job on sample data, or go on with what is kept; return 0 if each ended as the data says it must.

    Raises PostgresUnavailableError, CannotGoOnError, and CannotListenError for a port that is taken.
    """
    before = None if keep is None else read_kept(keep)
    same = None if before is None else before.port
    with _directory(keep) as directory, running_postgres(find_binaries(), directory=keep, port=same) as server:
        return asyncio.run(_demonstrate(directory, server, port, once=once, report=report))


@contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    """Give a directory for the digests, which goes with the demo unless it is to be kept."""
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="bon-demo-") as name:
        yield Path(name)


async def _demonstrate(directory: Path, server: str, port: int, *, once: bool, report: Report) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    home = await _move_in(directory, server, once=once)
    async with _world(home, port) as world:
        await service.prepare(declared.read_settings(world.settings))
        faults = []
        if world.facts is None:
            await _say_what_was_kept(report, home)
        else:
            faults = await _show_jobs(world, world.facts, stop, report)
        if not once and not stop.is_set():
            async with service.serving(declared.read_settings(world.settings)) as serving:
                _say_where_to_look(report, serving, home)
                await stop.wait()
    return 1 if faults else 0


async def _show_jobs(world: World, facts: SampleFacts, stop: asyncio.Event, report: Report) -> list[str]:
    """Run each job and tell what it did; return what is not as the sample data demands."""
    without_schedules = {f"SCHEDULE_{job.name.replace('-', '_').upper()}": "" for job in declared.JOBS}
    async with service.serving(declared.read_settings({**world.settings, **without_schedules})) as serving:
        ended = await _run_jobs(serving, facts, stop, report)
    faults = _compare(ended, facts, world.sink)
    _tell(report, ended, faults, facts, world.sink)
    return faults


async def _move_in(directory: Path, server: str, *, once: bool) -> Home:
    """Find out whether there is a database to go on with, and leave the key and the port for the next demo."""
    before = read_kept(directory)
    async with database.connect(server) as connection:
        goes_on = await connection.fetchval("select exists (select from pg_database where datname = 'bon')")
    if goes_on and before is None:
        raise CannotGoOnError(
            f"{directory} holds a demo's database, and not the key of its tokens. Give another directory, or remove it."
        )
    if goes_on and once:
        raise CannotGoOnError(
            f"{directory} holds a demo's database, which --once does not change: it runs the jobs on new sample data. "
            "Give another directory, or leave out --once to go on with this one."
        )
    if not goes_on:
        before = None
        # Only what a demo's mail server wrote: a directory of that name may be somebody's own.
        for path in (directory / "digests").glob("[0-9][0-9]*-*.*"):
            if path.suffix in {".eml", ".html"}:
                path.unlink()
    now = Kept(before.key if before else secrets.token_hex(32), urlsplit(server).port or 0)
    keep(directory, now)  # BEFORE there is a database, otherwise one may be left whose tokens nobody can read
    return Home(directory, server, before, now)


@asynccontextmanager
async def _world(home: Home, port: int) -> AsyncIterator[World]:
    """Build BON's database with sample data, if there is none, a mail server and the authority's simulator."""
    name, secret = CLIENT["SHAAM_CLIENT_ID"], CLIENT["SHAAM_CLIENT_SECRET"]
    async with AsyncExitStack() as stack:
        sink = await stack.enter_async_context(smtp_sink(home.directory / "digests"))
        authority = shaam_simulator(client_id=name, client_secret=secret, seed=secrets.token_hex(8))
        simulator = await stack.enter_async_context(authority)
        settings = {
            "DATABASE_URL": home.database,
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
            "SHAAM_ENCRYPTION_KEY": home.now.key,
            **CLIENT,
        }
        zone = declared.read_settings(settings).bon_timezone
        facts = await _make_database(home, simulator, zone) if home.before is None else None
        if facts is None:
            await _accept_kept_tokens(home, simulator)
        simulator.spoil.update({str(each): Misbehaviour(spoil) for each, spoil in spoiled_businesses().items()})
        yield World(facts, settings, sink)


async def _make_database(home: Home, simulator: ShaamSimulator, zone: ZoneInfo) -> SampleFacts:
    """Make the database `bon` with sample data; there is none of that name before it is complete."""
    unfinished = urlunsplit(urlsplit(home.server)._replace(path="/bon_unfinished"))
    async with database.connect(home.server) as connection:
        await connection.execute("drop database if exists bon_unfinished with (force)")
        await connection.execute("create database bon_unfinished")
    async with database.connect(unfinished) as connection:
        await create_tables(connection)
        facts = await load_sample(
            connection,
            now=datetime.now(UTC),
            zone=zone,
            encrypt=TokenCipher(home.now.key).encrypt,
            refresh_tokens=lambda business: simulator.issue(str(business)),
        )
    async with database.connect(home.server) as connection:
        await connection.execute("alter database bon_unfinished rename to bon")
    return facts


async def _accept_kept_tokens(home: Home, simulator: ShaamSimulator) -> None:
    """Have the simulator honour the tokens that its predecessor issued, and that the database holds."""
    cipher = TokenCipher(home.now.key)
    async with database.connect(home.database) as connection:
        for business, sealed in await connection.fetch(TOKENS):
            with suppress(UnreadableTokenError):  # somebody's own experiment
                simulator.accept(str(business), cipher.decrypt(sealed))


async def _say_what_was_kept(report: Report, home: Home) -> None:
    async with database.connect(home.database) as connection:
        runs = await connection.fetchval(RUNS)
    moved = home.before is not None and home.before.port != home.now.port
    if report.as_json:
        report.document({"goes_on": True, "runs": runs, "database_url": home.database, "moved": moved})
        return
    report.say(f"Going on with what was kept in {home.directory}: its database, where {runs:,} runs are recorded.")
    report.say("The jobs are not run on new sample data. To begin anew, give another directory.")
    if moved and home.before:
        report.say(f"The port that it had, {home.before.port}, is taken. In each shell that has the address:")
        report.say(f"export DATABASE_URL={home.database}")


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


def _compare(ended: list[Ended], facts: SampleFacts, sink: SmtpSink) -> list[str]:
    """Return what is not as the sample data demands."""
    found = {job.job: job for job in ended}
    faults = []
    for name, (state, counts) in _expected(facts).items():
        job = found.get(name)
        if job is None:
            faults.append(f"{name} did not run")
        elif job.state != state or any(job.counts.get(key) != count for key, count in counts.items()):
            faults.append(
                f"{name} ended {job.state} with {format_counts(job.counts)}; the sample data demands "
                f"{state} with {format_counts(counts)}"
            )
    letters = sum(map(len, facts.digest_recipients.values())) + facts.consent_letters
    if (kept := len(sink.messages)) != letters:
        faults.append(f"the mail server received {kept} letters, and not {letters}")
    return faults


def _tell(report: Report, ended: list[Ended], faults: list[str], facts: SampleFacts, sink: SmtpSink) -> None:
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
                "letters": len(sink.messages),
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
            f"\nAs the sample data demands: {len(sink.messages)} letters sent, and SHAAM refused "
            f"exactly the {len(facts.spoiled)} businesses its simulator spoils on purpose."
        )


def _say_where_to_look(report: Report, serving: Serving, home: Home) -> None:
    address = f"http://127.0.0.1:{serving.port}"
    report.say(f"\nDigests as HTML files:  {home.directory / 'digests'}")
    report.say(f"Probes and metrics:     {address}/readyz  {address}/metrics")
    report.say(f"Its database:           DATABASE_URL={home.database}")
    report.say("Serving, with its schedules, until Ctrl-C.")
