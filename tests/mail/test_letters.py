"""How a letter is written: its headers, and which settings it can be written with."""

import re
from dataclasses import replace
from datetime import datetime
from email import message_from_bytes, policy
from email.message import EmailMessage

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon_scheduler.addresses import read_mailbox
from bon_scheduler.config import Settings
from bon_scheduler.environment import SettingsError, load_settings
from bon_scheduler.jobs import NeverRetryError
from bon_scheduler.mail import message as messages
from bon_scheduler.mail.message import Letter, Written
from tests.mailworld import LETTER, NOW, RECIPIENT, settings

KEY = b"k" * 64


def compose(letter: Letter, settings: Settings, *, now: datetime, key: bytes = KEY) -> EmailMessage:
    mailbox = read_mailbox(letter.recipient)
    assert mailbox is not None
    return messages.compose(letter, mailbox, settings, now=now, key=key)


def write(letter: Letter, settings: Settings, *, now: datetime) -> Written:
    written = messages.write(letter, settings, now=now, key=KEY)
    assert written is not None
    return written


def test_the_headers_say_that_a_machine_wrote_it() -> None:
    message = compose(LETTER, settings(None), now=NOW)
    assert message["Date"] == "Mon, 23 Nov 2026 04:00:00 +0000"
    assert message["From"] == "BON <noreply@bon.co.il>"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["Content-Language"] == "he"
    assert message.get_content_type() == "multipart/alternative"
    assert [part.get_content_charset() for part in message.iter_parts()] == ["utf-8", "utf-8"]
    assert message["List-Unsubscribe"] is None


def test_the_message_id_depends_on_the_key_alone() -> None:
    def written(letter: Letter) -> str:
        return str(compose(letter, settings(None), now=NOW)["Message-ID"])

    first = written(LETTER)
    assert re.fullmatch(r"<[0-9a-f]{32}@bon\.co\.il>", first)
    assert written(replace(LETTER, subject="other", text="other", recipient=RECIPIENT.lower())) == first
    assert written(replace(LETTER, recipient="other@shop.example")) != first


def test_a_long_unsubscribe_address_stays_readable() -> None:
    url = "https://app.example.com/unsubscribe/" + "x" * 150
    source = compose(LETTER, settings(None, unsubscribe_url=url), now=NOW).as_bytes()
    assert f"\r\nList-Unsubscribe: <{url}>\r\n".encode() in source
    assert b"\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n" in source


@given(st.text(st.sampled_from('אבגדה ABC –\u2068\u2069🌳"<>,.'), max_size=120))
def test_a_subject_arrives_as_it_was_written(subject: str) -> None:
    source = compose(replace(LETTER, subject=subject), settings(None), now=NOW).as_bytes()
    assert str(message_from_bytes(source, policy=policy.default)["Subject"]) == " ".join(subject.split())
    assert max(map(len, source.split(b"\r\n"))) <= 998


@pytest.mark.parametrize("separator", ["\r\n", "\n", "\r", "\x0b", "\x85", "\u2028", "\x00"])
def test_a_name_cannot_begin_a_header(separator: str) -> None:
    letter = replace(LETTER, subject=f"Studio{separator}Bcc: victim@x.example")
    source = compose(letter, settings(None), now=NOW).as_bytes()
    message = message_from_bytes(source, policy=policy.default)
    assert message["Bcc"] is None
    assert message["Subject"] == "Studio Bcc: victim@x.example"


def test_nothing_is_written_for_what_is_no_address() -> None:
    assert messages.write(replace(LETTER, recipient="secret\r\nBcc: x"), settings(None), now=NOW, key=KEY) is None


def test_a_letter_has_a_size() -> None:
    with pytest.raises(NeverRetryError, match="is not sent; at most 1,048,576 are"):
        write(replace(LETTER, text="x" * 800_000), settings(None), now=NOW)
    written = write(replace(LETTER, subject="x" * 1_000_000), settings(None), now=NOW)
    assert len(written.content) < 3_000


def test_a_message_id_tells_its_recipient_to_nobody_without_the_key() -> None:
    first, second = (str(compose(LETTER, settings(None), now=NOW, key=key)["Message-ID"]) for key in (KEY, b"l" * 64))
    assert first != second


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("EMAIL_FROM", address)
            for address in (
                "<noreply@bon.co.il>",
                "noreply@bon..co.il",
                "a@b@bon.co.il",
                "a..b@bon.co.il",
                ".a@bon.co.il",
                "a.@bon.co.il",
                "a,b@bon.co.il",
                "a(b)@bon.co.il",
                "no\u202ereply@bon.co.il",
                "נו@bon.co.il",
                "noreply@בון.קום",
                "noreply@bon.co.il\n",
                "noreply@[-1@",  # one that Python's own parser stumbles over
            )
        ),
        *(
            ("UNSUBSCRIBE_URL", f"https://bon.co.il/{path}")
            for path in ("הסרה", "u\nBcc: x", "a b", "u>, <mailto:x@y.example", "u\x7f")
        ),
    ],
)
def test_what_cannot_stand_in_a_header_is_refused_at_start(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}: must be .*(ASCII|percent-encode)"):
        load_settings({"DATABASE_URL": "postgresql://x", name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EMAIL_FROM", "o'brien+bon_x@mail-1.bon.co.il"),
        ("EMAIL_FROM", "bon@localhost"),
        ("UNSUBSCRIBE_URL", "https://bon.co.il/u/?who=a%20b&then=/"),
    ],
)
def test_what_settings_accept_stands_in_the_letter_as_it_is(name: str, value: str) -> None:
    usable = load_settings({"DATABASE_URL": "postgresql://x", name: value})
    assert f" <{value}>\r\n".encode() in write(LETTER, usable, now=NOW).content
