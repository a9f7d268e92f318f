"""The digest: what is owed, who is told, and how the letter reads in two directions."""

import re
import unicodedata
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from babel.messages.extract import extract_from_file
from babel.messages.pofile import read_po

import handlers.digest.rendering
from handlers.digest import render_digest
from handlers.digest.rendering import render as render_letter
from handlers.digest.statement import (
    MAX_ROWS,
    Ageing,
    OverdueInvoice,
    Statement,
    read_recipients,
    read_statement,
)
from handlers.overdue_digest import FIND_OWED
from tests import arrange
from tests.conftest import Connection

AS_OF = date(2026, 11, 23)
YESTERDAY = AS_OF - timedelta(days=1)
HERE = Path(handlers.digest.__file__).parent


async def a_business(connection: Connection, *, owners: tuple[str, ...] = (), **values: object) -> UUID:
    """Make a business with an owner for each address."""
    business = await arrange.business(connection, **values)
    for email in owners:
        await arrange.owner(connection, business, email)
    return business


async def late(connection: Connection, business: UUID, **values: object) -> UUID:
    """Make an invoice of 100.00 ILS, sent, due the day before AS_OF."""
    return await arrange.invoice(connection, business, **({"due_date": YESTERDAY} | values))


async def owed(connection: Connection, business: UUID) -> list[int]:
    statement = await read_statement(connection, business, AS_OF)
    return [invoice.owed for invoice in statement.invoices] if statement else []


def an_invoice(**values: Any) -> OverdueInvoice:
    defaults: dict[str, Any] = {
        "number": "INV-7",
        "customer": "Acme",
        "currency": "ILS",
        "total": 123_450,
        "owed": 123_450,
        "due_date": YESTERDAY,
    }
    return OverdueInvoice(**{**defaults, **values})


def a_statement(*given: OverdueInvoice, name: str = "סטודיו", since: date = YESTERDAY) -> Statement:
    """Make a statement of these invoices, its totals counted here once more."""
    invoices = sorted(given or [an_invoice()], key=lambda invoice: invoice.due_date)
    ageing = []
    for currency in sorted({i.currency for i in invoices}, key=lambda code: (code != "ILS", code)):
        mine = [i for i in invoices if i.currency == currency]
        limits = [(1, 30), (31, 60), (61, 90), (91, 9999)]
        sums = [sum(i.owed for i in mine if low <= (AS_OF - i.due_date).days <= high) for low, high in limits]
        new = sum(i.due_date >= since for i in mine)
        ageing.append(Ageing(currency, len(mine), new, (sums[0], sums[1], sums[2], sums[3])))
    return Statement(name, AS_OF, since, tuple(invoices[:MAX_ROWS]), tuple(ageing))


def days_ago(days: int) -> date:
    return AS_OF - timedelta(days=days)


def render(statement: Statement, language: str = "he") -> tuple[str, str, str]:
    return render_digest(statement, language=language, app_origin="https://app.example.com")


# What is owed


async def test_due_yesterday_is_overdue_and_due_today_is_not(connection: Connection) -> None:
    business = await a_business(connection)
    await late(connection, business, document_number="yesterday", due_date=YESTERDAY)
    await late(connection, business, document_number="today", due_date=AS_OF)
    statement = await read_statement(connection, business, AS_OF)
    assert statement is not None
    assert [invoice.number for invoice in statement.invoices] == ["yesterday"]


@pytest.mark.parametrize(
    ("status", "count"),
    [
        ("draft", 0),
        ("finalized", 1),
        ("sending", 0),
        ("sent", 1),
        ("paid", 0),
        ("partially_paid", 1),
        ("cancelled", 0),
        ("credited", 0),
    ],
)
async def test_only_open_invoices_are_overdue(connection: Connection, status: str, count: int) -> None:
    business = await a_business(connection)
    await late(connection, business, status=status)
    assert len(await owed(connection, business)) == count


async def test_payments_and_issued_credit_notes_lessen_what_is_owed(connection: Connection) -> None:
    business = await a_business(connection)
    invoice = await late(connection, business)
    await arrange.payment(connection, invoice, 1_000)
    await arrange.payment(connection, invoice, 500)
    for status in ("draft", "finalized", "sending", "sent", "paid", "partially_paid", "cancelled", "credited"):
        await late(
            connection,
            business,
            document_type="credit_note",
            status=status,
            credited_invoice_id=invoice,
            total_incl_vat_minor_units=100,
        )
    assert await owed(connection, business) == [10_000 - 1_500 - 500]


