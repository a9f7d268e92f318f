"""
The Israel Tax Authority's OAuth2 token endpoint (SHAAM).

`Shaam.refresh` exchanges one refresh token and says what came of it in one of five
answers. It never raises for what the network or the authority does, and no answer's
reason or repr contains a token, the client's id or its secret.

Refresh tokens are single use: a success spends the token that was sent. Whoever calls
`refresh` must therefore see it to its end and save what it returns before anything else.
"""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from types import SimpleNamespace, TracebackType
from typing import Any, Self, TypeAlias
from urllib.parse import quote_plus

import aiohttp
from pydantic import SecretStr

from bon_scheduler.config import ClientAuth, Settings, ShaamMode
from bon_scheduler.log import is_out_of_descriptors, mask, withhold

__all__ = [
    "ON_DEMAND_SLOTS",
    "Ambiguous",
    "Answer",
    "Misconfigured",
    "NeedsReauth",
    "Refreshed",
    "Shaam",
    "Transient",
    "name_of",
]

MAX_ANSWER_BYTES = 64 * 1024
MAX_REASON_CHARACTERS = 200
CONNECT_TIMEOUT_SECONDS = 5.0
ON_DEMAND_SLOTS = 5
"""So many calls more than SHAAM_CONCURRENCY, for whoever waits for one token while a schedule's run is long."""
LONGEST_RETRY_AFTER = timedelta(days=1)
LONGEST_LIFETIME = timedelta(days=366)
"""An access token said to live longer than this is not believed."""
ASSUMED_LIFETIME = timedelta(seconds=601)
"""What is seen, for an access token whose lifetime is missing or not believed."""
LONGEST_REFRESH_LIFETIME = timedelta(days=3660)
"""A refresh token said to live longer than this is not believed; 90 days are seen."""

OK = range(200, 300)
REDIRECTED = range(300, 400)
TRANSIENT_STATUSES = frozenset({408, 429, *REDIRECTED})
APPLICATION_STATUSES = frozenset({403, 404, 405, 415})
"""The authority blocks foreign addresses by a bare 403; the others mean a wrong SHAAM_TOKEN_URL."""
SERVER_FAULT = 500
UNKNOWN_FATE_STATUSES = frozenset({408, 500, 502, 504})
"""Behind these the authority may have done what it was asked."""

# RFC 6749 §5.2; the transient two are from §4.1.2.1, and gateways use them here as well.
APPLICATION_ERRORS = frozenset({"invalid_client", "unauthorized_client", "unsupported_grant_type"})
TRANSIENT_ERRORS = frozenset({"server_error", "temporarily_unavailable"})
BAD_CREDENTIALS_TEXT = "invalid client id or secret"

