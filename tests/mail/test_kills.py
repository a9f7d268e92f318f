"""
The whole way of a digest, with the process that walks it killed between every two steps (SIGKILL), then another
process, then a second detection the same day: nobody gets two, nobody is forgotten, uncertain ones are flagged.
"""

import asyncio
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from aiosmtpd.smtp import SMTP

from bon_scheduler.declared import JOBS
from bon_scheduler.mail.keys import read_key, recipient_hash
from tests import arrange
from tests.conftest import Connection
from tests.mailserver import PASSWORD, Server
from tests.process import Service, serve
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")]

NO_SCHEDULES = {f"SCHEDULE_{job.name.replace('-', '_').upper()}": "" for job in JOBS}
CONCURRENCY = 2
BUSINESSES = 5
LOCK = 4711
# By step: the table whose change waits for the test, when, and which change. What waits is never committed.
STEPS = {
    "invoices are marked": ("public.invoices", "update", "true"),
    "the digest is asked for": ("bon_scheduler.runs", "insert", "new.job = 'overdue-digest'"),
    "detection ends": ("bon_scheduler.runs", "update", "new.job = 'overdue-detection' and new.state = 'succeeded'"),
    "sending is asked for": ("bon_scheduler.runs", "insert", "new.job = 'send-overdue-digest'"),
    "the digest ends": ("bon_scheduler.runs", "update", "new.job = 'overdue-digest' and new.state = 'succeeded'"),
    "sending is claimed": ("bon_scheduler.runs", "update", "new.job = 'send-overdue-digest' and new.state = 'running'"),
    "the gate is passed": ("bon_scheduler.mail_gate", "update", "true"),
    "a letter is intended": ("bon_scheduler.deliveries", "insert", "true"),
    "the answer is recorded": ("bon_scheduler.deliveries", "update", "new.state = 'sent'"),
    "sending ends": ("bon_scheduler.runs", "update", "new.job = 'send-overdue-digest' and new.state = 'succeeded'"),
}
# Where one run ends, other letters may be on their way: between DATA and the record of its answer.
CERTAIN = STEPS.keys() - {"the answer is recorded", "sending ends"}
UNFINISHED = "select count(*) from bon_scheduler.runs where state in ('queued', 'running', 'retrying')"
INTENDED = "select count(*) from bon_scheduler.deliveries where state = 'intended'"
SENDING_ASKED = "select count(*) from bon_scheduler.runs where job = 'send-overdue-digest'"


class Town:
    """Businesses with an owner each, one with two, all of them owed something; and the mail they got."""

    def __init__(self, connection: Connection, server: Server, environ: dict[str, str]) -> None:
        self.connection = connection
        self.server = server
        self.environ = environ
        self.owners: dict[str, str] = {}
        """Hash in the ledger by address."""

    async def build(self, businesses: int) -> None:
        for n in range(businesses):
            business = await arrange.business(self.connection)
            for email in [f"owner{n}@shop.example", *(["second@shop.example"] if n == 0 else [])]:
                await arrange.owner(self.connection, business, email)
                self.owners[email] = recipient_hash(await read_key(self.connection), business, email)
            due = datetime.now(UTC).date() - timedelta(days=10)
            await arrange.invoice(self.connection, business, due_date=due)

    async def detect(self) -> None:
        await self.connection.execute("select bon_scheduler.enqueue('overdue-detection')")

    async def settled(self) -> None:
        """Wait until every run has ended and no letter is only intended."""

        async def look() -> bool:
            return not await self.connection.fetchval(UNFINISHED) and not await self.connection.fetchval(INTENDED)

        await until(look, seconds=60)

    async def states(self) -> dict[str, str]:
        """What the ledger says of each owner's letter."""
        rows = await self.connection.fetch("select recipient_hash, state from bon_scheduler.deliveries")
        return {row["recipient_hash"]: row["state"] for row in rows}

    async def verdict(self) -> dict[str, list[str]]:
        """Who got two, who got none and nobody knows of it, and who is flagged as uncertain."""
        got, states = Counter(self.server.recipients), await self.states()
        return {
            "doubled": [owner for owner in self.owners if got[owner] > 1],
            "forgotten": [o for o, who in self.owners.items() if not got[o] and states.get(who) != "unknown"],
            "unknown": [owner for owner, who in self.owners.items() if states.get(who) == "unknown"],
        }


@pytest.fixture
async def town(
    connection: Connection, database_url: str, authority: trustme.CA, server: Server, tmp_path: Path
) -> AsyncIterator[Town]:
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    async with server.listening():
        mail = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(server.port), "SSL_CERT_FILE": str(trusted)}
        login = {"SMTP_USERNAME": "bon", "SMTP_PASSWORD": PASSWORD, "EMAIL_RATE_PER_SECOND": "1000"}
        quick = {"LEASE_SECONDS": "2", "WORKER_CONCURRENCY": str(CONCURRENCY), "DATABASE_URL": database_url}
        yield Town(connection, server, {**NO_SCHEDULES, **mail, **login, **quick})