async def test_a_credit_note_in_another_currency_lessens_nothing(connection: Connection) -> None:
    business = await a_business(connection)
    invoice = await late(connection, business)
    await late(connection, business, document_type="credit_note", credited_invoice_id=invoice, currency="USD")
    assert await owed(connection, business) == [10_000]


async def test_an_invoice_paid_in_full_or_over_is_left_out(connection: Connection) -> None:
    business = await a_business(connection)
    await arrange.payment(connection, await late(connection, business), 10_000)
    await arrange.payment(connection, await late(connection, business), 10_001)
    assert await read_statement(connection, business, AS_OF) is None


@pytest.mark.parametrize("kind", ["receipt", "tax_invoice_receipt", "credit_note"])
async def test_a_document_that_is_no_receivable_is_left_out(connection: Connection, kind: str) -> None:
    business = await a_business(connection)
    await late(connection, business, document_type=kind)
    assert await read_statement(connection, business, AS_OF) is None


async def test_an_inactive_business_is_owed_nothing(connection: Connection) -> None:
    business = await a_business(connection, is_active=False, deleted_at=datetime.now(UTC))
    await late(connection, business)
    assert await read_statement(connection, business, AS_OF) is None


async def test_the_customers_row_is_the_fall_back_for_the_name(connection: Connection) -> None:
    business = await a_business(connection)
    customer = await arrange.customer(connection, business, name="From the row")
    await late(connection, business, customer_id=customer, customer_name="  ", due_date=days_ago(3))
    await late(connection, business, customer_id=customer, customer_name="Snapshot", due_date=days_ago(2))
    await late(connection, business, due_date=days_ago(1))
    statement = await read_statement(connection, business, AS_OF)
    assert statement is not None
    assert [invoice.customer for invoice in statement.invoices] == ["From the row", "Snapshot", None]


BLANK = ["", "  ", "\t", "\n", "\xa0", "\u200f", " \u200e\u2009\u200b\ufeff"]


async def test_a_name_of_which_nothing_is_seen_falls_back_to_the_customers_row(connection: Connection) -> None:
    business = await a_business(connection)
    customer = await arrange.customer(connection, business, name="\u200fFrom the row\xa0")
    nobody = await arrange.customer(connection, business, name="\u200f")
    for blank in BLANK:
        await late(connection, business, customer_id=customer, customer_name=blank)
        await late(connection, business, customer_id=nobody, customer_name=blank, due_date=days_ago(2))
    statement = await read_statement(connection, business, AS_OF)
    assert statement is not None
    assert [i.customer for i in statement.invoices] == [None] * len(BLANK) + ["From the row"] * len(BLANK)


async def test_an_address_of_which_nothing_is_seen_is_none(connection: Connection) -> None:
    business = await a_business(connection, owners=tuple(BLANK), email="\u200foffice@b.example\n")
    assert await read_recipients(connection, business) == ["office@b.example"]


async def test_the_oldest_comes_first(connection: Connection) -> None:
    business = await a_business(connection)
    for days in (5, 40, 1):
        await late(connection, business, due_date=days_ago(days))
    statement = await read_statement(connection, business, AS_OF)
    assert statement is not None
    assert [statement.days_overdue(invoice) for invoice in statement.invoices] == [40, 5, 1]


# Who is told


async def test_every_owner_is_told_once_whatever_the_case(connection: Connection) -> None:
    business = await a_business(
        connection, owners=("One@owner.example", "one@OWNER.example", "two@owner.example"), email="office@b.example"
    )
    await arrange.owner(connection, business, "admin@b.example", role="admin")
    found = await read_recipients(connection, business)
    assert sorted(address.lower() for address in found) == ["one@owner.example", "two@owner.example"]


async def test_without_an_owner_the_business_itself_is_told(connection: Connection) -> None:
    business = await a_business(connection, email=" office@b.example ")
    await arrange.owner(connection, business, "user@b.example", role="user")
    assert await read_recipients(connection, business) == ["office@b.example"]


