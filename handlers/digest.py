"""
The overdue digest: what one business is owed, who is told, and the letter.

The reading is two statements; the rendering is pure: the same statement gives
the same letter. Sentences are in the catalogues of `locale/`, layout is in
`templates/`, money and plurals are CLDR's through Babel.
"""

import gettext
import io
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from uuid import UUID

from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po
from babel.numbers import format_currency, get_currency_precision
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from bon_scheduler.jobs import Connection

__all__ = [
    "DIGEST_KIND",
    "Ageing",
    "OverdueInvoice",
    "Statement",
    "read_recipients",
    "read_statement",
    "render",
    "render_digest",
]

DIGEST_KIND = "overdue-digest"
"""The kind under which the delivery ledger knows these letters."""
MAX_ROWS = 200
"""More would be cut off by mail readers (some at 102 kB); the totals always count every invoice."""
BUCKET_LIMITS_DAYS = (30, 60, 90)
_BIDI_CONTROLS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
MONEY_LOCALES = {"he": "he_IL", "en": "en_IL"}

# What is still owed on each overdue invoice of an active business, oldest first.
# A credit note counts once it is issued: `sending` is between finalized and sent, and `paid` or
# `partially_paid` say that it was refunded, not that it is void. `draft` is not issued yet, `cancelled`
# and `credited` no longer stand. One in another currency is nothing we may subtract.
# $1 business: uuid, $2 as_of: date. Indexes: the ones on invoices (business_id, status), invoice_payments
# (invoice_id) and, for the credit notes, invoices (business_id, credited_invoice_id, document_type).
READ_STATEMENT = """
    select b.name as business_name,
           i.document_number,
           coalesce(nullif(trim(i.customer_name), ''), nullif(trim(c.name), '')) as customer_name,
           i.currency,
           i.total_incl_vat_minor_units as total,
           i.total_incl_vat_minor_units - paid.amount - credited.amount as owed,
           i.due_date
      from invoices i
      join businesses b on b.id = i.business_id
      left join customers c on c.id = i.customer_id
     cross join lateral (
               select coalesce(sum(p.amount_minor_units), 0) as amount
                 from invoice_payments p
                where p.invoice_id = i.id
           ) paid
     cross join lateral (
               select coalesce(sum(n.total_incl_vat_minor_units), 0) as amount
                 from invoices n
                where n.business_id = i.business_id
                  and n.credited_invoice_id = i.id
                  and n.document_type = 'credit_note'
                  and n.status in ('finalized', 'sending', 'sent', 'paid', 'partially_paid')
                  and n.currency = i.currency
           ) credited
     where i.business_id = $1
       and i.status in ('finalized', 'sent', 'partially_paid')
       and i.due_date < $2
       and i.document_type not in ('receipt', 'tax_invoice_receipt', 'credit_note')
       and b.is_active
       and b.deleted_at is null
       and i.total_incl_vat_minor_units - paid.amount - credited.amount > 0
     order by i.due_date, i.sequence_number nulls last, i.id
"""

# The owners' addresses, else the business's own, else nothing.
# $1 business: uuid. Indexes: the one on user_businesses (business_id), users_pkey, businesses_pkey.
READ_RECIPIENTS = """
      with owners as (
               select trim(u.email) as email
                 from user_businesses m
                 join users u on u.id = m.user_id
                where m.business_id = $1
                  and m.role = 'owner'
                  and trim(u.email) <> ''
           )
    select email
      from owners
     union all
    select trim(b.email)
      from businesses b
     where b.id = $1
       and trim(b.email) <> ''
       and not exists (select from owners)
     order by email
"""


@dataclass(frozen=True, slots=True)
class OverdueInvoice:
    """One row of the digest; amounts in minor units of `currency` (agorot for ILS)."""

    number: str | None
    customer: str | None
    currency: str
    total: int
    owed: int
    due_date: date


