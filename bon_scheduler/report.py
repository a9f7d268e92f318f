"""
How commands speak: tables for people, one JSON document for programs.

With JSON, standard output carries that document and nothing else. Without it, tables are plain where
standard output is not a terminal, and NO_COLOR is honoured (rich does both).
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Any
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
        terminal = sys.stdout.isatty()
        self.console = Console(width=None if terminal else PLAIN_WIDTH, highlight=False, soft_wrap=False)

    def document(self, value: object) -> None:
        """Write the JSON document."""
        options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
        sys.stdout.buffer.write(orjson.dumps(value, option=options, default=str))
        sys.stdout.buffer.flush()

    def progress(self, text: str) -> AbstractContextManager[object]:
        """Show, on a terminal, that something is under way; nothing elsewhere."""
        return self.console.status(escape(text)) if self.console.is_terminal else nullcontext()

    def say(self, text: str) -> None:
        """Write a line for people."""
        self.console.print(escape(text))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
        """Write a table for people; a cell that is a known state is coloured."""
        table = Table(*columns, title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(_cell(value) for value in row))
        self.console.print(table)

    def instant(self, instant: datetime | None) -> str:
        """Return an instant in the report's zone."""
        return format_instant(instant, self.zone)

    def facts(self, pairs: Mapping[str, Any]) -> None:
        """Write name and value a line, leaving out what is None or empty."""
        shown = [(name, value) for name, value in pairs.items() if value not in (None, "", {})]
        table = Table.grid(padding=(0, 2))
        for name, value in shown:
            table.add_row(f"[bold]{escape(name)}[/bold]", _cell(value))
        self.console.print(table)


def _cell(value: object) -> str:
    text = "—" if value is None else str(value)
    style = STATE_STYLES.get(text)
    return f"[{style}]{escape(text)}[/{style}]" if style else escape(text)
