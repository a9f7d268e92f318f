"""What is kept of a mail server's answers: codes, words of mail in general, and nothing that it may quote."""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import quote, quote_plus

import pytest
from aiosmtpd.smtp import SMTP
from pydantic import SecretStr

from bon_scheduler.config import SmtpTls
from bon_scheduler.mail.gate import gate_state
from bon_scheduler.mail.mailer import LetterDeferredError, MailUnavailableError
from bon_scheduler.mail.replies import REPLY_LENGTH, clean_reply
from bon_scheduler.mail.smtp import NotConnectedError, try_login
from tests.mailserver import PASSWORD, Server
from tests.mailworld import LETTER, RECIPIENT, World, settings

SUBJECT = "BON: 3 overdue invoices – \u2068Studio Dana 54\u2069"
pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (f"5.7.1 spam: '{SUBJECT}'", "5.7.1 spam: …"),
        ("5.7.1 DANA'S letter is spam", "5.7.1 … is spam"),
        ("5.7.1 no =?utf-8?b?16HXmNeV15PXmdeV?= =?utf-8?b?15M", "5.7.1 no …"),
        ("4.3.2 total 12,345.00 or 99.50 or 7", "4.3.2 … or … or …"),
        ("5.1.1 <dana.owner@shop.example> is not here", "5.1.1 <[address]> is not here"),
        ("5.1.1 <Dana.Owner@shop.example>: Recipient address rejected: User unknown in local recipient table",
         "5.1.1 <[address]>: Recipient address rejected: User unknown in local recipient table"),
        ("5.7.8 Username and Password not accepted. For more information, go to https://support.example/?p=Bad h12-20s",
         "5.7.8 Username and Password not accepted. For more information, go to …"),
        ("5.7.1 Service unavailable; Client host [10.0.0.25] blocked using zen.spamhaus.org",
         "5.7.1 Service unavailable; Client host [10.0.0.25] blocked using …"),
        ("4.2.0 Greylisted, try again in 300 seconds", "4.2.0 Greylisted, try again in … seconds"),
        ("message contains the name Noa", "message contains the name …"),
        ("user Studio unknown", "user … unknown"),
        ("\u05e0\u05d5\u05e2\u05d4 rejected", "… rejected"),
        ("\x1b]0;title\x07 \u202e rejected", "… rejected"),
    ],
)  # fmt: skip
def test_what_a_server_quotes_of_a_letter_is_not_kept_and_the_rest_is(said: str, kept: str) -> None:
    assert clean_reply(550, said, replace(LETTER, subject=SUBJECT)) == f"550 {kept}"


def test_a_name_of_words_of_mail_is_left_out_where_we_know_it() -> None:
    """Of the business, which is in the subject, and of the login."""
    letter = replace(LETTER, subject="BON: \u2068Mail Service\u2069")
    assert clean_reply(550, "rejected Mail Service", letter) == "550 rejected …"
    assert clean_reply(535, "unknown user relay", None, ("relay", "no such")) == "535 unknown user …"


def test_the_queues_id_is_kept_of_what_was_accepted() -> None:
    said = "2.0.0 Ok: queued as 54F3A by 10.0.0.25 over TLSv1.3"
    assert clean_reply(250, said, LETTER) == f"250 {said}"
    assert clean_reply(550, said, LETTER) == "550 2.0.0 Ok: queued as … by 10.0.0.25 over TLSv1.3"
    assert clean_reply(250, "queued as Noa", LETTER) == "250 queued as …"
    assert (
        clean_reply(250, f"queued as {base64.b64encode(b'x7 pass').decode()}", LETTER, ["x7 pass"]) == "250 queued as …"
    )


USER, SECRET = "bon-mailer@bon.example", "Pa55/wörd+ &=s3cret"
WIRE = {
    "plain": lambda: f"{USER} {SECRET}",
    "AUTH PLAIN": lambda: base64.b64encode(f"\0{USER}\0{SECRET}".encode()).decode(),
    "AUTH PLAIN with an identity": lambda: base64.b64encode(f"{USER}\0{USER}\0{SECRET}".encode()).decode(),
    "AUTH LOGIN": lambda: " ".join(base64.b64encode(text.encode()).decode() for text in (USER, SECRET)),
    "CRAM-MD5": lambda: base64.b64encode(
        f"{USER} {hmac.new(SECRET.encode(), b'<1@host>', hashlib.md5).hexdigest()}".encode()
    ).decode(),
    "base64 without its end": lambda: base64.b64encode(f"\0{USER}\0{SECRET}".encode()).decode().rstrip("="),
    "base64 in lines": lambda: " ".join(
        base64.b64encode(f"\0{USER}\0{SECRET}".encode()).decode()[at : at + 8] for at in range(0, 64, 8)
    ),
    "percent": lambda: f"{quote(USER)} {quote(SECRET, safe='')} {quote_plus(SECRET)}",
    "JSON": lambda: json.dumps([USER, SECRET]),
    "hexadecimal": lambda: SECRET.encode().hex(),
    "upper case": f"{USER} {SECRET}".upper,
}


