"""What was done can be told: each deleted draft, each marked or cleared invoice, and nothing else of them."""

from datetime import UTC, date, datetime, timedelta

import pytest

from handlers import batches
from handlers.draft_cleanup import draft_cleanup
from handlers.ledger_pruning import ledger_pruning
from handlers.overdue_detection import overdue_detection
from tests import arrange
from tests.conftest import Connection, RunJob
from tests.process import run_command

FIRED = datetime(2026, 11, 23, 4, tzinfo=UTC)
LONG_DUE = date(2026, 11, 1)


@pytest.mark.parametrize("largest", [1, 2, 5000])
async def test_each_deleted_draft_is_kept_with_its_business_items_and_last_update(
    run_job: RunJob, connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    monkeypatch.setattr(batches, "LARGEST", largest)
    expected = {}
    last = await arrange.business(connection)
    for number in range(3):
        business = last if number == 2 else await arrange.business(connection)
        touched = datetime(2026, 1, 1 + number, 1, 2, 3, 4567, tzinfo=UTC)
        draft = await arrange.draft(connection, business, updated_at=touched)
        for _ in range(number):
            await arrange.item(connection, draft)
        expected[str(draft)] = (str(business), number, touched.isoformat())
    kept = await arrange.draft(connection, last)
    await arrange.payment(connection, kept)
    report = await run_job(draft_cleanup, fire_time=FIRED)
    shown = await run_command("show", str(report.run["run_id"]), "--rows", "--json", DATABASE_URL=database_url)
    rows = shown.document["rows"]
    assert {row["change"] for row in rows} == {"deleted"}
    assert {row["id"]: (row["business_id"], row["items"], row["updated"]) for row in rows} == expected


async def test_each_marked_and_cleared_invoice_is_kept_and_what_was_rolled_back_is_not(
    run_job: RunJob, connection: Connection, database_url: str
) -> None:
    ours, other = [await arrange.business(connection) for _ in range(2)]
    late = await arrange.invoice(connection, ours, due_date=LONG_DUE)
    paid = await arrange.invoice(connection, ours, status="paid", is_overdue=True)
    moved = await arrange.invoice(connection, ours, is_overdue=True, due_date=FIRED.date() + timedelta(days=1))
    await arrange.invoice(connection, ours, due_date=FIRED.date())
    theirs = await arrange.invoice(connection, other, due_date=LONG_DUE)
    await run_job(overdue_detection, fire_time=FIRED)
    told = await run_command("history", "--business", str(ours), "--json", DATABASE_URL=database_url)
    found = [(row["change"], row["id"]) for row in told.document["rows"]]
    assert sorted(found) == sorted([("marked", str(late)), ("cleared", str(paid)), ("cleared", str(moved))])
    people = await run_command("history", "--business", str(other), DATABASE_URL=database_url)
    assert str(theirs) in people.out
    nobody = await run_command(
        "history", "--business", str(await arrange.business(connection)), DATABASE_URL=database_url
    )
    assert (nobody.status, "No run that is kept" in nobody.out) == (0, True)


async def test_evidence_goes_with_its_run_and_not_before(run_job: RunJob, connection: Connection) -> None:
    await arrange.draft(connection, await arrange.business(connection))
    await run_job(draft_cleanup, fire_time=FIRED)
    count = "select count(*) from bon_scheduler.changed_rows"
    for days, left in ((390, 1), (402, 0)):
        age = "update bon_scheduler.runs set finished_at = now() - $1::interval"
        await connection.execute(age, timedelta(days=days))
        await run_job(ledger_pruning, fire_time=datetime.now(UTC))
        assert await connection.fetchval(count) == left
