"""
A stand-in for the authority's token endpoint: a real HTTP server on loopback, for the demo and the tests.

It keeps the one rule that matters, as the authority does: a refresh token works once. A success
returns its successor; a token that was used before is refused, and everything that was ever
rotated from it is revoked. `Misbehaviour` makes it fail for one business in the ways seen in life.
"""

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from urllib.parse import unquote_plus

from aiohttp import web

__all__ = ["Misbehaviour", "ShaamSimulator", "shaam_simulator"]

HOST = "127.0.0.1"
PATH = "/shaam/tsandbox/longtimetoken/oauth2/token"
EXPIRES_IN_SECONDS = 601
REFRESH_TOKEN_EXPIRES_IN_SECONDS = 7_776_000
RETRY_AFTER_SECONDS = 120
USED_OR_REVOKED = "The refresh token was used before or revoked"


class Misbehaviour(StrEnum):
    """What goes wrong for one business."""

    INVALID_GRANT = "invalid_grant"
    """Its owner has withdrawn consent."""
    UNAVAILABLE = "unavailable"
    """503."""
    GARBAGE = "garbage"
    """200, but a page in HTML."""
    SLOW = "slow"
    """No answer until the server stops; nothing is rotated."""
    GATEWAY_401 = "gateway_401"
    """The gateway's own error format: "Invalid client id or secret"."""
    INVALID_CLIENT = "invalid_client"
    """The same in OAuth's format."""
    FORBIDDEN = "forbidden"
    """A 403 that says nothing, as to a foreign address."""
    DROP = "drop"
    """Rotates the token, then closes the connection without an answer."""
    TOO_MANY = "too_many"
    """429 with `Retry-After`."""
    REDIRECT = "redirect"
    """307 to itself; nothing is rotated."""
    EMPTY = "empty"
    """Rotates the token, and answers 200 with nothing; so do the next ones, with something else."""
    TRUNCATED = "truncated"
    """Half of the JSON."""
    MISSING_FIELDS = "missing_fields"
    """JSON without the new refresh token."""
    HUGE_BODY = "huge_body"
    """The JSON behind 10 MB of blanks."""
    SLOW_LORIS = "slow_loris"
    """The JSON, a byte at a time, until the server stops."""
    EXPIRES_TEXT = "expires_text"
    """The JSON with `expires_in` in quotation marks."""
    EXPIRES_NEGATIVE = "expires_negative"
    """With -1 for it."""
    EXPIRES_HUGE = "expires_huge"
    """With 10**30 for it."""
    REFRESH_EXPIRES_HUGE = "refresh_expires_huge"
    """With 10**13 for `refresh_token_expires_in`: more years than PostgreSQL counts."""
    SCOPE_NUL = "scope_nul"
    """With a NUL in its scope, which PostgreSQL cannot hold."""
    WRONG_TYPE = "wrong_type"
    """The JSON, called HTML."""


WITHOUT_ROTATION = frozenset(
    {
        Misbehaviour.INVALID_GRANT,
        Misbehaviour.UNAVAILABLE,
        Misbehaviour.GARBAGE,
        Misbehaviour.SLOW,
        Misbehaviour.GATEWAY_401,
        Misbehaviour.INVALID_CLIENT,
        Misbehaviour.FORBIDDEN,
        Misbehaviour.TOO_MANY,
        Misbehaviour.REDIRECT,
    }
)
"""What leaves the token as it was."""
SPOILED_FIELDS: dict[Misbehaviour, tuple[str, object]] = {
    Misbehaviour.MISSING_FIELDS: ("refresh_token", None),
    Misbehaviour.EXPIRES_TEXT: ("expires_in", str(EXPIRES_IN_SECONDS)),
    Misbehaviour.EXPIRES_NEGATIVE: ("expires_in", -1),
    Misbehaviour.EXPIRES_HUGE: ("expires_in", 10**30),
    Misbehaviour.REFRESH_EXPIRES_HUGE: ("refresh_token_expires_in", 10**13),
    Misbehaviour.SCOPE_NUL: ("scope", "a\0b"),
}
HUGE_BODY_BYTES = 10 * 1024 * 1024
LORIS_SECONDS = 0.05


@dataclass(slots=True)
class _Consent:
    """One owner's consent, and the refresh tokens that came from it, one after the other."""

    subject: str
    number: int
    generation: int = 0
    revoked: bool = False


