"""The gate: one rate for all replicas, one alert for an outage, and no attempt used up by it."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import pytest
from aiosmtpd.smtp import SMTP
from structlog.testing import capture_logs

from bon_scheduler.database import connections as db
from bon_scheduler.database.connections import Pool
from bon_scheduler.jobs import NotNowError
from bon_scheduler.mail import gate as mail_gate
from bon_scheduler.mail.gate import MailGate, gate_state
from bon_scheduler.mail.mailer import Delivery, MailUnavailableError
from tests.conftest import Connection, MakeSettings
from tests.mailserver import hang_up
from tests.mailworld import LETTER, World, a_run, another

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")

RATE = 20.0
DOWN = "421 4.3.2 down for upkeep"
EVERY_WAIT = ("FIRST_WAIT", "LONGEST_WAIT")


@pytest.fixture
async def replicas(make_settings: MakeSettings) -> AsyncIterator[list[MailGate]]:
    """Three processes' gates, each with a pool of its own."""
    async with AsyncExitStack() as stack:
        pools = [await stack.enter_async_context(db.open_pool(make_settings())) for _ in range(3)]
        yield [MailGate(pool, rate_per_second=RATE) for pool in pools]


async def close_gate(connection: Connection, *, again_in: str = "1 hour") -> None:
    await connection.execute(
        "update bon_scheduler.mail_gate set failures = 3, trouble = 'x', closed_since = now(), "
        "closed_until = now() + $1::text::interval",
        again_in,
    )


# The rate


async def test_the_rate_holds_for_all_replicas_together(replicas: list[MailGate]) -> None:
    letters = 45
    passed: list[float] = []

    async def send(gate: MailGate) -> None:
        await gate.pass_through()
        passed.append(time.monotonic())

    started = time.monotonic()
    await asyncio.gather(*(send(replicas[n % 3]) for n in range(letters)))
    # However busy the machine: nobody passes before their place in the one row of all replicas.
    places = [started + n / RATE for n in range(letters)]
    assert all(instant >= place - 0.01 for instant, place in zip(sorted(passed), places, strict=True))


async def test_a_rate_that_was_not_used_is_not_saved_up(replicas: list[MailGate]) -> None:
    await replicas[0].pass_through()
    await asyncio.sleep(0.3)
    started = time.monotonic()
    for _ in range(3):
        await replicas[0].pass_through()
    assert time.monotonic() - started >= 2 / RATE * 0.9


async def test_no_connection_is_held_while_a_letter_waits_for_its_turn(make_settings: MakeSettings) -> None:
    async with db.open_pool(make_settings(DATABASE_POOL_SIZE="2")) as pool:
        gate = MailGate(pool, rate_per_second=2)
        waiting = [asyncio.create_task(gate.pass_through()) for _ in range(20)]
        await asyncio.sleep(0.3)
        started = time.monotonic()
        assert await pool.fetchval("select 1") == 1
        assert time.monotonic() - started < 0.5
        assert sum(task.done() for task in waiting) <= 2
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


@pytest.mark.parametrize("state", ["sent", "refused", "unknown"])
async def test_a_letter_that_is_settled_takes_nobodys_turn(world: World, state: str) -> None:
    run = await a_run(world.pool)
    mailer = await world.mailer()
    await mailer.deliver(LETTER, run_id=run, attempt=1)
    await world.pool.execute("update bon_scheduler.deliveries set state = $1", state)
    before = await world.pool.fetchval("select next_slot from bon_scheduler.mail_gate")
    await mailer.deliver(LETTER, run_id=run, attempt=1)
    assert await world.pool.fetchval("select next_slot from bon_scheduler.mail_gate") == before


@pytest.mark.parametrize("state", ["next_slot", "closed_until"])
async def test_a_database_clock_that_was_set_back_stops_no_mail(
    replicas: list[MailGate], connection: Connection, state: str
) -> None:
    if state == "closed_until":
        await close_gate(connection)
    await connection.execute(f"update bon_scheduler.mail_gate set {state} = now() + interval '2 hours'")
    async with asyncio.timeout(2):
        await replicas[0].pass_through()


@pytest.mark.parametrize(("rate", "letters", "places"), [(1.0, 150, 121), (0.1, 16, 13), (0.001, 3, 1)])
async def test_the_rate_holds_however_many_letters_wait(
    connection: Connection, rate: float, letters: int, places: int
) -> None:
    """Who finds the row full is told to come again; nobody is let in beside it."""
    apart = timedelta(seconds=1 / rate)
    taken = [await connection.fetchrow(mail_gate.TAKE_TURN, apart, mail_gate.TRIAL) for _ in range(letters)]
    verdicts = [gate["verdict"] for gate in taken if gate is not None]
    assert verdicts == ["open"] * places + ["closed"] * (letters - places)
    waits = [gate["wait"] for gate in taken[:places] if gate is not None]
    assert all(later - earlier > apart * 0.9 for earlier, later in itertools.pairwise(waits))
    assert waits[-1] <= timedelta(minutes=2)


async def test_a_letter_that_finds_the_row_full_is_given_back_and_no_server_is_blamed(
    connection: Connection, pool: Pool
) -> None:
    await connection.execute("update bon_scheduler.mail_gate set next_slot = now() + interval '3 minutes'")
    before = await connection.fetchval("select next_slot from bon_scheduler.mail_gate")
    with pytest.raises(NotNowError, match="EMAIL_RATE_PER_SECOND") as caught:
        await MailGate(pool, rate_per_second=0.001).pass_through()
    assert not isinstance(caught.value, MailUnavailableError)
    assert await connection.fetchval("select next_slot from bon_scheduler.mail_gate") == before


# An outage


