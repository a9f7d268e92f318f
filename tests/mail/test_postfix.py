"""One delivery from detection to a mailbox, through Debian's Postfix, over verified STARTTLS."""

import asyncio
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from os import geteuid
from pathlib import Path
from socket import socket

import pytest
import trustme

from tests import arrange
from tests.conftest import Connection
from tests.process import run_command
from tests.waiting import until

POSTFIX = shutil.which("postfix", path="/usr/sbin:/usr/bin")
pytestmark = pytest.mark.skipif(
    POSTFIX is None or geteuid() != 0, reason="needs Postfix, and root to start one of our own: apt-get install postfix"
)

MAIN = """
compatibility_level = 3.6
queue_directory = {home}/queue
data_directory = {home}/data
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
maillog_file = {home}/maillog
maillog_file_prefixes = {home}
mail_owner = postfix
setgid_group = postdrop
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = mail.shop.example
mydestination =
mynetworks = 127.0.0.0/8
virtual_mailbox_domains = shop.example
virtual_mailbox_base = {home}/mail
virtual_mailbox_maps = static:owner/
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
smtpd_tls_security_level = encrypt
smtpd_tls_cert_file = {home}/server.pem
smtpd_tls_key_file = {home}/server.pem
smtpd_recipient_restrictions = permit_mynetworks, reject
"""
MASTER = """
127.0.0.1:{port} inet n - n - - smtpd
pickup    unix  n - n 60 1 pickup
cleanup   unix  n - n - 0 cleanup
qmgr      unix  n - n 300 1 qmgr
tlsmgr    unix  - - n 1000? 1 tlsmgr
rewrite   unix  - - n - - trivial-rewrite
bounce    unix  - - n - 0 bounce
defer     unix  - - n - 0 bounce
trace     unix  - - n - 0 bounce
proxymap  unix  - - n - - proxymap
error     unix  - - n - - error
retry     unix  - - n - - error
virtual   unix  - n n - - virtual
anvil     unix  - - n - 1 anvil
postlog   unix-dgram n - n - 1 postlogd
"""


@dataclass(frozen=True)
class Postfix:
    """A Postfix that takes mail for shop.example into one mailbox."""

    home: Path
    port: int

    def mailbox(self) -> list[EmailMessage]:
        files = sorted((self.home / "mail" / "owner" / "new").glob("*"))
        return [message_from_bytes(file.read_bytes(), policy=policy.default) for file in files]


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that Postfix's own users may enter, as they may not enter pytest's."""
    with tempfile.TemporaryDirectory(prefix="bon-postfix-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        for part in ("queue", "data", "mail"):
            (directory / part).mkdir()
        shutil.chown(directory / "data", pwd.getpwnam("postfix").pw_uid)
        shutil.chown(directory / "mail", 65534, 65534)
        yield directory


@pytest.fixture
async def postfix(home: Path, authority: trustme.CA) -> AsyncIterator[Postfix]:
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(home / "server.pem"))
    authority.cert_pem.write_to_path(str(home / "authority.pem"))
    (home / "main.cf").write_text(MAIN.format(home=home))
    (home / "master.cf").write_text(MASTER.format(port=port))

    def run(action: str) -> None:
        subprocess.run([str(POSTFIX), "-c", str(home), action], check=True, capture_output=True, timeout=30)

    await asyncio.to_thread(run, "start")
    try:
        yield Postfix(home, port)
    finally:
        await asyncio.to_thread(run, "stop")


async def test_a_digest_reaches_the_owners_mailbox_whole(
    postfix: Postfix, connection: Connection, database_url: str
) -> None:
    business = await arrange.business(connection, name='סטודיו "גן" 🌳')
    await arrange.owner(connection, business, "owner@shop.example")
    due = datetime.now(UTC).date() - timedelta(days=40)
    await arrange.invoice(connection, business, due_date=due, customer_name="לקוח <ותיק>", document_number="INV-7")
    environ = {
        "DATABASE_URL": database_url,
        "SMTP_HOST": "127.0.0.1",
        "SMTP_PORT": str(postfix.port),
        "SSL_CERT_FILE": str(postfix.home / "authority.pem"),
    }
    ran = await run_command("run-once", "overdue-detection", "--json", **environ)
    assert ran.status == 0, ran.err

    async def arrived() -> list[EmailMessage]:
        return postfix.mailbox()

    (message,) = await until(arrived)
    assert " with ESMTPS " in str(message["Received"])
    assert str(message["Delivered-To"]) == "owner@shop.example"
    assert str(message["Subject"]) == '\u200fBON: חשבונית אחת באיחור – \u2068סטודיו "גן" 🌳\u2069'
    stored = await connection.fetchval("select message_id from bon_scheduler.deliveries where state = 'sent'")
    assert str(message["Message-ID"]) == stored
    text, html = (str(part.get_content()) for part in message.iter_parts())
    assert "לקוח <ותיק>" in text
    assert "לקוח &lt;ותיק&gt;" in html
    assert '<html lang="he" dir="rtl">' in html