async def test_without_any_address_nobody_is_told(connection: Connection) -> None:
    assert await read_recipients(connection, await a_business(connection, email="")) == []


async def test_all_businesses_are_found_by_the_rules_of_the_statement(connection: Connection) -> None:
    """FIND_OWED repeats the conditions of READ_STATEMENT and READ_RECIPIENTS: they must agree."""
    made = [
        await a_business(connection, owners=("a@x.example", "A@x.example", "b@x.example")),
        await a_business(connection, email="office@x.example"),
        await a_business(connection),
        await a_business(connection, is_active=False, deleted_at=datetime.now(UTC)),
        await a_business(connection, owners=("\u200fd@x.example\t", "D@x.example", "\xa0")),
        await a_business(connection, owners=("\t", "\u200e"), email="office@x.example"),
        await a_business(connection, owners=("\n",), email="\u200f"),
        await a_business(connection, owners=("c@x.example",)),
    ]
    for business in made[:-1]:
        await arrange.payment(connection, await late(connection, business), 4_000)
        await arrange.payment(connection, await late(connection, business), 10_000)
        await late(connection, business, due_date=AS_OF)
        await late(connection, business, document_type="receipt")
        credited = await late(connection, business, status="finalized")
        await late(connection, business, document_type="credit_note", credited_invoice_id=credited)
    found = {
        row["business_id"]: (row["invoices"], row["addresses"]) for row in await connection.fetch(FIND_OWED, AS_OF)
    }
    assert found == {
        business: (len(amounts), len(await read_recipients(connection, business)))
        for business in made
        if (amounts := await owed(connection, business))
    }
    assert [found[business] for business in made[:3]] == [(1, 2), (1, 1), (1, 0)]
    assert [found[business] for business in made[4:7]] == [(1, 1), (1, 1), (1, 0)]


# How it reads


@pytest.mark.parametrize(
    ("days", "phrase"), [(1, "יום אחד"), (2, "יומיים"), (3, "3 ימים"), (20, "20 ימים"), (101, "101 ימים")]
)
def test_days_are_counted_as_hebrew_counts(days: int, phrase: str) -> None:
    _, text, html = render(a_statement(an_invoice(due_date=days_ago(days))))
    assert f"איחור: {phrase} (" in text
    assert f">{phrase}<" in re.sub(r'<span dir="ltr">(\d+)</span>', r"\1", html)


@pytest.mark.parametrize(
    ("count", "phrase"),
    [(1, "חשבונית אחת באיחור"), (2, "שתי חשבוניות באיחור"), (3, "3 חשבוניות באיחור")],
)
def test_invoices_are_counted_as_hebrew_counts(count: int, phrase: str) -> None:
    subject, text, _ = render(a_statement(*[an_invoice()] * count))
    assert phrase in subject
    assert phrase in text


def test_english_has_one_and_many() -> None:
    assert "One overdue invoice" in render(a_statement(), "en")[0]
    assert "2 overdue invoices" in render(a_statement(an_invoice(), an_invoice()), "en")[0]


@pytest.mark.parametrize("language", ["he", "en"])
def test_what_people_typed_is_escaped(language: str) -> None:
    hostile = '<b>"x"</b>&'
    _, text, html = render(
        a_statement(an_invoice(customer=hostile, number=hostile, currency="<i>"), name=hostile), language
    )
    assert "<b>x" not in html.replace('"', "")
    assert "<i>" not in html
    assert "&lt;b&gt;&#34;x&#34;&lt;/b&gt;&amp;" in html
    assert hostile in text


def test_a_percent_sign_in_a_name_is_only_a_percent_sign() -> None:
    assert "100% %(num)s" in render(a_statement(name="100% %(num)s"))[1]


def test_a_name_can_neither_break_a_line_nor_turn_the_text_around() -> None:
    name = "a\r\nBcc: b\u2028c\u202ed\u2069e"
    subject, text, html = render(a_statement(an_invoice(customer=name), name=name))
    assert "a Bcc: b c d e" in subject
    for part in (text, html):
        assert "a Bcc: b c d e" in part
        assert "\u202e" not in part
        assert "\u2028" not in part
    assert "\n" not in subject


