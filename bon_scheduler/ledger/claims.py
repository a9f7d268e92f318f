"""
Claims: how waiting runs come to a worker.

They must overlook no run and take none twice, whatever else claims. So they exclude each other in the database, take
waiting runs only, and count the attempt from that moment. What a row holds is read as text, and made sense of one run
at a time: a run that no Python can hold costs the others nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import asyncpg

from bon_scheduler.database import UnreadableJsonError, read_json
from bon_scheduler.jobs import AnyJob, Connection
from bon_scheduler.ledger.attempts import RunRef
from bon_scheduler.ledger.entries import CALL_TIMEOUT_SECONDS, Origin

__all__ = [
    "Claim",
    "Claimant",
    "Claims",
    "Demand",
    "Foreground",
    "MailSlot",
    "NewRun",
    "UnreadableRunError",
    "Verdict",
    "Wanted",
    "claim",
    "claim_new",
    "claim_one",
]

# $1 worker, $2 host, $3 room: int, $4 reserve: int, $5 jobs: text[], $6 rooms: int[], $7 active: int[],
# $8 totals: int[], $9 whether their runs begin with a letter: boolean[], $10 time between letters: interval or null,
# $11 whether to look for runs whose instant has come: boolean, $12 whether the oldest go first: boolean, $13 the mark
# that was seen: bigint. The session's own LISTEN is looked at with the clock: null when it was not looked at.
# Indexes: runs_ready, runs_oldest, runs_timed, runs_exclusive, runs_pkey.
CLAIM = """
    select extract(epoch from c.wait)::float8 as wait, c.run_id, c.attempt, c.job, c.fire_time::text as fire_time,
           c.asked_for::text as asked_for, c.payload::text as payload, c.origin, c.given_back, c.retried_after,
           c.released, c.slot, c.trial, c.after_failures,
           case when $11 then exists (select from pg_listening_channels()) end as listens
      from bon_scheduler.claim($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) c
"""
# $1 run, $2 worker, $3 host, $4 whether it begins with a letter: boolean, $5 time between letters: interval or null,
# $6 the mark that was seen: bigint.
CLAIM_ONE = """
    select c.verdict, extract(epoch from c.wait)::float8 as wait, (c.run).id as run_id, (c.run).attempt, (c.run).job,
           (c.run).fire_time::text as fire_time,
           coalesce((c.run).asked_for, (c.run).enqueued_at)::text as asked_for,
           (c.run).payload::text as payload, (c.run).origin, (c.run).given_back, (c.run).retried_after,
           (c.run).released, c.slot, c.trial, c.after_failures, c.holder_host, c.holder_since, c.holder_silent
      from bon_scheduler.claim_one($1, $2, $3, $4, $5, $6) c
"""
# $1 job, $2 payload: jsonb, $3 fire time, $4 asked by, $5 why it may pass the brake or null, then as CLAIM_ONE from $2.
CLAIM_NEW = """
    select c.verdict, extract(epoch from c.wait)::float8 as wait, (c.run).id as run_id, (c.run).attempt, (c.run).job,
           (c.run).fire_time::text as fire_time,
           coalesce((c.run).asked_for, (c.run).enqueued_at)::text as asked_for,
           (c.run).payload::text as payload, (c.run).origin, (c.run).given_back, (c.run).retried_after,
           (c.run).released, c.slot, c.trial, c.after_failures, c.holder_host, c.holder_since, c.holder_silent
      from bon_scheduler.claim_new($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) c
"""


class UnreadableRunError(Exception):
    """A run's row holds what no attempt can be made with; the message says which column and why."""


class Verdict(StrEnum):
    """What became of a claim of one certain run; see the SQL function `claim_one`."""

    CLAIMED = "claimed"
    ENDED = "ended"
    HELD = "held"
    PAUSED = "paused"
    BUSY = "busy"
    WAITS = "waits"


@dataclass(frozen=True, slots=True)
class MailSlot:
    """The leave to send one letter, which came with a claim."""

    wait: timedelta
    """From the claim to the letter's place."""
    trial: bool
    """Whether this letter tries a server that was away."""
    after_failures: bool
    """Whether a success is worth reporting."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A run that is this worker's, and what an attempt at it needs, as the ledger has it."""

    ref: RunRef
    job: str
    fire_time_text: str | None
    asked_for_text: str
    """The instant it was put off to when it was asked for, else when that was."""
    payload_text: str
    origin: Origin
    given_back: int
    retried: bool
    """Whether a person has retried it."""
    released: bool
    """Whether a person has let it pass the brake."""
    mail_slot: MailSlot | None

    @property
    def fire_time(self) -> datetime:
        """The instant that was named, else the one the run was asked for (UTC). Raises UnreadableRunError."""
        named = self.fire_time_text is not None
        return _instant(self.fire_time_text or self.asked_for_text, "fire_time" if named else "asked_for")

    @property
    def payload(self) -> Mapping[str, Any]:
        """The arguments. Raises UnreadableRunError."""
        try:
            payload: Mapping[str, Any] = read_json(self.payload_text)
        except UnreadableJsonError as error:
            raise UnreadableRunError(f"the payload cannot be read: {error}") from error
        return payload