async def fail(world: World, times: int, **settings: object) -> None:
    mailer = await world.mailer(**settings)  # type: ignore[arg-type] # environment values of the test's own
    for _ in range(times):
        with pytest.raises(MailUnavailableError):
            await mailer.deliver(another(), run_id=await a_run(world.pool), attempt=1)


async def is_closed(world: World) -> bool:
    async with world.pool.acquire() as connection:
        return (await gate_state(connection)).closed_since is not None


async def test_a_server_that_is_down_is_said_once_and_then_left_alone(world: World) -> None:
    world.server.on["MAIL"] = DOWN
    with capture_logs() as events:
        await fail(world, 12)
    assert [e["event"] for e in events if e["log_level"] == "error"] == ["mail.unavailable"]
    assert world.server.connections == 3
    assert await world.rows() == []


async def test_one_lost_connection_among_many_is_no_outage(world: World) -> None:
    mailer = await world.mailer(email_rate_per_second=1000)
    for n in range(9):
        if n % 3:
            world.server.on["MAIL"] = hang_up
            with pytest.raises(MailUnavailableError):
                await mailer.deliver(another(), run_id=await a_run(world.pool), attempt=1)
        else:
            world.server.on.clear()
            assert await mailer.deliver(another(), run_id=await a_run(world.pool), attempt=1) is Delivery.SENT
        assert not await is_closed(world)


async def test_what_the_server_says_of_one_letter_closes_no_gate(world: World) -> None:
    world.server.on["RCPT"] = "450 greylisted"
    mailer = await world.mailer(email_rate_per_second=1000)
    for _ in range(5):
        with pytest.raises(Exception, match="450"):
            await mailer.deliver(another(), run_id=await a_run(world.pool), attempt=1)
    assert not await is_closed(world)


async def test_while_it_is_closed_one_letter_at_a_time_tries_the_server(world: World, connection: Connection) -> None:
    mailer = await world.mailer(email_rate_per_second=1000)
    await close_gate(connection, again_in="-1 second")
    tried, answer = asyncio.Event(), asyncio.Event()

    async def think(_: SMTP) -> str:
        tried.set()
        await answer.wait()
        return DOWN

    world.server.on["MAIL"] = think
    trial = asyncio.create_task(mailer.deliver(another(), run_id=await a_run(world.pool), attempt=1))
    await tried.wait()
    await fail(world, 5)
    assert world.server.connections == 1
    others = await connection.fetchrow(mail_gate.TAKE_TURN, timedelta(seconds=1), mail_gate.TRIAL)
    assert others is not None
    assert (others["verdict"], others["wait"] <= timedelta(seconds=5)) == ("closed", True)
    answer.set()
    with pytest.raises(MailUnavailableError):
        await trial
    assert await is_closed(world)


async def test_the_gate_opens_with_the_first_letter_that_is_taken(world: World, connection: Connection) -> None:
    mailer = await world.mailer(email_rate_per_second=1000)
    await close_gate(connection, again_in="-1 second")
    with capture_logs() as events:
        for _ in range(3):
            assert await mailer.deliver(another(), run_id=await a_run(world.pool), attempt=1) is Delivery.SENT
    (available,) = [e for e in events if e["event"] == "mail.available"]
    assert 0 <= available["seconds"] < 300
    assert not await is_closed(world)


async def test_a_recipient_who_is_refused_proves_the_server_alive(world: World, connection: Connection) -> None:
    await close_gate(connection, again_in="-1 second")
    world.server.on["RCPT"] = "550 no such user"
    assert await world.deliver() is Delivery.REFUSED
    assert not await is_closed(world)


async def test_what_is_no_address_proves_nothing(world: World, connection: Connection) -> None:
    await close_gate(connection, again_in="-1 second")
    assert await world.deliver(letter=replace(LETTER, recipient="nobody")) is Delivery.REFUSED
    assert await is_closed(world)


async def test_the_wait_grows_with_each_trial_that_fails(connection: Connection) -> None:
    waits = []
    for trial in (False, False, False, *[True] * 6):
        await connection.execute(f"select {mail_gate.CLOSE_GATE.removeprefix('select ')}", "x", trial, 3,
                                 timedelta(seconds=30), timedelta(minutes=5))  # fmt: skip
        until = await connection.fetchval("select closed_until - clock_timestamp() from bon_scheduler.mail_gate")
        waits.append(round(until.total_seconds()))
    assert waits[2:] == [30, 60, 120, 240, 300, 300, 300]


async def test_what_failed_beside_a_closed_gate_changes_nothing(connection: Connection) -> None:
    """A letter that began before the gate closed says nothing new: the wait would grow with each of twenty."""
    await close_gate(connection, again_in="30 seconds")
    row = "select failures, closed_since, closed_until, trying_until, trouble from bon_scheduler.mail_gate"
    before = await connection.fetchrow(row)
    again = await connection.fetchval(
        mail_gate.CLOSE_GATE, "late", False, 3, timedelta(seconds=30), timedelta(minutes=5)
    )
    assert (again, await connection.fetchrow(row)) == (False, before)


async def test_another_letter_of_a_run_finds_the_gate_closed_and_waits_for_nothing(
    world: World, connection: Connection
) -> None:
    """Its run is given back, and is not taken before the gate opens: a handler that waits is a place lost."""
    await close_gate(connection, again_in="30 seconds")
    mailer = await world.mailer()
    with pytest.raises(MailUnavailableError) as caught:
        await mailer.deliver(LETTER, run_id=uuid4(), attempt=1)
    assert timedelta(seconds=28) <= caught.value.after <= timedelta(seconds=45)


async def test_nobody_there_closes_the_gate_too(world: World) -> None:
    await fail(world, 3, smtp_port=1)
    assert await is_closed(world)
