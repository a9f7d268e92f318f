"""
Settings: what the service can be told from outside, what each means, and which values are usable.

Names are `interface.md`'s. The docstrings below the settings are the reference that `docs/reference.md` prints.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SecretStr,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from bon_scheduler.addresses import fault_of_host, fault_of_web_address, read_database_address, read_mailbox
from bon_scheduler.files import fault_of_shared_directory

__all__ = [
    "LOOPBACK_HOSTS",
    "ClientAuth",
    "EmailMode",
    "LogFormat",
    "LogLevel",
    "Settings",
    "ShaamMode",
    "SmtpTls",
    "SwitchedOff",
    "mail_off",
    "shaam_off",
    "switched_off",
]

SHAAM_HOST = "https://ita-api.taxes.gov.il"
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
KEY_LENGTH_HEX = 64
READABLE = (
    *("bon_timezone", "worker_concurrency", "shutdown_seconds", "lease_seconds", "run_retention_days"),
    *("email_rate_per_second", "email_language", "smtp_host", "smtp_port", "smtp_tls", "brake_min_rows"),
    *("brake_max_share", "shaam_mode", "shaam_client_auth", "shaam_concurrency", "shaam_timeout_seconds"),
)
"""Settings that each worker records in the ledger."""
NO_PLACES = frozenset({"localtime", "posixrules", "Factory", "leapseconds"})
"""Files beside the zones: they mean another zone on each machine, or none."""


class SmtpTls(StrEnum):
    """How the connection to the SMTP server is protected."""

    STARTTLS = "starttls"
    IMPLICIT = "implicit"
    NONE = "none"


class EmailMode(StrEnum):
    """What becomes of letters; `log` sends none."""

    SMTP = "smtp"
    LOG = "log"


class ShaamMode(StrEnum):
    """Which of the authority's systems is called; `mock` calls none."""

    MOCK = "mock"
    SANDBOX = "sandbox"
    PRODUCTION = "production"


class ClientAuth(StrEnum):
    """Where the client's id and secret travel in a token request."""

    BODY = "body"
    BASIC = "basic"


class LogFormat(StrEnum):
    """How log lines are written."""

    JSON = "json"
    CONSOLE = "console"


class LogLevel(StrEnum):
    """The least severe event that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _is_guessable(key: bytes) -> bool:
    """Return whether it has few different bytes, or they rise or fall by the same step, as no random key's do."""
    steps = {(after - before) % 256 for before, after in pairwise(key)}
    return len(set(key)) <= len(key) // 2 or len(steps) == 1


def _zone(value: object) -> ZoneInfo:
    if isinstance(value, ZoneInfo):
        return value
    if str(value).startswith(("right/", "posix/")) or str(value) in NO_PLACES:
        raise ValueError('not a place\'s time zone; give an IANA name such as "Asia/Jerusalem"')
    try:
        return ZoneInfo(str(value))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError('not a time zone; give an IANA name such as "Asia/Jerusalem"') from error


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Zone = Annotated[ZoneInfo, BeforeValidator(_zone), PlainSerializer(str)]


