"""
Settings: read from the environment once, and every fault in it reported at once.

Names are `interface.md`'s. A secret may also be given as `NAME_FILE`, the path
of a file that holds it. No secret is ever part of an error.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from bon_scheduler.addresses import fault_of_database_url, fault_of_host, fault_of_web_address

__all__ = ["ClientAuth", "Settings", "SettingsError", "ShaamMode", "SmtpTls", "load_settings"]

SHAAM_HOST = "https://ita-api.taxes.gov.il"
SECRETS = frozenset(
    {
        "DATABASE_URL",
        "DATABASE_LISTEN_URL",
        "METRICS_TOKEN",
        "SMTP_PASSWORD",
        "SHAAM_ENCRYPTION_KEY",
        "SHAAM_CLIENT_ID",
        "SHAAM_CLIENT_SECRET",
    }
)
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
KEY_LENGTH_HEX = 64
_ADDRESS = re.compile(
    r"[\w!#$%&'*+/?^`{|}~-]+(\.[\w!#$%&'*+/?^`{|}~-]+)*@[^\W_]([\w-]*[^\W_])?(\.[^\W_]([\w-]*[^\W_])?)*", re.ASCII
)
"""RFC 5321 §4.1.2, without quoted local parts: its domain is also what we call ourselves in SMTP."""


class SettingsError(Exception):
    """The environment is not usable; the message lists every fault."""


class SmtpTls(StrEnum):
    """How the connection to the SMTP server is protected."""

    STARTTLS = "starttls"
    IMPLICIT = "implicit"
    NONE = "none"


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


def _zone(value: object) -> ZoneInfo:
    if isinstance(value, ZoneInfo):
        return value
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
    database_listen_url: SecretStr | None = None
    database_pool_size: int = Field(10, ge=2, le=200)
    bon_timezone: Zone = ZoneInfo("Asia/Jerusalem")
    log_level: Annotated[LogLevel, BeforeValidator(_lower)] = LogLevel.INFO
    log_format: LogFormat = LogFormat.JSON
    health_host: str = "0.0.0.0"  # noqa: S104 - a container's probes come from outside it
    health_port: int = Field(8080, ge=0, le=65535)
    metrics_token: SecretStr | None = None
    worker_concurrency: int = Field(20, ge=2, le=1000)
    shutdown_seconds: float = Field(25, gt=0, le=3600)
    lease_seconds: float = Field(15, ge=2, le=3600)
    run_retention_days: int = Field(400, ge=1, le=36500)

    email_from: str = "noreply@bon.co.il"
    email_rate_per_second: float = Field(5, ge=0.001, le=1000)
    email_language: Literal["he", "en"] = "he"
    app_origin: str | None = None
    unsubscribe_url: str | None = None
    smtp_host: str | None = None
    smtp_port: int = Field(587, ge=1, le=65535)
    smtp_username: str | None = None
    smtp_password: SecretStr | None = None
    smtp_tls: SmtpTls = SmtpTls.STARTTLS

    shaam_mode: ShaamMode = ShaamMode.MOCK
    shaam_encryption_key: SecretStr | None = None
    shaam_client_id: SecretStr | None = None
    shaam_client_secret: SecretStr | None = None
    shaam_token_url: str | None = None
    shaam_client_auth: ClientAuth = ClientAuth.BODY
    shaam_concurrency: int = Field(50, ge=1, le=1000)
    shaam_timeout_seconds: float = Field(20, gt=0, le=300)
    spool_dir: Path | None = None
    """Where rotated tokens wait, encrypted, that the database does not take; a persistent volume."""

    deadman_urls: Mapping[str, SecretStr] = Field(default_factory=dict, exclude=True)
    """Where a job's dead man's switch is, by job name, from `DEADMAN_URL_<JOB_NAME>`."""
    schedules: Mapping[str, str] = Field(default_factory=dict, exclude=True)
    """Cron expressions by job name, from `SCHEDULE_<JOB_NAME>`; empty means no schedule."""

    @field_validator("database_url", "database_listen_url")
    @classmethod
    def _is_postgres(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and (what := fault_of_database_url(value.get_secret_value())):
            raise ValueError(what)
        return value

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
        if not _ADDRESS.fullmatch(value):
            raise ValueError("must be one e-mail address in ASCII, such as noreply@bon.co.il, and nothing beside it")
        return value

    @field_validator("shaam_encryption_key")
    @classmethod
    def _is_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            text = value.get_secret_value()
            if len(text) != KEY_LENGTH_HEX or not all(c in "0123456789abcdefABCDEF" for c in text):
                raise ValueError(f"must be 64 hexadecimal characters (32 bytes), has {len(text)} characters")
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
class _Faults:
    """Collects one line for each thing that is wrong."""

    lines: list[str]

    def add(self, name: str, what: str) -> None:
        self.lines.append(f"{name}: {what}")


def _read_values(environ: Mapping[str, str], faults: _Faults) -> dict[str, str]:
    values = {}
    for field in Settings.model_fields:
        name = field.upper()
        if environ.get(name, "") != "":
            values[field] = environ[name]
        if name in SECRETS and environ.get(f"{name}_FILE"):
            if field in values:
                faults.add(name, f"is set twice, as {name} and as {name}_FILE; keep one")
                continue
            path = Path(environ[f"{name}_FILE"])
            values[field], what = _read_secret(path)
            if what:
                faults.add(f"{name}_FILE", f'"{path}" {what}')
    return values


def _read_secret(path: Path) -> tuple[str, str | None]:
    """Return what a file holds, without the end of its last line, and what is wrong with it, if anything."""
    try:
        secret = path.read_text("utf-8").rstrip("\r\n")
    except OSError as error:
        return "", f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        return "", "is not text (UTF-8)"
    return secret, None if secret.strip() else "is empty; write the secret to it, or leave the setting out"


def _check_together(values: Mapping[str, str], faults: _Faults) -> None:
    """Check what no field can know alone. On the raw values, so that it is said beside the fields' own faults."""
    mode = values.get("shaam_mode", ShaamMode.MOCK)
    if mode in {ShaamMode.SANDBOX, ShaamMode.PRODUCTION}:
        for name in ("shaam_encryption_key", "shaam_client_id", "shaam_client_secret"):
            if name not in values:
                faults.add(name.upper(), f"is not set; SHAAM_MODE={mode} needs it")
    if ("smtp_username" in values) != ("smtp_password" in values):
        missing = "SMTP_PASSWORD" if "smtp_username" in values else "SMTP_USERNAME"
        faults.add(missing, "is not set; SMTP_USERNAME and SMTP_PASSWORD go together")
    in_the_clear = values.get("smtp_tls") == SmtpTls.NONE and values.get("smtp_host") not in LOOPBACK_HOSTS
    if "smtp_username" in values and in_the_clear:
        faults.add("SMTP_TLS", "none would send SMTP_PASSWORD in the clear; use starttls or implicit")


