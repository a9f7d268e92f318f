"""
How commands speak: tables for people, one JSON document for programs.

With JSON, standard output carries that document and nothing else: whatever else is said goes to standard error.
Without it, tables are plain where standard output is not a terminal, one record a line, and NO_COLOR is honoured. On a
terminal a table that is too wide leaves out its least important columns, and says so; then long texts go on in the next
line. No cell is cut off, and an id stays in one line, to be copied.

Instants are shown in BON_TIMEZONE with their offset, wherever they stand; in JSON they are UTC. Hints name the command
as it was started here (`calling`).
"""

import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import orjson
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.status import Status
from rich.table import Table

from bon_scheduler.calling import fill_in

__all__ = [
    "Column",
    "Report",
    "add_counts",
    "format_counts",
    "format_distance",
    "format_instant",
    "format_offset",
    "format_span",
    "show_controls",
]

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
MINUTE, HOUR, DAY = 60, 3_600, 86_400
ANY_WIDTH = 100_000
_UTC = re.compile(r"\b(\d{4}-\d\d-\d\d \d\d:\d\d(?::\d\d)?) UTC\b")
_HINT = re.compile(r"(.*:) (bon-scheduler [a-z].*)", re.DOTALL)
BYTE = 0xFF


def format_instant(instant: datetime | None, zone: ZoneInfo) -> str:
    """Return an instant as people in `zone` read it, to the second, with its offset."""
    return f"{instant.astimezone(zone):%Y-%m-%d %H:%M:%S}{format_offset(instant, zone)}" if instant else "—"


def format_offset(instant: datetime, zone: ZoneInfo) -> str:
    """Return how far the zone's clocks are from UTC then: `+02:00`."""
    text = f"{instant.astimezone(zone):%z}"
    return f"{text[:3]}:{text[3:5]}"


def format_span(started: datetime | None, finished: datetime | None) -> str:
    """Return the time between two instants, in milliseconds, seconds or minutes."""
    if not started or not finished:
        return "—"
    seconds = (finished - started).total_seconds()
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < MINUTE:
        return f"{seconds:.1f} s"
    return f"{seconds / MINUTE:.1f} min"


def format_distance(instant: datetime | None, now: datetime) -> str:
    """Return how far off an instant is, as people say it: `in 3 h 12 min`, `5 min ago`, `now`."""
    if instant is None:
        return "—"
    seconds = round((instant - now).total_seconds())
    if seconds == 0:
        return "now"
    left = abs(seconds)
    if left < MINUTE:
        words = f"{left} s"
    elif left < HOUR:
        words = f"{left // MINUTE} min"
    else:
        (unit, length), (smaller, small) = (("h", HOUR), ("min", MINUTE)) if left < DAY else (("d", DAY), ("h", HOUR))
        rest = left % length // small
        words = f"{left // length} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"in {words}" if seconds > 0 else f"{words} ago"


