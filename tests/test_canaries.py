"""
No secret and nobody's personal data are in anything that the service writes, whatever others quote back at it.

Each secret setting and each personal field of BON's tables holds a text that is nowhere else. `serve` runs every job
against a mail server and an authority that answer with all they know; then everything is read that can be read. A
letter may hold what its owner may see; the ledger's rows, logs, metrics and commands hold ids and counts alone.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote_plus, urlsplit, urlunsplit

import aiohttp
import pytest
from aiohttp import web

from bon_scheduler import declared
from bon_scheduler.shaam.cipher import TokenCipher
from tests import arrange
from tests.conftest import Connection
from tests.process import run_command, serve
from tests.waiting import until

KEY = "c0ffee" + "5eadbeef90a1b2c3d4e5f6071829304a5b6c7d8e9fa0b1c2d3e4f50617"
AMOUNT = 73_519_462
SECRETS = {
    "database password": "cnry-db-p4ss:w0rd",
    "smtp user": "cnry-smtp-user",
    "smtp password": "cnry-smtp-p4ss word",
    "shaam client": "cnry-shaam-client",
    "shaam secret": "cnry-shaam-s3cret&+",
    "encryption key": KEY,
    "metrics token": "cnry-metrics-token",
    "dead man's address": "cnry-deadman-uuid",
    "access token": "cnry-access-token-0123456789",
    "refresh token": "cnry-refresh-token-0123456789",
}
PERSONAL = {
    "user's name": "Cnrydana Cnrylevi",
    "user's address": "cnry.owner@cnry-shop.example",
    "user's telephone": "+972501230099",
    "user's google id": "cnrygoogle10987",
    "business's name": "Cnrystudio & Sons",
    "business's number": "519990077",
    "business's vat number": "559990088",
    "business's address": "cnry.office@cnry-shop.example",
    "customer's name": "Cnrycustomer Ltd",
    "customer's address": "cnry.customer@cnry-buyer.example",
    "customer's street": "9 Cnrystreet, Haifa",
    "customer's tax id": "539990066",
    "document's number": "CNRY-2026-00042",
    "allocation number": "cnryalloc77",
    "item": "Cnryservice for a wedding",
    "amount": str(AMOUNT),
    "amount as people write it": f"{AMOUNT / 100:,.2f}",
}
OWNER, WATCHED = PERSONAL["user's address"], SECRETS["dead man's address"]
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("jobs",),
    ("runs", "--limit", "1000"),
    ("audit",),
    ("timeline",),
    ("check",),
    ("rehearse",),
    ("run-once", "overdue-detection", "--dry-run"),
    ("run-once", "shaam-token-refresh", "--dry-run"),
    ("run-once", "session-cleanup"),
    ("enqueue", "session-cleanup", "--key", "k"),
)
TABLES = "select c.relname from pg_class c where c.relnamespace = 'bon_scheduler'::regnamespace and c.relkind = 'r'"


def forms(secret: str) -> Iterator[str]:
    """Yield what a text looks like where it is said plainly, in base64, percent-encoded, in hex or in JSON."""
    yield secret
    yield quote_plus(secret)
    yield json.dumps(secret)[1:-1]
    yield secret.encode().hex()
    for before in ("", "x", "xx"):  # in the middle of a longer text it has one of three forms
        coded = base64.b64encode((before + secret).encode()).decode().rstrip("=")
        yield coded[4 if before else 0 : -2]


def found_in(text: str) -> set[str]:
    """Return which canaries a text holds, by name."""
    lower = text.lower()
    return {
        name
        for name, canary in {**SECRETS, **PERSONAL}.items()
        if any(len(form) > 5 and form.lower() in lower for form in forms(canary))
    }


@dataclass
class QuotingMail:
    """A mail server that refuses, now at this stage and now at that, with everything it was told."""

    refuses: str = "AUTH"
    heard: list[str] = field(default_factory=list)
    refused: int = 0

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said: list[str] = []

        def answer(code: int, text: str) -> None:
            writer.write(f"{code} {text}\r\n".encode())

        answer(220, "here")
        while line := (await reader.readline()).decode(errors="replace").strip():
            said.append(line)
            self.heard.append(line)
            command = line.split()[0].upper()
            if command == "EHLO":
                writer.write(b"250-here\r\n250 AUTH PLAIN LOGIN\r\n")
            elif command == self.refuses:
                self.refused += 1
                answer(535 if command == "AUTH" else 554, self._quote(said))
            elif command == "DATA":
                answer(354, "go on")
                while (await reader.readline()).strip() != b".":
                    pass
                if self.refuses == "BODY":
                    self.refused += 1
                    words = list(PERSONAL.values())
                    first = 3 * self.refused % len(words)  # whoever keeps the beginning of an answer keeps another
                    answer(554, f"spam: {' '.join(words[first:] + words[:first])} {self._quote(said)}")
                else:
                    answer(250, "OK")
            elif command == "AUTH":
                answer(235, "welcome")
            else:
                answer(221 if command == "QUIT" else 250, "OK")
            await writer.drain()
        writer.close()

    def _quote(self, said: list[str]) -> str:
        login = next((line.split()[-1] for line in said if line.upper().startswith("AUTH")), "")
        decoded = base64.b64decode(login + "==").decode(errors="replace").replace("\0", " ") if login else ""
        return f"refused: {said[-1]} [{login}] ({decoded}) {OWNER}"[:800]


class QuotingAuthority:
    """An authority that answers each request with everything it was told."""

    def __init__(self) -> None:
        self.answers = [400, 401, 403, 418, 500, 200, 429]
        self.asked = 0

    async def answer(self, request: web.Request) -> web.Response:
        told = {**await request.post(), "authorization": request.headers.get("Authorization", "")}
        words = " ".join(f"{name}={value!s}" for name, value in told.items())
        status = self.answers[self.asked % len(self.answers)]
        self.asked += 1
        body = {
            "error": f"odd {words}"[:120],
            "error_description": words,
            "moreInformation": words,
            "httpMessage": words,
        }
        return web.json_response(body, status=status, headers={"X-Echo": words[:500]}, reason=words[:60])


@asynccontextmanager
async def listening(handler: object) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)  # type: ignore[arg-type]
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def plant(connection: Connection, numbers: range) -> None:
    """Make businesses that are owed something, whose tokens are due, with a canary in each personal field."""
    cipher = TokenCipher(KEY)
    for n in numbers:
        more = "" if n == 0 else str(n)
        owner = await arrange.user(
            connection,
            email=f"{more}{OWNER}",
            name=PERSONAL["user's name"],
            phone=PERSONAL["user's telephone"],
            google_id=PERSONAL["user's google id"],
        )
        business = await arrange.business(
            connection,
            name=PERSONAL["business's name"],
            registration_number=PERSONAL["business's number"] + more,
            vat_number=PERSONAL["business's vat number"] + more,
            email=PERSONAL["business's address"],
            created_by_user_id=owner,
        )
        members = {"user_id": owner, "business_id": business, "role": "owner"}
        await arrange.insert(connection, "user_businesses", members)
        invoice = await arrange.invoice(
            connection,
            business,
            due_date=datetime.now(UTC).date() - timedelta(days=10),
            customer_id=await arrange.customer(
                connection, business, name=PERSONAL["customer's name"], email=PERSONAL["customer's address"]
            ),
            customer_name=PERSONAL["customer's name"],
            customer_email=PERSONAL["customer's address"],
            customer_address=PERSONAL["customer's street"],
            customer_tax_id=PERSONAL["customer's tax id"],
            document_number=PERSONAL["document's number"],
            allocation_number=PERSONAL["allocation number"],
            total_incl_vat_minor_units=AMOUNT,
        )
        await arrange.item(connection, invoice, description=PERSONAL["item"], unit_price_minor_units=AMOUNT)
        await arrange.draft(connection, business, customer_name=PERSONAL["customer's name"])
        credentials = {
            "business_id": business,
            "encrypted_access_token": cipher.encrypt(SECRETS["access token"]),
            "encrypted_refresh_token": cipher.encrypt(f"{SECRETS['refresh token']}{n}"),
            "token_expires_at": datetime.now(UTC) + timedelta(minutes=1),
            "scope": "kept",
            "needs_reauth": n == 1,
            "updated_at": arrange.LONG_AGO,
        }
        await arrange.insert(connection, "business_shaam_credentials", credentials)


def with_password(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(
        parts._replace(
            netloc=f"{parts.username}:{quote_plus(SECRETS['database password'])}@{parts.hostname}:{parts.port}"
        )
    )


async def read_everything(connection: Connection, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what each read command says, with and without --json, and each table of ours as text."""
    outputs = {}
    runs = [str(row["id"]) for row in await connection.fetch("select id from bon_scheduler.runs order by enqueued_at")]
    for command in (*COMMANDS, *(("show", run) for run in runs[:6])):
        for more in ((), ("--json",)):
            ended = await run_command(*command, *more, **environ)
            outputs[" ".join([*command, *more])] = ended.out + ended.err
    away = {**environ, "DATABASE_URL": with_password("postgresql://postgres@127.0.0.1:9/x")}
    login = f"{SECRETS['smtp user']}:{SECRETS['smtp password']}"
    odd = {**environ, "SHAAM_ENCRYPTION_KEY": f"{KEY}zz", "SMTP_HOST": f"{login}@mail.example"}
    for name, wrong in {"away": away, "odd": odd}.items():
        ended = await run_command("check", **wrong)
        outputs[f"check {name}"] = ended.out + ended.err
    for row in await connection.fetch(TABLES):
        texts = await connection.fetch(f"select t::text as row from bon_scheduler.{row['relname']} t")
        outputs[f"table {row['relname']}"] = "\n".join(each["row"] for each in texts)
    return outputs


