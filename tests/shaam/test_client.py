"""The token cipher against BON's own vectors, and the client against real HTTP servers on loopback."""

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from bon_scheduler.config import ClientAuth, Settings, ShaamMode
from bon_scheduler.shaam.cipher import TokenCipher, UnreadableTokenError
from bon_scheduler.shaam.client import (
    ON_DEMAND_SLOTS,
    Ambiguous,
    Answer,
    Misconfigured,
    NeedsReauth,
    Refreshed,
    Shaam,
    Transient,
)
from tests import tax

KEY = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
VECTORS = [
    (
        "refresh-token-אבג-₪-test",
        "cluRbJCFwvRrJ6IEhRYklK3P2dUAeIJ4zrCLOQfsAbhYw07galYnZmY5bcZuE5633bjATSmbqlpV",
    ),
    ("AAI", "/VxyyIk9avLhk9CeHQbQvYeA/bOE6/DYDFfa6Wc2aw=="),
    ("", "Is+xpbMwR7uCmZrx7vRMMvxpMgwpiuTOZcXaYw=="),
]
CLIENT_ID = "client-4711"
CLIENT_SECRET = "s3cret:+&/%"
TOKEN = "AAI-refresh-token-of-a-business"
GOOD = {
    "token_type": "Bearer",
    "access_token": "new-access",
    "scope": "scope",
    "expires_in": 601,
    "consented_on": 1767225600,
    "refresh_token": "new-refresh",
    "refresh_token_expires_in": 7776000,
}


# The cipher ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plaintext", "stored"), VECTORS)
def test_what_bon_has_encrypted_is_read(plaintext: str, stored: str) -> None:
    assert TokenCipher(KEY).decrypt(stored) == plaintext


@pytest.mark.parametrize(("plaintext", "stored"), VECTORS)
def test_the_key_may_be_written_in_either_case(plaintext: str, stored: str) -> None:
    assert TokenCipher(KEY.upper()).decrypt(stored) == plaintext


@pytest.mark.parametrize(("plaintext", "stored"), VECTORS)
def test_unpadded_and_url_safe_base64_are_read(plaintext: str, stored: str) -> None:
    cipher = TokenCipher(KEY)
    assert cipher.decrypt(stored.rstrip("=")) == plaintext
    assert cipher.decrypt(stored.replace("+", "-").replace("/", "_")) == plaintext
    assert cipher.decrypt(f"{stored[:20]}\n{stored[20:]}\n") == plaintext


@pytest.mark.parametrize("plaintext", [plaintext for plaintext, _ in VECTORS])
def test_what_is_written_has_bons_layout(plaintext: str) -> None:
    """Standard, padded base64 of iv ‖ tag ‖ ciphertext, opened here without our own decrypt."""
    blob = base64.b64decode(TokenCipher(KEY).encrypt(plaintext), validate=True)
    opened = AESGCM(bytes.fromhex(KEY)).decrypt(blob[:12], blob[28:] + blob[12:28], None)
    assert opened.decode() == plaintext


def test_the_same_token_is_never_sealed_alike() -> None:
    """The compare-and-set on the stored text relies on it."""
    cipher = TokenCipher(KEY)
    assert len({cipher.encrypt("AAI") for _ in range(100)}) == 100


def _damaged(stored: str) -> str:
    blob = bytearray(base64.b64decode(stored))
    blob[-1] ^= 1
    return base64.b64encode(blob).decode()


@pytest.mark.parametrize(
    "stored",
    [
        "",
        "AAAA",
        base64.b64encode(bytes(27)).decode(),
        base64.b64encode(bytes(28)).decode(),
        _damaged(VECTORS[0][1]),
        VECTORS[0][1][:-4],
        "not base64 !!!",
        "שלום",
        "A",
    ],
)
def test_an_unreadable_token_is_an_error_that_does_not_quote_it(stored: str) -> None:
    with pytest.raises(UnreadableTokenError) as caught:
        TokenCipher(KEY).decrypt(stored)
    assert not stored or stored not in str(caught.value)


def test_another_key_reads_nothing() -> None:
    with pytest.raises(UnreadableTokenError, match="another key"):
        TokenCipher("ff" * 32).decrypt(VECTORS[0][1])


