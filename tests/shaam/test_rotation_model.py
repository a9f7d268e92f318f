"""
Random lives of three replicas and an authority that misbehaves: no token is lost that could be kept.

Replicas run by schedule and on demand, alone and at once; they die between any two steps, their databases and disks
fail, answers are lost; owners consent anew and withdraw; time passes. At the end, when all is well again, each
business has a token that works, or its owner is asked for a reason that is true; and no token was ever sent again but
once for each sending that was not answered.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from bon_scheduler.database.connections import Pool
from bon_scheduler.demo.shaam_simulator import Misbehaviour
from bon_scheduler.shaam import rotation, unsaved
from handlers.shaam_token_refresh import RefreshTokens
from tests import arrange
from tests.authority import Authority, authority
from tests.conftest import Connection, MakeSettings
from tests.fated import Fate, Replica, Sendings
from tests.tax import AGE, CIPHER, environ

BUSINESSES = 3
DEFERRED = "select exists (select from bon_scheduler.shaam_refreshes where state = 'deferred')"
STEPS = 7
LATER = datetime(2100, 1, 1, tzinfo=UTC)
LOST = "the rotation was lost"
FAULTS = tuple(Misbehaviour)


@dataclass(slots=True)
class Life:
    """One random life, drawn from a seed that a failure names."""

    seed: int
    connection: Connection
    authority: Authority
    replicas: list[Replica]
    sendings: Sendings
    clock: list[float]
    chance: random.Random = field(init=False)
    subjects: dict[UUID, str] = field(default_factory=dict)
    withdrawn: set[str] = field(default_factory=set)
    """Subjects whose present consent is withdrawn, or would be at the next request."""

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    async def begin(self) -> None:
        await self.connection.execute("truncate bon_scheduler.shaam_refreshes; truncate business_shaam_credentials")
        for number in range(BUSINESSES):
            business_id = await arrange.business(self.connection)
            self.subjects[business_id] = f"{self.seed}-{number}"
            values = {
                "business_id": business_id,
                "encrypted_access_token": CIPHER.encrypt("access"),
                "encrypted_refresh_token": CIPHER.encrypt(await self.authority.issue(self.subjects[business_id])),
                "token_expires_at": datetime(2026, 1, 1, tzinfo=UTC),
            }
            await arrange.insert(self.connection, "business_shaam_credentials", values)
        for replica in self.replicas:
            await replica.start()

    async def step(self) -> None:
        often = [self.run_some] * 5 + [self.spoil] * 2
        step = self.chance.choice([*often, self.heal, self.consent, self.withdraw, self.wait, self.restart])
        await step()

    async def run_some(self) -> None:
        """Let one to three replicas run at once, whatever befalls them."""
        chosen = self.chance.sample(self.replicas, self.chance.choice((1, 1, 2, 3)))
        for replica in chosen:
            self.draw_fate(replica.fate)
        await asyncio.gather(*(self.run(replica) for replica in chosen))
        for replica in chosen:
            if replica.fate.dead:
                await replica.stop()
                await self.bury(replica)
                await replica.start()
            else:
                replica.fate.crash_at, replica.fate.outage, replica.fate.disk_full = None, range(0), False

    def draw_fate(self, fate: Fate) -> None:
        fate.steps = 0
        match self.chance.choice(("well", "well", "crash", "crash", "outage", "both")):
            case "crash":
                fate.crash_at = self.chance.randint(1, 40)
            case "outage":
                self.draw_outage(fate)
            case "both":
                self.draw_outage(fate)
                fate.crash_at = fate.outage.start + self.chance.randint(1, 20)

    def draw_outage(self, fate: Fate) -> None:
        start = self.chance.randint(1, 40)
        fate.outage = range(start, start + self.chance.choice((1, 3, 30)))
        fate.answers_are_lost = self.chance.random() < 0.5
        fate.disk_full = self.chance.random() < 0.2

    async def run(self, replica: Replica) -> None:
        business_id = self.chance.choice((None, *self.subjects)) if self.chance.random() < 0.5 else None
        await replica.run(RefreshTokens(business_id=business_id), fire_time=datetime.now(UTC))

    async def bury(self, replica: Replica) -> None:
        """A process died. An answer that it alone had is lost: as if it had never come."""
        stored = await self.connection.fetch("select encrypted_refresh_token from business_shaam_credentials")
        known = {CIPHER.decrypt(row[0]) for row in stored}
        known.update(*(other.kept() for other in self.replicas))
        for token, successor in replica.answers.items():
            if successor not in known and await self.authority.honours(successor):
                self.sendings.lose(token)

    async def spoil(self) -> None:
        subject, fault = self.any_subject(), self.chance.choice(FAULTS)
        if fault is Misbehaviour.INVALID_GRANT:
            self.withdrawn.add(subject)
        await self.authority.spoil(subject, fault)

    async def heal(self) -> None:
        for subject in self.subjects.values():
            await self.authority.spoil(subject, None)

    async def withdraw(self) -> None:
        subject = self.any_subject()
        self.withdrawn.add(subject)
        await self.authority.withdraw(subject)

    async def consent(self) -> None:
        """The owner consents anew: BON writes fresh tokens over whatever is there."""
        business_id, subject = self.chance.choice(list(self.subjects.items()))
        self.withdrawn.discard(subject)
        await self.authority.spoil(subject, None)
        await self.connection.execute(
            "update business_shaam_credentials set encrypted_refresh_token = $2, needs_reauth = false,"
            " updated_at = now(), token_expires_at = now() where business_id = $1",
            business_id,
            CIPHER.encrypt(await self.authority.issue(subject)),
        )

    async def wait(self) -> None:
        await self.let_pass(self.chance.choice((timedelta(minutes=2), timedelta(minutes=20), timedelta(hours=6))))

    async def let_pass(self, duration: timedelta) -> None:
        for replica in self.replicas:
            await replica.offer()  # as it does every other second
        self.clock[0] += duration.total_seconds()
        await self.connection.execute(AGE, duration)

    async def restart(self) -> None:
        await self.chance.choice(self.replicas).restart()

    def any_subject(self) -> str:
        return self.chance.choice(list(self.subjects.values()))

    async def end_well(self) -> None:
        """Let everything be well again, for long enough that everybody was tried and had an answer in time."""
        await self.heal()
        for replica in self.replicas:
            await replica.restart()
        for round_ in range(20):
            await self.let_pass(timedelta(hours=6))
            for replica in self.replicas:
                await replica.run(RefreshTokens(), fire_time=datetime.now(UTC))
            if round_ > 0 and not await self.connection.fetchval(DEFERRED):
                return

    async def check(self) -> None:
        rows = await self.connection.fetch(
            "select c.business_id, c.encrypted_refresh_token, c.needs_reauth, r.error, r.state"
            "  from business_shaam_credentials c left join bon_scheduler.shaam_refreshes r using (business_id)"
        )
        assert len(rows) == BUSINESSES
        for row in rows:
            subject, token = self.subjects[row["business_id"]], CIPHER.decrypt(row["encrypted_refresh_token"])
            about = f"seed {self.seed}, {subject}: {dict(row)}"
            if not row["needs_reauth"]:
                assert await self.authority.honours(token), f"{about}: its token does not work, and nobody is asked"
                assert token == await self.authority.current(subject), about
                continue
            assert not await self.authority.honours(token), f"{about}: its owner is asked, but the token works"
            if LOST in row["error"]:
                # A process that died before it sent what it meant to send leaves the same trace.
                assert self.sendings.unanswered[token] or subject in self.withdrawn, f"{about}: nothing was lost"
            else:
                assert subject in self.withdrawn, f"{about}: nobody withdrew the consent"
        for token, count in self.sendings.sent.items():
            assert count <= 1 + self.sendings.again[token], f"seed {self.seed}: sent {count} times"
        assert self.sendings.overlapped == set(), f"seed {self.seed}: sent by two at once"


@asynccontextmanager
async def lives(
    pool: Pool, connection: Connection, make_settings: MakeSettings, directory: Path
) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Yield what lives one life, from its seed."""
    async with authority() as one:
        settings = make_settings(**environ(one.token_url) | {"SHAAM_TIMEOUT_SECONDS": "0.15", "SHAAM_CONCURRENCY": "3"})

        async def live(seed: int) -> None:
            home = directory / str(seed)
            spools = [home / "a", home / "b"]
            for spool in spools:
                spool.mkdir(parents=True)
            third = random.Random(seed).choice((None, spools[0], spools[1]))
            life = Life(seed, connection, one, [], Sendings(), [0.0])
            life.replicas = [
                Replica(pool, settings, life.sendings, lambda: life.clock[0], spool) for spool in (*spools, third)
            ]
            await life.begin()
            for _ in range(STEPS):
                await life.step()
            await life.end_well()
            for replica in life.replicas:
                await replica.stop()
                assert replica.kept() == set(), f"seed {seed}: left in the spool"
            await life.check()

        yield live


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for nothing that a life lets pass by itself."""
    monkeypatch.setattr(rotation, "SAVE_WAITS_SECONDS", (0, 0))
    monkeypatch.setattr(rotation, "SPOOLED_SAVE_WAITS_SECONDS", (0,))
    monkeypatch.setattr(rotation, "LOOK_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(rotation, "JOIN_BEYOND_ANSWER_SECONDS", 0)
    monkeypatch.setattr(unsaved, "OFFER_SECONDS", 0.03)


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("part", range(4))
@pytest.mark.samples(1)
async def test_no_token_is_lost_that_could_be_kept(
    pool: Pool, connection: Connection, make_settings: MakeSettings, tmp_path: Path, part: int
) -> None:
    async with lives(pool, connection, make_settings, tmp_path) as live:
        for seed in range(part * 25, part * 25 + 25):
            await live(seed)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("part", range(10))
async def test_no_token_is_lost_in_thousands_of_lives(
    pool: Pool, connection: Connection, make_settings: MakeSettings, tmp_path: Path, part: int
) -> None:
    async with lives(pool, connection, make_settings, tmp_path) as live:
        for seed in range(1000 + part * 210, 1210 + part * 210):
            await live(seed)
