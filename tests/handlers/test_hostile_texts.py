"""Every text that a tenant chose, in every letter: it says what it says, costs little, and reaches as far as it may."""

import dataclasses
import resource
import time
import unicodedata
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime, timedelta
from email import message_from_bytes, policy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from bon_scheduler.demo.smtp_sink import SmtpSink, smtp_sink
from bon_scheduler.mail.message import LARGEST_BYTES, Letter, write
from handlers.digest import DIGEST_KIND, Ageing, OverdueInvoice, Statement, read_recipients, read_statement
from handlers.digest.rendering import (
    LONGEST_CURRENCY,
    LONGEST_NAME,
    LONGEST_READ,
    MOST_MARKS,
    clean,
    render,
    render_digest,
)
from handlers.digest.statement import MAX_ROWS, MOST_CURRENCIES, MOST_OWNERS, Rest
from handlers.notify_reauth import NotifyReauth, notify_reauth
from handlers.send_overdue_digest import SendOverdueDigest, send_overdue_digest
from tests import arrange
from tests.conftest import Connection, RunJob
from tests.mailworld import settings

AS_OF = date(2026, 11, 24)
NOW = datetime(2026, 11, 24, 4, tzinfo=UTC)
NASTY = {
    "ends of lines": "a\r\nBcc: victim@x.example\n\nb",
    "more ends of lines": "a\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029b",
    "an escape sequence and a bell": "a\x1b]0;title\x07\x1b[2Jb\x9b31m",
    "controls": "".join(map(chr, (*range(1, 32), *range(0x7F, 0xA0)))) + "a",
    "overrides": "a\u202eb\u202dc\u202a\u202bd",
    "an isolate that is not closed": "a\u2066\u2067\u2068b",
    "ends of isolates": "a\u2069\u2069\u2069\u202c\u202cb",
    "halves of characters": "a\ud800\udc00\udfffb",
    "noncharacters": "a\ufffe\uffff\ufdd0\U0010ffffb",
    "markup": "<script>alert(1)</script><b>&amp;\"'",
    "a template": "{{ 7 * 7 }}{% raw %}{# #}%(num)s%%{0}",
    "the sign of currencies": "'\u00a4\u00a4\u00a4'#0.00;'",
    "marks": "e" + "\u0301" * 390,
    "nothing to see": "\u200b\u2060\u00ad",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 60,
    "a long word": "\u05d0" * 100_000,
    "a long text": "word " * 1_000_000,
}
FIELDS = [
    (kind, field.name)
    for kind in (Statement, OverdueInvoice, Ageing)
    for field in dataclasses.fields(kind)
    if field.type in {"str", "str | None", str, str | None}
]


def a_statement(kind: type | None = None, name: str = "", value: str = "x") -> Statement:
    """Make a statement in which one text, a field of one of its parts, is `value`."""

    def given(of: type) -> dict[str, Any]:
        return {name: value} if of is kind else {}

    invoice = OverdueInvoice("INV-7", "Acme", "ILS", 2_000, 1_000, date(2026, 11, 1))
    ageing = [Ageing(code, 1, 0, (1_000, 0, 0, 0)) for code in ("ILS", "USD")]
    whole = Statement(
        "Studio",
        AS_OF,
        AS_OF,
        (dataclasses.replace(invoice, **given(OverdueInvoice)),),
        tuple(dataclasses.replace(one, **given(Ageing)) for one in ageing),
    )
    return dataclasses.replace(whole, **given(Statement))


def test_the_texts_are_found_type_by_type() -> None:
    assert {name for _, name in FIELDS} == {"business_name", "number", "customer", "currency"}


def obeyed(text: str) -> list[str]:
    """Return what a reader's program would obey and not show: controls, ends of lines, marks of direction."""
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return [
        c
        for c in text
        if unicodedata.category(c) in {"Cc", "Zl", "Zp", "Cs"} or unicodedata.bidirectional(c) in turning
    ]


