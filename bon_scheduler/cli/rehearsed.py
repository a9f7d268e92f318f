"""A rehearsal beside the runs that came after it."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from bon_scheduler.cli.ids import mark
from bon_scheduler.report import Column, Report

__all__ = ["number", "runs_of", "show_comparison"]


def runs_of(rows: Sequence[Mapping[str, Any]]) -> list[UUID]:
    """Return the runs that rehearsals name."""
    return [run for row in rows for run in (row["rehearsal"], row["compared_with"]) if run is not None]


def show_comparison(report: Report, rows: Sequence[Mapping[str, Any]], short: Mapping[Any, str]) -> None:
    """Show, of a run, what its rehearsal said; of a rehearsal, what there was to do when its runs came."""
    if not rows:
        return
    report.table(
        ["job", "rehearsal", "rehearsed", "run", "found", Column("verdict", importance=1)],
        [
            (
                row["job"],
                _short(row["rehearsal"], short),
                f"{row['candidates']:,}",
                _short(row["compared_with"], short) if row["compared_with"] else "to come",
                number(row["found"]),
                row["verdict"],
            )
            for row in rows
        ],
        title="\nRehearsed",
    )


def _short(run: UUID, short: Mapping[Any, str]) -> str:
    return mark(short.get(run, str(run)))


def number(value: int | None) -> str:
    """Return a number with its thousands apart, a dash for none."""
    return "—" if value is None else f"{value:,}"