_OPAQUE = re.compile(r"[A-Za-z0-9+/_=.~-]{40,}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_DIGITS = re.compile(r"[0-9]{1,12}")
LONGEST_INTEGER_DIGITS = 18


@dataclass(frozen=True, slots=True)
class Refreshed:
    """The authority spent the old token and gave these; they exist nowhere else until they are saved."""

    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    expires_in: timedelta
    """How long the access token lives from now."""
    scope: str | None = None
    refresh_token_expires_in: timedelta | None = None


@dataclass(frozen=True, slots=True)
class NeedsReauth:
    """`invalid_grant`: this business's owner has to consent again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Misconfigured:
    """The application is refused, whichever business it asks for: nobody may be flagged for it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Transient:
    """Nothing was decided; try again later, after `retry_after` where the authority named a wait."""

    reason: str
    retry_after: timedelta | None = None
    maybe_spent: bool = False
    """Whether the authority may have rotated the token all the same, as when its answer never came."""


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """An answer nobody can read. Change nothing, and report it."""

    reason: str
    maybe_spent: bool = False
    """Whether the token may have been rotated: so after a 2xx."""


Answer: TypeAlias = Refreshed | NeedsReauth | Misconfigured | Transient | Ambiguous


def name_of(answer: Answer) -> str:
    """Name an answer as `shaam_requests_total` does."""
    match answer:
        case Refreshed():
            return "refreshed"
        case NeedsReauth():
            return "needs_reauth"
        case Misconfigured():
            return "misconfigured"
        case Transient():
            return "transient"
        case Ambiguous():
            return "ambiguous"


@dataclass(frozen=True, slots=True)
class _Reply:
    """What came back: `body` is None when it could not be read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes | None
    trouble: str = ""
    """Why the body could not be read."""


@dataclass(slots=True)
class _Sending:
    """One request; `begun` once a byte of it may have left."""

    begun: bool = False


class Shaam:
    """
    The client of the token endpoint: one pooled session, opened by `async with`.

    In mock mode no session exists, so nothing can open a socket.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None

    @property
    def mode(self) -> ShaamMode:
        """Which of the authority's systems is called."""
        return self._settings.shaam_mode

    async def __aenter__(self) -> Self:
        """Make the session; connections are opened when they are first needed."""
        if self.mode is not ShaamMode.MOCK:
            total = self._settings.shaam_timeout_seconds
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._settings.shaam_concurrency + ON_DEMAND_SLOTS),
                timeout=aiohttp.ClientTimeout(total=total, connect=min(CONNECT_TIMEOUT_SECONDS, total)),
                # One business's cookie must not travel with the next one's request.
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept": "application/json", "User-Agent": "bon-scheduler"},
                trace_configs=[_tracing()],
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def refresh(self, refresh_token: str) -> Answer:
        """
        Exchange a refresh token for new tokens (RFC 6749 §6; the body is the authority's own example).

        Raises nothing for what the network or the authority does, and OSError without a file descriptor. See it to
        its end: once the request is on its way, the token may be spent whether or not anybody reads the answer.
        """
        if self.mode is ShaamMode.MOCK:
            return Misconfigured("SHAAM_MODE is mock: nobody is called")
        if self._session is None:
            raise RuntimeError("Shaam is used outside its `async with`")
        secrets, sending = [refresh_token, *self._client()], _Sending()
        try:
            reply = await self._post(self._session, refresh_token, sending)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if is_out_of_descriptors(error) and not sending.begun:
                raise
            reason = f"the connection failed ({_name(error)})"
            if sending.begun and isinstance(error, TimeoutError):
                reason = f"no answer within {self._settings.shaam_timeout_seconds:g} s ({type(error).__name__})"
            return Transient(reason, maybe_spent=sending.begun)
        return _classify(reply, secrets)

    def _client(self) -> tuple[str, str]:
        return _reveal(self._settings.shaam_client_id), _reveal(self._settings.shaam_client_secret)

    def _request(self, refresh_token: str) -> tuple[dict[str, str], dict[str, str]]:
        """Build the form and the headers of a token request."""
        client_id, client_secret = self._client()
        form = {"grant_type": "refresh_token", "refresh_token": refresh_token, "scope": "scope"}
        if self._settings.shaam_client_auth is ClientAuth.BODY:
            return form | {"client_id": client_id, "client_secret": client_secret}, {}
        # RFC 6749 §2.3.1: form-encode each BEFORE joining, otherwise a colon in the id ends it.
        pair = f"{quote_plus(client_id)}:{quote_plus(client_secret)}"
        return form, {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}

    async def _post(self, session: aiohttp.ClientSession, refresh_token: str, sending: _Sending) -> _Reply:
        form, headers = self._request(refresh_token)
        # A redirect would carry the token and the secret to wherever it points.
        async with session.post(
            self._settings.token_url, data=form, headers=headers, allow_redirects=False, trace_request_ctx=sending
        ) as response:
            # Raised here, a failure would hide that a 2xx had begun, and with it that the token is spent.
            try:
                body = await _read_bounded(response)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                return _Reply(response.status, response.headers, None, f"broke off ({_name(error)})")
            if body is None:
                trouble = f"is longer than {MAX_ANSWER_BYTES // 1024} KiB"
                return _Reply(response.status, response.headers, None, trouble)
            return _Reply(response.status, response.headers, body)