@dataclass(frozen=True, slots=True)
class Statement:
    """What is owed to one business on a day, oldest first; never empty."""

    business_name: str
    as_of: date
    invoices: tuple[OverdueInvoice, ...]

    def days_overdue(self, invoice: OverdueInvoice) -> int:
        """Count calendar days from the due date; 1 is the day after it."""
        return (self.as_of - invoice.due_date).days

    def is_new(self, invoice: OverdueInvoice) -> bool:
        """Say whether the invoice was not overdue yet the day before."""
        return invoice.due_date == self.as_of - timedelta(days=1)

    @property
    def new(self) -> int:
        """How many invoices became overdue since yesterday."""
        return sum(map(self.is_new, self.invoices))

    @property
    def ageing(self) -> "tuple[Ageing, ...]":
        """What is owed by currency, ILS first, then by code."""
        currencies = sorted({i.currency for i in self.invoices}, key=lambda code: (code != "ILS", code))
        return tuple(self._age(currency) for currency in currencies)

    def _age(self, currency: str) -> "Ageing":
        buckets = [0] * (len(BUCKET_LIMITS_DAYS) + 1)
        for invoice in self.invoices:
            if invoice.currency == currency:
                days = self.days_overdue(invoice)
                buckets[sum(days > limit for limit in BUCKET_LIMITS_DAYS)] += invoice.owed
        return Ageing(currency, sum(buckets), tuple(buckets))


@dataclass(frozen=True, slots=True)
class Ageing:
    """Minor units owed in one currency: in all, and 1-30, 31-60, 61-90 and over 90 days overdue."""

    currency: str
    total: int
    buckets: tuple[int, ...]


async def read_statement(connection: Connection, business_id: UUID, as_of: date) -> Statement | None:
    """Read what is overdue on `as_of`; None when nothing is owed or the business is not active."""
    rows = await connection.fetch(READ_STATEMENT, business_id, as_of)
    if not rows:
        return None
    invoices = (
        OverdueInvoice(
            row["document_number"],
            row["customer_name"],
            row["currency"],
            row["total"],
            int(row["owed"]),
            row["due_date"],
        )
        for row in rows
    )
    return Statement(rows[0]["business_name"], as_of, tuple(invoices))


async def read_recipients(connection: Connection, business_id: UUID) -> list[str]:
    """Read the addresses to write to, each once whatever its case; none when nobody can be reached."""
    return _each_once(row["email"] for row in await connection.fetch(READ_RECIPIENTS, business_id))


def _each_once(addresses: Iterable[str]) -> list[str]:
    # Lower case, as the delivery ledger's hash: what it takes for one recipient is one here.
    return list({address.lower(): address for address in addresses}.values())


def render_digest(statement: Statement, *, language: str, app_origin: str | None) -> tuple[str, str, str]:
    """Render subject, plain text and HTML in `language` (he or en), linking to the web app if it is known."""
    values = {
        "statement": statement,
        "shown": statement.invoices[:MAX_ROWS],
        "hidden": len(statement.invoices) - MAX_ROWS,
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
    environment.filters["money"] = partial(_format_money, locale=MONEY_LOCALES[language])
    environment.filters["day"] = _format_day
    environment.filters["clean"] = _clean
    return environment


def _read_catalogue(path: Path, language: str) -> gettext.GNUTranslations:
    """Read a .po file; compiled in memory, because gettext evaluates plurals from that form only."""
    with path.open("rb") as source:
        catalogue = read_po(source, locale=language, abort_invalid=True)
    compiled = io.BytesIO()
    write_mo(compiled, catalogue)
    compiled.seek(0)
    return gettext.GNUTranslations(compiled)


def _format_money(minor_units: int, currency: str, *, locale: str) -> str:
    amount = Decimal(minor_units).scaleb(-get_currency_precision(currency))
    return format_currency(amount, currency, locale=locale)


def _format_day(value: date) -> str:
    return value.strftime("%d/%m/%Y")


def _clean(text: str | None) -> str:
    """Blank what could reorder or break the line a name stands in: controls, line ends, bidi overrides."""
    visible = "".join(
        " " if unicodedata.category(c) in {"Cc", "Zl", "Zp"} or unicodedata.bidirectional(c) in _BIDI_CONTROLS else c
        for c in text or ""
    )
    return " ".join(visible.split()) or "—"


# BEFORE the first digest is due: a broken catalogue must keep the service from starting, not from sending.
for _language in MONEY_LOCALES:
    _environment(_language)
