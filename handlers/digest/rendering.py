"""
The overdue digest as a letter: subject, plain text and HTML of a statement.

Pure: the same statement gives the same letter. Sentences are in the catalogues of `locale/`, layout is in
`templates/`, money and plurals are CLDR's through Babel.
"""

import gettext
import io
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from functools import cache, lru_cache, partial
from pathlib import Path

from babel import Locale
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po
from babel.numbers import format_currency, format_decimal, get_currency_precision
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from handlers.digest.statement import Statement

__all__ = ["render", "render_digest"]

LONGEST_NAME = 80
"""Of a customer or a business, in characters: on a telephone that is eight lines."""
LONGEST_NAME_IN_SUBJECT = 60
LONGEST_CURRENCY = 8
LONGEST_READ = 400
"""Of a name, in characters; the rest is not looked at. What is remembered of names is so long at most."""
MOST_MARKS = 4
"""Upon one letter: more would run over the lines above and below."""
CACHED = 2048
"""Names and amounts that are remembered: each stands in the text and in the HTML, most in tomorrow's digest too."""
_BIDI_CONTROLS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
_BLANK = frozenset({"Cc", "Cs", "Zl", "Zp"})
_NOT_IN_HTML = frozenset(
    {*map(chr, range(0xFDD0, 0xFDF0)), *(chr(p << 16 | n) for p in range(17) for n in (0xFFFE, 0xFFFF))}
)
"""Noncharacters. Not what is unassigned: tomorrow's emoji are."""
_JOINS_NEXT, _JOINS_BEFORE = "\u200d", frozenset({"Mn", "Me", "Cf", "Sk"})
MONEY_LOCALES = {"he": "he_IL", "en": "en_IL"}


def render_digest(statement: Statement, *, language: str, app_origin: str | None) -> tuple[str, str, str]:
    """Render subject, plain text and HTML in `language` (he or en), linking to the web app if it is known."""
    values = {
        "statement": statement,
        "link": f"{app_origin}/invoices?filter=overdue" if app_origin else None,
        "language": language,
    }
    return render("digest", language, values)


def render(template: str, language: str, values: Mapping[str, object]) -> tuple[str, str, str]:
    """Render a letter of `templates/`: subject, plain text and HTML in `language` (he or en)."""
    environment = _environment(language)
    subject, text, html = (
        environment.get_template(f"{template}.{part}.j2").render(values) for part in ("subject", "txt", "html")
    )
    return subject.strip(), text, html


@cache
def _environment(language: str) -> Environment:
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here / "templates"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        extensions=["jinja2.ext.i18n"],
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    catalogue = _read_catalogue(here / "locale" / f"{language}.po", language)
    # The i18n extension adds the method when it is loaded.
    environment.install_gettext_translations(catalogue, newstyle=True)  # type: ignore[attr-defined]
    locale = Locale.parse(MONEY_LOCALES[language])
    money = lru_cache(CACHED)(partial(_format_money, locale=locale))
    environment.filters["money"] = lambda amount, currency: money(amount, clean(currency, LONGEST_CURRENCY))
    environment.filters["number"] = lru_cache(CACHED)(partial(format_decimal, locale=locale))
    # Not %Y, which writes the year 26 as 26, like 2026.
    environment.filters["day"] = "{0:%d/%m}/{0.year:04}".format
    environment.filters["clean"] = clean
    environment.globals["longest_in_subject"] = LONGEST_NAME_IN_SUBJECT
    return environment


def _read_catalogue(path: Path, language: str) -> gettext.GNUTranslations:
    """Read a .po file; compiled in memory, because gettext evaluates plurals from that form only."""
    with path.open("rb") as source:
        catalogue = read_po(source, locale=language, abort_invalid=True)
    compiled = io.BytesIO()
    write_mo(compiled, catalogue)
    compiled.seek(0)
    return gettext.GNUTranslations(compiled)


def _format_money(minor_units: int, currency: str, *, locale: Locale) -> str:
    amount = Decimal(minor_units).scaleb(-get_currency_precision(currency))
    return format_currency(amount, currency, locale=locale)


def clean(text: str | None, longest: int = LONGEST_NAME) -> str:
    """
    Return what a tenant chose as a letter shows it: every text of BON's that reaches a letter comes through here.

    In one line of at most `longest` characters; what could reorder or break that line (controls, ends of lines, marks
    of direction that reach beyond the name) and what no letter can hold (halves of characters, noncharacters) is
    blank; at most MOST_MARKS marks stand upon a letter. "—" where nothing is left to see.
    """
    return _clean((text or "")[:LONGEST_READ], longest)


@lru_cache(CACHED)
def _clean(text: str, longest: int) -> str:
    visible, marks = [], 0
    for c in text:
        category = unicodedata.category(c)
        marks = marks + 1 if category in {"Mn", "Me"} else 0
        if marks > MOST_MARKS:
            continue
        visible.append(" " if category in _BLANK or c in _NOT_IN_HTML or _turns(c) else c)
    whole = " ".join("".join(visible).split())
    if all(unicodedata.category(c) in {"Cf", "Zs"} for c in whole):
        return "—"
    return whole if len(whole) <= longest else f"{whole[: _end_of_character(whole, longest - 1)].rstrip()}…"


def _turns(character: str) -> bool:
    return unicodedata.bidirectional(character) in _BIDI_CONTROLS


def _end_of_character(text: str, end: int) -> int:
    """Return the nearest end at or before `end` that parts no letter from its marks and no emoji from its parts."""
    while end > 0 and (unicodedata.category(text[end]) in _JOINS_BEFORE or text[end - 1] == _JOINS_NEXT):
        end -= 1
    return end


# BEFORE the first digest is due: a broken catalogue must keep the service from starting, not from sending.
for _language in MONEY_LOCALES:
    _environment(_language)
