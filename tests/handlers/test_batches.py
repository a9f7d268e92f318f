"""One row that BON's database refuses to change stops no other; it is kept, counted for its business, and reported."""

import asyncio
import importlib
import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from bon_scheduler.database import connections
from bon_scheduler.jobs import AnyJob
from handlers import batches
from handlers.draft_cleanup import draft_cleanup
from handlers.overdue_detection import overdue_detection
from handlers.session_cleanup import session_cleanup
from tests import arrange
from tests.conftest import Connection, RunJob

FIRED = datetime(2026, 11, 23, 4, tzinfo=UTC)
LONG_DUE = date(2026, 11, 1)
NAME = "Mazal Toubiana"
# {when}: what is refused; {how}: by which statement; each says a customer's name, as BON's triggers may.
TRIGGER = """
    create function public.refuse() returns trigger language plpgsql as $$
    begin
        if old.id = any (array(select id from public.refused)) then {how}; end if;
        return coalesce(new, old);
    end $$;
    create {kind} trigger refuse {when} update or delete on public.{table} {deferred} for each row
        execute function public.refuse()
"""
IMMEDIATE = {"kind": "", "when": "before", "deferred": ""}
DEFERRED = {"kind": "constraint", "when": "after", "deferred": "deferrable initially deferred"}
REFUSALS = {
    "raises": (f"raise exception 'not {NAME}'", IMMEDIATE),
    "raises when it is over": (f"raise exception 'not {NAME}'", DEFERRED),
    "has no privilege": (f"raise insufficient_privilege using message = 'not {NAME}'", IMMEDIATE),
    "finds no column": ("perform nothing_of_that_name from public.users", IMMEDIATE),
    "violates a constraint": (f"insert into public.users (email, name) values (null, '{NAME}')", IMMEDIATE),
    "divides by zero": ("perform 1 / 0", IMMEDIATE),
    "reads what is no number": (f"perform '{NAME}'::integer", IMMEDIATE),
}


async def draft(connection: Connection, business: UUID) -> UUID:
    return await arrange.draft(connection, business)


async def late(connection: Connection, business: UUID) -> UUID:
    return await arrange.invoice(connection, business, due_date=LONG_DUE)


async def settled(connection: Connection, business: UUID) -> UUID:
    return await arrange.invoice(connection, business, status="paid", is_overdue=True)


async def moved(connection: Connection, business: UUID) -> UUID:
    return await arrange.invoice(connection, business, is_overdue=True, due_date=FIRED.date() + timedelta(days=9))


Make = Callable[[Connection, UUID], Any]
KINDS: dict[str, tuple[AnyJob, Make, str]] = {
    "delete": (draft_cleanup, draft, "select id from public.invoices where status = 'draft'"),
    "mark": (overdue_detection, late, "select id from public.invoices where not is_overdue"),
    "clear": (overdue_detection, settled, "select id from public.invoices where is_overdue"),
    "clear what moved": (overdue_detection, moved, "select id from public.invoices where is_overdue"),
}


async def left(connection: Connection, unchanged: str) -> set[UUID]:
    return {row["id"] for row in await connection.fetch(unchanged)}


async def refuse(connection: Connection, how: str, rows: list[UUID], table: str = "invoices") -> None:
    statement, kind = REFUSALS[how]
    await connection.execute("create table public.refused (id uuid)")
    await connection.executemany("insert into public.refused values ($1)", [(row,) for row in rows])
    await connection.execute(TRIGGER.format(how=statement, table=table, **kind))