def first_letter(line: str) -> str | None:
    """The class of what gives a paragraph its direction (UAX 9 P2): the first strong character outside isolates."""
    depth = 0
    for c in line:
        kind = unicodedata.bidirectional(c)
        depth += (kind in {"LRI", "RLI", "FSI"}) - (kind == "PDI")
        if depth == 0 and kind in {"L", "R", "AL"}:
            return kind
    return None


@pytest.mark.parametrize("name", ["Studio Dana", "סטודיו דנה"])
def test_every_hebrew_line_reads_from_right_to_left(name: str) -> None:
    about_consent = {"business_name": name, "link": "https://app.example.com", "language": "he"}
    unpaid = [an_invoice(owed=5), an_invoice(currency="USD"), *[an_invoice(number=None)] * MAX_ROWS]
    letters = render(a_statement(*unpaid, name=name)), render_letter("reauth", "he", about_consent)
    lines = [line for subject, text, _ in letters for line in (subject, *text.splitlines())]
    hebrew = [line for line in lines if any(unicodedata.bidirectional(c) == "R" for c in line)]
    assert len(hebrew) > MAX_ROWS
    assert [line for line in hebrew if first_letter(line) == "L"] == []


@pytest.mark.parametrize("language", ["he", "en"])
def test_every_isolate_that_opens_closes_on_its_line(language: str) -> None:
    subject, text, _ = render(a_statement(an_invoice(owed=5), an_invoice(currency="USD")), language)
    for line in [subject, *text.splitlines()]:
        opened = sum(line.count(c) for c in "\u2066\u2067\u2068")
        assert opened == line.count("\u2069")


@pytest.mark.parametrize("name", ["", "\xa0\u200f", "\u200b", "\u2069"])
def test_a_name_of_which_nothing_is_seen_is_a_dash(name: str) -> None:
    subject, text, html = render(a_statement(an_invoice(customer=name), name=name))
    assert "\u2068—\u2069" in subject
    assert text.count("\u2068—\u2069") == 2
    assert html.count('<span dir="auto">—</span>') == 2


def test_a_day_is_written_with_all_four_digits_of_its_year() -> None:
    for part in render(a_statement(an_invoice(due_date=date(26, 11, 1))))[1:]:
        assert "01/11/0026" in part


def test_each_table_and_cell_says_its_direction() -> None:
    html = render(a_statement())[2]
    cells = re.findall(r"<(?:td|th)\b[^>]*>", html)
    assert cells
    assert all('dir="rtl"' in cell and 'align="right"' in cell for cell in cells)
    assert all('dir="rtl"' in table for table in re.findall(r"<table\b[^>]*>", html))
    assert re.search(r'<body[^>]*>\s*<div [^>]*dir="rtl"', html)


def test_invoice_numbers_and_dates_stand_left_to_right() -> None:
    _, text, html = render(a_statement())
    for value in ("INV-7", "22/11/2026", "23/11/2026"):
        assert f'<span dir="ltr">{value}</span>' in html
        assert f"\u2066{value}\u2069" in text


def test_the_html_is_for_mail_readers() -> None:
    html = render(a_statement())[2]
    assert not re.search(r"flex|<img|<script|<link|url\(|@import|src=", html)
    assert re.findall(r'https?://[^"]+', html) == ["https://app.example.com/invoices?filter=overdue"]


def test_the_style_element_does_nothing_but_turn_the_colours() -> None:
    """Some mail readers drop it."""
    (style,) = re.findall(r"<style>(.*?)</style>", render(a_statement())[2], re.DOTALL)
    assert set(re.findall(r"([\w-]+):", style)) <= {"color-scheme", "supported-color-schemes"} | {
        "prefers-color-scheme",
        "background-color",
        "color",
        "",
    }


def test_each_colour_has_one_for_the_dark() -> None:
    html = render(a_statement(an_invoice(), an_invoice()))[2]
    coloured = re.findall(r"<(\w+)([^>]*(?:color:#|bgcolor)[^>]*)>", html)
    inside_button = [(tag, rest) for tag, rest in coloured if tag != "a"]
    assert inside_button
    assert [tag for tag, rest in inside_button if "class=" not in rest] == []


def test_money_is_written_as_the_currency_is_counted() -> None:
    invoices = [an_invoice(currency=code, total=1_234, owed=1_234) for code in ("ILS", "JPY", "KWD")]
    text = render(a_statement(*invoices), "en")[1]
    for amount in ("₪12.34", "JP¥1,234", "KWD1.234"):
        assert f"Outstanding: \u2066{amount}\u2069" in text


