"""Is the work done? Who is alive, what is overdue, dead, held, paused, or waits for a job that nobody handles."""

from bon_scheduler import ledger, schedule
from bon_scheduler.cli.checks.findings import Finding, Level, ok
from bon_scheduler.cli.in_force import InForce, read_in_force, tell_pause, unhandled, who_serves
from bon_scheduler.config import Settings
from bon_scheduler.jobs import Connection

__all__ = ["check_paused", "check_runs", "check_service", "check_ticks"]


async def check_service(connection: Connection, settings: Settings) -> list[Finding]:
    """Look who is at work, and whether they were told what this shell was told."""
    found = await read_in_force(connection, settings)
    nobody = who_serves(found.beats)
    if nobody is not None:
        served = bool((await schedule.read_histories(connection)).periods)
        level = Level.FAILURE if served else Level.WARNING
        return [Finding("workers", level, nobody.rstrip("."), "Start one: bon-scheduler serve")]
    serving = [beat for beat in found.beats if beat.serves and beat.alive]
    silent = [beat for beat in found.beats if beat.serves and not beat.alive]
    hosts = ", ".join(f"{beat.host} (process {beat.pid}, {beat.version})" for beat in serving)
    findings = [ok("workers", f"{len(serving)} alive: {hosts}")]
    if silent:
        gone = ", ".join(f"{beat.host} (process {beat.pid})" for beat in silent)
        what, remedy = (
            f"without a heartbeat for longer than its lease: {gone}",
            "Its runs are taken over by the others.",
        )
        findings.append(Finding("workers", Level.WARNING, what, remedy))
    return [*findings, *_differences(found, settings)]


def _differences(found: InForce, settings: Settings) -> list[Finding]:
    here = settings.readable()
    told = {beat.host: beat.settings for beat in found.beats if beat.serves and beat.alive and beat.settings}
    lines = [line.rstrip(".") for line in found.differences]
    for name in here:
        theirs = sorted({settings_of.get(name, "unset") for settings_of in told.values()})
        if len(theirs) > 1:
            lines.append(f"{name}: the replicas have {', '.join(theirs)}")
        elif theirs and theirs[0] != here[name]:
            lines.append(f"{name}: the service has {theirs[0]}, this shell {here[name]}")
    if not lines:
        return [ok("service's settings", "as this shell has them")]
    remedy = (
        "The service's count. Run check with its environment: the rows on mail, SHAAM and settings are this shell's."
    )
    return [Finding("service's settings", Level.WARNING, "; ".join(lines), remedy)]


async def check_ticks(connection: Connection) -> list[Finding]:
    """Look whether ticks are due and not in the ledger."""
    remedy = "See `workers`; then: bon-scheduler audit --since 2d"
    unusable = (await schedule.read_histories(connection)).unusable  # which `schedules` names
    counted = (await schedule.unaccounted(connection)).items()
    overdue = {job: many for job, many in counted if many and job not in unusable}
    return [
        Finding("ticks", Level.FAILURE, f"{job}: {_many(many, 'tick')} due for over a minute and not begun", remedy)
        for job, many in sorted(overdue.items())
    ] or [ok("ticks", "none is overdue")]


async def check_runs(connection: Connection) -> list[Finding]:
    """Look for runs that wait for a person, or for a job that nobody handles."""
    findings = []
    for row in await ledger.held_counts(connection):
        job = row["job"]
        if row["dead"]:
            what, remedy = f"{job}: {_many(row['dead'], 'dead run')}", f"bon-scheduler runs --state dead --job {job}"
            mend = f"mend the cause, then: bon-scheduler retry --dead --job {job} --reason …"
            findings.append(Finding("runs", Level.FAILURE, what, f"See why: {remedy}; {mend}"))
        if row["held"]:
            what, remedy = f"{job}: {_many(row['held'], 'held run')}", f"bon-scheduler show {job}"
            findings.append(Finding("runs", Level.WARNING, what, f"See why, and what lets it go on: {remedy}"))
    beats = await ledger.heartbeats(connection)
    for row in await ledger.job_overview(connection):
        job, why = row["name"], unhandled(row["name"], beats)
        waiting = (await ledger.open_counts(connection, job))[0] if row["waiting"] and why is not None else 0
        if waiting:
            what = f"{job}: {_many(waiting, 'run')} waiting, and {why}"
            remedy = f"Deploy the version that has it; or: bon-scheduler cancel --waiting --job {job} --reason …"
            findings.append(Finding("runs", Level.WARNING, what, remedy))
    return findings or [ok("runs", "none is dead, held or without a handler")]


async def check_paused(connection: Connection) -> list[Finding]:
    """Tell what is paused, since when, by whom, why and until when."""
    findings = []
    for job, pause in sorted((await ledger.paused_jobs(connection)).items()):
        remedy = f"To end it: bon-scheduler resume {job} --reason …"
        findings.append(Finding("paused", Level.WARNING, f"job {job} {tell_pause(pause)}", remedy))
    left_alone = await ledger.paused_businesses(connection)
    if left_alone:
        what = f"{len(left_alone):,} business{'es are' if len(left_alone) > 1 else ' is'} skipped by every job"
        findings.append(Finding("paused", Level.WARNING, what, "See which, and why: bon-scheduler jobs"))
    return findings or [ok("paused", "nothing")]


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"
