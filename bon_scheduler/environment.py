"""
Reading settings from the environment, once, and every fault in it reported at once.

A secret may also be given as `NAME_FILE`, the path of a file that holds it. No secret is ever part of an error.
"""

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bon_scheduler.addresses import fault_of_web_address
from bon_scheduler.config import LOOPBACK_HOSTS, EmailMode, Settings, ShaamMode, SmtpTls

__all__ = ["SECRETS", "SettingsError", "load_settings"]

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
_HOST_AND_PORT = re.compile(r"(?:\w{1,9}://)?(?:[\w. -]{1,255}|\[[\w.:%-]{1,64}\])(?::[0-9]{1,5})?/?")


class SettingsError(Exception):
    """The environment is not usable; the message lists every fault."""


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
                # In place of a file's name somebody may have given the secret itself.
                told = f'"{path}"' if path.parent.name and path.parent.is_dir() else "the file it names"
                faults.add(f"{name}_FILE", f"{told} {what}")
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
        shutdown, timeout = (_number(values, name) for name in ("shutdown_seconds", "shaam_timeout_seconds"))
        if timeout >= shutdown:
            faults.add(
                "SHAAM_TIMEOUT_SECONDS",
                f"is {timeout:g} and SHUTDOWN_SECONDS {shutdown:g}, so that a process which stops would not have the "
                "time to save a token that it has sent; keep it below SHUTDOWN_SECONDS",
            )
    if values.get("email_mode") == EmailMode.SMTP and "smtp_host" not in values:
        faults.add("SMTP_HOST", "is not set; EMAIL_MODE=smtp needs it")
    if values.get("email_mode") == EmailMode.LOG and "smtp_host" in values:
        faults.add("EMAIL_MODE", "log sends nothing, and SMTP_HOST is set; keep one of the two")
    if ("smtp_username" in values) != ("smtp_password" in values):
        missing = "SMTP_PASSWORD" if "smtp_username" in values else "SMTP_USERNAME"
        faults.add(missing, "is not set; SMTP_USERNAME and SMTP_PASSWORD go together")
    in_the_clear = values.get("smtp_tls") == SmtpTls.NONE and values.get("smtp_host") not in LOOPBACK_HOSTS
    if "smtp_username" in values and in_the_clear:
        faults.add("SMTP_TLS", "none would send SMTP_PASSWORD in the clear; use starttls or implicit")


def _number(values: Mapping[str, str], name: str) -> float:
    """Return a number as it is set, or its default; nan for what is none, of which its field tells."""
    try:
        return float(values.get(name, Settings.model_fields[name].default))
    except ValueError:
        return math.nan


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
    check_schedule: Callable[[str, str], str | None],
    faults: _Faults,
) -> dict[str, str]:
    schedules = _read_by_job("SCHEDULE_", environ, jobs, faults)
    for job, (variable, text) in schedules.items():
        if text and (what := check_schedule(job, text)):
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
    check_schedule: Callable[[str, str], str | None] = lambda _, __: None,
) -> Settings:
    """
    Read settings from `environ` (the process's own by default).

    `jobs` are the names a `SCHEDULE_<JOB_NAME>` may override; `check_schedule` says what is wrong
    with an expression as the schedule of a job, or None. Raises SettingsError naming every fault, not only the first.
    """
    environ = os.environ if environ is None else environ
    faults = _Faults([])
    values: dict[str, Any] = dict(_read_values(environ, faults))
    _check_together(values, faults)
    values["deadman_urls"] = _read_deadman_urls(environ, jobs, faults)
    values["schedules"] = _read_schedules(environ, jobs, check_schedule, faults)
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
    return text if name in SECRETS or _may_hold_a_secret(name, str(value)) else f'{text} (it is "{value}")'


def _may_hold_a_secret(name: str, value: str) -> bool:
    """Whether a user, a password or a query may stand in it. Of a host only name and port are shown."""
    if name.endswith("_HOST"):
        return _HOST_AND_PORT.fullmatch(value) is None
    return name != "EMAIL_FROM" and re.search("[@?]|%40", value) is not None


def _message(faults: _Faults) -> str:
    count = len(faults.lines)
    head = "One setting is wrong" if count == 1 else f"{count} settings are wrong"
    return "\n".join([f"{head}:", *(f"  - {line}" for line in faults.lines)])