@dataclass(frozen=True, slots=True)
class Claims:
    """The answer to a claim."""

    taken: Sequence[Claim]
    wait_seconds: float | None
    """In how long it is worth asking again; None: nobody knows."""
    listens: bool
    """False when the session was found not to listen any more."""


@dataclass(frozen=True, slots=True)
class Foreground:
    """The answer to a claim of one certain run. Fields after `verdict` are set as far as they apply."""

    verdict: Verdict
    claim: Claim | None
    wait_seconds: float
    holder_host: str | None
    holder_since: datetime | None
    holder_silent: bool
    """By the database's clock, which proves nothing."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """How many more runs of a job a worker takes, and what bounds them."""

    job: str
    room: int
    active: int
    """How many run here now."""
    total: int | None
    """How many may run in all replicas."""
    sends_mail: bool


def _instant(text: str, column: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UnreadableRunError(f"{column} {text} is no instant that a job can work with") from error


def _claim(row: asyncpg.Record, worker: UUID) -> Claim:
    slot = None if row["slot"] is None else MailSlot(row["slot"], row["trial"], bool(row["after_failures"]))
    return Claim(
        RunRef(row["run_id"], row["attempt"], worker),
        row["job"],
        row["fire_time"],
        row["asked_for"],
        row["payload"],
        Origin(row["origin"]),
        row["given_back"],
        row["retried_after"] > 0,
        row["released"],
        slot,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a worker has room for; see the SQL function `claim`."""

    worker: UUID
    host: str
    room: int
    reserve: int
    wanted: Sequence[Wanted]
    letters_apart: timedelta | None
    look_at_clock: bool
    oldest_first: bool
    seen: int = 0
    """The highest mark of the ledger that is known: nothing is taken from one that is behind it."""


async def claim(connection: Connection, demand: Demand) -> Claims:
    """Take waiting runs for a worker, counting their attempts from now; see the SQL function `claim`."""
    rows = await connection.fetch(
        CLAIM,
        demand.worker,
        demand.host,
        demand.room,
        demand.reserve,
        [w.job for w in demand.wanted],
        [w.room for w in demand.wanted],
        [w.active for w in demand.wanted],
        [w.total for w in demand.wanted],
        [w.sends_mail for w in demand.wanted],
        demand.letters_apart,
        demand.look_at_clock,
        demand.oldest_first,
        demand.seen,
    )
    taken = [_claim(row, demand.worker) for row in rows if row["run_id"] is not None]
    return Claims(taken, rows[0]["wait"], rows[0]["listens"] is not False)


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who claims certain runs, and how their letters are paced."""

    worker: UUID
    host: str
    letters_apart: timedelta | None
    """The time between two letters of all replicas; None while letters are only logged."""
    seen: int = 0
    """As in a Demand."""


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run that a person asks for, to take it at once."""

    job: AnyJob
    payload: Mapping[str, Any]
    fire_time: datetime
    asked_by: str
    released_for: str | None
    """Why it may pass the brake; None: it may not."""


async def claim_one(connection: Connection, run_id: UUID, *, sends_mail: bool, by: Claimant) -> Foreground:
    """Take a certain run for a worker, counting the attempt from now; see the SQL function `claim_one`."""
    return await _claim_certain(connection, CLAIM_ONE, (run_id,), sends_mail, by)


async def claim_new(connection: Connection, wanted: NewRun, *, by: Claimant) -> Foreground:
    """Ask for a run and take it; it was never asked for unless the verdict is `claimed`."""
    asked = (wanted.job.name, dict(wanted.payload), wanted.fire_time, wanted.asked_by, wanted.released_for)
    return await _claim_certain(connection, CLAIM_NEW, asked, wanted.job.sends_mail, by)


async def _claim_certain(
    connection: Connection, statement: str, what: tuple[object, ...], sends_mail: bool, by: Claimant
) -> Foreground:
    row = await connection.fetchrow(
        statement, *what, by.worker, by.host, sends_mail, by.letters_apart, by.seen, timeout=CALL_TIMEOUT_SECONDS
    )
    if row is None:
        raise LookupError("a claim always returns one row")
    verdict = Verdict(row["verdict"])
    return Foreground(
        verdict,
        _claim(row, by.worker) if verdict is Verdict.CLAIMED else None,
        row["wait"] or 0.0,
        row["holder_host"],
        row["holder_since"],
        bool(row["holder_silent"]),
    )