def test_a_plaintext_that_is_not_utf8_is_unreadable() -> None:
    sealed = AESGCM(bytes.fromhex(KEY)).encrypt(bytes(12), b"\xff\xfe", None)
    with pytest.raises(UnreadableTokenError, match="UTF-8"):
        TokenCipher(KEY).decrypt(base64.b64encode(bytes(12) + sealed[-16:] + sealed[:-16]).decode())


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        TokenCipher("00" * 16)


# The client ------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A real HTTP server whose one answer a test decides."""

    url: str = ""
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None
    forms: list[dict[str, object]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    remotes: set[object] = field(default_factory=set)
    most_at_once: int = 0
    _now: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.forms.append(dict(await request.post()))
        self.headers.append(dict(request.headers))
        assert request.transport is not None
        self.remotes.add(request.transport.get_extra_info("peername"))
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            assert self.answer is not None
            return await self.answer(request)
        finally:
            self._now -= 1


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_post("/token", server.handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/token"
    yield server
    await runner.cleanup()


def settings(url: str, **changes: object) -> Settings:
    values: dict[str, object] = {
        "database_url": SecretStr("postgresql://nobody@localhost/none"),
        "shaam_mode": ShaamMode.SANDBOX,
        "shaam_encryption_key": SecretStr(tax.KEY),
        "shaam_client_id": SecretStr(CLIENT_ID),
        "shaam_client_secret": SecretStr(CLIENT_SECRET),
        "shaam_token_url": url,
        "shaam_timeout_seconds": 5,
    }
    return Settings.model_validate(values | changes)


async def refresh(server: Server, token: str = TOKEN, **changes: object) -> Answer:
    async with Shaam(settings(server.url, **changes)) as shaam:
        return await shaam.refresh(token)


def answers(
    status: int = 200, body: object = b"", headers: dict[str, str] | None = None
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=raw, headers=headers)

    return answer


def reason_of(answer: Answer) -> str:
    assert not isinstance(answer, Refreshed)
    return answer.reason


async def test_a_success_gives_the_new_tokens(server: Server) -> None:
    server.answer = answers(200, GOOD)
    assert await refresh(server) == Refreshed(
        "new-access", "new-refresh", timedelta(seconds=601), "scope", timedelta(days=90)
    )


async def test_the_request_is_the_authoritys_own_example(server: Server) -> None:
    server.answer = answers(200, GOOD)
    await refresh(server)
    assert server.forms == [
        {
            "grant_type": "refresh_token",
            "refresh_token": TOKEN,
            "scope": "scope",
            "client_id": CLIENT_ID,
            "client_secret": CLIENT_SECRET,
        }
    ]
    assert server.headers[0]["Content-Type"] == "application/x-www-form-urlencoded"
    assert "Authorization" not in server.headers[0]


async def test_basic_authentication_keeps_the_secret_out_of_the_body(server: Server) -> None:
    server.answer = answers(200, GOOD)
    await refresh(server, shaam_client_auth=ClientAuth.BASIC)
    assert server.forms == [{"grant_type": "refresh_token", "refresh_token": TOKEN, "scope": "scope"}]
    pair = base64.b64decode(server.headers[0]["Authorization"].removeprefix("Basic "))
    assert pair == b"client-4711:s3cret%3A%2B%26%2F%25"  # RFC 6749 §2.3.1: each form-encoded


@pytest.mark.parametrize("expires_in", ["601", " 601 ", 601.0])
async def test_a_lifetime_may_be_written_as_text(server: Server, expires_in: object) -> None:
    server.answer = answers(200, GOOD | {"expires_in": expires_in})
    answer = await refresh(server)
    assert isinstance(answer, Refreshed)
    assert answer.expires_in == timedelta(seconds=601)


ODD_LIFETIMES = [
    *("-1", "0", "1e30", "1e308", "1e400", "-1e400", "1e-300", "NaN", "Infinity", "9" * 5000),
    *("10000000000000", "1000000000000000"),
    *('"soon"', '""', '"٦٠١"', '"-5"', '"999999999999"', "true", "null", "[601]", "{}"),
]


@pytest.mark.parametrize("odd", ODD_LIFETIMES)
@pytest.mark.parametrize(("name", "instead"), [("expires_in", 601), ("refresh_token_expires_in", None)])
async def test_tokens_are_kept_whatever_is_said_of_their_lifetime(
    server: Server, name: str, instead: int | None, odd: str
) -> None:
    """The old token is spent: dropping the new one for an odd number would lock the business out."""
    server.answer = answers(200, json.dumps(GOOD | {name: "?"}).replace('"?"', odd).encode())
    answer = await refresh(server)
    assert isinstance(answer, Refreshed)
    said = {"expires_in": answer.expires_in, "refresh_token_expires_in": answer.refresh_token_expires_in}
    assert answer.refresh_token == "new-refresh"
    assert said[name] == (instead and timedelta(seconds=instead))


@pytest.mark.parametrize(
    ("written", "read"),
    [(r"a\u0000b", None), (r"a\nb", None), ("a\x00b", None), ("a\nb", None), (r"a\ud800", "a\ufffd"), ("", None)],
)
async def test_tokens_are_kept_whatever_is_said_of_their_scope(server: Server, written: str, read: str | None) -> None:
    """What PostgreSQL cannot hold would stop the tokens beside it from being saved."""
    server.answer = answers(200, json.dumps(GOOD | {"scope": "?"}).replace("?", written).encode())
    answer = await refresh(server)
    assert isinstance(answer, Refreshed)
    assert (answer.refresh_token, answer.scope) == ("new-refresh", read)


@pytest.mark.parametrize(
    ("written", "read"), [(r"a\u0000b", "a\x00b"), (r"a\ud800b", "a\ufffdb"), (r"a\ud83d\ude00", "a😀"), ("אב", "אב")]
)
async def test_a_token_of_odd_characters_can_still_be_sealed(server: Server, written: str, read: str) -> None:
    """It is sent back as it came, all but half a character, which nothing can encode."""
    body = json.dumps(GOOD | {"access_token": "?", "refresh_token": "?"}).replace("?", written)
    server.answer = answers(200, body.encode())
    answer = await refresh(server)
    assert isinstance(answer, Refreshed)
    assert (answer.access_token, answer.refresh_token) == (read, read)
    cipher = TokenCipher(KEY)
    assert cipher.decrypt(cipher.encrypt(answer.refresh_token)) == read


async def test_tokens_are_read_behind_a_byte_order_mark_and_beside_bytes_that_are_no_text(server: Server) -> None:
    server.answer = answers(200, b"\xef\xbb\xbf" + json.dumps(GOOD).encode().replace(b"Bearer", b"\xe4\xff"))
    assert isinstance(await refresh(server), Refreshed)


async def test_a_reason_with_half_a_character_in_it_can_be_stored(server: Server) -> None:
    server.answer = answers(400, {"error": "invalid_request", "error_description": "\ud800 \x00 no"})
    reason_of(await refresh(server)).encode()


async def test_tokens_are_kept_whatever_they_are_called(server: Server) -> None:
    server.answer = answers(200, GOOD, {"Content-Type": "text/html"})
    assert isinstance(await refresh(server), Refreshed)


async def test_the_optional_fields_may_be_missing(server: Server) -> None:
    server.answer = answers(200, {k: GOOD[k] for k in ("access_token", "refresh_token")})
    assert await refresh(server) == Refreshed("new-access", "new-refresh", timedelta(seconds=601))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><body>Welcome</body></html>",
        json.dumps(GOOD).encode()[:-20],
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 5000,
        *(
            {name: value for name, value in GOOD.items() if name != missing}
            for missing in ("access_token", "refresh_token")
        ),
        GOOD | {"access_token": ""},
        GOOD | {"refresh_token": None},
        GOOD | {"refresh_token": 12345},
        {"error": "invalid_grant", "error_description": "was used before"},
        {"httpCode": "401", "httpMessage": "Unauthorized", "moreInformation": "Invalid client id or secret."},
    ],
)
async def test_a_200_that_is_not_the_expected_json_is_ambiguous(server: Server, body: object) -> None:
    server.answer = answers(200, body)
    assert isinstance(await refresh(server), Ambiguous)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": "invalid_grant", "error_description": "The token was used before or revoked"}),
        (401, {"error": "invalid_grant", "error_description": "The token was used before or revoked"}),
        (400, {"error": "invalid_grant"}),
        (403, {"error": "invalid_grant"}),
    ],
)
async def test_only_invalid_grant_needs_the_owner_again(server: Server, status: int, body: object) -> None:
    server.answer = answers(status, body)
    assert isinstance(await refresh(server), NeedsReauth)


