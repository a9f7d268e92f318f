"""
What happens while a pass of the reconciler looks at the ledger.

A pass looks three times: at the attempts this process knows (`before`), at the runs the ledger says are its own, and
at the attempts once more. Two comments guard this, and each is needed, for a case of its own: the second look for what
was claimed after the first, the first for what ended unrecorded after the ledger was read.

A mutation that takes both snapshots of the first look AFTER the query is equivalent: an attempt whose end could not be
recorded meanwhile is then in `unrecorded`, and is let go of; one whose end was recorded is not `running` any more, so
that giving it back changes nothing; one that is lost is asked for afterwards in either case.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from bon_scheduler import Counts, JobContext, NoPayload, Retry, job, ledger, service
from bon_scheduler.ledger import attempts
from tests.conftest import Connection, MakeSettings
from tests.waiting import until

ASK = "select bon_scheduler.enqueue('a-test')"
GIVEN_BACK = "select given_back from bon_scheduler.runs"


def beside_the_query(
    monkeypatch: pytest.MonkeyPatch,
    *,
    before: Callable[[], Awaitable[None]] | None = None,
    after: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Have something happen just before or after a pass reads from the ledger which runs are its own."""
    real = attempts.held_by

    async def held_by(connection: Any, worker: UUID) -> Any:
        if before is not None:
            await before()
        held = await real(connection, worker)
        if after is not None:
            await after()
        return held

    monkeypatch.setattr(ledger, "held_by", held_by)


async def test_a_run_that_is_claimed_while_a_pass_looks_is_left_alone(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = asyncio.Event()

    @job("a-test")
    async def work(_: JobContext, __: NoPayload) -> Counts:
        await over.wait()
        return {}

    async with service.serving(make_settings(LEASE_SECONDS="600"), jobs=[work]) as serving:
        runner, asked = serving.machinery.runner, list[UUID]()

        async def claim_one_more() -> None:
            if not asked:
                asked.append(await connection.fetchval(ASK))

            async def known() -> bool:
                return bool(runner.under_way)

            await until(known)

        beside_the_query(monkeypatch, before=claim_one_more)
        await serving.machinery.reconciler.make_pass()
        assert asked
        assert (await connection.fetchval(GIVEN_BACK), len(runner.under_way)) == (0, 1)
        over.set()


async def test_an_attempt_that_ends_unrecorded_while_a_pass_looks_counts(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given back, it would cost nothing, and its handler be called for ever."""

    async def refuse(*_: Any, **__: Any) -> Any:
        raise asyncpg.CheckViolationError("no")

    monkeypatch.setattr(ledger, "finish_many", refuse)
    monkeypatch.setattr(ledger, "fail", refuse)
    begun, over = asyncio.Event(), asyncio.Event()

    @job("a-test", retry=Retry(attempts=1))
    async def work(_: JobContext, __: NoPayload) -> Counts:
        begun.set()
        await over.wait()
        return {}

    async with service.serving(make_settings(LEASE_SECONDS="600"), jobs=[work]) as serving:
        runner = serving.machinery.runner
        await connection.execute(ASK)
        await begun.wait()

        async def end() -> None:
            over.set()

            async def forgotten() -> bool:
                return bool(runner.unrecorded and not runner.under_way) or not await held(connection)

            await until(forgotten)

        beside_the_query(monkeypatch, after=end)
        await serving.machinery.reconciler.make_pass()
        assert await connection.fetchval(GIVEN_BACK) == 0


async def held(connection: Connection) -> bool:
    return bool(await connection.fetchval("select worker is not null from bon_scheduler.runs"))