@dataclass(slots=True)
class ShaamSimulator:
    """The running server: where it is, what it was asked, and what it holds valid."""

    client_id: str
    client_secret: str = field(repr=False)
    spoil: dict[str, Misbehaviour]
    """What goes wrong, by subject; may be changed while it runs."""
    seed: str = "bon"
    delay_seconds: float = 0
    """How long each answer takes."""
    token_url: str = ""
    requests: int = 0
    """How many token requests came, whatever became of them."""
    reuses: list[str] = field(default_factory=list)
    """The subjects whose spent tokens were sent again, in order."""
    _closing: asyncio.Event = field(default_factory=asyncio.Event)
    _consents: dict[str, list[_Consent]] = field(default_factory=dict)
    _issued: dict[str, tuple[_Consent, int]] = field(default_factory=dict)

    def issue(self, subject: str) -> str:
        """Give a business its first refresh token, as consent would; asked again, a new consent."""
        consents = self._consents.setdefault(subject, [])
        consents.append(_Consent(subject, len(consents)))
        return self._refresh_token(consents[-1])

    def accept(self, subject: str, token: str) -> None:
        """Honour a refresh token that an earlier simulator issued; this one needs another seed, to issue new ones."""
        consents = self._consents.setdefault(subject, [])
        consents.append(_Consent(subject, len(consents)))
        self._issued[token] = (consents[-1], consents[-1].generation)

    def current(self, subject: str) -> str:
        """Return the latest consent's unspent refresh token. Raises KeyError if none was issued."""
        return self._refresh_token(self._consents[subject][-1])

    def withdraw(self, subject: str) -> None:
        """Let the owner withdraw the latest consent."""
        self._consents[subject][-1].revoked = True

    def honours(self, token: str) -> bool:
        """Return whether a refresh token would be exchanged."""
        consent, generation = self._issued.get(token, (None, 0))
        return consent is not None and not consent.revoked and consent.generation == generation

    def secrets(self) -> set[str]:
        """Return every token that was ever issued."""
        access = {self._token("access", consent, n) for consent, n in self._issued.values()}
        return {*self._issued, *access}

    def _token(self, kind: str, consent: _Consent, generation: int | None = None) -> str:
        generation = consent.generation if generation is None else generation
        text = f"{self.seed}/{kind}/{consent.subject}/{consent.number}/{generation}"
        digest = hashlib.blake2b(text.encode(), digest_size=48).digest()
        return f"AA{base64.urlsafe_b64encode(digest).decode()}"

    def _refresh_token(self, consent: _Consent) -> str:
        token = self._token("refresh", consent)
        self._issued[token] = (consent, consent.generation)
        return token

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        if self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)
        form = {name: value for name, value in (await request.post()).items() if isinstance(value, str)}
        if not self._is_the_client(request, form):
            return _refusal("invalid_client", f"client {self.client_id} is not who it says", status=401)
        if form.get("grant_type") != "refresh_token":
            return _refusal("unsupported_grant_type", "only refresh_token and authorization_code")
        consent, generation = self._issued.get(form.get("refresh_token", ""), (None, 0))
        if consent is None:
            return _refusal("invalid_grant", USED_OR_REVOKED)
        fault = self.spoil.get(consent.subject)
        if fault in WITHOUT_ROTATION:
            return await self._refuse(Misbehaviour(fault), consent)
        return await self._exchange(request, consent, generation, fault)

    async def _exchange(
        self, request: web.Request, consent: _Consent, generation: int, fault: Misbehaviour | None
    ) -> web.StreamResponse:
        if generation != consent.generation:
            self.reuses.append(consent.subject)
            consent.revoked = True
        if consent.revoked:
            return _refusal("invalid_grant", USED_OR_REVOKED)
        tokens = self._rotate(consent)
        if fault is None:
            return web.json_response(tokens)
        return await self._spoil(fault, request, tokens)

    def _is_the_client(self, request: web.Request, form: Mapping[str, str]) -> bool:
        given = form.get("client_id", ""), form.get("client_secret", "")
        scheme, _, encoded = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                pair = base64.b64decode(encoded, validate=True).decode()
            except ValueError:
                return False
            name, _, secret = pair.partition(":")
            given = unquote_plus(name), unquote_plus(secret)
        expected = self.client_id, self.client_secret
        return all(hmac.compare_digest(a.encode(), b.encode()) for a, b in zip(given, expected, strict=True))

    def _rotate(self, consent: _Consent) -> dict[str, object]:
        consent.generation += 1
        return {
            "token_type": "Bearer",
            "access_token": self._token("access", consent),
            "scope": "scope",
            "expires_in": EXPIRES_IN_SECONDS,
            "consented_on": int(datetime.now(UTC).timestamp()),
            "refresh_token": self._refresh_token(consent),
            "refresh_token_expires_in": REFRESH_TOKEN_EXPIRES_IN_SECONDS,
        }

    async def _refuse(self, fault: Misbehaviour, consent: _Consent) -> web.StreamResponse:
        if fault is Misbehaviour.SLOW:
            await self._closing.wait()
        if fault is Misbehaviour.INVALID_GRANT:
            consent.revoked = True
        return _fault_answers(self.client_id)[fault]

    async def _spoil(
        self, fault: Misbehaviour, request: web.Request, tokens: Mapping[str, object]
    ) -> web.StreamResponse:
        name, value = SPOILED_FIELDS.get(fault, ("", None))
        body = json.dumps({field: value if field == name else kept for field, kept in tokens.items()})
        if fault is Misbehaviour.SLOW_LORIS:
            return await self._drip(request, body.encode())
        if fault is Misbehaviour.DROP and request.transport is not None:
            request.transport.abort()
        shapes = {
            Misbehaviour.DROP: "",
            Misbehaviour.EMPTY: "",
            Misbehaviour.TRUNCATED: body[: len(body) // 2],
            Misbehaviour.HUGE_BODY: " " * HUGE_BODY_BYTES + body if fault is Misbehaviour.HUGE_BODY else "",
        }
        kind = "text/html" if fault is Misbehaviour.WRONG_TYPE else "application/json"
        return web.Response(text=shapes.get(fault, body), content_type=kind)

    async def _drip(self, request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(body)
        await response.prepare(request)
        for byte in body:
            await response.write(bytes([byte]))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), LORIS_SECONDS)
        return response