GATEWAY = {"httpCode": "401", "httpMessage": "Unauthorized"}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"error": "invalid_client"}),
        (400, {"error": "invalid_client", "error_description": "no such client"}),
        (400, {"error": "unauthorized_client"}),
        (400, {"error": "unsupported_grant_type"}),
        (401, GATEWAY | {"moreInformation": "Invalid client id or secret."}),
        (500, GATEWAY | {"moreInformation": "Invalid client id or secret."}),
        (401, {"error": "invalid_request", "error_description": "invalid client ID or secret"}),
        (400, {"error": "invalid_grant", "error_description": "Invalid client id or secret"}),
        (403, b""),
        (403, b"<html>Access denied</html>"),
        (403, {"httpCode": "403", "httpMessage": "Forbidden", "moreInformation": "blocked"}),
        (404, b"Not Found"),
    ],
)
async def test_the_applications_own_fault_is_misconfigured(server: Server, status: int, body: object) -> None:
    server.answer = answers(status, body)
    assert isinstance(await refresh(server), Misconfigured)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 599])
@pytest.mark.parametrize("body", [b"", b"<html>", {"error": "server_error"}])
async def test_an_outage_is_transient(server: Server, status: int, body: object) -> None:
    server.answer = answers(status, body)
    assert isinstance(await refresh(server), Transient)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b""),
        (400, b"{"),
        (400, {"error": "invalid_request"}),
        (401, {"error": "invalid_request", "error_description": "a parameter is missing"}),
        (401, GATEWAY | {"moreInformation": "something else"}),
        (400, {"error": ["invalid_grant"]}),
        (418, b"teapot"),
    ],
)
async def test_a_refusal_nobody_can_place_flags_nobody(server: Server, status: int, body: object) -> None:
    server.answer = answers(status, body)
    assert isinstance(await refresh(server), Ambiguous)


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "120"}, timedelta(minutes=2)),
        ({"Retry-After": "0"}, timedelta(0)),
        ({"Retry-After": "99999999999"}, timedelta(days=1)),
        ({"Retry-After": "9" * 5000}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "later"}, None),
        ({}, None),
        (
            {"Date": "Mon, 23 Nov 2026 04:00:00 GMT", "Retry-After": "Mon, 23 Nov 2026 04:10:00 GMT"},
            timedelta(minutes=10),
        ),
        (
            {"Date": "Mon, 23 Nov 2026 04:00:00 GMT", "Retry-After": "Mon, 23 Nov 2026 03:00:00 GMT"},
            timedelta(0),
        ),
        (
            {"Date": "Mon, 23 Nov 2026 04:00:00 GMT", "Retry-After": "Mon, 23 Nov 2099 03:00:00 GMT"},
            timedelta(days=1),
        ),
        ({"Retry-After": "Mon, 99 Nov 2026 04:10:00 GMT"}, None),
    ],
)
async def test_retry_after_is_read_and_bounded(server: Server, headers: dict[str, str], wait: timedelta | None) -> None:
    server.answer = answers(429, b"", headers)
    answer = await refresh(server)
    assert isinstance(answer, Transient)
    assert answer.retry_after == wait


