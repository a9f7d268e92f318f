"""
Make docs/screenshots: `python -m tests.tools.screenshots [DIR]`.

Five telling digests as headless Chromium shows them, from invented data. Needs Debian's `chromium`, and
`culmus fonts-liberation fonts-noto-color-emoji` for letters as mail readers have them.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from handlers.digest import render_digest
from handlers.digest.statement import Ageing, OverdueInvoice, Statement

AS_OF = date(2026, 11, 23)
HERE = Path(__file__).resolve().parents[2] / "docs" / "screenshots"
PER_BUCKET = (30, 60, 90, 100_000)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DARK = "--blink-settings=preferredColorScheme=0"


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture: its file's name, its size in pixels, what is on it."""

    name: str
    width: int
    height: int
    statement: Statement
    language: str = "he"
    options: Sequence[str] = ()


def row(
    customer: str | None, days: int, owed: int, *, total: int = 0, currency: str = "ILS", number: int = 0
) -> OverdueInvoice:
    """Return an invoice of `owed` minor units, `days` overdue."""
    return OverdueInvoice(
        f"INV-2026-{number:04}", customer, currency, total or owed, owed, AS_OF - timedelta(days=days)
    )


def statement(name: str, rows: Sequence[OverdueInvoice], *, since_days: int = 1, more: int = 0) -> Statement:
    """Return a statement of these rows and `more` of 100.00 each that are 91 days overdue and not shown."""
    since = AS_OF - timedelta(days=since_days)
    ageing = []
    for currency in sorted({r.currency for r in rows}, key=lambda code: (code != "ILS", code)):
        mine = [r for r in rows if r.currency == currency]
        sums, before = [], 0
        for limit in PER_BUCKET:
            sums.append(sum(r.owed for r in mine if before < (AS_OF - r.due_date).days <= limit))
            before = limit
        extra = more if currency == "ILS" else 0
        sums[3] += extra * 10_000
        new = sum(r.due_date >= since for r in mine)
        ageing.append(Ageing(currency, len(mine) + extra, new, (sums[0], sums[1], sums[2], sums[3])))
    return Statement(name, AS_OF, since, tuple(sorted(rows, key=lambda r: r.due_date)), tuple(ageing))


TYPICAL = statement(
    "סטודיו גן השקד",
    [
        row("מאפיית תאנה בע״מ", 97, 1_240_000, total=2_480_000, number=311),
        row("רהיטי אלון", 64, 385_050, number=342),
        row("Blue Heron Ltd", 41, 99_900, number=367),
        row("אורן ובניו – שיפוצים", 12, 1_755_000, total=1_800_000, number=398),
        row("קפה שדרה", 2, 64_000, number=401),
        row("מרכז ״הצפון״ לרפואה", 1, 452_500, number=402),
    ],
)
CURRENCIES = statement(
    "Almond Grove Studio",
    [
        row("Blue Heron Ltd", 120, 1_250_000, currency="USD", number=12),
        row("Kobayashi Works", 45, 480_000, currency="JPY", number=19),
        row("מאפיית תאנה בע״מ", 33, 99_900, total=120_000, number=23),
        row("Maison Bleue", 3, 310_000, currency="EUR", number=30),
        row(None, 1, 75_000, number=31),
    ],
    since_days=4,
)
HOSTILE = statement(
    'O\'Brien & <b>"בנים"</b> 🧾',
    [
        row("שם ארוך מאוד " * 16, 80, 123_456_789, total=223_456_789, number=1),
        row("x" * 200, 31, 100, number=2),
        row("👩‍👩‍👧‍👦 משפחת \u202eכהן\u200f 🏳️‍🌈", 9, 45_000, number=3),
        row("<script>alert(1)</script> & 'Co'", 1, 9_990, number=4),
    ],
)
MANY = statement("סופרמרקט הגליל", [row("מכולת השכונה", 400 - n, 10_000 + n, number=n) for n in range(5)], more=19_995)

SHOTS = (
    Shot("hebrew-wide", 1200, 800, TYPICAL),
    Shot("hebrew-dark", 700, 800, TYPICAL, options=(DARK,)),
    Shot("hebrew-telephone-odd-names", 320, 1180, HOSTILE),
    Shot("hebrew-telephone-twenty-thousand", 320, 960, MANY),
    Shot("english-currencies", 700, 1240, CURRENCIES, language="en"),
)


def take(shot: Shot, browser: str, scratch: Path, out: Path) -> None:
    """Render, open, and save one picture."""
    html = render_digest(shot.statement, language=shot.language, app_origin="https://app.bon.example")[2]
    page = scratch / f"{shot.name}.html"
    page.write_text(html, encoding="utf-8")
    size, picture = f"--window-size={shot.width},{shot.height}", f"--screenshot={out / shot.name}.png"
    command = [browser, *QUIET, *shot.options, f"--user-data-dir={scratch / 'profile'}", size, picture, page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def main() -> int:
    """Take them all."""
    browser = shutil.which("chromium")
    if browser is None:
        sys.stderr.write("No chromium. Install it: apt-get install --no-install-recommends chromium\n")
        return 1
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    with tempfile.TemporaryDirectory(prefix="bon-screenshots-") as scratch:
        for shot in SHOTS:
            take(shot, browser, Path(scratch), out.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
