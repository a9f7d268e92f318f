"""
What the batches of the nightly jobs cost, beside the single statement that does the same.

    python -m benchmarks.batches [--rows 1000000] [--rounds 3] [--only backlog,night,…]

An embedded PostgreSQL (no fsync, no autovacuum) with BON's tables at volume. Each measurement has a fresh copy of them.
In each round every job is done by a single statement, then by us: a `serve` process, from the start of the attempt to
its end. Both are done once alone, for time, CPU (server and worker), WAL and memory, and once beside two writers that
pay and edit random invoices, for how long these wait. Medians of the rounds; waits are of all rounds together.

- backlog: 180,000 invoices to mark. `night`: 4,000 to mark and 1,000 to clear. `clear`: 50,000 to clear.
- indexed: a night with the index that finds moved due dates, beside BON's own two statements, which know of none.
- drafts: 29,000 stale drafts, with the two indexes that BON lacks. `bare`: without them, alone and for one round.
- sessions: 100,000 expired sessions of 200,000.

The single statements of detection mark, clear what is settled, and clear where the due date was moved.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.volume import BACKLOG, fill
from bon_scheduler import database, declared, ledger, service
from bon_scheduler.demo.postgres import find_binaries, running_postgres
from bon_scheduler.demo.sample import create_tables
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger import Request
from tests.process import Service, serve

SERVER = {"autovacuum": "off", "shared_buffers": "1GB", "max_wal_size": "20GB", "checkpoint_timeout": "1h"}
WRITERS = 2
BETWEEN_WRITES_SECONDS = 0.002
SETTLE_SECONDS = 1.0
MARK = """
    update public.invoices set is_overdue = true, updated_at = now()
     where status in ('finalized', 'sent', 'partially_paid')
       and due_date is not null and due_date < (now() at time zone 'Asia/Jerusalem')::date and not is_overdue
"""
CLEAR = """
    update public.invoices set is_overdue = false, updated_at = now()
     where is_overdue = true and status in ('paid', 'cancelled', 'credited')
"""
DELETE_DRAFTS = """
    delete from public.invoices i
     where i.status = 'draft'
       and i.updated_at < now() - interval '30 days'
       and not exists (select from public.invoice_payments p where p.invoice_id = i.id)
       and not exists (select from public.shaam_audit_log a where a.invoice_id = i.id)
       and not exists (select from public.emergency_allocation_numbers e where e.used_for_invoice_id = i.id)
       and not exists (select from public.invoices c where c.credited_invoice_id = i.id)
"""
# BON's own does not do this; ours does.
CLEAR_MOVED = """
    update public.invoices set is_overdue = false, updated_at = now()
     where is_overdue and status in ('finalized', 'sent', 'partially_paid')
       and (due_date is null or due_date >= (now() at time zone 'Asia/Jerusalem')::date)
"""
DELETE_SESSIONS = "delete from public.sessions where expires_at < now()"
INDEXES = """
    create index on public.invoices (credited_invoice_id) where credited_invoice_id is not null;
    create index on public.emergency_allocation_numbers (used_for_invoice_id) where used_for_invoice_id is not null
"""
MOVED_INDEX = """
    create index on public.invoices (due_date) where is_overdue and status in ('finalized', 'sent', 'partially_paid')
"""
# Into the server's memory, for both alike.
WARM = "select count(i.updated_at), (select count(s.expires_at) from public.sessions s) from public.invoices i"
# $1 how many stay unmarked: int. Those that are due last, as on the morning after.
LEAVE = """
    update public.invoices set is_overdue = true
     where id in (select id from public.invoices
                   where status = 'sent' and due_date < current_date and not is_overdue
                   order by due_date desc, id offset $1::int)
"""
# $1 how many are marked and paid: int.
SETTLE = """
    update public.invoices set is_overdue = true
     where id in (select id from public.invoices where status = 'paid' order by id limit $1::int)
"""
PAY = """
    with paid as (
        update public.invoices set status = 'paid', is_overdue = false, paid_at = now(), updated_at = now()
         where id = $1 and status in ('finalized', 'sent', 'partially_paid')
        returning id
    )
    insert into public.invoice_payments (invoice_id, amount_minor_units, paid_at, method)
    select id, 100, current_date, 'transfer' from paid
"""
EDIT = "update public.invoices set customer_name = 'Edited', updated_at = now() where id = $1"
VISIT = "update public.sessions set last_accessed_at = now() where id = $1 and expires_at > now()"
OPEN = "select id from public.invoices where status = 'sent' order by random() limit 30000"
ANY = "select id from public.invoices order by random() limit 30000"
VISITED = "select id from public.sessions order by random() limit 30000"
ENDED = """
    select a.outcome::text, extract(epoch from a.ended_at - a.started_at)::float8 as seconds, r.counts
      from bon_scheduler.attempts a join bon_scheduler.runs r on r.id = a.run_id
     where a.run_id = $1 and a.ended_at is not null
