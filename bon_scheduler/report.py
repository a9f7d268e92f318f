"""
How commands speak: tables for people, one JSON document for programs.

With JSON, standard output carries that document and nothing else: whatever else is said goes to standard error.
Without it, tables are plain where standard output is not a terminal, one record a line, and NO_COLOR is honoured. On a
terminal a table that is too wide leaves out its least important columns, and says so; then texts go on in the next
line, and where that is not enough each row is listed with a name and a value a line. No cell is cut off. An id stays in
one line, to be copied: a whole one, or its beginning with "…" behind it, which every command takes.

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
from itertools import zip_longest
from typing import Any
from zoneinfo import ZoneInfo

import orjson
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.text import Text

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
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{8}[0-9a-f-]*…", re.IGNORECASE)
GAP = 2
"""Between two columns, as rich has it."""
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


@dataclass(frozen=True, slots=True)
class _Laid:
    """A column with its cells as they are shown, and how wide it may be."""

    column: Column
    cells: Sequence[str]

    @property
    def widest(self) -> int:
        """The width in which no cell is broken."""
        return max(cell_len(line) for text in (self.column.heading, *self.cells) for line in text.split("\n"))

    def least(self, *, folded: bool) -> int:
        """Return the least width: texts that wrap may be broken, but for ids; `folded`: others too, between words."""
        texts = self.column.heading, *self.cells
        if self.column.wraps is None and not folded:
            return self.widest
        words = (word for text in texts for word in text.split() if self.column.wraps is None or _ID.search(word))
        return min(self.widest, max(self.column.wraps or 0, *(cell_len(word) for word in words), 0))


def _width(laid: Sequence[_Laid], *, folded: bool = False) -> int:
    """Return the least width of a table."""
    return sum(each.least(folded=folded) for each in laid) + GAP * (len(laid) - 1)


def _share(laid: Sequence[_Laid], width: int, *, folded: bool) -> list[int]:
    """Return how wide each column is: its least, and what it needs of the rest, those first that need least."""
    widths = [each.least(folded=folded) for each in laid]
    left = width - _width(laid, folded=folded)
    needs = sorted((each.widest - widths[index], index) for index, each in enumerate(laid))
    for number, (need, index) in enumerate(needs):
        more = max(0, min(need, left // (len(needs) - number)))
        widths[index] += more
        left -= more
    return widths


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

    def _text(self, value: object) -> str:
        text = "—" if value is None else self.for_people(str(value))
        return " ".join(text.split("\n")) if self._one_line else text

    @property
    def _one_line(self) -> bool:
        """Whether a record is one line, however long: for programs."""
        return self.console.width >= ANY_WIDTH

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
        named = [column if isinstance(column, Column) else Column(column) for column in columns]
        every = [_Laid(column, [self._text(row[index]) for row in rows]) for index, column in enumerate(named)]
        kept = every
        dropped: list[Column] = []
        while _width(kept) > self.console.width and not self._one_line:
            least = [each.column for each in kept if each.column.importance is not None]
            if not least:
                break
            dropped.append(min(least, key=lambda column: column.importance or 0))
            kept = [each for each in kept if each.column is not dropped[-1]]
        folded = _width(kept) > self.console.width
        if self._one_line or _width(kept, folded=folded) <= self.console.width:
            self._print_rows(kept, title, folded=folded and not self._one_line)
        else:
            self._print_records(every, title)
            return
        if dropped:
            names = ", ".join(column.heading for column in dropped)
            self.say(f"Left out for want of width: {names}. See --json, or widen the terminal.")

    def _print_rows(self, kept: Sequence[_Laid], title: str | None, *, folded: bool) -> None:
        if title is not None:
            self.console.print(Text(title, style="italic"))
        widths = _share(kept, ANY_WIDTH**2 if self._one_line else self.console.width, folded=folded)
        self._print_cells([Text(each.column.heading, style="bold") for each in kept], widths)
        for cells in zip(*(each.cells for each in kept), strict=True):
            self._print_cells([Text(text, style=STATE_STYLES.get(text, "")) for text in cells], widths)

    def _print_cells(self, cells: Sequence[Text], widths: Sequence[int]) -> None:
        """Write a row: cells beside each other, each broken into lines of its column's width."""
        broken = [cell.wrap(self.console, width, overflow="fold") for cell, width in zip(cells, widths, strict=True)]
        for parts in zip_longest(*broken):
            line = Text()
            for part, width in zip(parts, widths, strict=True):
                line.append_text(part or Text())
                line.append(" " * (width + GAP - (cell_len(part.plain) if part else 0)))
            line.rstrip()
            # Not cropped: where a terminal is too narrow for an id, it breaks the line itself.
            self.console.print(line, soft_wrap=True)

    def _print_records(self, kept: Sequence[_Laid], title: str | None) -> None:
        """Write each row as lines of name and value, for a terminal in which even folded cells have no room."""
        if title is not None:
            self.console.print(Text(title, style="italic"))
        for number, cells in enumerate(zip(*(each.cells for each in kept), strict=True)):
            if number:
                self.console.print()
            self._print_pairs([(each.column.heading, cell) for each, cell in zip(kept, cells, strict=True)])

    def _print_pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        laid = _Laid(Column(""), [name for name, _ in pairs]), _Laid(Column("", wraps=1), [text for _, text in pairs])
        widths = _share(laid, self.console.width, folded=False)
        for name, text in pairs:
            self._print_cells([Text(name, style="bold"), Text(text, style=STATE_STYLES.get(text, ""))], widths)

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
        self._print_pairs([(name, self._text("yes" if value is True else value)) for name, value in shown])
