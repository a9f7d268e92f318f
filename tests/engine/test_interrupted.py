"""Attempts that are cut short because their process stops, wherever that is."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from bon_scheduler import declared, service
from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from bon_scheduler.jobs import AnyJob, Counts, JobContext, NoPayload, job
from bon_scheduler.ledger.claims import Verdict
from bon_scheduler.service import Machinery
from handlers.send_overdue_digest import send_overdue_digest
from tests import arrange
from tests.conftest import Connection, MakeSettings
from tests.interrupting import interrupted_everywhere

RUN = "select state::text, attempt, given_back from bon_scheduler.runs where id = $1"
DELIVERIES = "select state::text from bon_scheduler.deliveries where run_id = $1"
NO_ATTEMPT_OPEN = "select count(*) from bon_scheduler.attempts where ended_at is null"
returned: set[UUID] = set()


@job("return-at-once")
async def return_at_once(ctx: JobContext, _: NoPayload) -> Counts:
    """Do what cannot be done in the last transaction, and return."""
    async with ctx.transaction() as tx:
        await tx.execute("select")
    returned.add(ctx.run_id)
    return {"done": 1}


@dataclass(slots=True)
class Attempts:
    """One attempt after another, each at another run."""

    parts: Machinery
    connection: Connection
    job: AnyJob
    run_id: UUID = field(default_factory=uuid4)

    async def begin(self) -> Coroutine[Any, Any, str]:
        payload: dict[str, str] = {}
        if self.job.payload is not NoPayload:
            business = await arrange.business(self.connection)
            await arrange.owner(self.connection, business, f"{business}@shop.example")
            await arrange.invoice(self.connection, business, due_date=date(2026, 1, 1), is_overdue=True)
            payload = {"business_id": str(business), "as_of": str(datetime.now(UTC).date())}
        ask = "select bon_scheduler.enqueue($1, $2)"
        self.run_id = await self.connection.fetchval(ask, self.job.name, payload)
        while True:
            answer = await self.parts.runner.claim_one(self.connection, self.run_id, self.job)
            if answer.claim is not None:
                return self.parts.runner.execute(self.job, answer.claim, self.job.retry)
            assert answer.verdict is Verdict.WAITS
            await asyncio.sleep(answer.wait_seconds)

    async def became(self) -> tuple[str, int, int]:
        await self.parts.runner.settled()
        while self.parts.mailer._sending:
            await asyncio.wait(self.parts.mailer._sending)
        assert await self.connection.fetchval(NO_ATTEMPT_OPEN) == 0
        row = await self.connection.fetchrow(RUN, self.run_id)
        assert row is not None
        return tuple(row)


async def test_a_handler_that_has_returned_is_finished_and_not_given_back(
    make_settings: MakeSettings, connection: Connection
) -> None:
    async with service.machinery(make_settings(), jobs=[return_at_once]) as parts:
        attempts, became = Attempts(parts, connection, return_at_once), set()
        async for step, outcome in interrupted_everywhere(attempts.begin):
            ended = await attempts.became()
            if attempts.run_id in returned:
                assert ended == ("succeeded", 1, 0), f"at step {step}: {outcome!r}"
            else:
                assert ended == ("queued", 1, 1), f"at step {step}: {outcome!r}"
            became.add((ended[0], isinstance(outcome, asyncio.CancelledError)))
    assert became == {("queued", True), ("succeeded", True), ("succeeded", False)}


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[SmtpSink]:
    async with smtp_sink(tmp_path) as sink:
        yield sink


async def test_a_digest_is_sent_and_recorded_or_nothing_is_left_of_it(
    make_settings: MakeSettings, connection: Connection, sink: SmtpSink
) -> None:
    mail = {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none", "EMAIL_RATE_PER_SECOND": "100"}
    async with service.machinery(make_settings(**mail), jobs=declared.JOBS) as parts:
        attempts, became = Attempts(parts, connection, send_overdue_digest), set()
        async for step, outcome in interrupted_everywhere(attempts.begin):
            state, attempt, given_back = await attempts.became()
            letters = [row["state"] for row in await connection.fetch(DELIVERIES, attempts.run_id)]
            at = f"at step {step}: {outcome!r}, {state}, {letters}"
            assert letters in (["sent"], []), at
            assert (state, attempt, given_back) in {("succeeded", 1, 0), ("queued", 1, 1)}, at
            assert state == "queued" or letters, at
            became.add((state, len(letters)))
        sent = await connection.fetchval("select count(*) from bon_scheduler.deliveries where state = 'sent'")
    assert len(sink.messages) == sent
    assert became == {("queued", 0), ("queued", 1), ("succeeded", 1)}