def test_hebrew_money_reads_right_to_left() -> None:
    assert "\u2067\u200f1,234.50\xa0\u200f₪\u2069" in render(a_statement())[1]


def test_the_total_stands_beside_what_is_owed_only_where_something_was_paid() -> None:
    paid = render(a_statement(an_invoice(owed=100)), "en")
    unpaid = render(a_statement(), "en")
    assert "Outstanding: \u2066₪1.00\u2069 of \u2066₪1,234.50\u2069" in paid[1]
    assert " of \u2066" not in unpaid[1]
    assert "<small>of <span" in paid[2]
    assert "<small>of <span" not in unpaid[2]


def test_ageing_is_by_currency_and_its_boundaries_are_30_60_and_90_days() -> None:
    rows = [(1, 1), (30, 10), (31, 100), (60, 1_000), (61, 10_000), (90, 100_000), (91, 1_000_000)]
    ils = [an_invoice(due_date=days_ago(days), owed=amount) for days, amount in rows]
    usd = an_invoice(due_date=days_ago(91), owed=7, currency="USD")
    ageing = a_statement(usd, *ils).ageing
    assert [(a.currency, a.total, a.buckets) for a in ageing] == [
        ("ILS", 1_111_111, (11, 1_100, 110_000, 1_000_000)),
        ("USD", 7, (0, 0, 0, 7)),
    ]


def test_what_became_overdue_yesterday_is_marked_new() -> None:
    text = render(a_statement(an_invoice(number="old", due_date=days_ago(2)), an_invoice(number="new")))[1]
    assert "חדש מאז \u206622/11/2026\u2069: חשבונית אחת." in text
    assert [line.startswith("* [חדש]") for line in text.splitlines() if line.startswith("*")] == [False, True]


def test_without_anything_new_nothing_is_called_new() -> None:
    text, html = render(a_statement(an_invoice(due_date=days_ago(2))))[1:]
    assert "חדש" not in re.sub("חשבונ", "", text)
    assert "<b" not in html.partition("<body")[2].replace("<br>", "")


def test_missing_numbers_and_names_are_dashes() -> None:
    html = render(a_statement(an_invoice(number=None, customer=None)))[2]
    assert '<span dir="ltr">—</span>' in html
    assert '<span dir="auto">—</span>' in html


def test_two_hundred_rows_are_shown_and_the_rest_is_counted_and_summed() -> None:
    _, text, html = render(a_statement(*[an_invoice(total=100, owed=100)] * 203), "en")
    assert html.count(">INV-7<") == 200
    assert "And 3 more invoices." in text
    assert "Outstanding in total: \u2066₪203.00\u2069" in text


def test_a_long_digest_is_not_cut_off_by_mail_readers() -> None:
    assert len(render(a_statement(*[an_invoice(customer="ל" * 20, owed=100)] * 300))[2].encode()) < 102_000


def test_the_list_is_linked_only_when_the_web_app_is_known() -> None:
    linked = render(a_statement())
    assert 'href="https://app.example.com/invoices?filter=overdue"' in linked[2]
    assert "\nhttps://app.example.com/invoices?filter=overdue\n" in linked[1]
    assert "http" not in "".join(render_digest(a_statement(), language="he", app_origin=None))


@pytest.mark.parametrize("language", ["he", "en"])
def test_every_sentence_of_the_templates_is_in_the_catalogue(language: str) -> None:
    with (HERE / "locale" / f"{language}.po").open("rb") as source:
        catalogue = read_po(source, locale=language)
    found = [
        message
        for template in sorted((HERE / "templates").glob("*.j2"))
        for _, message, _, _ in extract_from_file("jinja2.ext:babel_extract", template)
    ]
    assert len(found) > 20
    for message in found:
        entry = catalogue.get(message if isinstance(message, str) else message[0])
        assert entry is not None, message
        strings = [entry.string] if isinstance(entry.string, str) else list(entry.string or ())
        assert all(strings), message
        assert len(strings) == (1 if isinstance(message, str) else catalogue.num_plurals), message
    assert len(list(catalogue)) - 1 == len(set(found)), "a sentence nobody uses"
