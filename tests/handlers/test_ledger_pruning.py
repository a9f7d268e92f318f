"""What is old enough goes; what something or somebody still needs stays, however old it is."""

import asyncio
from datetime import UTC, date, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from bon_scheduler import NoPayload, service
from bon_scheduler.clock import SystemClock
from bon_scheduler.database.connections import Pool
from bon_scheduler.engine.dry_run import DryRunner
from bon_scheduler.engine.run_once import Order, RunReport
from bon_scheduler.ledger import retention
from bon_scheduler.schedule.audit import audit_ticks
from handlers import JOBS
from handlers.ledger_pruning import ledger_pruning
from tests import arrange
from tests.conftest import Connection, MakeSettings, RunJob
from tests.waiting import until

OLD = timedelta(days=31)
YOUNG = timedelta(days=29)
ENDED = ("succeeded", "partial", "cancelled", "missed", "paused")
# $1 state, $2 age: interval, $3 caused by.
RUN = """
    insert into bon_scheduler.runs (job, origin, state, enqueued_at, finished_at, caused_by)
    values ('session-cleanup', 'program', $1::text::bon_scheduler.run_state, now() - $2::interval,
            case when $1::text in ('queued', 'running', 'retrying', 'held') then null else now() - $2::interval end, $3)
    returning id
"""
# $1 run, $2 state, $3 age: interval, $4 as of.
DELIVERY = """
    insert into bon_scheduler.deliveries
           (kind, business_id, as_of, recipient_hash, state, message_id, run_id, attempt, intended_at)
    values ('overdue-digest', gen_random_uuid(), $4, 'hash', $2, '<1@bon>', $1, 1, now() - $3::interval)
"""


async def run(
    connection: Connection, state: str = "succeeded", age: timedelta = OLD, cause: UUID | None = None
) -> UUID:
    run_id: UUID = await connection.fetchval(RUN, state, age, cause)
    await connection.execute(
        "insert into bon_scheduler.attempts (run_id, attempt, worker, host, started_at) values ($1, 1, $2, 'h', now())",
        run_id,
        uuid4(),
    )
    return run_id


async def delivery(connection: Connection, run_id: UUID, state: str, age: timedelta = OLD) -> None:
    as_of = datetime.now(UTC).date() - age - timedelta(days=2)
    await connection.execute(DELIVERY, run_id, state, age, as_of)


async def prune(run_job: RunJob, **options: datetime) -> RunReport:
    return await run_job(ledger_pruning, jobs=JOBS, RUN_RETENTION_DAYS="30", **options)


async def left(connection: Connection, run_ids: list[UUID]) -> list[UUID]:
    rows = await connection.fetch("select id from bon_scheduler.runs where id = any ($1)", run_ids)
    found = {row["id"] for row in rows}
    return [run_id for run_id in run_ids if run_id in found]


async def test_runs_that_ended_long_ago_go_with_their_attempts(run_job: RunJob, connection: Connection) -> None:
    old = [await run(connection, state) for state in ENDED]
    young = [await run(connection, state, YOUNG) for state in ENDED]
    report = await prune(run_job)
    assert report.run["counts"] == {
        "deliveries": 0,
        "outcomes": 0,
        "runs": len(old),
        "tokens": 0,
        "refreshes": 0,
        "actions": 0,
    }
    assert await left(connection, old + young) == young
    assert await connection.fetchval("select count(*) from bon_scheduler.attempts") == len(young) + 1  # this run's


@pytest.mark.parametrize("state", ["queued", "running", "retrying", "held", "dead"])
async def test_a_run_that_has_not_ended_or_waits_for_a_person_stays(
    run_job: RunJob, connection: Connection, state: str
) -> None:
    waiting = await run(connection, state)
    await prune(run_job)
    assert await left(connection, [waiting]) == [waiting]