def _tracing() -> aiohttp.TraceConfig:
    """Have each request say when it begins; aiohttp does so BEFORE it writes the first byte."""

    async def begin(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
        context.trace_request_ctx.begun = True

    tracing = aiohttp.TraceConfig()
    tracing.on_request_headers_sent.append(begin)
    return tracing


def _reveal(secret: SecretStr | None) -> str:
    return secret.get_secret_value() if secret is not None else ""


def _name(error: Exception) -> str:
    """Name an error by its kind: its text may hold addresses or what was sent."""
    system = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}: {system}" if system else type(error).__name__


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes | None:
    """Read the whole body, or None when it is too long; the rest is then left unread."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(MAX_ANSWER_BYTES):
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            return None
    return bytes(body)


def _classify(reply: _Reply, secrets: list[str]) -> Answer:
    """
    Tell what an answer means: by its body first, then by its status (BON's contract, "SHAAM").

    What the contract does not name flags nobody: a wrong address is the application's fault,
    a redirect passes, and any other refusal is `Ambiguous`.
    """
    data = _parse(reply.body)
    reason = _reason(reply, data, secrets)
    if reply.status in OK:
        return _refreshed(data) or Ambiguous(reason, maybe_spent=True)
    error = _text(data.get("error")).strip().lower()
    blames_client = error in APPLICATION_ERRORS or BAD_CREDENTIALS_TEXT in _said(data).lower()
    if error == "invalid_grant" and not blames_client:
        return NeedsReauth(reason)
    if blames_client or (reply.status in APPLICATION_STATUSES and error not in TRANSIENT_ERRORS):
        return Misconfigured(reason)
    if error in TRANSIENT_ERRORS or reply.status in TRANSIENT_STATUSES or reply.status >= SERVER_FAULT:
        return Transient(reason, _retry_after(reply.headers), reply.status in UNKNOWN_FATE_STATUSES)
    return Ambiguous(reason)


def _parse(body: bytes | None) -> dict[str, Any]:
    """Read a JSON object; anything else is an empty one."""
    # More than JSON allows (NaN, half a character, bare control characters): behind a 2xx the new tokens are nowhere
    # but in these bytes, and one odd field beside them must not lose them.
    text = (body or b"").decode("utf-8-sig", "replace")
    try:
        data = json.loads(text, strict=False, parse_int=_integer)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _integer(digits: str) -> int | float:
    """Read an integer; thousands of digits, which Python refuses, as infinity."""
    return int(digits) if len(digits) <= LONGEST_INTEGER_DIGITS else float(digits)


def _refreshed(data: dict[str, Any]) -> Refreshed | None:
    """Read a success, or None when it lacks a token: what gives both is kept, whatever else is odd about it."""
    access, refresh = _text(data.get("access_token")), _text(data.get("refresh_token"))
    if not access or not refresh:
        return None
    expires_in = _lifetime(data.get("expires_in"), LONGEST_LIFETIME) or ASSUMED_LIFETIME
    refresh_expires_in = _lifetime(data.get("refresh_token_expires_in"), LONGEST_REFRESH_LIFETIME)
    return Refreshed(access, refresh, expires_in, _scope(data.get("scope")), refresh_expires_in)


def _lifetime(value: object, longest: timedelta) -> timedelta | None:
    """Read a number of seconds, or digits in a string; None for what is no lifetime, or longer than is believed."""
    if isinstance(value, str) and _DIGITS.fullmatch(value.strip()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # NaN is neither above nor below anything.
    return timedelta(seconds=value) if 1 <= value <= longest.total_seconds() else None


def _scope(value: object) -> str | None:
    """Read a scope; None, which leaves the stored one, for what none can be (RFC 6749 §3.3) or PostgreSQL not hold."""
    text = _text(value)
    return text if text and not _UNPRINTABLE.search(text) else None


def _retry_after(headers: Mapping[str, str]) -> timedelta | None:
    """
    Read how long the authority asks to be left alone, at most a day (RFC 9110 §10.2.3).

    A date is measured against the answer's own `Date`, so that neither clock has to be right.
    """
    text = headers.get("Retry-After", "").strip()
    if _DIGITS.fullmatch(text):
        wait = timedelta(seconds=min(int(text), LONGEST_RETRY_AFTER.total_seconds()))
    else:
        until, sent = _http_date(text), _http_date(headers.get("Date", ""))
        if until is None or sent is None:
            return None
        wait = until - sent
    return max(timedelta(0), min(wait, LONGEST_RETRY_AFTER))


def _http_date(text: str) -> datetime | None:
    try:
        instant = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):  # by what is wrong with the text
        return None
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def _text(value: object) -> str:
    """Read a string; half a character in it, which nothing can encode, is replaced."""
    return _LONE_SURROGATE.sub("\ufffd", value) if isinstance(value, str) else ""


def _said(data: dict[str, Any]) -> str:
    """Join what an error says in words: OAuth's two fields, and the gateway's three."""
    names = ("error", "error_description", "httpCode", "httpMessage", "moreInformation")
    return " ".join(str(data[name]) for name in names if isinstance(data.get(name), str | int))


def _reason(reply: _Reply, data: dict[str, Any], secrets: list[str]) -> str:
    """Return what came back, for the log and the ledger: no secret, one line, at most 200 characters."""
    said = "not the tokens that were asked for" if reply.status in OK else _said(data)
    if reply.trouble:
        said = f"the answer {reply.trouble}"
    elif reply.status in REDIRECTED:
        said = "redirects are refused; see SHAAM_TOKEN_URL"
    elif not data:
        said = f"no JSON object, but {len(reply.body or b'')} bytes"
    # Redact BEFORE cutting to length, otherwise half a secret at the end would stay.
    known = [*secrets, *(_text(data.get(name)) for name in ("access_token", "refresh_token"))]
    return _redact(f"HTTP {reply.status}: {said}", known)[:MAX_REASON_CHARACTERS]


def _redact(text: str, secrets: list[str]) -> str:
    """Cut out every known secret in each of its forms, addresses, and whatever looks like a token."""
    return _UNPRINTABLE.sub(" ", mask(_OPAQUE.sub("[redacted]", withhold(_text(text), secrets)))).strip()