async def until_refused(mail: QuotingMail, connection: Connection, stage: str, numbers: range) -> None:
    """Have the mail server refuse letters of new businesses at a stage, and wait until it has."""
    mail.refuses, before = stage, mail.refused
    await plant(connection, numbers)
    await connection.execute("select bon_scheduler.enqueue('overdue-detection')")
    reset = "update bon_scheduler.mail_gate set closed_since = null, closed_until = '-infinity', failures = 0"
    soon = (
        "update bon_scheduler.runs set run_at = null, ready = true where not ready and state in ('queued', 'retrying')"
    )

    async def refused() -> bool:
        await connection.execute(f"{reset}; {soon}")
        return mail.refused >= before + len(numbers)

    await until(refused, seconds=40)
    await asyncio.sleep(0.5)  # what the refusal is written into, is written


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("client_auth", ["basic", pytest.param("body", marks=pytest.mark.long)])
async def test_no_canary_is_in_anything_that_can_be_read(
    database_url: str, connection: Connection, client_auth: str, tmp_path: Path
) -> None:
    mail, authority = QuotingMail(), QuotingAuthority()
    post_office = await asyncio.start_server(mail.converse, "127.0.0.1", 0)

    async def unwell(request: web.Request) -> web.Response:
        return web.Response(status=500, text=request.path)

    async with listening(authority.answer) as authority_url, listening(unwell) as watcher_url:
        environ = {
            "DATABASE_URL": with_password(database_url),
            "SMTP_HOST": "127.0.0.1",
            "SMTP_PORT": str(post_office.sockets[0].getsockname()[1]),
            "SMTP_TLS": "none",
            "SMTP_USERNAME": SECRETS["smtp user"],
            "SMTP_PASSWORD": SECRETS["smtp password"],
            "EMAIL_RATE_PER_SECOND": "100",
            "SHAAM_MODE": "sandbox",
            "SHAAM_TOKEN_URL": f"{authority_url}/token",
            "SHAAM_CLIENT_AUTH": client_auth,
            "SHAAM_CLIENT_ID": SECRETS["shaam client"],
            "SHAAM_CLIENT_SECRET": SECRETS["shaam secret"],
            "SHAAM_ENCRYPTION_KEY": KEY,
            "SPOOL_DIR": str(tmp_path),
            "METRICS_TOKEN": SECRETS["metrics token"],
            "LOG_LEVEL": "debug",
            **{
                f"DEADMAN_URL_{job.name.upper().replace('-', '_')}": f"{watcher_url}/{WATCHED}"
                for job in declared.JOBS
                if job.schedule
            },
        }
        pages = []
        async with serve(**environ) as service, aiohttp.ClientSession() as session:
            for job in declared.JOBS:
                await connection.execute("select bon_scheduler.enqueue($1)", job.name)
            for number, stage in enumerate(("AUTH", "MAIL", "RCPT", "DATA", "BODY")):
                await until_refused(mail, connection, stage, range(4 * number, 4 * number + 4))

            await connection.execute("select bon_scheduler.enqueue('shaam-token-refresh')")

            async def asked() -> bool:
                return authority.asked >= 5

            await until(asked, seconds=30)
            headers = {"Authorization": f"Bearer {SECRETS['metrics token']}"}
            for path in ("/metrics", "/readyz", "/livez", "/no-such"):
                async with session.get(f"http://127.0.0.1:{service.port}{path}", headers=headers) as page:
                    pages.append(f"{page.headers} {await page.text()}")
            async with session.get(f"http://127.0.0.1:{service.port}/metrics") as page:
                assert page.status == 401
                pages.append(await page.text())
            outputs = await read_everything(connection, environ)
            await service.stop()
    post_office.close()
    outputs["pages"] = "\n".join(pages)
    outputs["log"] = "\n".join(json.dumps(line, ensure_ascii=False) for line in service.events)
    # The others were told what they quote, so that there was something to be found.
    assert mail.heard
    assert "delivery.refused" in outputs["log"]
    assert len(outputs["table attempts"]) > 100
    # Until replies of mail servers are kept without their words, this fails by what `QuotingMail` quotes, the login and
    # the letter's words, in the log and in tables attempts, deliveries and mail_gate, and by nothing else.
    assert {name: sorted(held) for name, text in outputs.items() if (held := found_in(text))} == {}


def test_a_canary_is_found_in_each_form_that_it_may_take() -> None:
    for name, canary in SECRETS.items():
        assert name in found_in(f"said {canary}!")
        assert name in found_in(quote_plus(canary))
        for before in ("", "u", "us", "\0user\0", "user:"):
            assert name in found_in(base64.b64encode(f"{before}{canary}:more".encode()).decode()), before
    assert found_in("nothing at all, 42") == set()
