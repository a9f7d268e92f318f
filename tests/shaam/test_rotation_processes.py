"""
Real processes of the service, killed by SIGKILL between every two steps of a refresh; what the next ones make of it.

Each test holds a process at a step from outside: by a lock it must wait for, by an answer that does not come, by a
table that is not there.
"""

import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from bon_scheduler.database import connections
from bon_scheduler.demo.shaam_simulator import Misbehaviour
from bon_scheduler.shaam.spool import count_files
from tests import arrange
from tests.authority import Authority, authority
from tests.conftest import Connection
from tests.process import Service, serve
from tests.tax import CIPHER, CLIENT_ID, CLIENT_SECRET, KEY, NOW, environ
from tests.waiting import until

pytestmark = pytest.mark.slow

SUBJECT = "a business"
LOCK_CREDENTIALS = "select from business_shaam_credentials for update"
LOCK_RUNS = "select from bon_scheduler.runs for update"
TAKE_AWAY = "alter table business_shaam_credentials rename to elsewhere"
GIVE_BACK = "alter table elsewhere rename to business_shaam_credentials"
WAITING = "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and query like '%' || $1 || '%')"
LEASE_OVER = "update bon_scheduler.shaam_refreshes set lease_until = lease_until - interval '10 minutes'"
ASK = "select bon_scheduler.enqueue('shaam-token-refresh', $1)"


@dataclass(slots=True)
class Bon:
    """One business whose tokens are refreshed on demand, by processes that a test starts and kills."""

    connection: Connection
    url: str
    authority: Authority
    business_id: UUID
    said: list[dict[str, Any]]
    """What all processes logged."""

    @asynccontextmanager
    async def service(self, spool: Path | None = None) -> AsyncIterator[Service]:
        settings = {
            "DATABASE_URL": self.url,
            "LEASE_SECONDS": "2",
            "LOG_LEVEL": "debug",
            "SCHEDULE_SHAAM_TOKEN_REFRESH": "",
            **environ(self.authority.token_url),
            "SHAAM_TIMEOUT_SECONDS": "20",
        }
        async with serve(**settings, **({"SPOOL_DIR": str(spool)} if spool else {})) as service:
            try:
                yield service
            finally:
                await service.stop(signal.SIGKILL)
        self.said += service.events

    async def ask(self) -> UUID:
        """Ask for a refresh now."""
        return UUID(str(await self.connection.fetchval(ASK, {"business_id": str(self.business_id)})))

    async def ended(self, run_id: UUID) -> dict[str, Any]:
        """Wait for the end of a run; return its state and counts."""
        query = "select state, counts from bon_scheduler.runs where id = $1 and finished_at is not null"

        async def look() -> dict[str, Any]:
            return dict(await self.connection.fetchrow(query, run_id) or {})

        return await until(look, seconds=40)

    async def row(self) -> dict[str, Any]:
        row = await self.connection.fetchrow(
            "select * from business_shaam_credentials left join bon_scheduler.shaam_refreshes using (business_id)"
        )
        assert row is not None
        return dict(row)

    async def token(self) -> str:
        return CIPHER.decrypt((await self.row())["encrypted_refresh_token"])

    async def waits_for_lock(self, statement: str) -> None:
        async def look() -> bool:
            return bool(await self.connection.fetchval(WAITING, statement))

        await until(look)

    async def was_asked(self, times: int = 1) -> None:
        """Wait until the authority was asked so often."""

        async def look() -> bool:
            return await self.authority.requests() >= times

        await until(look)


@pytest.fixture
async def delay() -> float:
    """How long each answer of the authority takes, in seconds."""
    return 0.5


@pytest.fixture
async def bon(connection: Connection, database_url: str, delay: float) -> AsyncIterator[Bon]:
    async with authority(delay) as one:
        business_id = await arrange.business(connection)
        values = {
            "business_id": business_id,
            "encrypted_access_token": CIPHER.encrypt("access"),
            "encrypted_refresh_token": CIPHER.encrypt(await one.issue(SUBJECT)),
            "token_expires_at": NOW,
        }
        await arrange.insert(connection, "business_shaam_credentials", values)
        bon = Bon(connection, database_url, one, business_id, [])
        yield bon
        said = json.dumps(bon.said)
        secrets = {KEY, CLIENT_ID, CLIENT_SECRET, *await one.secrets()}
        assert bon.said
        assert [secret[:6] for secret in secrets if secret in said] == []


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[Connection]:
    """A second connection, for the locks."""
    async with connections.connect(database_url) as connection:
        yield connection


async def test_killed_before_the_intent_was_committed_nothing_was_sent(bon: Bon, other: Connection) -> None:
    async with bon.service() as first:
        async with other.transaction():
            await other.execute(LOCK_CREDENTIALS)
            run_id = await bon.ask()
            await bon.waits_for_lock("insert into bon_scheduler.shaam_refreshes")
            await first.stop(signal.SIGKILL)
        assert await bon.authority.requests() == 0
    async with bon.service():
        # The dead process's statement may have gone on and committed: then its lease must run out first.
        await bon.connection.execute(LEASE_OVER)
        assert (await bon.ended(run_id))["state"] == "succeeded"
    assert await bon.authority.honours(await bon.token())
    assert await bon.authority.reuses() == []