class Tags(HTMLParser):
    """The elements of a page, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")


@pytest.mark.parametrize("language", ["he", "en"])
@pytest.mark.parametrize("nasty", NASTY)
@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_text_is_shown_and_not_obeyed(kind: type, name: str, nasty: str, language: str) -> None:
    harmless = render_digest(a_statement(kind, name), language=language, app_origin=None)
    before = time.process_time()
    letter = render_digest(a_statement(kind, name, NASTY[nasty]), language=language, app_origin=None)
    assert time.process_time() - before < 0.5
    for part, plain in zip(letter, harmless, strict=True):
        assert obeyed(part) == obeyed(plain)
        assert len(part) < len(plain) + 20 * LONGEST_NAME
    assert Tags(letter[2]).tags == Tags(harmless[2]).tags
    assert_written(*letter)


@pytest.mark.parametrize("language", ["he", "en"])
@pytest.mark.parametrize("nasty", NASTY)
def test_a_business_name_is_shown_and_not_obeyed_in_the_other_letter(nasty: str, language: str) -> None:
    def letter(name: str) -> tuple[str, str, str]:
        return render("reauth", language, {"business_name": name, "link": None, "language": language})

    for part, plain in zip(letter(NASTY[nasty]), letter("x"), strict=True):
        assert obeyed(part) == obeyed(plain)
    assert_written(*letter(NASTY[nasty]))


def assert_written(subject: str, text: str, html: str) -> int:
    """Write the letter; its header is whole, nobody else gets it, and it has a size. Return that in bytes."""
    letter = Letter(DIGEST_KIND, uuid4(), AS_OF, "o@shop.example", subject, text, html, "he")
    written = write(letter, settings(None), now=NOW, key=b"k" * 64)
    assert written is not None
    message = message_from_bytes(written.content, policy=policy.default)
    assert message["Bcc"] is None
    assert message["To"] == "o@shop.example"
    assert str(message["Subject"]) == " ".join(subject.split())
    return len(written.content)


def test_marks_upon_a_letter_do_not_run_over_other_lines_and_points_of_hebrew_stay() -> None:
    assert clean("e" + "\u0301" * 300 + "f") == "e" + "\u0301" * MOST_MARKS + "f"
    pointed = "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd"
    assert clean(pointed) == pointed


def test_what_no_page_can_hold_is_blank_and_tomorrows_emoji_are_not() -> None:
    assert clean("a\ufffe\U0010ffff\ufdd0\ud800b") == "a b"
    assert clean("a\U0001fadfb") == "a\U0001fadfb"  # of Unicode 16


def test_what_is_remembered_of_names_is_short() -> None:
    for n in range(20):
        clean(f"{n}" + "x" * 1_000_000)
    from handlers.digest import rendering  # noqa: PLC0415 - its cache alone

    before = rendering._clean.cache_info().currsize
    clean("y" * LONGEST_READ + "1")
    clean("y" * LONGEST_READ + "2")
    assert rendering._clean.cache_info().currsize == before + 1


def test_the_largest_letter_has_two_thirds_of_the_size_that_is_allowed() -> None:
    """The dearest character in UTF-8 and the dearest one in HTML, everywhere, and as many rows as are shown."""
    sizes = []
    for dear in ("\U0001f9d1", '"', "&"):
        name, code = dear * LONGEST_NAME, dear * LONGEST_CURRENCY
        invoice = OverdueInvoice(name, name, code, 2**62, 2**61, date(1, 1, 1))
        ageing = [Ageing(code, 10**6, 10**6, (2**60,) * 4)] * MOST_CURRENCIES
        statement = Statement(name, AS_OF, date(1, 1, 1), (invoice,) * MAX_ROWS, tuple(ageing), Rest(9999, 9999, 9))
        sizes.append(assert_written(*render_digest(statement, language="he", app_origin="https://" + "x" * 200)))
    assert max(sizes) < LARGEST_BYTES * 2 // 3


@pytest.mark.parametrize("currency", ["ils", "QQQ", "\u20aa", "EUROS", "BTC/USD", "", " ", "0", "\u05e9\u05e7\u05dc"])
def test_a_currency_that_nobody_knows_is_written_as_it_is(currency: str) -> None:
    _, text, _ = render_digest(a_statement(OverdueInvoice, "currency", currency), language="he", app_origin=None)
    assert (currency.strip() or "\u2014") in text


async def test_rows_without_end_make_a_letter_of_some_size_in_some_time(connection: Connection) -> None:
    business = await arrange.business(connection)
    await connection.execute("update businesses set name = repeat('\u05d0', 10000000) where id = $1", business)
    await connection.execute(
        "insert into invoices (business_id, document_type, status, invoice_date, due_date, total_incl_vat_minor_units, "
        "currency) select $1, 'tax_invoice', 'sent', $2, $2, 2000000000, case n % 6000 when 0 then 'ILS' "
        "else 'C' || n % 6000 end from generate_series(1, 100000) n",
        business,
        AS_OF - timedelta(days=3),
    )
    for _ in range(200):
        await arrange.invoice(connection, business, due_date=AS_OF - timedelta(days=9))
    await connection.execute(
        "update invoices set customer_name = repeat('\u05d1', 900000), document_number = repeat('9', 900000), "
        "currency = repeat('X', 900000) where due_date < $1",
        AS_OF - timedelta(days=5),
    )
    before, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    statement = await read_statement(connection, business, AS_OF)
    assert statement is not None
    size = assert_written(*render_digest(statement, language="he", app_origin=None))
    assert time.perf_counter() - before < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50 * 1024
    assert size < LARGEST_BYTES * 2 // 3
    assert statement.count == 100_200
    assert len(statement.ageing) == MOST_CURRENCIES
    assert statement.ageing[0].currency == "ILS"
    assert statement.rest.currencies == 6_001 - MOST_CURRENCIES
    assert sum(one.invoices for one in statement.ageing) + statement.rest.invoices == 100_200
    assert any(set(one.currency) == {"X"} and one.invoices == 200 for one in statement.ageing)  # the most invoices


# Whoever is called an owner


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[SmtpSink]:
    async with smtp_sink(tmp_path) as listening:
        yield listening


async def test_so_many_owners_are_written_to_and_the_rest_are_counted(
    run_job: RunJob, connection: Connection, sink: SmtpSink, logged: Callable[[], str]
) -> None:
    business = await arrange.business(connection, email="office@shop.example")
    for n in range(300):
        await arrange.owner(connection, business, f"owner{n}@shop.example")
    await arrange.invoice(connection, business, due_date=AS_OF - timedelta(days=1))
    through = {"SMTP_HOST": sink.host, "SMTP_PORT": str(sink.port), "SMTP_TLS": "none", "EMAIL_RATE_PER_SECOND": "500"}
    payload = SendOverdueDigest(business_id=business, as_of=AS_OF)
    first = await run_job(send_overdue_digest, payload, fire_time=NOW, **through)
    assert (first.run["counts"]["sent"], first.run["counts"]["left_out"]) == (MOST_OWNERS, 280)
    again = await run_job(send_overdue_digest, payload, fire_time=NOW, **through)
    assert (again.run["counts"]["sent"], again.run["counts"]["already_sent"]) == (0, MOST_OWNERS)
    assert len({str(message["To"]) for message in sink.messages}) == len(sink.messages) == MOST_OWNERS
    assert '"event":"owners.left_out"' in logged()
    outcomes = await connection.fetch("select counts::text from bon_scheduler.business_outcomes")
    assert ['"left_out": 280' in row["counts"] or '"left_out":280' in row["counts"] for row in outcomes] == [True]
    await connection.execute(
        "insert into business_shaam_credentials (business_id, encrypted_access_token, encrypted_refresh_token, "
        "token_expires_at, needs_reauth) values ($1, 'x', 'x', now(), true)",
        business,
    )
    asked = await run_job(notify_reauth, NotifyReauth(business_id=business), fire_time=NOW, **through)
    assert (asked.run["counts"]["sent"], asked.run["counts"]["left_out"]) == (MOST_OWNERS, 280)


async def test_so_many_owners_and_no_more_leave_nobody_out(run_job: RunJob, connection: Connection) -> None:
    business = await arrange.business(connection)
    for n in range(MOST_OWNERS):
        for spelling in ("owner", "OWNER"):
            await arrange.owner(connection, business, f"{spelling}{n}@shop.example")
    assert len(await read_recipients(connection, business)) == MOST_OWNERS
    await arrange.invoice(connection, business, due_date=AS_OF - timedelta(days=1))
    report = await run_job(send_overdue_digest, SendOverdueDigest(business_id=business, as_of=AS_OF), fire_time=NOW)
    assert report.run["counts"].get("left_out") is None
    assert report.run["counts"]["logged"] == MOST_OWNERS
