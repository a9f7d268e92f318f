"""What lies beside the database: the spool, the mail server, the authority's host."""

import asyncio
import ssl
from urllib.parse import urlsplit

from bon_scheduler.cli.checks.findings import Finding, Level, ok
from bon_scheduler.config import Settings, ShaamMode, SwitchedOff, mail_off, shaam_off, switched_off
from bon_scheduler.log import describe_error
from bon_scheduler.mail import NotConnectedError, try_login
from bon_scheduler.shaam import count_files

__all__ = ["check_mail", "check_schedules_off", "check_shaam", "check_spool"]

REACH_SECONDS = 5
PORTS = {"http": 80, "https": 443}


def told_off(off: SwitchedOff) -> Finding:
    """Return what the settings switch off: a warning unless they say so in so many words."""
    return ok(off.name, off.what) if off.chosen else Finding(off.name, Level.WARNING, off.what, off.remedy)


def check_schedules_off(settings: Settings) -> list[Finding]:
    """Name the jobs whose schedule the settings take away."""
    return [told_off(off) for off in switched_off(settings) if off.name not in {"mail", "shaam"}]


def check_spool(settings: Settings) -> list[Finding]:
    """Look at what waits in SPOOL_DIR."""
    if settings.shaam_mode is ShaamMode.MOCK:
        return []
    if settings.spool_dir is None:
        what = (
            "SPOOL_DIR is not set: tokens that are rotated while the database is away are in memory only, and a "
            "process that ends before it is back locks their businesses out until their owners consent again"
        )
        return [Finding("spool", Level.WARNING, what, "Mount a persistent volume and name it in SPOOL_DIR.")]
    found = count_files(settings.spool_dir)
    if found.corrupt:
        what = f"{found.corrupt} files in SPOOL_DIR cannot be used and were put aside (*.corrupt)"
        return [Finding("spool", Level.FAILURE, what, "Find out what damaged them; then delete them.")]
    if found.waiting:
        what = f"{found.waiting} rotated tokens in SPOOL_DIR wait for the database"
        remedy = "A service that runs with this SPOOL_DIR saves them; where it cannot, it logs token.refused and why."
        return [Finding("spool", Level.WARNING, what, remedy)]
    return [ok("spool", "SPOOL_DIR can be written, and nothing waits in it")]


async def check_shaam(settings: Settings) -> list[Finding]:
    """Open a connection to the token endpoint's host, with TLS where it has it, and say nothing."""
    if (off := shaam_off(settings)) is not None:
        return [told_off(off)]
    parts = urlsplit(settings.token_url)
    port = parts.port or PORTS[parts.scheme]
    where = f"{parts.hostname}:{port}"
    try:
        async with asyncio.timeout(REACH_SECONDS):
            tls = ssl.create_default_context() if parts.scheme == "https" else None
            _, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls)
    except (OSError, TimeoutError) as error:
        why = f"no answer within {REACH_SECONDS} s" if isinstance(error, TimeoutError) else describe_error(error)
        remedy = "Allow this machine to reach it, from an address in Israel, or correct SHAAM_TOKEN_URL."
        return [Finding("shaam", Level.FAILURE, f"{where} cannot be reached: {why}", remedy)]
    writer.transport.abort()
    return [ok("shaam", f"{where} can be reached{' and its certificate is valid' if tls else ''} (no token was sent)")]


async def check_mail(settings: Settings) -> list[Finding]:
    """Connect to the mail server, and log in."""
    if (off := mail_off(settings)) is not None:
        return [told_off(off)]
    where = f"{settings.smtp_host}:{settings.smtp_port}"
    try:
        await try_login(settings)
    except NotConnectedError as error:
        what = f"{where} is of no use (at {error.stage}): {error.said}"
        return [Finding("mail", Level.FAILURE, what, "Correct SMTP_HOST, SMTP_PORT, SMTP_TLS, or the login.")]
    how = "" if settings.smtp_username is None else " and takes our login"
    return [ok("mail", f"{where} answers{how} ({settings.smtp_tls})")]