async def test_a_run_stays_while_one_it_caused_is_there(run_job: RunJob, connection: Connection) -> None:
    grandparent = await run(connection)
    parent = await run(connection, cause=grandparent)
    await run(connection, "dead", cause=parent)
    await prune(run_job)
    assert await left(connection, [grandparent, parent]) == [grandparent, parent]


async def test_a_whole_family_that_is_old_goes_at_once(run_job: RunJob, connection: Connection) -> None:
    family = [await run(connection)]
    for _ in range(3):
        family.append(await run(connection, cause=family[-1]))
    await prune(run_job)
    assert await left(connection, family) == []


async def test_a_settled_delivery_goes_with_its_run_and_an_uncertain_one_keeps_it(
    run_job: RunJob, connection: Connection
) -> None:
    runs = {state: await run(connection) for state in ("sent", "refused", "released", "unknown", "intended")}
    for state, run_id in runs.items():
        await delivery(connection, run_id, state)
    report = await prune(run_job)
    assert await left(connection, list(runs.values())) == [runs["unknown"], runs["intended"]]
    assert report.run["counts"]["deliveries"] == 3


async def test_a_young_delivery_keeps_its_old_run(run_job: RunJob, connection: Connection) -> None:
    sender = await run(connection)
    await delivery(connection, sender, "sent", YOUNG)
    await prune(run_job)
    assert await left(connection, [sender]) == [sender]


async def test_a_delivery_of_a_day_that_may_still_be_replayed_stays(run_job: RunJob, connection: Connection) -> None:
    """The letter was sent long ago, for a day the mailer would still write of: its row is what stops a second one."""
    sender = await run(connection)
    await connection.execute(DELIVERY, sender, "sent", OLD, datetime.now(UTC).date() - timedelta(days=30))
    await prune(run_job)
    assert await left(connection, [sender]) == [sender]


async def test_what_was_done_for_a_business_is_kept_sixty_days(run_job: RunJob, connection: Connection) -> None:
    kept = await run(connection, age=timedelta(days=61))
    insert = """
        insert into bon_scheduler.business_outcomes (run_id, business_id, outcome, recorded_at)
        values ($1, gen_random_uuid(), 'done', now() - make_interval(days => $2))
    """
    for days in (61, 59):
        await connection.execute(insert, kept, days)
    report = await run_job(ledger_pruning, jobs=JOBS)  # 400 days: the run stays
    assert report.run["counts"] == {
        "deliveries": 0,
        "outcomes": 1,
        "runs": 0,
        "tokens": 0,
        "refreshes": 0,
        "actions": 0,
    }
    assert await connection.fetchval("select count(*) from bon_scheduler.business_outcomes") == 1


async def test_what_a_person_did_is_kept_seven_years(run_job: RunJob, connection: Connection) -> None:
    insert = """
        insert into bon_scheduler.operator_actions (at, by, action, target, reason)
        values (now() - make_interval(years => $1, days => $2), 'dana', 'retry', $3, 'why')
    """
    for years, target in ((6, "young"), (7, "old")):
        await connection.execute(insert, years, 20, target)
    report = await prune(run_job)
    assert report.run["counts"]["actions"] == 1
    assert await connection.fetchval("select array_agg(target) from bon_scheduler.operator_actions") == ["young"]


async def test_how_an_exchange_ended_is_forgotten_once_the_business_has_no_credentials(
    run_job: RunJob, connection: Connection
) -> None:
    """A business that has them keeps its row, however long ago it was: it says why nobody asks the authority."""
    kept = await arrange.business(connection)
    await connection.execute(
        "insert into business_shaam_credentials (business_id, encrypted_access_token, encrypted_refresh_token,"
        " token_expires_at) values ($1, 'a', 'r', now())",
        kept,
    )
    insert = """
        insert into bon_scheduler.shaam_refreshes (business_id, state, changed_at, lease_until)
        values ($1, 'needs_reauth', now() - make_interval(days => $2), now() - make_interval(days => $3))
    """
    young, at_work = uuid4(), uuid4()
    for business, days, leased in ((kept, 61, None), (uuid4(), 61, 61), (young, 59, None), (at_work, 61, 1)):
        await connection.execute(insert, business, days, leased)
    report = await prune(run_job)
    assert report.run["counts"]["refreshes"] == 1
    rows = await connection.fetch("select business_id from bon_scheduler.shaam_refreshes")
    assert {row["business_id"] for row in rows} == {kept, young, at_work}


