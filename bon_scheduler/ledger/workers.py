"""
This process as a worker, and which of the others are silent.

A worker's row holds a random id that each heartbeat replaces. Nobody is judged by a clock that can be set, least of
all the database's: `Watch` keeps for how long a process has seen the same id, by its own clock since boot. A worker
that is silent for a lease is declared dead: it loses that id and, in the same transaction, its runs.
"""

import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID, uuid4

import orjson

from bon_scheduler import __version__
from bon_scheduler.clock import seconds_since_boot
from bon_scheduler.database import Outage
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger.entries import CALL_TIMEOUT_SECONDS

__all__ = [
    "LastBeat",
    "Watch",
    "Worker",
    "beat",
    "count_serving",
    "database_seconds",
    "declare_dead",
    "last_beats",
    "newer_serves",
    "register_worker",
    "retire_worker",
]

# $1 worker, $2 host, $3 process id, $4 version, $5 whether it is a `serve`: boolean, $6 lease: interval,
# $7 settings: text of a JSON object, because the heartbeat's connection knows no codecs, $8 jobs: text[].
REGISTER_WORKER = """
    insert into bon_scheduler.workers (id, host, pid, version, serves, lease, settings, jobs)
    values ($1, $2, $3, $4, $5, $6, $7::text::jsonb, $8)
    on conflict (id) do update set seen_at = clock_timestamp(), last_word = gen_random_uuid()
"""
# $1 worker.
BEAT = """
    update bon_scheduler.workers
       set seen_at = clock_timestamp(), last_word = gen_random_uuid()
     where id = $1
    returning id
"""
# A worker that leaves holds nothing, and neither does one that was taken for dead a day ago.
RETIRE_WORKER = """
    delete from bon_scheduler.workers
     where id = $1 or (last_word is null and seen_at < clock_timestamp() - interval '1 day')
"""
# $1 version. Whether a service of a higher one lives.
NEWER_SERVES = """
    select exists (select from bon_scheduler.workers w
                    where w.serves
                      and w.last_word is not null
                      and bon_scheduler.numbers_of(w.version) > bon_scheduler.numbers_of($1))
"""
LAST_BEATS = "select id as worker, last_word as id, lease from bon_scheduler.workers where last_word is not null"
COUNT_SERVING = "select count(*) from bon_scheduler.workers where serves and last_word is not null"
DATABASE_SECONDS = "select extract(epoch from clock_timestamp())::float8"
# $1 last beats: uuid[]; see the SQL functions.
DECLARE_DEAD = "select id, host, pid from bon_scheduler.declare_dead($1)"


@dataclass(frozen=True, slots=True)
class Worker:
    """This process, as the ledger knows it."""

    id: UUID = field(default_factory=uuid4)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    version: str = __version__
    serves: bool = False
    """Whether it is a `serve`, which declares schedules, or works on one run in the foreground."""
    lease: timedelta = timedelta(seconds=15)
    """How long it may be silent before its runs are taken over."""
    outage: Outage = field(default_factory=Outage, compare=False, repr=False)
    """Where its parts report whether the database answers them."""
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What it was told that anybody may read, by name: operators compare it with their own."""
    jobs: Sequence[str] = ()
    """Those it takes runs of; one in the foreground takes its own run and what that causes, and names none."""


@dataclass(frozen=True, slots=True)
class LastBeat:
    """The last heartbeat of a worker."""

    worker: UUID
    id: UUID
    """Another with each heartbeat."""
    lease: timedelta


@dataclass(frozen=True, slots=True)
class DeadWorker:
    """A worker that was declared dead."""

    id: UUID
    host: str
    pid: int


class Watch:
    """
    Who was silent for a lease, as seen by one worker; `elapsed` is seconds by a clock that nobody can set.

    Silence proves something only while this worker is heard itself: after an outage, or when it was frozen, it begins
    anew, as it does when it starts. Of two workers' leases the longer counts.
    """

    def __init__(self, worker: Worker, *, elapsed: Callable[[], float] = seconds_since_boot) -> None:
        self._worker = worker
        self._elapsed = elapsed
        self._heard: dict[UUID, float] = {}
        self._own_beat: UUID | None = None
        self._spoke = self._looked = self._began = elapsed()

    @property
    def steady(self) -> bool:
        """Whether it has watched for a lease without a break."""
        return self._elapsed() - self._began >= self._worker.lease.total_seconds()

    def silent(self, beats: Iterable[LastBeat]) -> list[UUID]:
        """Note what is heard now of all workers; return the last beats of those that are silent."""
        now, half = self._elapsed(), self._worker.lease.total_seconds() / 2
        by_worker = {each.worker: each for each in beats}
        own = by_worker.pop(self._worker.id, None)
        if own is not None and own.id != self._own_beat:
            self._own_beat, self._spoke = own.id, now
        if max(now - self._looked, now - self._spoke) > half:
            self._began = now
            self._heard.clear()
        self._looked = now
        self._heard = {each.id: self._heard.get(each.id, now) for each in by_worker.values()}
        return [
            each.id
            for each in by_worker.values()
            if now - self._heard[each.id] >= max(each.lease, self._worker.lease).total_seconds()
        ]


async def register_worker(connection: Connection, worker: Worker) -> None:
    """Make this process a living worker."""
    told = orjson.dumps(dict(worker.settings)).decode()
    values = worker.id, worker.host, worker.pid, worker.version, worker.serves, worker.lease, told, list(worker.jobs)
    await connection.execute(REGISTER_WORKER, *values, timeout=CALL_TIMEOUT_SECONDS)


async def beat(connection: Connection, worker: UUID) -> bool:
    """Record a heartbeat; False when the worker's row is gone. The connection's own time-out holds."""
    return await connection.fetchval(BEAT, worker) is not None


async def newer_serves(connection: Connection, version: str) -> bool:
    """Return whether a service of a newer version lives, as in the middle of a deploy."""
    return bool(await connection.fetchval(NEWER_SERVES, version, timeout=CALL_TIMEOUT_SECONDS))


async def last_beats(connection: Connection) -> list[LastBeat]:
    """Return the last heartbeat of each worker that is not taken for dead."""
    return [LastBeat(*row) for row in await connection.fetch(LAST_BEATS, timeout=CALL_TIMEOUT_SECONDS)]


async def database_seconds(connection: Connection) -> float:
    """Return what the database's clock says, in seconds since 1970."""
    return float(await connection.fetchval(DATABASE_SECONDS, timeout=CALL_TIMEOUT_SECONDS))


async def count_serving(connection: Connection) -> int:
    """Return how many `serve` processes are not taken for dead."""
    return int(await connection.fetchval(COUNT_SERVING, timeout=CALL_TIMEOUT_SECONDS))


async def declare_dead(connection: Connection, beats: Collection[UUID]) -> list[DeadWorker]:
    """Declare those dead of whom these are still the last heartbeats; return them."""
    rows = await connection.fetch(DECLARE_DEAD, list(beats), timeout=CALL_TIMEOUT_SECONDS)
    return [DeadWorker(*row) for row in rows]


async def retire_worker(connection: Connection, worker: UUID) -> None:
    """Take the worker off the list, so that whatever it still held is free at once."""
    await connection.execute(RETIRE_WORKER, worker, timeout=CALL_TIMEOUT_SECONDS)
