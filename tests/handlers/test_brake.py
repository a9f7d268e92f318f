"""The brake, at, below and above each threshold, with 0, 1 and 14 runs of history; released by a person, once."""

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from bon_scheduler import service
from bon_scheduler.jobs import AnyJob
from bon_scheduler.ledger import Action, RefusedError, change_all, entries
from bon_scheduler.ledger.entries import Origin, Request
from handlers.draft_cleanup import draft_cleanup
from handlers.overdue_detection import overdue_detection
from handlers.overdue_digest import overdue_digest
from handlers.session_cleanup import session_cleanup
from tests import arrange
from tests.attempting import attempt
from tests.conftest import Connection, MakeSettings, RunJob, SetClock
from tests.process import run_command

FIRED = datetime(2026, 11, 23, 4, tzinfo=UTC)
LONG_DUE = date(2026, 11, 1)
MIN_ROWS = 4
PAST = """
    insert into bon_scheduler.runs (job, origin, state, counts, enqueued_at, finished_at, dry_run)
    values ($1, 'person', $2::text::bon_scheduler.run_state, $3, now() - $4::interval, now(), $5)
"""
Make = Callable[[Connection, int, int], Awaitable[None]]


async def drafts(connection: Connection, stale: int, fresh: int) -> None:
    business = await arrange.business(connection)
    for _ in range(stale):
        await arrange.draft(connection, business)
    for _ in range(fresh):
        await arrange.draft(connection, business, updated_at=FIRED)


async def sessions(connection: Connection, expired: int, valid: int) -> None:
    user = await arrange.user(connection)
    for number in range(expired + valid):
        hours = -1 if number < expired else 1
        await arrange.session(connection, user, FIRED + timedelta(hours=hours, seconds=number))


async def invoices(connection: Connection, overdue: int, open_: int) -> None:
    business = await arrange.business(connection)
    for number in range(overdue + open_):
        due = LONG_DUE if number < overdue else FIRED.date() + timedelta(days=9)
        await arrange.invoice(connection, business, due_date=due)


async def owners(connection: Connection, owed: int, others: int) -> None:
    for number in range(owed + others):
        business = await arrange.business(connection)
        await arrange.owner(connection, business, f"owner-{number}@shop.example")
        if number < owed:
            await arrange.invoice(connection, business, due_date=LONG_DUE, is_overdue=True)


KINDS: dict[str, tuple[AnyJob, Make, str]] = {
    "drafts": (draft_cleanup, drafts, "deleted"),
    "sessions": (session_cleanup, sessions, "deleted"),
    "invoices": (overdue_detection, invoices, "marked"),
    "letters": (overdue_digest, owners, "deliveries"),
}
ROWS = """
    select (select count(*) from public.sessions) + (select count(*) from public.invoices where not is_overdue)
           - (select count(*) from bon_scheduler.runs where job = 'send-overdue-digest')
"""


async def history(connection: Connection, job: str, count: str, numbers: list[int]) -> None:
    for ago, number in enumerate(numbers, 1):
        await connection.execute(PAST, job, "succeeded", {count: number}, timedelta(days=ago), False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("candidates", "others", "past", "held"),
    [
        (MIN_ROWS, 0, [], False),
        (MIN_ROWS + 1, 0, [], True),
        (MIN_ROWS + 1, MIN_ROWS + 1, [], False),
        (MIN_ROWS + 2, MIN_ROWS + 1, [], True),
        (MIN_ROWS, 0, [0], False),
        (10, 20, [1], False),
        (11, 20, [1], True),
        (11, 20, [2], False),
        (5, 20, [0], True),
        (10, 20, [1] * 14, False),
        (11, 20, [1] * 14, True),
        (11, 20, [1] * 6 + [2] * 8, False),
        (11, 20, [2] * 6 + [1] * 8, True),
        (11, 20, [1] * 14 + [9] * 20, True),
        (12, 3, [9] * 14, True),
    ],
)
@pytest.mark.samples(20)
async def test_it_trips_above_its_thresholds_and_not_at_them(
    run_job: RunJob, connection: Connection, kind: str, candidates: int, others: int, past: list[int], held: bool
) -> None:
    job, make, count = KINDS[kind]
    await make(connection, candidates, others)
    await history(connection, job.name, count, past)
    before = await connection.fetchval(ROWS)
    report = await run_job(job, fire_time=FIRED, BRAKE_MIN_ROWS=str(MIN_ROWS))
    assert (report.run["state"] == "held", report.held) == (held, held)
    if held:
        assert await connection.fetchval(ROWS) == before
        assert report.run["counts"]["candidates"] == candidates
        assert f"release {report.run['run_id']} --reason" in report.run["reason"]
        assert ("first run" in report.run["reason"]) is (past == [])
    else:
        assert report.run["counts"][count] == candidates


@pytest.mark.parametrize(("state", "dry_run"), [("dead", False), ("held", False), ("succeeded", True)])
async def test_only_what_ended_well_says_what_is_usual(
    run_job: RunJob, connection: Connection, state: str, dry_run: bool
) -> None:
    await drafts(connection, 5, 20)
    await connection.execute(PAST, "draft-cleanup", state, {"deleted": 0}, timedelta(days=1), dry_run)
    report = await run_job(draft_cleanup, fire_time=FIRED, BRAKE_MIN_ROWS=str(MIN_ROWS))
    assert report.run["state"] == "succeeded"


async def held_run(settings: MakeSettings, connection: Connection, origin: Origin = Origin.SCHEDULE) -> UUID:
    """A run of draft clean-up that the brake holds."""
    await drafts(connection, 6, 0)
    async with service.machinery(settings(BRAKE_MIN_ROWS=str(MIN_ROWS)), clock=SetClock(FIRED)) as parts:
        request = Request(draft_cleanup.name, {}, fire_time=FIRED, origin=origin)
        run_id = await entries.enqueue(connection, request)
        assert run_id is not None
        await attempt(parts, run_id, draft_cleanup)
    return run_id


