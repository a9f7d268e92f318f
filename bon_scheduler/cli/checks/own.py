"""Schema `bon_scheduler`: its version, whether the role may use it, and what its tables say that needs a person."""

from bon_scheduler import declared, mail, schedule
from bon_scheduler.cli.checks.bon import refused
from bon_scheduler.cli.checks.findings import Finding, Level, ok
from bon_scheduler.database import SchemaBehindError, own_functions, own_refusals, require_schema
from bon_scheduler.jobs import Connection

__all__ = ["check_functions", "check_jobs", "check_letters", "check_own_tables", "check_schedules", "check_schema"]

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
        return [Finding("schema", Level.FAILURE, str(error), "Run: python -m bon_scheduler migrate")]
    return [ok("schema", f"bon_scheduler is at version {version}")]


async def check_own_tables(connection: Connection) -> list[Finding]:
    """Ask whether the role may read and write our tables."""
    role = await connection.fetchval("select quote_ident(current_user)")
    found = [refused(role, each) for each in await own_refusals(connection)]
    return found or [ok("our tables", f"role {role} may read and write them")]


async def check_functions(connection: Connection) -> list[Finding]:
    """Look whether each function is there, may be executed and is this version's."""
    role = await connection.fetchval("select quote_ident(current_user)")
    functions = await own_functions(connection)
    findings = []
    for each in functions:
        if each.signature is None:
            what, remedy = f"function {each.name} is missing", _again(each.name)
        elif not each.executable:
            what = f"role {role} may not execute function {each.name}"
            remedy = f"grant execute on function {each.signature} to {role};"
        else:
            continue
        findings.append(Finding("functions", Level.FAILURE, what, remedy))
    if others := [each.name for each in functions if each.signature is not None and not each.ours]:
        what = f"not as this version has them: {', '.join(others)}"
        findings.append(Finding("functions", Level.WARNING, what, _again(*others)))
    return findings or [ok("functions", f"{len(functions)} executable, and as this version has them")]


def _again(*names: str) -> str:
    # `migrate` leaves alone what it applied before.
    listed = ", ".join(f"'{name}'" for name in names)
    statement = f"delete from bon_scheduler.functions where name in ({listed});"  # noqa: S608 - told, not executed
    return f"Run: python -m bon_scheduler migrate. Where that changes nothing, before it: {statement}"


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
    return [
        *findings,
        Finding(
            "deliveries",
            Level.WARNING,
            f"{unknown} of the last seven days may or may not have arrived, the latest: {named}",
            "Ask the owner, or send it again knowingly: python -m bon_scheduler resend DELIVERY_ID --reason …",
        ),
    ]
