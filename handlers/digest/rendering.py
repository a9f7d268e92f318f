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
CACHED = 2048
"""Names and amounts that are remembered: each stands in the text and in the HTML, most in tomorrow's digest too."""
_BIDI_CONTROLS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
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
    environment.filters["money"] = lru_cache(CACHED)(partial(_format_money, locale=locale))
    environment.filters["number"] = lru_cache(CACHED)(partial(format_decimal, locale=locale))
    # Not %Y, which writes the year 26 as 26, like 2026.
    environment.filters["day"] = "{0:%d/%m}/{0.year:04}".format
    environment.filters["clean"] = _clean
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


@lru_cache(CACHED)
def _clean(text: str | None, longest: int = LONGEST_NAME) -> str:
    """Blank what could reorder or break the line a name stands in (controls, line ends, bidi overrides); bound it."""
    visible = "".join(
        " " if unicodedata.category(c) in {"Cc", "Zl", "Zp"} or unicodedata.bidirectional(c) in _BIDI_CONTROLS else c
        for c in text or ""
    )
    whole = " ".join(visible.split())
    if all(unicodedata.category(c) in {"Cf", "Zs"} for c in whole):
        return "—"
    return whole if len(whole) <= longest else f"{whole[: _end_of_character(whole, longest - 1)].rstrip()}…"


def _end_of_character(text: str, end: int) -> int:
    """Return the nearest end at or before `end` that parts no letter from its marks and no emoji from its parts."""
    while end > 0 and (unicodedata.category(text[end]) in _JOINS_BEFORE or text[end - 1] == _JOINS_NEXT):
        end -= 1
    return end


# BEFORE the first digest is due: a broken catalogue must keep the service from starting, not from sending.
for _language in MONEY_LOCALES:
    _environment(_language)