class Settings(BaseSettings):
    """Everything the service can be told from outside, validated."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)

    database_url: SecretStr
    """`postgresql://…`, as libpq writes it. In the password write `#`, `/`, `?`, `@`, `[` and `]` as `%23`, `%2F`,
    `%3F`, `%40`, `%5B` and `%5D`. Off this machine it is encrypted unless it says `sslmode=disable`; what becomes of
    each parameter is in operations.md."""
    database_listen_url: SecretStr | None = None
    """The server's own address, where `DATABASE_URL` goes through a pooler in transaction mode. Both must lead to the
    same database. Unset: `DATABASE_URL`."""
    deployment: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """The name of this deployment, such as `production`: letters, digits, `.`, `_` and `-`. The ledger remembers it; a
    process with another one, or none, does nothing with it until a person says `adopt`. Unset: the server's address
    counts instead."""
    database_pool_size: int = Field(10, ge=2, le=200)
    """Connections for handlers. A replica uses up to ten more, on the server's own address: one listens and claims,
    one is the heartbeat, four are for the ledger, ticks and probes, four for what mail servers and the authority have
    answered."""
    bon_timezone: Zone = ZoneInfo("Asia/Jerusalem")
    """Of schedules and business dates."""
    operator: str | None = None
    """Who you are, for commands that record who did it. Unset: the user's name, in a container with the machine's."""
    log_level: Annotated[LogLevel, BeforeValidator(_lower)] = LogLevel.INFO
    """The least severe event that is logged."""
    log_format: LogFormat = LogFormat.JSON
    """How log lines are written."""
    health_host: str = "0.0.0.0"  # noqa: S104 - a container's probes come from outside it
    """Where probes and metrics answer."""
    health_port: int = Field(8080, ge=0, le=65535)
    """Their port; 0 for any that is free."""
    metrics_token: SecretStr | None = None
    """The bearer token that `/metrics` then asks for."""
    worker_concurrency: int = Field(20, ge=2, le=1000)
    """Handlers at a time, a replica. A quarter of the places is kept for jobs of which nothing runs there."""
    shutdown_seconds: float = Field(25, gt=0, le=3600)
    """How long attempts may finish after SIGTERM. Then their runs are given back, and three seconds later the process
    has ended, or once the answers to letters and tokens that it has sent are recorded: a minute later at most."""
    lease_seconds: float = Field(15, ge=2, le=3600)
    """After so long without a heartbeat a worker's runs are taken over. While replicas differ, the longer counts."""
    run_retention_days: int = Field(400, ge=1, le=36500)
    """How long runs and deliveries are kept once they have ended."""

    email_from: str = Field("noreply@bon.co.il", validate_default=False)  # else each command loads the rules for it
    """The sender: one address in ASCII and nothing beside it."""
    email_rate_per_second: float = Field(5, ge=0.001, le=1000)
    """Letters a second, of all replicas together. A run that sends a letter is not begun before one may go."""
    email_language: Literal["he", "en"] = "he"
    """Of letters."""
    app_origin: str | None = None
    """BON's web address, for the link to the invoice list."""
    unsubscribe_url: str | None = None
    """`List-Unsubscribe` of letters, in ASCII, as it is to stand there."""
    email_mode: EmailMode | None = None
    """`smtp` needs `SMTP_HOST`; `log` sends nothing, counts letters as `logged` and takes no `SMTP_HOST`. Unset: `smtp`
    where `SMTP_HOST` is set; else letters are logged, which is warned of, and a run that logs one ends `partial`."""
    smtp_host: str | None = None
    """The mail server."""
    smtp_port: int = Field(587, ge=1, le=65535)
    """Its port."""
    smtp_username: str | None = None
    """The login; together with `SMTP_PASSWORD`."""
    smtp_password: SecretStr | None = None
    """Its password."""
    smtp_tls: SmtpTls = SmtpTls.STARTTLS
    """How the connection is protected. `starttls` refuses a server without it."""

    brake_min_rows: int = Field(1000, ge=0, le=1_000_000_000)
    """A run that would change or send no more than this is never held. One that would is compared with what is normal:
    `BRAKE_MAX_SHARE`."""
    brake_max_share: float = Field(0.5, gt=0, le=1)
    """A run of more than `BRAKE_MIN_ROWS` is held in either of two cases: it would change or send a larger share than
    this of all rows of their kind, or more than ten times the median of the last 14 runs."""

    shaam_mode: ShaamMode = ShaamMode.MOCK
    """Which of the authority's systems is called. `mock` calls nobody and changes nothing; where nothing says `mock`,
    that is warned of, and a run that it stops ends `partial`."""
    shaam_encryption_key: SecretStr | None = None
    """The key with which BON encrypts tokens, 64 hexadecimal characters, random: zeros, sequences and examples are
    refused."""
    shaam_client_id: SecretStr | None = None
    """BON's id at the authority."""
    shaam_client_secret: SecretStr | None = None
    """Its secret."""
    shaam_token_url: str | None = None
    """The token endpoint, https; plain http to loopback only. Unset: the authority's."""
    shaam_client_auth: ClientAuth = ClientAuth.BODY
    """Where id and secret travel."""
    shaam_concurrency: int = Field(50, ge=1, le=1000)
    """Requests at a time, a replica. Five more are for refreshes on demand."""
    shaam_timeout_seconds: float = Field(20, gt=0, le=300)
    """How long to wait for an answer; less than `SHUTDOWN_SECONDS`."""
    spool_dir: Path | None = None
    """A directory where rotated tokens wait, encrypted, that the database does not take: on a persistent volume, of
    this replica or shared. It belongs to this user or root, and only they and a group of this process may write it.
    Unset: they are in memory only."""

    deadman_urls: Mapping[str, SecretStr] = Field(default_factory=dict, exclude=True)
    """Pinged after each success of the job, `/start` and `/fail` beside it (healthchecks.io's convention); without `?`
    and `#`."""
    schedules: Mapping[str, str] = Field(default_factory=dict, exclude=True)
    """The job's schedule, instead of its own: five fields, or six with seconds first. Empty: no schedule."""

    @field_validator("database_url", "database_listen_url")
    @classmethod
    def _is_postgres(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        read_database_address(value.get_secret_value()).arguments()  # which reads the certificates' files as well
        return SecretStr(value.get_secret_value().strip())

    @field_validator("health_host", "smtp_host")
    @classmethod
    def _is_host(cls, value: str | None) -> str | None:
        if value is not None and (what := fault_of_host(value)):
            raise ValueError(what)
        return value

    @field_validator("app_origin")
    @classmethod
    def _begins_links(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if what := fault_of_web_address(value, begins=True):
            raise ValueError(what)
        return value.rstrip("/")

    @field_validator("unsubscribe_url")
    @classmethod
    def _stands_in_a_header(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if what := fault_of_web_address(value):
            raise ValueError(what)
        if not value.isascii():  # RFC 2369 §2: it stands there as it is
            raise ValueError("must be ASCII; percent-encode anything else, and write a host as xn--…")
        return value

    @field_validator("email_from")
    @classmethod
    def _is_address(cls, value: str) -> str:
        # A recipient's dots are left to the server; ours stand in a header. The domain is what we call ourselves.
        odd = not value.isascii() or value != value.strip() or value.startswith(".") or ".." in value or ".@" in value
        if odd or read_mailbox(value) is None:
            raise ValueError("must be one e-mail address in ASCII, such as noreply@bon.co.il, and nothing beside it")
        return value

    @field_validator("shaam_encryption_key")
    @classmethod
    def _is_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            text = value.get_secret_value()
            if len(text) != KEY_LENGTH_HEX or not all(c in "0123456789abcdefABCDEF" for c in text):
                raise ValueError(f"must be 64 hexadecimal characters (32 bytes), has {len(text)} characters")
            if _is_guessable(bytes.fromhex(text)):
                raise ValueError(
                    "must be random; this is one that anybody would try (a few bytes again and again, a sequence, an "
                    "example). Make one with: python3 -c 'import secrets; print(secrets.token_hex(32))'. BON must "
                    "encrypt with it, and seal the tokens it has with it, first"
                )
        return value

    @field_validator("shaam_token_url")
    @classmethod
    def _is_safe_token_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if what := fault_of_web_address(value):
            raise ValueError(what)
        parts = urlsplit(value)
        if parts.scheme == "http" and parts.hostname not in LOOPBACK_HOSTS:
            raise ValueError("must be https:// (plain http only to this machine's loopback address)")
        return value

    @field_validator("spool_dir")
    @classmethod
    def _is_writable_directory(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError("must be a directory that exists, on a persistent volume")
        if value is not None and not os.access(value, os.R_OK | os.W_OK | os.X_OK):
            raise ValueError("must be a directory this process can read and write")
        if value is not None and (what := fault_of_shared_directory(value)):
            raise ValueError(what)
        return value

    @property
    def listen_url(self) -> str:
        """Where LISTEN works: `DATABASE_LISTEN_URL`, else `DATABASE_URL`."""
        return (self.database_listen_url or self.database_url).get_secret_value()

    @property
    def token_url(self) -> str:
        """The authority's token endpoint."""
        system = "production" if self.shaam_mode is ShaamMode.PRODUCTION else "tsandbox"
        return self.shaam_token_url or f"{SHAAM_HOST}/shaam/{system}/longtimetoken/oauth2/token"

    def readable(self) -> dict[str, str]:
        """Return, by name, what changes how it works and anybody may read: no secret, user, e-mail address or path."""
        shown = {name.upper(): getattr(self, name) for name in READABLE}
        return {name: "unset" if value is None else str(value) for name, value in shown.items()}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic-settings names the parameters
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read only what `load_settings` passes: it names every fault, also of `NAME_FILE`."""
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class SwitchedOff:
    """Something that the service does not do, by its settings."""

    name: str
    what: str
    """What is so, and by which setting."""
    remedy: str
    chosen: bool
    """Whether the settings say so in so many words."""

    @property
    def fault(self) -> str | None:
        """Why a run that it keeps from its work has not done it; None where that was chosen."""
        return None if self.chosen else f"{self.what}. {self.remedy}"


def mail_off(settings: Settings) -> SwitchedOff | None:
    """Return that letters are not sent, if so."""
    if settings.smtp_host is not None:
        return None
    chosen = settings.email_mode is not None
    return SwitchedOff(
        "mail",
        f"letters are logged, not sent: {'EMAIL_MODE is log' if chosen else 'SMTP_HOST is not set'}",
        "If letters are to be sent, set EMAIL_MODE=smtp and SMTP_HOST."
        if chosen
        else "Set SMTP_HOST, or EMAIL_MODE=log if none is to be sent.",
        chosen,
    )


def shaam_off(settings: Settings) -> SwitchedOff | None:
    """Return that the tax authority is not called, if so."""
    if settings.shaam_mode is not ShaamMode.MOCK:
        return None
    chosen = "shaam_mode" in settings.model_fields_set
    return SwitchedOff(
        "shaam",
        f"no token is refreshed: SHAAM_MODE is {'mock' if chosen else 'not set, and mock by default'}",
        "If the authority is to be called, set SHAAM_MODE=production (or sandbox)."
        if chosen
        else "Set SHAAM_MODE=production (or sandbox), or SHAAM_MODE=mock if the authority is not to be called.",
        chosen,
    )


def switched_off(settings: Settings) -> list[SwitchedOff]:
    """Return everything that the settings have switched off."""
    found = [off for off in (mail_off(settings), shaam_off(settings)) if off is not None]
    for job, expression in settings.schedules.items():
        if not expression:
            variable = f"SCHEDULE_{job.replace('-', '_').upper()}"
            remedy = f"Leave {variable} out if it is to run by itself."
            found.append(SwitchedOff(f"schedule {job}", f"{job} has no schedule: {variable} is empty", remedy, True))
    return found
