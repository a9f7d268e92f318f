"""A job's declaration, its typed payload, and what its handler is given."""

import random
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar
from uuid import UUID

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from pydantic import BaseModel, ConfigDict

from bon_scheduler.jobs.mistakes import (
    JobDeclarationError,
    declared_at,
    faults_of_function,
    faults_of_name,
    faults_of_options,
    payload_of,
)
from bon_scheduler.jobs.payloads import faults_of_payload
from bon_scheduler.jobs.rehearsed import Rehearsed

__all__ = [
    "AnyJob",
    "BusinessOutcome",
    "CatchUp",
    "Connection",
    "Counts",
    "Cron",
    "Exclusive",
    "Handler",
    "Job",
    "JobContext",
    "NoPayload",
    "P",
    "Payload",
    "Retry",
    "Usual",
    "job",
]

Counts: TypeAlias = Mapping[str, int]
"""What an attempt did, as integers: the names are `interface.md`'s."""

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"
"""An asyncpg connection, from the pool or not."""

T = TypeVar("T")
_DEFAULT_RANDOM = random.Random()  # noqa: S311 - jitter, not a secret


class Payload(BaseModel):
    """Typed arguments of a run: frozen, and a field nobody declared is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NoPayload(Payload):
    """The payload of a job that takes no arguments."""


P = TypeVar("P", bound=Payload)
P_contra = TypeVar("P_contra", bound=Payload, contravariant=True)


class CatchUp(StrEnum):
    """Which of several fire times that nobody was awake for are still run."""

    SKIP = "skip"
    """None: each is recorded as missed."""
    LATEST = "latest"
    """The latest that is within its grace; the earlier ones are recorded as missed."""
    ALL = "all"
    """Each that is within its grace, in order."""


@dataclass(frozen=True, slots=True)
class Cron:
    """
    When a job runs by itself.

    `expression` has five fields, or six with seconds first, and is read in
    `BON_TIMEZONE`. `grace` is the lateness after which a fire time is not run
    but recorded as missed.
    """

    expression: str
    catch_up: CatchUp = CatchUp.LATEST
    grace: timedelta = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Retry:
    """
    How often a run is tried, and how long it waits in between.

    The wait before attempt n + 1 is drawn between half of and the whole of
    `delay * factor ** (n - 1)`, at most `longest`, so that runs which failed
    together do not come back together.
    """

    attempts: int = 5
    delay: timedelta = timedelta(seconds=10)
    factor: float = 2.0
    longest: timedelta = timedelta(minutes=15)

    def wait(self, attempt: int, source: random.Random = _DEFAULT_RANDOM) -> timedelta:
        """Draw the wait after `attempt` (from 1) has failed."""
        # The exponent is bounded, otherwise a long-lived run would overflow the float.
        grown_seconds = self.delay.total_seconds() * self.factor ** min(attempt - 1, 64)
        return timedelta(seconds=min(grown_seconds, self.longest.total_seconds()) * source.uniform(0.5, 1.0))


class Exclusive(StrEnum):
    """What must not run together, in one replica or in several."""

    NO = "no"
    """Nothing: runs of the job are free."""
    JOB = "job"
    """Two runs of the job."""
    BUSINESS = "business"
    """Two runs of the job for one business, and two for none."""


@dataclass(frozen=True, slots=True)
class BusinessOutcome:
    """What a run changed, or failed to do, for one business; never written for "nothing to do"."""

    business_id: UUID
    outcome: Literal["done", "kept", "failed"] = "done"
    counts: Counts = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Usual:
    """What a count has been lately."""

    runs: int
    """Of how many runs."""
    median: float | None
    """None without any run."""


class JobContext(Protocol):
    """
    What a handler may know and do. It never reads a clock: the instants are here.

    Every effect on BON's tables goes through `transaction`, whose commit is
    refused (`LostRunError`) once another attempt owns the run.
    """

    @property
    def run_id(self) -> UUID:
        """The run this attempt belongs to."""
        ...

    @property
    def job_name(self) -> str:
        """The name of the job."""
        ...

    @property
    def attempt(self) -> int:
        """Which execution of the run this is, from 1."""
        ...

    @property
    def fire_time(self) -> datetime:
        """The instant that was named, else the one the run was asked for (UTC, aware); a retry keeps it."""
        ...

    @property
    def business_date(self) -> date:
        """The Israeli calendar date of `fire_time`."""
        ...

    @property
    def now(self) -> datetime:
        """When this attempt started (UTC, aware)."""
        ...

    @property
    def today(self) -> date:
        """The Israeli calendar date of `now`."""
        ...

    @property
    def next_fire_time(self) -> datetime | None:
        """When the job's schedule fires next after `now` (UTC, aware); None without a schedule."""
        ...

    @property
    def replay(self) -> bool:
        """Whether a person asked for this run with a fire time of their own."""
        ...

    @property
    def retried(self) -> bool:
        """Whether a person has had this run tried again."""
        ...

    @property
    def released(self) -> bool:
        """Whether a person has let this run pass the brake."""
        ...

    @property
    def dry_run(self) -> bool:
        """Whether everything is rolled back and nobody outside may be called: only what would be done is wanted."""
        ...

    def get(self, kind: type[T]) -> T:
        """Return the service's one object of that type (`Settings`, `Mailer`, `Shaam`)."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[Connection]:
        """Open a transaction that commits only while this attempt owns its run."""
        ...

    def connection(self) -> AbstractAsyncContextManager[Connection]:
        """
        Borrow a connection without a fence: for reading, and for recording what the outside
        world has already done (a reply from an SMTP server, a rotated token).
        """
        ...

    async def enqueue(self, job: "Job[P]", payload: P, *, on: Connection, dedupe_key: str | None = None) -> UUID | None:
        """Ask for a run caused by this one, in the same transaction; None when the key is taken."""
        ...

    async def enqueue_many(
        self, job: "Job[P]", requests: Iterable[tuple[P, str]], *, on: Connection, priority: int = 0
    ) -> int:
        """Ask for a run for each (payload, dedupe key); return how many keys were new. A higher priority goes first."""
        ...

    async def record(self, outcomes: Iterable[BusinessOutcome], *, on: Connection) -> None:
        """Record outcomes per business. Counts add up when a run reports a business twice."""
        ...

    async def usual(self, count: str, *, on: Connection, job: str | None = None) -> Usual:
        """Return what the count of that name was in the last runs of `job`, or of this one."""
        ...

    def fires_next(self, job: str) -> datetime | None:
        """Return when that job's schedule fires next after `now` (UTC, aware); None without a schedule."""
        ...

    async def keep_rehearsal(self, rehearsed: Sequence[Rehearsed], *, on: Connection) -> None:
        """Keep what this run says of runs to come."""
        ...

    async def compare_with_rehearsal(self, candidates: int, *, on: Connection) -> int | None:
        """Keep what there is to do beside the last rehearsal's number; return that, None without a rehearsal."""
        ...

    async def record_changed(self, *, on: Connection) -> None:
        """Record for each business how many of its rows this run has changed, as `changed_rows` tells."""
        ...

    async def progress(self, counts: Counts, *, on: Connection) -> Counts:
        """
        Add to what this run has done so far, in the transaction that did it; return the counts of all its attempts,
        for `finish`. A job that commits in batches is told so what earlier attempts have done.
        """
        ...

    async def finish(self, counts: Counts, *, on: Connection, undone: bool | str = False) -> Counts:
        """
        End the run in the handler's last transaction, so that its success and its last effect
        commit together; return the counts. A run that leaves something `undone` ends `partial`, not `succeeded`.
        A text says why it has not done what it is for: its error, and no success by `DEADMAN_URL_…` or the metrics.
        A handler whose effects are elsewhere need not call it.
        """
        ...