def _fault_answers(client_id: str) -> dict[Misbehaviour, web.Response]:
    gateway = {"httpCode": "401", "httpMessage": "Unauthorized"}
    credentials = {"moreInformation": "Invalid client id or secret."}
    return {
        Misbehaviour.INVALID_GRANT: _refusal("invalid_grant", USED_OR_REVOKED),
        Misbehaviour.UNAVAILABLE: web.Response(status=503, text="Service Unavailable"),
        Misbehaviour.GARBAGE: web.Response(text="<html><body>Welcome</body></html>", content_type="text/html"),
        Misbehaviour.SLOW: web.Response(status=503),
        Misbehaviour.GATEWAY_401: web.json_response(gateway | credentials, status=401),
        Misbehaviour.INVALID_CLIENT: _refusal("invalid_client", f"client {client_id} is unknown", status=401),
        Misbehaviour.FORBIDDEN: web.Response(status=403),
        Misbehaviour.REDIRECT: web.Response(status=307, headers={"Location": PATH}),
        Misbehaviour.TOO_MANY: web.Response(status=429, headers={"Retry-After": str(RETRY_AFTER_SECONDS)}),
    }


def _refusal(error: str, description: str, *, status: int = 400) -> web.Response:
    return web.json_response({"error": error, "error_description": description}, status=status)


@asynccontextmanager
async def shaam_simulator(
    *,
    client_id: str,
    client_secret: str,
    spoil: Mapping[str, Misbehaviour] | None = None,
    delay_seconds: float = 0,
    seed: str = "bon",
) -> AsyncIterator[ShaamSimulator]:
    """
    Serve the token endpoint on a free port of 127.0.0.1 until the block ends.

    The same subjects get the same tokens in every process of the same `seed`; `spoil` says what goes wrong for whom.
    """
    simulator = ShaamSimulator(client_id, client_secret, dict(spoil or {}), seed=seed, delay_seconds=delay_seconds)
    app = web.Application()
    app.router.add_post(PATH, simulator._answer)  # noqa: SLF001 - the route is this module's own
    # A client that gave up must not keep its handler, and with it the server's end, waiting.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, 0).start()
        simulator.token_url = f"http://{HOST}:{runner.addresses[0][1]}{PATH}"
        yield simulator
    finally:
        simulator._closing.set()  # noqa: SLF001 - as above
        await runner.cleanup()
