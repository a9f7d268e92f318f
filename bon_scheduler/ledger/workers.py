"""
This process as a worker, and which of the others are silent.

A worker's row holds its last word, another with each beat (`heartbeat`). Nobody is judged by a clock that can be set,
the database's least of all: `Watch` keeps for how long a process has seen the same word, by its own clock since boot.
A worker that is silent for a lease is declared dead: it loses its word and, in the same transaction, its runs.
"""

import os
import socket
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID, uuid4

from bon_scheduler import __version__
from bon_scheduler.clock import seconds_since_boot
from bon_scheduler.jobs import Connection
from bon_scheduler.ledger.entries import CALL_TIMEOUT_SECONDS

__all__ = ["Sign", "Watch", "Worker", "beat", "declare_dead", "register_worker", "retire_worker", "signs_of_life"]

# $1 worker, $2 host, $3 process id, $4 version, $5 whether it is a `serve`: boolean, $6 lease: interval.
REGISTER_WORKER = """
    insert into bon_scheduler.workers (id, host, pid, version, serves, lease) values ($1, $2, $3, $4, $5, $6)
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
SIGNS_OF_LIFE = "select id as worker, last_word as word, lease from bon_scheduler.workers where last_word is not null"
# $1 last words: uuid[]; see the SQL functions.
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


@dataclass(frozen=True, slots=True)
class Sign:
    """The last that was heard of a worker."""

    worker: UUID
    word: UUID
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
        self._own_word: UUID | None = None
        self._spoke = self._looked = self._began = elapsed()

    @property
    def steady(self) -> bool:
        """Whether it has watched for a lease without a break."""
        return self._elapsed() - self._began >= self._worker.lease.total_seconds()

    def silent(self, signs: Iterable[Sign]) -> list[UUID]:
        """Note what is heard now of all workers; return the last words of those that are silent."""
        now, half = self._elapsed(), self._worker.lease.total_seconds() / 2
        words = {sign.worker: sign for sign in signs}
        own = words.pop(self._worker.id, None)
        if own is not None and own.word != self._own_word:
            self._own_word, self._spoke = own.word, now
        if max(now - self._looked, now - self._spoke) > half:
            self._began = now
            self._heard.clear()
        self._looked = now
        self._heard = {sign.word: self._heard.get(sign.word, now) for sign in words.values()}
        return [
            sign.word
            for sign in words.values()
            if now - self._heard[sign.word] >= max(sign.lease, self._worker.lease).total_seconds()
        ]


async def register_worker(connection: Connection, worker: Worker) -> None:
    """Make this process a living worker."""
    values = worker.id, worker.host, worker.pid, worker.version, worker.serves, worker.lease
    await connection.execute(REGISTER_WORKER, *values, timeout=CALL_TIMEOUT_SECONDS)


async def beat(connection: Connection, worker: UUID) -> bool:
    """Record a heartbeat; False when the worker's row is gone. The connection's own time-out holds."""
    return await connection.fetchval(BEAT, worker) is not None


async def signs_of_life(connection: Connection) -> list[Sign]:
    """Return the last word of each worker that is not taken for dead."""
    return [Sign(*row) for row in await connection.fetch(SIGNS_OF_LIFE, timeout=CALL_TIMEOUT_SECONDS)]


async def declare_dead(connection: Connection, last_words: Collection[UUID]) -> list[DeadWorker]:
    """Declare those dead whose last word it still is; return them."""
    rows = await connection.fetch(DECLARE_DEAD, list(last_words), timeout=CALL_TIMEOUT_SECONDS)
    return [DeadWorker(*row) for row in rows]


async def retire_worker(connection: Connection, worker: UUID) -> None:
    """Take the worker off the list, so that whatever it still held is free at once."""
    await connection.execute(RETIRE_WORKER, worker, timeout=CALL_TIMEOUT_SECONDS)
