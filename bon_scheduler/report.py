"""
How commands speak: tables for people, one JSON document for programs.

With JSON, standard output carries that document and nothing else: whatever else is said goes to standard error.
Without it, tables are plain where standard output is not a terminal, and NO_COLOR is honoured (rich does both).
Nothing is ever cut off: what is too long goes on in the next line, and an id stays in one line, to be copied.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["Report", "add_counts", "format_counts", "format_instant", "format_span"]

STATE_STYLES = {
    "succeeded": "green",
    "ok": "green",
    "partial": "yellow",
    "warning": "yellow",
    "retrying": "yellow",
    "held": "yellow",
    "missed": "yellow",
    "dead": "bold red",
    "failure": "bold red",
    "failed": "red",
}
SECONDS_A_MINUTE = 60
PLAIN_WIDTH = 160
UUID_WIDTH = 36


def format_instant(instant: datetime | None, zone: ZoneInfo) -> str:
    """Return an instant as people in `zone` read it, to the second."""
    return f"{instant.astimezone(zone):%Y-%m-%d %H:%M:%S}" if instant else "—"


def format_span(started: datetime | None, finished: datetime | None) -> str:
    """Return the time between two instants, in milliseconds, seconds or minutes."""
    if not started or not finished:
        return "—"
    seconds = (finished - started).total_seconds()
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < SECONDS_A_MINUTE:
        return f"{seconds:.1f} s"
    return f"{seconds / SECONDS_A_MINUTE:.1f} min"


def add_counts(several: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add counts up by name, in the order they first come."""
    total: dict[str, int] = {}
    for counts in several:
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total


def format_counts(counts: Mapping[str, int] | None) -> str:
    """Return counts as `marked 132, cleared 4`."""
    return ", ".join(f"{name} {count:,}" for name, count in (counts or {}).items()) or "—"


class Report:
    """Where a command's answer goes."""

    def __init__(self, *, as_json: bool, zone: ZoneInfo | None = None) -> None:
        self.as_json = as_json
        self.zone = zone or ZoneInfo("Asia/Jerusalem")
        terminal = (sys.stderr if as_json else sys.stdout).isatty()
        self.console = Console(width=None if terminal else PLAIN_WIDTH, stderr=as_json, highlight=False)

    def document(self, value: object) -> None:
        """Write the JSON document."""
        options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
        sys.stdout.buffer.write(orjson.dumps(value, option=options, default=str))
        sys.stdout.buffer.flush()

    def progress(self, text: str) -> AbstractContextManager[object]:
        """Show, on a terminal, that something is under way; nothing elsewhere."""
        return self.console.status(escape(text)) if self.console.is_terminal else nullcontext()

    def say(self, text: str) -> None:
        """Write a line for people; only a terminal's is broken, so that programs find paths and ids whole."""
        self.console.print(escape(text), soft_wrap=not self.console.is_terminal)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
        """Write a table for people; a cell that is a known state is coloured."""
        table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
        for index, heading in enumerate(columns):
            has_ids = any(isinstance(row[index], UUID) for row in rows)
            table.add_column(heading, overflow="fold", no_wrap=has_ids, min_width=UUID_WIDTH if has_ids else None)
        for row in rows:
            table.add_row(*(_cell(value) for value in row))
        # Not cropped: where a terminal is too narrow for the ids, it breaks the lines itself.
        self.console.print(table, crop=False)

    def instant(self, instant: datetime | None) -> str:
        """Return an instant in the report's zone."""
        return format_instant(instant, self.zone)

    def facts(self, pairs: Mapping[str, Any]) -> None:
        """Write name and value a line, leaving out what is None or empty."""
        shown = [(name, value) for name, value in pairs.items() if value not in (None, "", {})]
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in shown:
            table.add_row(f"[bold]{escape(name)}[/bold]", _cell(value))
        self.console.print(table)


def _cell(value: object) -> str:
    text = "—" if value is None else str(value)
    style = STATE_STYLES.get(text)
    return f"[{style}]{escape(text)}[/{style}]" if style else escape(text)