def _read_by_job(
    prefix: str, environ: Mapping[str, str], jobs: Collection[str], faults: _Faults
) -> dict[str, tuple[str, str]]:
    """Return (variable, value) by job of the variables that begin with `prefix` and end with a job's name."""
    by_variable = {f"{prefix}{name.replace('-', '_').upper()}": name for name in jobs}
    found = {}
    for variable, value in environ.items():
        if variable.startswith(prefix) and variable not in by_variable:
            faults.add(variable, f"no such job; there are {', '.join(sorted(by_variable))}")
        elif variable in by_variable:
            found[by_variable[variable]] = (variable, value.strip())
    return found


def _read_schedules(
    environ: Mapping[str, str],
    jobs: Collection[str],
    check_cron: Callable[[str], str | None],
    faults: _Faults,
) -> dict[str, str]:
    schedules = _read_by_job("SCHEDULE_", environ, jobs, faults)
    for variable, text in schedules.values():
        if text and (what := check_cron(text)):
            faults.add(variable, f'"{text}" {what}')
    return {job: text for job, (_, text) in schedules.items()}


def _read_deadman_urls(environ: Mapping[str, str], jobs: Collection[str], faults: _Faults) -> dict[str, str]:
    urls = {job: found for job, found in _read_by_job("DEADMAN_URL_", environ, jobs, faults).items() if found[1]}
    for variable, url in urls.values():
        if what := fault_of_web_address(url, begins=True, secret=True):
            faults.add(variable, what)  # not shown: whoever has it can ping it
    return {job: url for job, (_, url) in urls.items()}


def load_settings(
    environ: Mapping[str, str] | None = None,
    *,
    jobs: Collection[str] = (),
    check_cron: Callable[[str], str | None] = lambda _: None,
) -> Settings:
    """
    Read settings from `environ` (the process's own by default).

    `jobs` are the names a `SCHEDULE_<JOB_NAME>` may override; `check_cron` says what is wrong
    with an expression, or None. Raises SettingsError naming every fault, not only the first.
    """
    environ = os.environ if environ is None else environ
    faults = _Faults([])
    values: dict[str, Any] = dict(_read_values(environ, faults))
    _check_together(values, faults)
    values["deadman_urls"] = _read_deadman_urls(environ, jobs, faults)
    values["schedules"] = _read_schedules(environ, jobs, check_cron, faults)
    try:
        settings = Settings(**values)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            name = str(item["loc"][0]).upper()
            if f"{name}_FILE:" in "\n".join(faults.lines):
                continue
            faults.add(name, _explain(name, item["type"], item["msg"], item.get("input")))
        raise SettingsError(_message(faults)) from None
    if faults.lines:
        raise SettingsError(_message(faults))
    return settings


def _explain(name: str, kind: str, message: str, value: object) -> str:
    if kind == "missing":
        return "is not set"
    text = message.removeprefix("Value error, ")
    text = text[:1].lower() + text[1:] if text.startswith("Input") else text
    # An address may hold a password.
    return text if name in SECRETS or ("://" in str(value) and "@" in str(value)) else f'{text} (it is "{value}")'


def _message(faults: _Faults) -> str:
    count = len(faults.lines)
    head = "One setting is wrong" if count == 1 else f"{count} settings are wrong"
    return "\n".join([f"{head}:", *(f"  - {line}" for line in faults.lines)])
