"""Marking many invoices by one statement: how many go at once, and what becomes of those that cannot go together."""

import importlib
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import pytest

from handlers import batches
from handlers.overdue_detection import overdue_detection
from tests import arrange
from tests.conftest import Connection, RunJob
from tests.handlers.test_batches import refuse

FIRED = datetime(2026, 11, 23, 4, tzinfo=UTC)
DUE = date(2026, 11, 1)


async def late(connection: Connection, number: int) -> list[UUID]:
    business = await arrange.business(connection)
    return [await arrange.invoice(connection, business, due_date=DUE) for _ in range(number)]


async def marked_at_once(connection: Connection) -> list[int]:
    rows = await connection.fetch("select cardinality(ids) from bon_scheduler.changed_rows order by number")
    return [row[0] for row in rows]


@pytest.mark.parametrize(
    ("number", "largest", "batches_of"),
    [(0, 3, []), (1, 3, [1]), (3, 3, [3]), (7, 3, [3, 3, 1]), (12, 11, [10, 2]), (3, 1, [1, 1, 1])],
)
async def test_as_many_go_at_once_as_pieces_make_a_batch(
    run_job: RunJob,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    largest: int,
    batches_of: list[int],
) -> None:
    monkeypatch.setattr(batches, "LARGEST", largest)
    await late(connection, number)
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert (report.run["state"], report.run["counts"]["marked"]) == ("succeeded", number)
    assert await marked_at_once(connection) == batches_of


@pytest.mark.parametrize("number", [3, 4, 5, 8, 9])
async def test_more_than_are_found_at_once_are_marked_all_the_same(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # The package's attribute of this name is the job, not the module.
    monkeypatch.setattr(importlib.import_module("handlers.overdue_detection"), "FOUND_AT_ONCE", 4)
    monkeypatch.setattr(batches, "LARGEST", 2)
    await late(connection, number)
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert (report.run["state"], report.run["counts"]["marked"]) == ("succeeded", number)
    assert sum(await marked_at_once(connection)) == number


async def test_a_batch_with_a_row_that_is_refused_leaves_the_others_as_they_are(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "LARGEST", 2)
    made = await late(connection, 6)
    await refuse(connection, "raises", [made[2]])
    report = await run_job(overdue_detection, fire_time=FIRED)
    assert (report.run["state"], report.run["counts"]) == ("partial", {"marked": 5, "cleared": 0, "refused": 1})
    assert await marked_at_once(connection) == [2, 2, 1]


async def test_slow_batches_become_smaller(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "LARGEST", 4)
    monkeypatch.setattr(batches, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(batches, "SHORT_SECONDS", 0.0)
    await late(connection, 9)
    await run_job(overdue_detection, fire_time=FIRED)
    assert await marked_at_once(connection) == [4, 2, 1, 1, 1]


async def test_what_is_not_reached_in_time_is_left_and_the_run_says_so(
    run_job: RunJob, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "LARGEST", 1)
    # The package's attribute of this name is the job, not the module.
    monkeypatch.setattr(importlib.import_module("handlers.overdue_detection"), "IN_TIME", timedelta(seconds=0.4))
    await late(connection, 20)
    await connection.execute(
        """
        create function public.slow() returns trigger language plpgsql as $$
        begin perform pg_sleep(0.1); return new; end $$;
        create trigger slow before update on public.invoices for each row execute function public.slow()
        """
    )
    report = await run_job(overdue_detection, fire_time=FIRED)
    marked = report.run["counts"]["marked"]
    assert 0 < marked < 20
    assert (report.run["state"], report.run["counts"]["left"]) == ("partial", 20 - marked)