async def test_a_redirect_is_not_followed(server: Server) -> None:
    server.answer = answers(307, b"", {"Location": server.url})
    assert isinstance(await refresh(server), Transient)
    assert len(server.forms) == 1


async def test_an_answer_that_does_not_come_is_transient_within_the_time_out(server: Server) -> None:
    never = asyncio.Event()

    async def stall(_: web.Request) -> web.StreamResponse:
        await never.wait()
        return web.Response()

    server.answer = stall
    async with asyncio.timeout(3):
        assert isinstance(await refresh(server, shaam_timeout_seconds=0.2), Transient)


async def _begin(request: web.Request, status: int, length: int, body: bytes) -> web.StreamResponse:
    response = web.StreamResponse(status=status)
    response.content_length = length
    await response.prepare(request)
    await response.write(body)
    return response


async def test_a_200_that_stalls_in_its_body_is_ambiguous(server: Server) -> None:
    """A 2xx that has begun means the token is spent: "try again later" would be a lie."""
    never = asyncio.Event()

    async def stall(request: web.Request) -> web.StreamResponse:
        response = await _begin(request, 200, 1000, b'{"access_token": "half')
        await never.wait()
        return response

    server.answer = stall
    assert isinstance(await refresh(server, shaam_timeout_seconds=0.3), Ambiguous)