class Handler(Protocol[P_contra]):
    """The coroutine function a job runs."""

    def __call__(self, ctx: JobContext, payload: P_contra, /) -> Awaitable[Counts]:
        """Run one attempt; return its counts."""
        ...


@dataclass(frozen=True, slots=True)
class Job(Generic[P]):
    """A named declaration: what runs, with which arguments, when, and how failure is met."""

    name: str
    handler: Handler[P]
    payload: type[P]
    schedule: Cron | None
    retry: Retry
    timeout: timedelta
    """How long one attempt may take before it is cancelled."""
    summary: str
    """The first line of the handler's docstring."""
    exclusive: Exclusive
    at_once: int | None
    """How many runs at most work at once, in all replicas; None: any number."""
    at_once_here: int | None
    """How many runs at most work at once in one replica; None: all that WORKER_CONCURRENCY allows."""
    sends_mail: bool
    """Whether a run begins by sending a letter: it is not taken before one may go."""


AnyJob: TypeAlias = "Job[typing.Any]"
KINDS = {"schedule": Cron, "catch_up": CatchUp, "retry": Retry, "exclusive": Exclusive}


def job(
    name: str,
    *,
    schedule: Cron | None = None,
    retry: Retry | None = None,
    timeout: timedelta = timedelta(minutes=10),
    exclusive: Exclusive | None = None,
    at_once: int | None = None,
    at_once_here: int | None = None,
    sends_mail: bool = False,
) -> Callable[[Handler[P]], Job[P]]:
    """
    Declare a handler as the job `name` (lower-case words joined by hyphens).

    The payload's type is read from the handler's second parameter. Without `exclusive`, a job with a schedule has no
    two runs at once, and one without any number. Raises JobDeclarationError, which names file and line.
    """
    options = {"schedule": schedule, "retry": retry, "timeout": timeout, "exclusive": exclusive}
    limits = {"at_once": at_once, "at_once_here": at_once_here, "sends_mail": sends_mail}
    told: object = name
    if callable(told):  # "@job" without its parentheses
        raise JobDeclarationError(declared_at(told), None, ['Its name is missing. Write @job("its-name") above it.'])

    def declare(handler: Handler[P]) -> Job[P]:
        faults = [
            *faults_of_name(told),
            *faults_of_options({**options, **limits}, KINDS),
            *(of_function := list(faults_of_function(handler, Payload))),
        ]
        if not of_function:
            by_business = exclusive is Exclusive.BUSINESS
            faults += faults_of_payload(payload_of(handler), ticks=schedule is not None, by_business=by_business)
        if faults:
            raise JobDeclarationError(declared_at(handler), told if isinstance(told, str) else None, faults)
        alone = exclusive or (Exclusive.JOB if schedule else Exclusive.NO)
        payload = payload_of(handler)
        summary = (handler.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        return Job(
            name,
            handler,
            payload,
            schedule,
            retry or Retry(),
            timeout,
            summary,
            alone,
            at_once,
            at_once_here,
            sends_mail,
        )

    return declare