async def test_killed_before_the_token_was_spent_it_is_sent_once_more(bon: Bon) -> None:
    await bon.authority.spoil(SUBJECT, Misbehaviour.SLOW)
    async with bon.service() as first:
        run_id = await bon.ask()
        await bon.was_asked()
        await first.stop(signal.SIGKILL)
    assert ((await bon.row())["state"], (await bon.row())["unanswered"]) == ("sending", 1)
    await bon.authority.spoil(SUBJECT, None)
    await bon.connection.execute(LEASE_OVER)
    async with bon.service():
        assert (await bon.ended(run_id))["counts"]["refreshed"] == 1
    assert await bon.authority.honours(await bon.token())
    assert await bon.authority.reuses() == []


async def flagged_as_lost(bon: Bon, run_id: UUID) -> None:
    """The token was spent and nobody has its successor: one more sending tells, and the owner is asked, once."""
    await bon.connection.execute(LEASE_OVER)
    async with bon.service():
        assert await bon.ended(run_id) == {
            "state": "partial",
            "counts": {"due": 1, "refreshed": 0, "joined": 0, "needs_reauth": 1, "deferred": 0, "failed": 0},
        }
    row = await bon.row()
    assert row["needs_reauth"]
    assert row["error"].startswith("the rotation was lost")
    assert await bon.authority.reuses() == [SUBJECT]
    notified = await bon.connection.fetch("select payload from bon_scheduler.runs where job = 'notify-reauth'")
    assert [row["payload"]["business_id"] for row in notified] == [str(bon.business_id)]


async def test_killed_while_the_answer_is_on_its_way_the_reason_says_that_it_was_lost(bon: Bon) -> None:
    token = await bon.authority.current(SUBJECT)
    await bon.authority.spoil(SUBJECT, Misbehaviour.SLOW_LORIS)
    async with bon.service() as first:
        run_id = await bon.ask()

        async def spent() -> bool:
            return not await bon.authority.honours(token)

        await until(spent)
        await first.stop(signal.SIGKILL)
    await bon.authority.spoil(SUBJECT, None)
    await flagged_as_lost(bon, run_id)


async def test_killed_while_it_saves_the_reason_says_that_it_was_lost(bon: Bon, other: Connection) -> None:
    async with bon.service() as first:
        run_id = await bon.ask()
        await bon.was_asked()
        async with other.transaction():
            await other.execute(LOCK_CREDENTIALS)
            await bon.waits_for_lock("update public.business_shaam_credentials")
            await first.stop(signal.SIGKILL)
            # A statement whose client is gone would be ended by the server in a few seconds; here at once.
            await other.execute("select pg_terminate_backend(pid) from pg_stat_activity where wait_event_type = 'Lock'")
    await flagged_as_lost(bon, run_id)


async def spool_and_die(bon: Bon, spool: Path) -> None:
    """Have a process rotate while the database takes nothing, keep the answer in its spool, and die."""
    async with bon.service(spool) as first:
        await bon.ask()
        await bon.was_asked()
        await bon.connection.execute(TAKE_AWAY)

        async def kept() -> bool:
            return count_files(spool).waiting == 1

        await until(kept)
        await first.stop(signal.SIGKILL)
    await bon.connection.execute(GIVE_BACK)
    assert not await bon.authority.honours(await bon.token())


async def test_killed_with_the_answer_in_the_spool_the_next_start_saves_it(bon: Bon, tmp_path: Path) -> None:
    await spool_and_die(bon, tmp_path)
    async with bon.service(tmp_path) as second:
        assert second.saw("token.saved_late")
        assert await bon.authority.honours(await bon.token())
    assert count_files(tmp_path).waiting == 0
    assert await bon.authority.requests() == 1


async def test_another_replica_does_not_send_a_token_whose_answer_may_be_in_a_spool(bon: Bon, tmp_path: Path) -> None:
    mine, others = tmp_path / "mine", tmp_path / "others"
    mine.mkdir()
    others.mkdir()
    await spool_and_die(bon, mine)
    await bon.connection.execute(LEASE_OVER)
    async with bon.service(others) as second:
        assert (await bon.ended(await bon.ask()))["counts"]["deferred"] == 1
        assert second.saw("token.waits")
    async with bon.service(mine):
        assert await bon.authority.honours(await bon.token())
    assert await bon.authority.requests() == 1


async def test_killed_after_the_save_the_run_ends_without_a_second_request(bon: Bon, other: Connection) -> None:
    async with bon.service() as first:
        run_id = await bon.ask()
        await bon.was_asked()
        async with other.transaction():
            await other.execute(LOCK_RUNS)

            async def saved() -> bool:
                return bool((await bon.row())["state"] == "refreshed")

            await until(saved)
            await first.stop(signal.SIGKILL)
    async with bon.service():
        assert (await bon.ended(run_id))["counts"]["joined"] == 1
    assert await bon.authority.honours(await bon.token())
    assert await bon.authority.requests() == 1


async def test_a_process_that_is_told_to_stop_sees_its_exchange_to_its_end(bon: Bon) -> None:
    async with bon.service() as first:
        await bon.ask()
        await bon.was_asked()
        assert await first.stop(signal.SIGTERM) == 0
    assert await bon.authority.honours(await bon.token())
    assert (await bon.row())["state"] == "refreshed"


async def test_two_callers_at_once_are_served_by_one_refresh(bon: Bon) -> None:
    async with bon.service(), bon.service():
        run_ids = [await bon.ask() for _ in range(4)]
        counts = [(await bon.ended(run_id))["counts"] for run_id in run_ids]
    assert sum(count["refreshed"] for count in counts) == 1
    assert sum(count["joined"] for count in counts) == 3
    assert await bon.authority.requests() == 1