async def test_a_200_that_breaks_off_is_ambiguous(server: Server) -> None:
    async def break_off(request: web.Request) -> web.StreamResponse:
        response = await _begin(request, 200, 1000, b'{"access_token": "half')
        assert request.transport is not None
        request.transport.close()
        return response

    server.answer = break_off
    assert isinstance(await refresh(server), Ambiguous)


@pytest.mark.parametrize(("status", "kind"), [(200, Ambiguous), (503, Transient), (403, Misconfigured)])
async def test_ten_megabytes_are_not_read(server: Server, status: int, kind: type[Answer]) -> None:
    written = 0

    async def pour(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for _ in range(160):
            await response.write(b" " * 65536)
            written += 65536
        await response.write(json.dumps(GOOD).encode())
        return response

    server.answer = pour
    answer = await refresh(server)
    assert isinstance(answer, kind)
    assert written < 10 * 1024 * 1024


async def test_a_compressed_bomb_is_not_unpacked_whole(server: Server) -> None:
    async def bomb(_: web.Request) -> web.StreamResponse:
        response = web.Response(body=b" " * (20 * 1024 * 1024))
        response.enable_compression(web.ContentCoding.gzip)
        return response

    server.answer = bomb
    assert isinstance(await refresh(server), Ambiguous)


async def test_a_server_that_is_not_there_is_transient() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/token"
        async with Shaam(settings(url)) as shaam:
            assert isinstance(await shaam.refresh(TOKEN), Transient)


@asynccontextmanager
async def raw_server(reply: bytes) -> AsyncIterator[str]:
    """Serve bytes that need not be HTTP."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(reply)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/token"


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"\x00\x01\x02 not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200",
        b"HTTP/1.1 999999 What\r\n\r\n",
        b"HTTP/1.1 503 " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 503 No\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_transient(reply: bytes) -> None:
    async with raw_server(reply) as url, Shaam(settings(url)) as shaam:
        assert isinstance(await shaam.refresh(TOKEN), Transient)


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nbad chunk\r\n",
    ],
)
async def test_a_200_with_a_broken_encoding_flags_nobody(reply: bytes) -> None:
    async with raw_server(reply) as url, Shaam(settings(url)) as shaam:
        assert isinstance(await shaam.refresh(TOKEN), Ambiguous | Transient)


async def test_a_certificate_nobody_vouches_for_is_refused() -> None:
    """The token and the secret are not sent to whoever answers in the authority's place."""
    trustme = pytest.importorskip("trustme")
    import ssl  # noqa: PLC0415 - used here only

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    seen: list[object] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(100))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}/token"
        async with Shaam(settings(url)) as shaam:
            assert isinstance(await shaam.refresh(TOKEN), Transient)
    assert not any(seen)


LEAKS = f"{CLIENT_ID} {CLIENT_SECRET} {TOKEN} {TOKEN.upper()} someone@example.com {'Zz9' * 30}"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": "invalid_grant", "error_description": f"the token {LEAKS} was used before"}),
        (401, {"error": "invalid_client", "error_description": f"client {LEAKS} is unknown"}),
        (401, GATEWAY | {"moreInformation": f"Invalid client id or secret. {LEAKS}"}),
        (503, {"error": "temporarily_unavailable", "error_description": LEAKS}),
        (400, {"error": LEAKS}),
        (200, GOOD | {"refresh_token": None, "error_description": LEAKS}),
        (200, LEAKS.encode()),
        (403, LEAKS.encode()),
        (400, {"error": "invalid_request", "error_description": "a" * 30 + " " + "y" * 150 + LEAKS}),
        (400, {"error": "invalid_request", "error_description": "z " * 90 + CLIENT_SECRET}),
    ],
)
async def test_no_reason_holds_a_secret(server: Server, status: int, body: object) -> None:
    server.answer = answers(status, body)
    answer = await refresh(server)
    for secret in (CLIENT_ID, CLIENT_SECRET, CLIENT_SECRET[:6], TOKEN, TOKEN.upper(), "Zz9", "@example"):
        assert secret not in reason_of(answer)
        assert secret not in repr(answer)
    if status == 200:
        assert "new-" not in reason_of(answer)