async def test_a_dead_dry_run_waits_for_nobody(run_job: RunJob, connection: Connection) -> None:
    """It is left out of what a person may retry or cancel."""
    runs = [await run(connection, "dead"), await run(connection, "dead")]
    await connection.execute("update bon_scheduler.runs set dry_run = true where id = $1", runs[0])
    await prune(run_job)
    assert await left(connection, runs) == runs[1:]


async def test_more_than_a_batch_goes_in_batches(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 2)
    old = [await run(connection) for _ in range(7)]
    report = await prune(run_job)
    assert report.run["counts"]["runs"] == 7
    assert await left(connection, old) == []


async def test_a_dry_run_counts_what_a_real_one_then_deletes_and_keeps_everything(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch, make_settings: MakeSettings, pool: Pool
) -> None:
    monkeypatch.setattr(retention, "BATCH", 2)
    settings = make_settings(RUN_RETENTION_DAYS="30")
    parent = await run(connection)
    old = [parent, *[await run(connection, cause=parent) for _ in range(4)]]
    await delivery(connection, old[-1], "sent")
    dry_runner = DryRunner(pool, settings, SystemClock(), {}, out=None)
    async with asyncio.timeout(20):
        dry = await dry_runner.run(
            Order(job=ledger_pruning, payload=NoPayload(), fire_time=datetime.now(UTC), asked_by="a test")
        )
    assert await left(connection, old) == old
    real = await prune(run_job)
    assert dry.run["counts"] == real.run["counts"]
    assert (real.run["counts"]["deliveries"], real.run["counts"]["runs"]) == (1, 5)


async def test_a_tick_of_a_clock_far_ahead_forgets_nothing(make_settings: MakeSettings, connection: Connection) -> None:
    young = await run(connection, age=YOUNG)
    settings = make_settings(RUN_RETENTION_DAYS="30", SCHEDULE_LEDGER_PRUNING="")
    async with service.serving(settings, jobs=[ledger_pruning]):
        tick = await connection.fetchval(
            "select bon_scheduler.enqueue_run('ledger-pruning', origin => 'schedule', fire_time => now() + '10 years')"
        )

        async def ended() -> bool:
            succeeded = "select state = 'succeeded' from bon_scheduler.runs where id = $1"
            return bool(await connection.fetchval(succeeded, tick))

        await until(ended)
    assert await left(connection, [young]) == [young]


async def test_what_was_pruned_is_not_a_gap_in_an_audit(run_job: RunJob, connection: Connection) -> None:
    midnight = datetime.combine(date.today(), datetime.min.time(), UTC)  # noqa: DTZ011 - any recent day will do
    begin = midnight - timedelta(days=40)
    await connection.execute(
        "insert into bon_scheduler.schedules values ('draft-cleanup', $1, '0 0 * * *', 'UTC', 'latest', '1 hour', '1')",
        begin,
    )
    ticks = """
        insert into bon_scheduler.runs (job, origin, state, fire_time, started_at, finished_at)
        select 'draft-cleanup', 'schedule', 'succeeded', t, t, t from generate_series($1::timestamptz, $2, '1 day') t
    """
    await connection.execute(ticks, begin + timedelta(days=1), midnight)
    await connection.execute("update bon_scheduler.jobs set last_tick = $1 where name = 'draft-cleanup'", midnight)
    await prune(run_job)
    found = await audit_ticks(connection, begin)
    assert (found.sound, len(found.ticks)) == (True, 30)
    assert found.since > begin
