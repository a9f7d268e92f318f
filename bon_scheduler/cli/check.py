"""
Is this deployment sound? One finding a line: ok, warning or failure, and the remedy.

Reads only. BON's tables and columns are what `bon-contract` says the jobs touch.
"""

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from bon_scheduler import database, mail
from bon_scheduler.cli.parsing import BADLY, DONE
from bon_scheduler.clock import Clock
from bon_scheduler.config import Settings, ShaamMode
from bon_scheduler.database import (
    DatabaseUnavailableError,
    OtherDatabaseError,
    PoolerError,
    SchemaBehindError,
    missing_indexes,
    require_schema,
)
from bon_scheduler.jobs import Connection
from bon_scheduler.mail import NotConnectedError, try_login
from bon_scheduler.report import Column, Report
from bon_scheduler.shaam import count_files

__all__ = ["Finding", "Level", "check", "check_deployment"]

SUPPORTED_VERSIONS = range(15, 19)
CLOCK_TOLERANCE = timedelta(seconds=5)
MOST_NAMED = 3

BON_COLUMNS: dict[str, tuple[str, ...]] = {
    "users": ("id", "email"),
    "sessions": ("id", "expires_at"),
    "businesses": ("id", "name", "email", "is_active", "deleted_at"),
    "user_businesses": ("user_id", "business_id", "role"),
    "customers": ("id", "name"),
    "invoices": (
        "id",
        "business_id",
        "customer_id",
        "customer_name",
        "document_type",
        "status",
        "is_overdue",
        "document_number",
        "sequence_number",
        "credited_invoice_id",
        "due_date",
        "currency",
        "total_incl_vat_minor_units",
        "updated_at",
    ),
    "invoice_items": ("invoice_id",),
    "invoice_payments": ("invoice_id", "amount_minor_units"),
    "business_shaam_credentials": (
        "business_id",
        "encrypted_access_token",
        "encrypted_refresh_token",
        "token_expires_at",
        "scope",
        "needs_reauth",
        "updated_at",
    ),
    "shaam_audit_log": ("invoice_id",),
    "emergency_allocation_numbers": ("used_for_invoice_id",),
}

# $1 tables: text[], $2 columns: text[] beside them. What is not where unqualified names would find it.
MISSING_COLUMNS = """
    select wanted.tab as table_name, wanted.col as column_name, to_regclass(wanted.tab) is null as no_table
      from unnest($1::text[], $2::text[]) as wanted (tab, col)
     where not exists (select from pg_attribute a
                        where a.attrelid = to_regclass(wanted.tab)
                          and a.attname = wanted.col
                          and a.attnum > 0
                          and not a.attisdropped)
     order by 1, 2
"""


class Level(StrEnum):
    """How a finding is to be taken."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, and the remedy where it is not as it should be."""

    name: str
    level: Level
    what: str
    remedy: str | None = None


async def check_deployment(settings: Settings, clock: Clock) -> list[Finding]:
    """Look at everything; an unreachable database ends the look early."""
    try:
        async with database.connect(settings.listen_url, pooled=True) as connection:
            return [
                Finding("settings", Level.OK, "every setting is usable"),
                await _check_server(connection),
                await _check_sessions(settings),
                *await _check_same_database(settings),
                *_check_spool(settings),
                await _check_clock(connection, clock),
                *await _check_columns(connection),
                *await _check_indexes(connection),
                schema := await _check_schema(connection),
                *(await _check_letters(connection) if schema.level is Level.OK else ()),
                await _check_mail(settings),
            ]
    except DatabaseUnavailableError as error:
        return [
            Finding("settings", Level.OK, "every setting is usable"),
            Finding("database", Level.FAILURE, str(error), "Start PostgreSQL, or correct DATABASE_URL."),
        ]


async def _check_server(connection: Connection) -> Finding:
    number = int(await connection.fetchval("select current_setting('server_version_num')")) // 10000
    if number in SUPPORTED_VERSIONS:
        return Finding("database", Level.OK, f"PostgreSQL {number} answers")
    return Finding(
        "database",
        Level.WARNING,
        f"PostgreSQL {number} is not one this version was tried on",
        "Use 15 to 18.",
    )


async def _check_sessions(settings: Settings) -> Finding:
    try:
        await database.require_sessions(settings)
    except PoolerError as error:
        return _failure("notifications", error)
    return Finding("notifications", Level.OK, "LISTEN hears what is notified")


async def _check_same_database(settings: Settings) -> list[Finding]:
    if settings.database_listen_url is None:
        return []
    try:
        await database.require_same_database(settings)
    except OtherDatabaseError as error:
        return [_failure("same database", error)]
    return [Finding("same database", Level.OK, "DATABASE_URL leads where DATABASE_LISTEN_URL does")]


def _failure(name: str, error: Exception) -> Finding:
    """Take an error's first sentence for what was found, and the rest for the remedy."""
    what, _, remedy = str(error).partition(". ")
    return Finding(name, Level.FAILURE, what, remedy)