async def test_a_reason_says_what_came_on_one_short_line(server: Server) -> None:
    server.answer = answers(400, {"error": "invalid_grant", "error_description": "used\r\nbefore" + " x" * 300})
    reason = reason_of(await refresh(server))
    assert reason.startswith("HTTP 400: invalid_grant used before")
    assert len(reason) <= 200
    assert "\n" not in reason


async def test_the_repr_of_a_success_shows_no_token(server: Server) -> None:
    server.answer = answers(200, GOOD)
    answer = await refresh(server)
    assert "new-access" not in repr(answer)
    assert "new-refresh" not in repr(answer)


async def test_no_more_connections_than_the_concurrency_allows(server: Server) -> None:
    server.answer = answers(200, GOOD)
    async with Shaam(settings(server.url, shaam_concurrency=3)) as shaam:
        results = await asyncio.gather(*(shaam.refresh(TOKEN) for _ in range(30)))
    assert all(isinstance(result, Refreshed) for result in results)
    assert server.most_at_once <= 3 + ON_DEMAND_SLOTS
    assert len(server.remotes) <= 3 + ON_DEMAND_SLOTS  # and they are used again


async def test_a_cookie_is_not_carried_to_the_next_business(server: Server) -> None:
    server.answer = answers(200, GOOD, {"Set-Cookie": "session=1"})
    by_name = server.url.replace("127.0.0.1", "localhost")  # cookies are never kept for bare addresses
    async with Shaam(settings(by_name)) as shaam:
        await shaam.refresh(TOKEN)
        await shaam.refresh(TOKEN)
    assert "Cookie" not in server.headers[1]


async def test_mock_mode_opens_no_socket(server: Server) -> None:
    server.answer = answers(200, GOOD)
    mock = settings(server.url, shaam_mode=ShaamMode.MOCK)
    async with Shaam(mock) as shaam:
        assert shaam.mode is ShaamMode.MOCK
        assert isinstance(await shaam.refresh(TOKEN), Misconfigured)
    assert server.forms == []


async def test_a_client_that_is_not_open_says_so(server: Server) -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await Shaam(settings(server.url)).refresh(TOKEN)


@pytest.mark.parametrize(
    ("status", "body", "maybe_spent"),
    [
        (200, b"<html>", True),
        (400, b"<html>", False),
        (408, b"", True),
        (429, b"", False),
        (500, b"", True),
        (502, b"", True),
        (503, b"", False),
        (504, b"", True),
    ],
)
async def test_an_answer_says_whether_the_token_may_be_spent(
    server: Server, status: int, body: bytes, maybe_spent: bool
) -> None:
    server.answer = answers(status, body)
    answer = await refresh(server)
    assert isinstance(answer, Transient | Ambiguous)
    assert answer.maybe_spent is maybe_spent


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/", "https://no-such-host.invalid/x", "https://a..b/x"])
async def test_a_request_that_was_never_sent_has_spent_nothing(url: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        async with Shaam(settings(url.format(port=taken.getsockname()[1]))) as shaam:
            answer = await shaam.refresh(TOKEN)
    assert isinstance(answer, Transient)
    assert answer.reason.startswith("the connection failed")
    assert not answer.maybe_spent


async def test_a_request_without_an_answer_may_have_spent_the_token() -> None:
    async with raw_server(b"") as url, Shaam(settings(url)) as shaam:
        answer = await shaam.refresh(TOKEN)
    assert isinstance(answer, Transient)
    assert answer.maybe_spent