"""


@dataclass(frozen=True, slots=True)
class Part:
    """A job, and the statements that do the same at once."""

    job: str
    single: tuple[str, ...]
    rows: float
    """A share of the invoices, for the printed line."""
    template: str = "made"
    before: str = ""
    beside: bool = True
    """Whether it is measured beside writers too."""


DETECTION = ("overdue-detection", (MARK, CLEAR, CLEAR_MOVED))
PARTS = {
    "backlog": Part(*DETECTION, BACKLOG),
    "night": Part(*DETECTION, 0.005, "night"),
    "indexed": Part("overdue-detection", (MARK, CLEAR), 0.005, "night", before=MOVED_INDEX),
    "clear": Part(*DETECTION, 0.05, "clear"),
    "drafts": Part("draft-cleanup", (DELETE_DRAFTS,), 0.029, before=INDEXES),
    "bare": Part("draft-cleanup", (DELETE_DRAFTS,), 0.029, beside=False),
    "sessions": Part("session-cleanup", (DELETE_SESSIONS,), 0.1),
}


@dataclass(slots=True)
class Cost:
    """What one side cost, a figure for each round, and what writers beside it waited."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    wal_mib: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    waits_ms: list[float] = field(default_factory=list)


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _cpu_seconds(pid: int, *, with_children: bool = False) -> float:
    # Fields after the name, which may hold blanks: utime, stime, and those of children that have ended.
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    ticks = sum(map(int, fields[11:15] if with_children else fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _postmaster(directory: str) -> int:
    return int(Path(directory, "postmaster.pid").read_text().split()[0])


def _forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _of_server(postmaster: int) -> float:
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    return _cpu_seconds(postmaster, with_children=True) + sum(_cpu_seconds(int(child)) for child in children)


def _peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


class Bench:
    """One server with its templates."""

    def __init__(self, root: str, rows: int) -> None:
        self.root, self.rows = root, rows
        self.postmaster = 0

    def url(self, name: str) -> str:
        """Return the address of a database."""
        return f"{self.root.rpartition('/')[0]}/{name}"

    async def copy(self, template: str, name: str) -> None:
        """Make a database anew from another."""
        async with database.connect(self.root) as connection:
            await connection.execute(f"drop database if exists {name} with (force)")
            await connection.execute(f"create database {name} template {template} strategy file_copy")

    async def make_templates(self) -> None:
        """Make the databases of which each measurement has a copy."""
        async with database.connect(self.root) as connection:
            self.postmaster = _postmaster(await connection.fetchval("show data_directory"))
            await connection.execute("create database made")
        async with database.connect(self.url("made")) as connection:
            await create_tables(connection)
        await service.prepare(declared.read_settings({"DATABASE_URL": self.url("made")}))
        async with database.connect(self.url("made")) as connection:
            await fill(connection, self.rows)
        for name, unmarked, settled in (("night", 4000, 1000), ("clear", 0, self.rows // 20)):
            await self.copy("made", name)
            async with database.connect(self.url(name)) as connection:
                await connection.execute(LEAVE, unmarked)
                await connection.execute(SETTLE, settled)
                await connection.execute("vacuum (full, analyze) public.invoices")

    @asynccontextmanager
    async def fresh(self, part: Part) -> AsyncIterator[Connection]:
        """Copy the part's template; yield a connection to it."""
        await self.copy(part.template, "measured")
        async with database.connect(self.url("measured")) as connection:
            if part.before:
                await connection.execute(part.before)
            await connection.execute("checkpoint")
            await connection.execute(WARM)
            yield connection

    async def single(self, part: Part, cost: Cost, *, beside: bool) -> None:
        """Measure the single statement."""
        async with self.fresh(part) as connection, self._writing(part, cost, beside=beside):
            wal, cpu, began = await _wal(connection), _of_server(self.postmaster), time.perf_counter()
            async with connection.transaction():
                for statement in part.single:
                    await connection.execute(statement)
            if not beside:
                cost.seconds.append(time.perf_counter() - began)
                cost.cpu_seconds.append(_of_server(self.postmaster) - cpu)
                cost.wal_mib.append((await _wal(connection) - wal) / 2**20)

    async def ours(self, part: Part, cost: Cost, *, beside: bool) -> str:
        """Measure a run of the job; return its counts."""
        settings = {f"SCHEDULE_{job.name.upper().replace('-', '_')}": "" for job in declared.JOBS if job.schedule}
        settings |= {"DATABASE_URL": self.url("measured"), "BRAKE_MIN_ROWS": "1000000000"}
        async with self.fresh(part) as connection, serve(**settings) as running:
            await asyncio.sleep(SETTLE_SECONDS)
            async with self._writing(part, cost, beside=beside):
                return await self._run(connection, running, part.job, None if beside else cost)

    async def _run(self, connection: Connection, running: Service, job: str, cost: Cost | None) -> str:
        pid = running.process.pid
        _forget_peak(pid)
        idle, wal, cpu = _peak_mib(pid), await _wal(connection), _of_server(self.postmaster) + _cpu_seconds(pid)
        run_id = await ledger.enqueue(connection, Request(job, {}, fire_time=datetime.now(UTC)))
        while not (ended := await connection.fetchrow(ENDED, run_id)):  # noqa: ASYNC110 - the service says nothing
            await asyncio.sleep(0.02)
        if ended["outcome"] not in {"succeeded", "partial"}:
            raise LookupError(f"{job} ended as {ended['outcome']}; its log: {running.events[-5:]}")
        if cost is not None:
            cost.seconds.append(ended["seconds"])
            cost.cpu_seconds.append(_of_server(self.postmaster) + _cpu_seconds(pid) - cpu)
            cost.wal_mib.append((await _wal(connection) - wal) / 2**20)
            cost.memory_mib.append(_peak_mib(pid) - idle)
        return str(ended["counts"])

    @asynccontextmanager
    async def _writing(self, part: Part, cost: Cost, *, beside: bool) -> AsyncIterator[None]:
        """Have writers pay and edit for the length of the context, and say how long each of them waited."""
        if not beside:
            yield
            return
        async with database.connect(self.url("measured")) as connection:
            queries = [(VISIT, VISITED)] if part.job == "session-cleanup" else [(PAY, OPEN), (EDIT, ANY)]
            choices = [(sql, [row["id"] for row in await connection.fetch(of)]) for sql, of in queries]
        tasks = [asyncio.create_task(self._write(choices, cost.waits_ms)) for _ in range(WRITERS)]
        try:
            await asyncio.sleep(SETTLE_SECONDS / 4)
            cost.waits_ms.clear()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _write(self, choices: Sequence[tuple[str, Sequence[object]]], waits_ms: list[float]) -> None:
        async with database.connect(self.url("measured")) as connection:
            while True:
                sql, ids = random.choice(choices)  # noqa: S311 - no secret
                began = time.perf_counter()
                try:
                    await connection.execute(sql, random.choice(ids))  # noqa: S311
                finally:  # a wait that the end cuts short counts as well
                    waits_ms.append((time.perf_counter() - began) * 1000)
                await asyncio.sleep(BETWEEN_WRITES_SECONDS)


async def _wal(connection: Connection) -> int:
    found: int = await connection.fetchval("select (pg_current_wal_insert_lsn() - '0/0')::bigint")
    return found


def _waits(cost: Cost) -> str:
    if len(cost.waits_ms) < 2:  # noqa: PLR2004 - quantiles want two
        return "-"
    p50, p99 = statistics.median(cost.waits_ms), statistics.quantiles(cost.waits_ms, n=100)[98]
    return f"{p50:.1f} / {p99:.1f} / {max(cost.waits_ms):.0f}"


def _line(name: str, rows: str, single: Cost, ours: Cost) -> str:
    def ratio(figures: str) -> str:
        pair = [statistics.median(getattr(cost, figures)) for cost in (single, ours)]
        return f"{pair[1] / max(pair[0], 0.01):>6.2f} ({pair[0]:.2f} → {pair[1]:.2f})"

    figures = [ratio("seconds"), ratio("cpu_seconds"), ratio("wal_mib"), _waits(single), _waits(ours)]
    memory = f"{statistics.median(ours.memory_mib):.1f}"
    return " | ".join([f"{name:<9}", f"{rows:>8}", *(f"{text:>24}" for text in figures), f"{memory:>6}"])


async def measure(root: str, options: argparse.Namespace) -> None:
    """Measure what was asked for, a line each."""
    bench = Bench(root, options.rows)
    await bench.make_templates()
    titles = ("time, s", "CPU, s", "WAL, MiB", "waits beside single, ms", "waits beside ours, ms")
    say(" | ".join([f"{'':<9}", f"{'rows':>8}", *(f"{title:>24}" for title in titles), "memory"]))
    costs = {name: (Cost(), Cost()) for name in options.only}
    counts: dict[str, str] = {}
    for number in range(options.rounds):
        for name in options.only:
            part = PARTS[name]
            if number and not part.beside:
                continue
            for beside in (False, True)[: 1 + part.beside]:
                kept = [list(cost.waits_ms) for cost in costs[name]]
                await bench.single(part, costs[name][0], beside=beside)
                counts[name] = await bench.ours(part, costs[name][1], beside=beside)
                for cost, waits in zip(costs[name], kept, strict=True):
                    cost.waits_ms.extend(waits)
    for name in options.only:
        rows = f"{round(PARTS[name].rows * options.rows):,}"
        say(_line(name, rows, *costs[name]))
    say(f"memory: MiB above idle. waits: p50 / p99 / worst. Counts of the last run of each: {counts}")


def main() -> None:
    """Measure on a server of our own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="invoices")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS))
    options = parser.parse_args()
    with running_postgres(find_binaries(), settings=SERVER) as url:
        asyncio.run(measure(url, options))


if __name__ == "__main__":
    main()