def _check_spool(settings: Settings) -> list[Finding]:
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
    return [Finding("spool", Level.OK, "SPOOL_DIR can be written, and nothing waits in it")]


async def _check_clock(connection: Connection, clock: Clock) -> Finding:
    before = clock.now()
    theirs = await connection.fetchval("select clock_timestamp()")
    apart = abs(theirs - (before + (clock.now() - before) / 2))
    what = f"this clock and the database's are {apart.total_seconds():.3f} s apart"
    if apart <= CLOCK_TOLERANCE:
        return Finding("clock", Level.OK, what)
    return Finding("clock", Level.WARNING, what, "Synchronise both machines (NTP); schedules depend on it.")


async def _check_columns(connection: Connection) -> list[Finding]:
    wanted = [(table, column) for table, columns in BON_COLUMNS.items() for column in columns]
    missing = await connection.fetch(MISSING_COLUMNS, [t for t, _ in wanted], [c for _, c in wanted])
    if not missing:
        return [Finding("BON's tables", Level.OK, f"{len(BON_COLUMNS)} tables, {len(wanted)} columns as expected")]
    absent = sorted({row["table_name"] for row in missing if row["no_table"]})
    findings = [Finding("BON's tables", Level.FAILURE, f"table {table} is missing", _BON_REMEDY) for table in absent]
    findings += [
        Finding(
            "BON's tables",
            Level.FAILURE,
            f"column {row['table_name']}.{row['column_name']} is missing",
            _BON_REMEDY,
        )
        for row in missing
        if not row["no_table"]
    ]
    return findings


_BON_REMEDY = "Run BON's own migrations on this database, or point DATABASE_URL at BON's."


async def _check_indexes(connection: Connection) -> list[Finding]:
    findings = [
        Finding(
            "indexes",
            Level.WARNING,
            f"no index on {where}: each deleted draft scans the table",
            f"Have BON run: {statement}",
        )
        for where, statement in (await missing_indexes(connection)).items()
    ]
    return findings or [Finding("indexes", Level.OK, "the recommended ones exist")]


async def _check_letters(connection: Connection) -> list[Finding]:
    findings = []
    gate = await mail.gate_state(connection)
    if gate.closed_since is not None:
        findings.append(
            Finding(
                "mail gate",
                Level.FAILURE,
                f"the mail server is away since {gate.closed_since:%Y-%m-%d %H:%M:%S} UTC: {gate.trouble}",
                "Letters wait and go by themselves once it answers; see `mail` below.",
            )
        )
    unknown = await mail.count_unknown(connection)
    if not unknown:
        return [*findings, Finding("deliveries", Level.OK, "none of the last seven days is uncertain")]
    named = ", ".join(str(letter.id) for letter in await mail.some_unknown(connection, MOST_NAMED))
    return [
        *findings,
        Finding(
            "deliveries",
            Level.WARNING,
            f"{unknown} of the last seven days may or may not have arrived, the latest: {named}",
            "Ask the owner, or send it again knowingly: python -m bon_scheduler resend DELIVERY_ID --reason …",
        ),
    ]


async def _check_mail(settings: Settings) -> Finding:
    if settings.smtp_host is None:
        return Finding("mail", Level.WARNING, "SMTP_HOST is not set: digests are logged, not sent", "Set SMTP_HOST.")
    where = f"{settings.smtp_host}:{settings.smtp_port}"
    try:
        await try_login(settings)
    except NotConnectedError as error:
        what = f"{where} is of no use (at {error.stage}): {error.said}"
        return Finding("mail", Level.FAILURE, what, "Correct SMTP_HOST, SMTP_PORT, SMTP_TLS, or the login.")
    how = "" if settings.smtp_username is None else " and takes our login"
    return Finding("mail", Level.OK, f"{where} answers{how} ({settings.smtp_tls})")


async def _check_schema(connection: Connection) -> Finding:
    try:
        version = await require_schema(connection)
    except SchemaBehindError as error:
        return Finding("schema", Level.FAILURE, str(error), "Run: python -m bon_scheduler migrate")
    return Finding("schema", Level.OK, f"bon_scheduler is at version {version}")


async def check(settings: Settings, report: Report, clock: Clock) -> int:
    """Report whether this deployment is sound."""
    findings = await check_deployment(settings, clock)
    sound = all(finding.level is not Level.FAILURE for finding in findings)
    if report.as_json:
        keys = ("name", "level", "what", "remedy")
        report.document({"sound": sound, "findings": [{key: getattr(f, key) for key in keys} for f in findings]})
    else:
        rows = [(f.level, f.name, f"{f.what}\n→ {f.remedy}" if f.remedy else f.what) for f in findings]
        report.table(["", "what", Column("found", wraps=24)], rows)
    return DONE if sound else BADLY