@pytest.mark.parametrize("form", WIRE)
@pytest.mark.parametrize("code", [250, 535, 550])
@pytest.mark.parametrize("around", ["{}", "rejected {} rejected", "queued as {}", "x{}x", "[{}]"])
def test_no_form_of_our_login_is_kept(form: str, code: int, around: str) -> None:
    if form == "base64 in lines" and around.startswith("queued"):
        code = 550  # with 250 a piece of eight characters is taken for a queue's id
    quoted = WIRE[form]()
    kept = clean_reply(code, around.format(quoted), LETTER, (USER, SECRET))
    assert kept.replace(str(code), "").replace("rejected", "").replace("queued as", "").strip(" []") == "…"


class Words:
    """What must not be found in what was kept or said, in any form that a server may quote."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def found(self, where: str) -> list[str]:
        forms = {text: (text, base64.b64encode(text.encode()).decode().rstrip("=")[:-1]) for text in self.texts}
        return [text for text, several in forms.items() if any(form in where for form in several)]


NAMES = ("Noa Barak", "Barak", "נועה", "12,345.00")
BODY = f"{' '.join(NAMES)} owes you"


@pytest.mark.parametrize("command", ["RCPT", "DATA", "MAIL"])
@pytest.mark.parametrize("code", ["554 5.6.0", "451 4.7.1", "250 2.0.0", "421 4.3.0"])
async def test_a_server_that_quotes_all_it_was_told_leaves_nothing_anywhere(
    world: World, server: Server, command: str, code: str, logged: Callable[[], str]
) -> None:
    login = base64.b64encode(f"\0bon\0{PASSWORD}".encode()).decode()

    async def quote_all(session: SMTP) -> str:
        envelope = session.envelope
        content = (getattr(envelope, "content", None) or b"").decode(errors="replace").replace("\r\n", " ")[-300:]
        return f"{code} {login} bon {PASSWORD} {RECIPIENT} {BODY} {content} rejected".encode(
            "ascii", "replace"
        ).decode()

    server.on[command] = quote_all
    try:
        await world.deliver(letter=replace(LETTER, text=BODY, html=f"<p>{BODY}</p>"))
        told = ""
    except (LetterDeferredError, MailUnavailableError) as error:
        told = str(error)
    rows = await world.rows()
    gate = await world.pool.fetch("select trouble from bon_scheduler.mail_gate")
    everything = f"{told} {rows} {gate} {logged()}"
    secrets = Words(login, PASSWORD, RECIPIENT, "shop.example", *NAMES, LETTER.subject, BODY)
    assert secrets.found(everything) == []
    if rows or told:
        assert code[:3] in f"{rows}{told}" or "250" in f"{rows}"


async def test_a_server_that_quotes_the_login_leaves_it_nowhere(
    world: World, server: Server, logged: Callable[[], str]
) -> None:
    """Into the log, the gate, the error of a run and what `check` says: the AUTH line came back in all of them."""
    password = "wrong-s3cret"
    quoted = base64.b64encode(f"\0bon\0{password}".encode()).decode()
    server.on["AUTH"] = f"535 5.7.8 authentication failed for {quoted} bon {password}"
    mailer = await world.mailer(smtp_password=SecretStr(password))
    told = []
    for _ in range(4):
        with pytest.raises(Exception, match=r"535 5\.7\.8") as caught:
            await world.deliver(mailer)
        told.append(str(caught.value))
    async with world.pool.acquire() as connection:
        gate = await gate_state(connection)
    assert gate.trouble == "535 5.7.8 authentication failed for … (at AUTH)"
    assert (
        Words(password, quoted, base64.b64encode(password.encode()).decode()).found(f"{told} {gate} {logged()}") == []
    )
    assert len(gate.trouble) <= REPLY_LENGTH


@pytest.mark.parametrize(
    "password", ["wrong-s3cret", "wr\u00f6ng-s3cret", "wrong\r\ns3cret", "wrong\0s3cret", "\u05e1\u05d5\u05d3-s3cret"]
)
@pytest.mark.parametrize("stage", ["connect", "AUTH"])
async def test_what_check_says_of_a_login_holds_none_of_it(server: Server, password: str, stage: str) -> None:
    """Whatever fails: the server, which quotes it, or the writing of a password that no command can hold."""
    server.on["AUTH"] = f"535 5.7.8 no such user bon with {password!r} {quote(password)}"
    async with server.listening():
        given = settings(server, smtp_tls=SmtpTls.NONE, smtp_password=SecretStr(password))
        if stage == "connect":
            given = given.model_copy(update={"smtp_port": 1, "smtp_host": "127.0.0.1"})
        with pytest.raises(NotConnectedError) as caught:
            await try_login(given)
    told = f"{caught.value} {caught.value.said} {caught.value.args}"
    assert "s3cret" not in told
    assert f"(at {stage})" in told
    assert caught.value.__suppress_context__
