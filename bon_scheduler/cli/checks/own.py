"""Schema `bon_scheduler`: its version, whether the role may use it, and what its tables say that needs a person."""

from bon_scheduler import declared, ledger, mail, schedule, shaam
from bon_scheduler.cli.checks.bon import refused
from bon_scheduler.cli.checks.findings import Finding, Level, ok, split_failure
from bon_scheduler.config import Settings
from bon_scheduler.database import SchemaBehindError, name_of, own_functions, own_refusals, require_schema
from bon_scheduler.engine import find_stood_aside
from bon_scheduler.jobs import Connection

__all__ = [
    "check_consent",
    "check_functions",
    "check_jobs",
    "check_letters",
    "check_own_tables",
    "check_place",
    "check_schedules",
    "check_schema",
    "check_stood_aside",
]

MOST_NAMED = 3


def check_jobs() -> list[Finding]:
    """Name the jobs that cannot be used as they are declared, and those that nothing runs."""
    mend = "Mend it, or take it out of handlers.JOBS. `serve` does not start before."
    found = [Finding("jobs", Level.FAILURE, str(fault), mend) for fault in declared.FAULTS]
    found += [Finding("jobs", Level.WARNING, str(fault), "Add it to handlers.JOBS.") for fault in declared.unlisted()]
    return found or [ok("jobs", f"{len(declared.JOBS)} are declared, each usable")]


async def check_schema(connection: Connection) -> list[Finding]:
    """Compare its version with the one that is needed."""
    try:
        version = await require_schema(connection)
    except SchemaBehindError as error:
        return [split_failure("schema", error)]
    return [ok("schema", f"bon_scheduler is at version {version}")]


async def check_own_tables(connection: Connection) -> list[Finding]:
    """Ask whether the role may read and write our tables."""
    role = await connection.fetchval("select quote_ident(current_user)")
    found = [refused(role, each) for each in await own_refusals(connection)]
    return found or [ok("our tables", f"role {role} may read and write them")]


async def check_functions(connection: Connection) -> list[Finding]:
    """Look whether each function is there, may be executed and is this version's."""
    role = await connection.fetchval("select quote_ident(current_user)")
    functions, where = await own_functions(connection), await name_of(connection)
    findings = []
    for each in functions:
        if each.signature is None:
            what, remedy = f"function {each.name} is missing", _again(where, each.name)
        elif not each.executable:
            what = f"role {role} may not execute function {each.name}"
            remedy = f"grant execute on function {each.signature} to {role};"
        else:
            continue
        findings.append(Finding("functions", Level.FAILURE, what, remedy))
    if others := [each.name for each in functions if each.signature is not None and not each.ours]:
        what = f"not as this version has them: {', '.join(others)}"
        findings.append(Finding("functions", Level.WARNING, what, _again(where, *others)))
    return findings or [ok("functions", f"{len(functions)} executable, and as this version has them")]


def _again(where: str, *names: str) -> str:
    # `migrate` leaves alone what it applied before.
    listed = ", ".join(f"'{name}'" for name in names)
    statement = f"delete from bon_scheduler.functions where name in ({listed});"  # noqa: S608 - told, not executed
    return f"Run, on database {where}: bon-scheduler migrate. Where that changes nothing, before it: {statement}"


async def check_place(connection: Connection, settings: Settings) -> list[Finding]:
    """Compare where the ledger lives with where these settings lead."""
    found = await ledger.find_place(connection)
    if found.place is None:
        return [ok("place", "nothing is remembered yet; the first `serve` does")]
    if (what := ledger.fault(found, ledger.Caller.of(settings))) is not None:
        return [Finding("place", Level.FAILURE, what, ledger.REMEDY)]
    unnamed = "; without DEPLOYMENT a physical copy at the same address looks the same"
    named = "" if found.place.deployment else unnamed
    return [ok("place", f"the ledger lives here since {found.place.since:%Y-%m-%d} ({found.place}){named}")]


async def check_schedules(connection: Connection) -> list[Finding]:
    """Read each job's schedule as the triggers do."""
    histories = await schedule.read_histories(connection)
    return [
        Finding(
            "schedules",
            Level.FAILURE,
            f"{job}: {why}",
            "Delete its last row in bon_scheduler.schedules: the newest `serve` declares the schedule anew.",
        )
        for job, why in histories.unusable.items()
    ] or [ok("schedules", "those in force can be read")]


async def check_consent(connection: Connection) -> list[Finding]:
    """Look whether owners are asked to consent again, as they are unless too many grants are spent."""
    brake = await shaam.consent_brake(connection)
    if brake.since is None:
        return [ok("consent", "owners whose grants are spent are asked")]
    command = f"release {brake.held}" if brake.held else "run-once shaam-token-refresh --release-brake"
    return [
        Finding(
            "consent",
            Level.FAILURE,
            f"the brake holds since {brake.since:%Y-%m-%d %H:%M:%S} UTC: {brake.reason}",
            "Mend the cause: each run asks one business, and once that is refreshed all go on by themselves. If the "
            f"owners did withdraw their consent: bon-scheduler {command} --reason …",
        )
    ]


async def check_stood_aside(connection: Connection) -> list[Finding]:
    """Name what waits for a person: pauses, held runs, the brake on consent."""
    found = await find_stood_aside(connection)
    return [Finding(each.name, Level.WARNING, each.what, each.remedy) for each in found]


async def check_letters(connection: Connection) -> list[Finding]:
    """Look whether letters wait for the mail server, or are uncertain."""
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
        return [*findings, ok("deliveries", "none of the last seven days is uncertain")]
    named = ", ".join(str(letter.id) for letter in await mail.some_unknown(connection, MOST_NAMED))
    rest = f", and {unknown - MOST_NAMED:,} more" if unknown > MOST_NAMED else ""
    return [
        *findings,
        Finding(
            "deliveries",
            Level.WARNING,
            f"{unknown} of the last seven days may or may not have arrived, the latest: {named}{rest}",
            "Ask the owner, or send it again knowingly: bon-scheduler resend DELIVERY_ID --reason …",
        ),
    ]
