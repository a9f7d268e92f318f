"""What is kept of a mail server's answers."""

from dataclasses import replace

import pytest

from bon_scheduler.mail.replies import clean_reply
from tests.mailserver import Server
from tests.mailworld import LETTER, World

SUBJECT = "BON: 3 overdue invoices – \u2068Studio Dana 54\u2069"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (f"5.7.1 spam: '{SUBJECT}'", "5.7.1 spam: '[subject]: 3 [subject] 54\u2069'"),
        ("5.7.1 DANA'S letter is spam", "5.7.1 [subject]'S letter is spam"),
        ("5.7.1 no =?utf-8?b?16HXmNeV15PXmdeV?= =?utf-8?b?15M", "5.7.1 no [subject]"),
        ("4.3.2 total 12,345.00 or 99.50", "4.3.2 total [amount] or [amount]"),
        ("5.1.1 <dana.owner@shop.example> is not here", "5.1.1 <[address]> is not here"),
        ("2.0.0 queued as 54F3A by 10.0.0.25 over TLSv1.3", "2.0.0 queued as 54F3A by 10.0.0.25 over TLSv1.3"),
    ],
)
def test_what_a_server_quotes_of_a_letter_is_not_kept_and_the_rest_is(said: str, kept: str) -> None:
    assert clean_reply(550, said, replace(LETTER, subject=SUBJECT)) == f"550 {kept}"


@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")
async def test_the_ledger_keeps_no_subject(world: World, server: Server) -> None:
    server.on["DATA"] = "554 5.7.1 spam: Studio Dana is owed 12,345.00"
    await world.deliver(letter=replace(LETTER, subject=SUBJECT))
    assert await world.rows() == [("refused", "554 5.7.1 spam: [subject] is owed [amount]")]