def add_counts(several: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add counts up by name, in the order they first come."""
    total: dict[str, int] = {}
    for counts in several:
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total


def format_counts(counts: Mapping[str, int] | None, *, brief: bool = False) -> str:
    """Return counts as `marked 132, cleared 4`; `brief`: without those that are 0, unless all are."""
    if brief and counts and any(counts.values()):
        counts = {name: count for name, count in counts.items() if count}
    return ", ".join(f"{name} {count:,}" for name, count in (counts or {}).items()) or "—"


def show_controls(text: str) -> str:
    """
    Return the text with its control characters written out, so that a terminal shows them and does not obey them.

    Also those of direction, which would show another order. Ends of lines stay.
    """
    return "".join(_show(character) if not character.isprintable() else character for character in text)


def _show(character: str) -> str:
    if character in "\n \u00a0" or unicodedata.category(character) in {"Zs", "Co", "Cn"}:
        return character
    return f"\\x{ord(character):02x}" if ord(character) <= BYTE else f"\\u{ord(character):04x}"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table for people."""

    heading: str
    wraps: int | None = None
    """Where the table is too wide, long texts go on in the next line; no line is shorter than so many characters."""
    importance: int | None = None
    """Left out where the table is too wide, the least first; None: always shown."""


class Report:
    """Where a command's answer goes."""

    def __init__(self, *, as_json: bool, zone: ZoneInfo | None = None) -> None:
        self.as_json = as_json
        self.zone = zone or ZoneInfo("Asia/Jerusalem")
        terminal = (sys.stderr if as_json else sys.stdout).isatty()
        self.console = Console(width=None if terminal else ANY_WIDTH, stderr=as_json, highlight=False)

    def document(self, value: object) -> None:
        """Write the JSON document."""
        options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
        try:
            text = orjson.dumps(value, option=options, default=str)
        except TypeError:  # whole numbers over 64 bits stay exact
            text = json.dumps(value, indent=2, default=str, ensure_ascii=False).encode() + b"\n"
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()

    def progress(self, text: str) -> AbstractContextManager[Status | None]:
        """Show, on a terminal, that something is under way; nothing elsewhere."""
        return self.console.status(escape(text)) if self.console.is_terminal else nullcontext()

    def say(self, text: str) -> None:
        """
        Write a line for people; only a terminal's is broken, so that programs find paths and ids whole.

        There a command that ends it is not broken either: it goes to a line of its own, to be copied.
        """
        shown, hint = self.for_people(text), _HINT.fullmatch(text)
        if not self.console.is_terminal or hint is None or len(shown) <= self.console.width:
            self.console.print(escape(shown), soft_wrap=not self.console.is_terminal)
            return
        self.console.print(escape(self.for_people(hint[1])))
        self.console.print(f"  {escape(self.for_people(hint[2]))}", soft_wrap=True)

    def for_people(self, text: str) -> str:
        """Return a text as it is read here: commands as they are typed, instants in the zone, controls written out."""
        return _UTC.sub(self._localise, fill_in(show_controls(text)))

    def _localise(self, found: re.Match[str]) -> str:
        try:
            instant = datetime.fromisoformat(found[1]).replace(tzinfo=UTC)
            local = f"{instant.astimezone(self.zone):%Y-%m-%d %H:%M:%S}"
        except (ValueError, OverflowError):
            return found[0]
        return f"{local[: len(found[1])]}{format_offset(instant, self.zone)}"

    def _cell(self, value: object) -> str:
        text = "—" if value is None else self.for_people(str(value))
        if self._one_line:
            text = " ".join(text.split("\n"))
        style = STATE_STYLES.get(text)
        return f"[{style}]{escape(text)}[/{style}]" if style else escape(text)

    @property
    def _one_line(self) -> bool:
        """Whether a record is one line, however long: for programs."""
        return self.console.width >= ANY_WIDTH

    def _print(self, table: Table) -> None:
        if not self._one_line:
            # Not cropped: where a terminal is too narrow for the ids, it breaks the lines itself.
            self.console.print(table, crop=False)
            return
        with self.console.capture() as captured:
            self.console.print(table, crop=False)
        for line in captured.get().splitlines():
            self.console.out(line.rstrip(), highlight=False)

    def table(
        self,
        columns: Sequence["Column | str"],
        rows: Sequence[Sequence[object]],
        *,
        title: str | None = None,
        empty: str | None = None,
    ) -> None:
        """Write a table for people, or `empty` where there is no row; a cell that is a known state is coloured."""
        if not rows and empty is not None:
            self.say(empty)
            return
        shown = [(column if isinstance(column, Column) else Column(column)) for column in columns]
        dropped: list[Column] = []
        while True:
            kept = [(index, column) for index, column in enumerate(shown) if column not in dropped]
            table = self._table(kept, rows, title)
            least = [column for _, column in kept if column.importance is not None]
            if not least or self._fits(table, kept, rows):
                break
            dropped.append(min(least, key=lambda column: column.importance or 0))
        self._print(table)
        if dropped:
            names = ", ".join(column.heading for column in dropped)
            self.say(f"Left out for want of width: {names}. See --json, or widen the terminal.")

    def _fits(self, table: Table, kept: Sequence[tuple[int, "Column"]], rows: Sequence[Sequence[object]]) -> bool:
        """Whether no cell would be broken but those of columns that wrap, and those into lines of some length."""
        options = self.console.options.update(max_width=ANY_WIDTH)
        natural = Measurement.get(self.console, options, table).maximum
        spare = 0
        for index, column in kept:
            if column.wraps:
                longest = max(len(column.heading), *(len(str(row[index])) for row in rows))
                spare += max(0, longest - column.wraps)
        return natural - spare <= self.console.width

    def instant(self, instant: datetime | None) -> str:
        """Return an instant in the report's zone."""
        return format_instant(instant, self.zone)

    def day_and_time(self, instant: datetime | None, now: datetime) -> str:
        """Return an instant in the report's zone, to the minute, as short as it is clear today."""
        if instant is None:
            return "—"
        here, today = instant.astimezone(self.zone), now.astimezone(self.zone)
        offset = format_offset(instant, self.zone)
        if here.date() == today.date():
            return f"{here:%H:%M}{offset}"
        return f"{here:%m-%d %H:%M}{offset}" if here.year == today.year else f"{here:%Y-%m-%d %H:%M}{offset}"

    def facts(self, pairs: Mapping[str, Any]) -> None:
        """Write name and value a line, leaving out what is None or empty."""
        shown = [(name, value) for name, value in pairs.items() if value not in (None, "", {}, False)]
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in shown:
            table.add_row(f"[bold]{escape(name)}[/bold]", self._cell("yes" if value is True else value))
        self._print(table)

    def _table(self, kept: Sequence[tuple[int, Column]], rows: Sequence[Sequence[object]], title: str | None) -> Table:
        table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
        for _, column in kept:
            table.add_column(column.heading, overflow="fold", no_wrap=not column.wraps)
        for row in rows:
            table.add_row(*(self._cell(row[index]) for index, _ in kept))
        return table