async def state_of(connection: Connection, run_id: UUID) -> str:
    return str(await connection.fetchval("select state::text from bon_scheduler.runs where id = $1", run_id))


async def test_a_person_releases_it_once_and_for_this_run_alone(
    make_settings: MakeSettings, connection: Connection, run_job: RunJob, database_url: str
) -> None:
    run_id = await held_run(make_settings, connection)
    assert await state_of(connection, run_id) == "held"
    released = await run_command("release", str(run_id), "--reason", "an import of 2019", DATABASE_URL=database_url)
    assert (released.status, "1 run that was held → queued" in released.out) == (0, True)
    async with service.machinery(make_settings(BRAKE_MIN_ROWS=str(MIN_ROWS)), clock=SetClock(FIRED)) as parts:
        await attempt(parts, run_id, draft_cleanup)
    counts = await connection.fetchval("select counts from bon_scheduler.runs where id = $1", run_id)
    assert (await state_of(connection, run_id), counts) == ("succeeded", {"deleted": 6, "items": 0, "kept": 0})
    action = await connection.fetchrow("select action, reason from bon_scheduler.operator_actions")
    assert tuple(action or ()) == ("release", "an import of 2019")
    await connection.execute("delete from bon_scheduler.runs")
    await drafts(connection, 6, 0)
    again = await run_job(draft_cleanup, fire_time=FIRED, BRAKE_MIN_ROWS=str(MIN_ROWS))
    assert again.run["state"] == "held"


async def test_a_held_run_does_not_keep_the_next_tick(make_settings: MakeSettings, connection: Connection) -> None:
    await held_run(make_settings, connection)
    await connection.execute("update bon_scheduler.jobs set last_tick = $1 where name = 'draft-cleanup'", FIRED)
    verdict = await connection.fetchval(
        "select verdict from bon_scheduler.record_tick('draft-cleanup', $1, null, $2, null)",
        FIRED,
        FIRED + timedelta(days=1),
    )
    assert verdict == "recorded"


@pytest.mark.parametrize("state", ["queued", "dead", "succeeded", "cancelled"])
async def test_what_is_not_held_cannot_be_released(connection: Connection, state: str) -> None:
    run_id = await connection.fetchval("select bon_scheduler.enqueue('draft-cleanup')")
    await connection.execute("update bon_scheduler.runs set state = $1::text::bon_scheduler.run_state", state)
    with pytest.raises(RefusedError, match="is not held by the brake"):
        await change_all(connection, Action.RELEASE, [run_id], by="dana", reason="why not")
    assert await state_of(connection, run_id) == state


async def test_run_once_says_why_with_status_3_and_goes_on_when_told(connection: Connection, database_url: str) -> None:
    await drafts(connection, 6, 0)
    environ: dict[str, Any] = {"DATABASE_URL": database_url, "BRAKE_MIN_ROWS": str(MIN_ROWS)}
    held = await run_command("run-once", "draft-cleanup", **environ)
    # At 80 columns the table breaks the text between its words.
    words = " ".join(held.out.replace("│", " ").split())
    assert (held.status, "first run: 6 of 6 drafts" in words, "release" in words) == (3, True, True)
    dry = await run_command("run-once", "draft-cleanup", "--dry-run", "--json", **environ)
    assert (dry.status, dry.document["state"], dry.document["counts"]["candidates"]) == (3, "held", 6)
    for wrong in (["--release-brake"], ["--reason", "why"]):
        refused = await run_command("run-once", "draft-cleanup", *wrong, **environ)
        assert (refused.status, "go together" in refused.err) == (2, True)
    assert await connection.fetchval("select count(*) from public.invoices") == 6
    told = await run_command(
        "run-once", "draft-cleanup", "--release-brake", "--reason", "an import", "--json", **environ
    )
    assert (told.status, told.document["counts"]["deleted"]) == (0, 6)
    noted = await connection.fetchrow("select action, reason, target from bon_scheduler.operator_actions")
    assert tuple(noted or ()) == ("release", "an import", told.document["run_id"])


async def test_it_is_logged_as_an_error_with_its_figures(
    run_job: RunJob, connection: Connection, logged: Callable[[], str]
) -> None:
    await drafts(connection, 6, 0)
    await run_job(draft_cleanup, fire_time=FIRED, BRAKE_MIN_ROWS=str(MIN_ROWS))
    (event,) = [e for e in map(json.loads, logged().splitlines()) if e["event"] == "run.ended"]
    assert (event["outcome"], event["level"], event["counts"]["candidates"]) == ("held", "error", 6)


async def test_after_an_attempt_that_died_half_way_what_is_left_does_not_trip_it(
    make_settings: MakeSettings, connection: Connection
) -> None:
    """The share of what is left is never more than the share of the whole."""
    await drafts(connection, 10, 10)
    await connection.execute("alter table bon_scheduler.runs add constraint no check (state <> 'succeeded')")
    async with service.machinery(make_settings(BRAKE_MIN_ROWS=str(MIN_ROWS)), clock=SetClock(FIRED)) as parts:
        run_id = await entries.enqueue(connection, Request(draft_cleanup.name, {}, fire_time=FIRED))
        assert run_id is not None
        await attempt(parts, run_id, draft_cleanup)
        await connection.execute("alter table bon_scheduler.runs drop constraint no")
        await attempt(parts, run_id, draft_cleanup)
    counts = await connection.fetchval("select counts from bon_scheduler.runs where id = $1", run_id)
    assert (await state_of(connection, run_id), counts["deleted"]) == ("succeeded", 10)
