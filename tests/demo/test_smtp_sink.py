"""What the mail server of the demo keeps, and that it ends when asked."""

import asyncio
from email.message import EmailMessage
from pathlib import Path

import aiosmtplib
import pytest

from bon_scheduler.demo.smtp_sink import smtp_sink

HTML = '<div dir="rtl">חשבונית <b>אחת</b></div>'


def digest(recipient: str) -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"] = "noreply@bon.example", recipient
    message["Subject"] = "חשבוניות באיחור"
    message.set_content("חשבונית אחת")
    message.add_alternative(HTML, subtype="html")
    return message


@pytest.mark.parametrize(
    ("recipient", "name"),
    [("oren@gan.example", "01-oren"), ('"../../etc/oren"@gan.example', "01-.._.._etc_oren")],
)
async def test_a_message_is_kept_whole_and_as_a_page_under_a_harmless_name(
    tmp_path: Path, recipient: str, name: str
) -> None:
    directory = tmp_path / "digests"
    async with smtp_sink(directory) as sink:
        await aiosmtplib.send(
            digest(recipient),
            hostname=sink.host,
            port=sink.port,
            sender="noreply@bon.example",
            recipients=[recipient],
        )
    assert [message["Subject"] for message in sink.messages] == ["חשבוניות באיחור"]
    assert sorted(path.name for path in directory.iterdir()) == [f"{name}.eml", f"{name}.html"]
    assert (directory / f"{name}.html").read_text().strip() == HTML


async def test_messages_are_numbered_after_those_that_an_earlier_server_left(tmp_path: Path) -> None:
    for name in ("09-oren.eml", "112-oren.eml", "90th-birthday.eml"):
        (tmp_path / name).write_text("kept")
    async with smtp_sink(tmp_path) as sink:
        await aiosmtplib.send(digest("oren@gan.example"), hostname=sink.host, port=sink.port)
    assert (tmp_path / "113-oren.eml").exists()
    assert (tmp_path / "09-oren.eml").read_text() == "kept"


async def test_a_client_that_stays_connected_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with asyncio.timeout(5):
        async with smtp_sink(tmp_path) as sink:
            reader, writer = await asyncio.open_connection(sink.host, sink.port)
            assert (await reader.readline()).startswith(b"220 ")
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