@pytest.mark.parametrize("how", REFUSALS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.samples(12)
async def test_a_row_that_the_database_refuses_to_change_stops_no_other(
    run_job: RunJob, connection: Connection, logged: Callable[[], str], kind: str, how: str
) -> None:
    job, make, unchanged = KINDS[kind]
    bad, good = [await arrange.business(connection) for _ in range(2)]
    made = [await make(connection, business) for business in (good, bad, good, bad, bad, good, good)]
    refused = [made[1], made[3]]
    await refuse(connection, how, refused)
    report = await run_job(job, fire_time=FIRED)
    assert (report.run["state"], report.run["counts"]["refused"]) == ("partial", 2)
    assert await left(connection, unchanged) == set(refused)
    outcome = await connection.fetchrow(
        "select outcome, counts, error from bon_scheduler.business_outcomes where run_id = $1 and business_id = $2",
        report.run["run_id"],
        bad,
    )
    assert outcome is not None
    assert (outcome["outcome"], outcome["counts"]["refused"]) == ("failed", 2)
    assert "refuse" in outcome["error"] or "constraint" in outcome["error"]
    events = [json.loads(line) for line in logged().splitlines()]
    assert {event["id"] for event in events if event["event"] == "row.refused"} == {str(row) for row in refused}
    assert NAME not in logged() + outcome["error"]


async def test_a_session_that_cannot_be_deleted_stops_no_other(run_job: RunJob, connection: Connection) -> None:
    user = await arrange.user(connection)
    made = [await arrange.session(connection, user, FIRED - timedelta(hours=hours + 1)) for hours in range(5)]
    await refuse(connection, "raises", [made[2]], "sessions")
    report = await run_job(session_cleanup, fire_time=FIRED)
    assert (report.run["state"], report.run["counts"]) == ("partial", {"deleted": 4, "refused": 1})
    assert await left(connection, "select id from public.sessions") == {made[2]}


@pytest.mark.parametrize("largest", [1, 2, 3, 5000])
@pytest.mark.parametrize("bad", [{0}, {6}, {0, 1}, {5, 6}, {0, 2, 4, 6}, {0, 1, 2}])
@pytest.mark.samples(8)
async def test_whichever_rows_they_are_and_however_large_a_batch_is_each_is_found(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch, largest: int, bad: set[int]
) -> None:
    monkeypatch.setattr(batches, "LARGEST", largest)
    business = await arrange.business(connection)
    made = [await late(connection, business) for _ in range(7)]
    await refuse(connection, "raises", [made[number] for number in bad])
    report = await run_job(overdue_detection, fire_time=FIRED)
    counts = report.run["counts"]
    assert (counts["marked"], counts["refused"]) == (7 - len(bad), len(bad))


async def test_a_database_that_refuses_every_row_fails_the_attempt_with_its_reason(
    run_job: RunJob, connection: Connection
) -> None:
    business = await arrange.business(connection)
    await refuse(connection, "raises", [await late(connection, business) for _ in range(20)])
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert (report.run["state"], report.run["error"][:11]) == ("dead", "RaiseError:")


async def test_a_row_that_is_refused_today_is_changed_by_the_next_run(run_job: RunJob, connection: Connection) -> None:
    row = await late(connection, await arrange.business(connection))
    await refuse(connection, "raises", [row])
    await run_job(overdue_detection, fire_time=FIRED)
    await connection.execute("drop trigger refuse on public.invoices")
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert (report.run["state"], report.run["counts"]) == ("succeeded", {"marked": 1, "cleared": 0})


@pytest.mark.parametrize("kind", KINDS)
async def test_a_row_that_somebody_edits_keeps_nobody_and_is_taken_once_it_is_free(
    run_job: RunJob, connection: Connection, database_url: str, kind: str
) -> None:
    job, make, unchanged = KINDS[kind]
    business = await arrange.business(connection)
    edited, other = [await make(connection, business) for _ in range(2)]
    async with connections.connect(database_url) as editor:
        editing = editor.transaction()
        await editing.start()
        await editor.execute("update public.invoices set customer_name = 'new' where id = $1", edited)
        run = asyncio.ensure_future(run_job(job, fire_time=FIRED))
        while other in await left(connection, unchanged):
            await asyncio.sleep(0.01)
            assert not run.done()
        await editing.rollback()
        report = await asyncio.wait_for(run, 30)
    assert (report.run["state"], await left(connection, unchanged)) == ("succeeded", set())


async def test_a_row_that_stays_in_use_is_left_and_counted(
    run_job: RunJob, connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "PAUSE_SECONDS", 0.01)
    business = await arrange.business(connection)
    edited, _ = [await late(connection, business) for _ in range(2)]
    async with connections.connect(database_url) as editor, editor.transaction():
        await editor.execute("select from public.invoices where id = $1 for update", edited)
        report = await run_job(overdue_detection, fire_time=FIRED)
    assert (report.run["state"], report.run["counts"]) == ("succeeded", {"marked": 1, "cleared": 0, "left": 1})


async def test_what_a_trigger_waits_for_is_left_to_a_later_pass_and_stops_no_other(
    run_job: RunJob, connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "WAIT_AT_MOST", "set local lock_timeout = '50ms'")
    waits, free = [await arrange.business(connection) for _ in range(2)]
    await connection.execute(
        """
        create function public.touch() returns trigger language plpgsql as $$
        begin
            update public.businesses set updated_at = now() where id = new.business_id;
            return new;
        end $$;
        create trigger touch before update on public.invoices for each row execute function public.touch()
        """
    )
    made = {business: await late(connection, business) for business in (waits, free)}
    # The first by far, so that it is tried and left before the other is marked.
    await connection.execute("update public.invoices set due_date = '2020-01-01' where id = $1", made[waits])
    async with connections.connect(database_url) as editor:
        editing = editor.transaction()
        await editing.start()
        await editor.execute("update public.businesses set name = 'new' where id = $1", waits)
        run = asyncio.ensure_future(run_job(overdue_detection, fire_time=FIRED))
        while made[free] in await left(connection, KINDS["mark"][2]):
            await asyncio.sleep(0.01)
            assert not run.done()
        assert await left(connection, KINDS["mark"][2]) == {made[waits]}
        await editing.rollback()
        report = await asyncio.wait_for(run, 30)
    assert (report.run["state"], report.run["counts"]["marked"]) == ("succeeded", 2)


async def test_a_run_that_has_no_time_left_says_what_it_left(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "LARGEST", 1)
    # The package's attribute of this name is the job, not the module.
    monkeypatch.setattr(importlib.import_module("handlers.draft_cleanup"), "IN_TIME", timedelta(seconds=0.5))
    business = await arrange.business(connection)
    for _ in range(20):
        await draft(connection, business)
    await connection.execute(
        """
        create function public.slow() returns trigger language plpgsql as $$
        begin perform pg_sleep(0.05); return old; end $$;
        create trigger slow before delete on public.invoices for each row execute function public.slow()
        """
    )
    report = await run_job(draft_cleanup, fire_time=FIRED)
    gone = report.run["counts"]["deleted"]
    assert 0 < gone < 20
    assert (report.run["state"], report.run["counts"]["left"]) == ("partial", 20 - gone)


async def test_without_bons_indexes_drafts_go_in_small_batches_for_its_time_and_the_others_the_next_night(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("handlers.draft_cleanup"), "IN_TIME", timedelta(seconds=0.3))
    business = await arrange.business(connection)
    for _ in range(50):
        await draft(connection, business)
    await connection.execute(
        """
        create function public.slow() returns trigger language plpgsql as $$
        begin perform pg_sleep(0.02); return old; end $$;
        create trigger slow before delete on public.invoices for each row execute function public.slow()
        """
    )
    first = await run_job(draft_cleanup, fire_time=FIRED)
    assert first.run["state"] == "partial"
    assert (first.run["counts"]["deleted"], first.run["counts"]["left"]) == (20, 30)
    await connection.execute("drop trigger slow on public.invoices")
    monkeypatch.undo()
    night = await run_job(draft_cleanup, fire_time=FIRED + timedelta(days=1))
    assert (night.run["state"], night.run["counts"]) == ("succeeded", {"deleted": 30, "items": 0, "kept": 0})


async def test_a_lost_connection_is_no_rows_fault(
    run_job: RunJob, connection: Connection, logged: Callable[[], str]
) -> None:
    await connection.execute(
        """
        create function public.cut() returns trigger language plpgsql as $$
        begin perform pg_terminate_backend(pg_backend_pid()); return new; end $$;
        create trigger cut before update on public.invoices for each row execute function public.cut()
        """
    )
    await late(connection, await arrange.business(connection))
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert (report.run["state"], "connection is closed" in report.run["error"]) == ("dead", True)
    assert "row.refused" not in logged()


@pytest.mark.parametrize("due", ["-infinity", "0044-03-15 BC", "0001-01-01"])
async def test_a_due_date_that_python_has_no_word_for_stops_nothing(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch, due: str
) -> None:
    monkeypatch.setattr(batches, "LARGEST", 1)
    business = await arrange.business(connection)
    made = [await late(connection, business) for _ in range(3)]
    await connection.execute("update public.invoices set due_date = $2::text::date where id = $1", made[0], due)
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert (report.run["state"], report.run["counts"]["marked"]) == ("succeeded", 3)