async def finish(town: Town) -> dict[str, list[str]]:
    """Have another process do the rest, and a second detection; return the verdict."""
    async with serve(**town.environ):
        await town.settled()
        await town.detect()
        await town.settled()
    return await town.verdict()


async def halt_at(connection: Connection, step: str) -> None:
    table, change, condition = STEPS[step]
    await connection.execute(
        f"create function public.halt() returns trigger language plpgsql as "
        f"$$ begin perform pg_advisory_xact_lock({LOCK}); return new; end $$;"
        f"create trigger halt before {change} on {table} for each row when ({condition}) "
        f"execute function public.halt();"
        f"select pg_advisory_lock({LOCK})"
    )


async def let_go(connection: Connection, step: str) -> None:
    """Undo `halt_at`. Whoever waits there never commits, as when its machine is gone."""
    await connection.execute(
        "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and not granted;"
        f"select pg_advisory_unlock({LOCK}); drop trigger halt on {STEPS[step][0]}; drop function public.halt()"
    )


async def test_the_server_and_the_process_get_along_without_faults(town: Town) -> None:
    await town.build(BUSINESSES)
    await town.detect()
    assert await finish(town) == {"doubled": [], "forgotten": [], "unknown": []}
    assert len(town.server.recipients) == BUSINESSES + 1


@pytest.mark.parametrize("step", STEPS)
async def test_killed_before_a_step_is_committed_nobody_gets_two_and_nobody_is_forgotten(town: Town, step: str) -> None:
    await town.build(BUSINESSES)
    await halt_at(town.connection, step)
    async with serve(**town.environ) as victim:
        await town.detect()

        async def halted() -> bool:
            waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
            return bool(await town.connection.fetchval(waiting))

        await until(halted)
        victim.process.kill()
        await victim.process.wait()
    await let_go(town.connection, step)
    found = await finish(town)
    assert (found["doubled"], found["forgotten"]) == ([], [])
    assert len(found["unknown"]) <= (0 if step in CERTAIN else CONCURRENCY)
    if step == "the answer is recorded":
        assert found["unknown"], "the server had accepted a letter whose answer was never recorded"


@pytest.mark.parametrize("accepts", [False, True], ids=["before it accepts", "after it accepted"])
@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA"])
async def test_killed_while_the_server_answers_what_is_uncertain_is_flagged(
    town: Town, command: str, accepts: bool
) -> None:
    if accepts and command != "DATA":
        pytest.skip("only the end of DATA accepts anything")
    await town.build(BUSINESSES)
    victims: list[Service] = []

    async def kill(_: SMTP) -> str:
        if victims[0].process.returncode is None:
            victims[0].process.kill()
        return "250 accepted" if accepts else "451 not accepted"

    town.server.on[command] = kill
    async with serve(**town.environ) as victim:
        victims.append(victim)
        await town.detect()
        await victim.process.wait()
    town.server.on.clear()
    found = await finish(town)
    assert (found["doubled"], found["forgotten"]) == ([], [])
    assert 1 <= len(found["unknown"]) <= CONCURRENCY


async def test_killed_when_all_is_done_nothing_is_done_again(town: Town) -> None:
    await town.build(BUSINESSES)
    async with serve(**town.environ) as victim:
        await town.detect()

        async def asked() -> bool:
            return bool(await town.connection.fetchval(SENDING_ASKED))

        await until(asked)
        await town.settled()
        victim.process.kill()
        await victim.process.wait()
    assert await finish(town) == {"doubled": [], "forgotten": [], "unknown": []}


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_killed_at_any_moment_again_and_again(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    """Two replicas, one killed at a random moment, twenty times over; the server drops and refuses meanwhile."""
    chance = random.Random(20261123)
    await town.build(600)
    told: Counter[str] = Counter()

    async def unreliable(session: SMTP) -> str:
        what = chance.choices(["250 OK", "451 later", "drop"], [94, 3, 3])[0]
        told[what] += 1
        await asyncio.sleep(0.01)
        if what == "drop":
            assert isinstance(session.transport, asyncio.WriteTransport)
            session.transport.abort()
            return "451 not heard"
        return what

    town.server.on |= {"RCPT": unreliable, "DATA": unreliable}
    await town.detect()
    async with serve(**town.environ):
        for _ in range(20):
            async with serve(**town.environ) as victim:
                await asyncio.sleep(chance.uniform(0, 1.5))
                victim.process.kill()
                await victim.process.wait()
    town.server.on.clear()
    # What was refused for now waits up to half a minute and more: have it now.
    await town.connection.execute(
        "update bon_scheduler.runs set run_at = now() where state in ('queued', 'retrying');"
        "update bon_scheduler.mail_gate set closed_until = '-infinity'"
    )
    found = await finish(town)
    with capsys.disabled():
        sys.stdout.write(
            f"\nletters {len(town.owners)}, server's answers {dict(told)}, received {len(town.server.recipients)}, "
            f"doubled {len(found['doubled'])}, forgotten {len(found['forgotten'])}, unknown {len(found['unknown'])}\n"
        )
    assert (found["doubled"], found["forgotten"]) == ([], [])
