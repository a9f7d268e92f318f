"""Commands that tell which of BON's invoices runs have changed: what a tax inspector asks for."""

from collections.abc import Mapping, Sequence
from typing import Any

from bon_scheduler import ledger
from bon_scheduler.cli.ids import Kind, find_ids, find_run_id, mark, shorten
from bon_scheduler.cli.parsing import DONE, reading
from bon_scheduler.config import Settings
from bon_scheduler.report import Column, Report

__all__ = ["history", "show_rows"]

COLUMNS = (
    *("when", "run", "change", "invoice"),
    *(Column("items", importance=2), Column("last touched", importance=1)),
)


async def show_rows(settings: Settings, report: Report, *, run: str) -> int:
    """List each invoice that a run has deleted, marked or cleared."""
    async with reading(settings) as connection:
        run_id = await find_run_id(connection, run)
        rows = await ledger.rows_of_run(connection, run_id)
        short = await shorten(connection, Kind.RUN, [run_id])
    if report.as_json:
        report.document({"run_id": run_id, "rows": rows})
        return DONE
    columns = ("business", *COLUMNS[2:])
    report.table(
        columns,
        [(row["business_id"], *_cells(report, row)) for row in rows],
        empty=f"Run {mark(short[run_id])} has changed no invoice.",
    )
    return DONE


async def history(settings: Settings, report: Report, *, business: str) -> int:
    """List each invoice of a business that a run has deleted, marked or cleared, the oldest change first."""
    async with reading(settings) as connection:
        (business_id,) = await find_ids(connection, Kind.BUSINESS, [business])
        rows = await ledger.rows_of_business(connection, business_id)
        short = await shorten(connection, Kind.RUN, list({row["run_id"] for row in rows}))
    if report.as_json:
        report.document({"business_id": business_id, "rows": rows})
        return DONE
    _list(report, rows, short, f"No run that is kept has changed an invoice of business {business_id}.")
    return DONE


def _list(report: Report, rows: Sequence[Mapping[str, Any]], short: Mapping[Any, str], empty: str) -> None:
    report.table(
        COLUMNS,
        [(report.instant(row["recorded_at"]), mark(short[row["run_id"]]), *_cells(report, row)) for row in rows],
        empty=empty,
    )


def _cells(report: Report, row: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        row["change"],
        row["id"],
        "—" if row["items"] is None else row["items"],
        report.instant(row["updated"]) if row["updated"] else "—",
    )
