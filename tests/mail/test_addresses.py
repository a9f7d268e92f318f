"""Which texts are one mailbox, and how a mail server is told of it."""

import asyncio
import time
from dataclasses import replace

import pytest

from bon_scheduler.addresses import read_mailbox
from bon_scheduler.environment import SettingsError, load_settings
from bon_scheduler.mail.mailer import Delivery
from tests.mailserver import Server
from tests.mailworld import LETTER, World

NONE = [
    "o@example..org", "o@-bad.org", "o@bad-.org", "o@example.org.", "o@.example.org", "o@exa mple.org",
    "o@exa_mple.org",    "o@", "@example.org", "@", "", "o", "o@b@example.org",
    "o@example.org,p@example.org", "o@example.org;p@example.org",
    "<o@example.org>", "Dana <o@example.org>", "o(dana)@example.org", "o@example.org(dana)", '"o"@example.org',
    '"o p"@example.org', '"o@p"@example.org', "o@[192.0.2.1]", "o@[IPv6:::1]", "o@192.0.2.1", "o@example.123",
    "o@example.org\r\nBcc: p@example.org", "o@example.org\nRCPT TO:<p@example.org>",
    "o\r@example.org",    "o\x00@example.org",    "o\x1b@example.org", "o\u202e@example.org",
    "o@exa\u200bmple.org", "o@exam\u2028ple.org", "o\ud800@example.org",
    "o@\ud800.org", "o@xn--a.org", "o@ab--cd.org", "o:p@example.org", "o\\@example.org", "o p@example.org",
    "\u200f@a.org",    "o" * 65 + "@example.org", "o@" + "a" * 64 + ".org", "o@" + "a." * 130 + "org", "o" * 1_000_000,
    "o@" + "a." * 500_000,    "\u05d3" * 100_000 + "@example.org", "o@" + "\u05d3" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("text", NONE, ids=lambda text: ascii(text[:40]))
def test_what_is_not_one_mailbox_is_none(text: str) -> None:
    before = time.process_time()
    assert read_mailbox(text) is None
    assert time.process_time() - before < 0.5


@pytest.mark.parametrize(
    ("text", "address", "utf8"),
    [
        ("o@example.org", "o@example.org", False),
        (" Dana.Owner@Shop.Example\n", "Dana.Owner@shop.example", False),
        ("Info@example.org", "Info@example.org", False),
        ("o@\u05d7\u05d1\u05e8\u05d4.\u05d9\u05e9\u05e8\u05d0\u05dc", "o@xn--5dbgh3e.xn--4dbrk0ce", False),
        ("o@xn--5dbgh3e.xn--4dbrk0ce", "o@xn--5dbgh3e.xn--4dbrk0ce", False),
        ("o@b\u00fccher.example", "o@xn--bcher-kva.example", False),
        ("\u05d3\u05e0\u05d4@shop.example", "\u05d3\u05e0\u05d4@shop.example", True),
        (
            "\u05d3@\u05d7\u05d1\u05e8\u05d4.\u05d9\u05e9\u05e8\u05d0\u05dc",
            "\u05d3@\u05d7\u05d1\u05e8\u05d4.\u05d9\u05e9\u05e8\u05d0\u05dc",
            True,
        ),
        ("o'brien+x=1@b-c.example", "o'brien+x=1@b-c.example", False),
        ("a..b@c.example", "a..b@c.example", False),
        (".a@c.example", ".a@c.example", False),
        ("o@localhost", "o@localhost", False),
        ("o@box", "o@box", False),
        ("o@shop.test", "o@shop.test", False),
        ("o@shop.invalid", "o@shop.invalid", False),
        ("o@shop.local", "o@shop.local", False),
        ("o@TEST", "o@test", False),
        ("o" * 64 + "@example.org", "o" * 64 + "@example.org", False),
    ],
)
def test_a_mailbox_is_written_as_every_server_takes_it(text: str, address: str, utf8: bool) -> None:
    mailbox = read_mailbox(text)
    assert mailbox is not None
    assert (mailbox.address, mailbox.utf8) == (address, utf8)
    assert address not in repr(mailbox)


@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")
async def test_a_hebrew_domain_reaches_a_server_that_knows_ascii_alone(world: World, server: Server) -> None:
    server.utf8 = False
    letter = replace(LETTER, recipient="o@\u05d7\u05d1\u05e8\u05d4.\u05d9\u05e9\u05e8\u05d0\u05dc")
    assert await world.deliver(letter=letter) is Delivery.SENT
    assert server.recipients == ["o@xn--5dbgh3e.xn--4dbrk0ce"]
    assert server.received[0]["To"] == "o@xn--5dbgh3e.xn--4dbrk0ce"


@pytest.mark.parametrize("recipient", ["o@example..org", "o@-bad.org", "o@example.org."])
async def test_what_no_server_can_deliver_is_refused_without_asking_one(world: World, recipient: str) -> None:
    assert await world.deliver(letter=replace(LETTER, recipient=recipient)) is Delivery.REFUSED
    assert world.server.connections == 0


@pytest.mark.parametrize("text", NONE, ids=lambda text: ascii(text[:40]))
async def test_the_sender_is_one_mailbox_too(text: str) -> None:
    if not text:
        return  # not set
    with pytest.raises(SettingsError, match="EMAIL_FROM: must be one e-mail address in ASCII"):
        await asyncio.to_thread(load_settings, {"DATABASE_URL": "postgresql://x", "EMAIL_FROM": text})
