"""Commands about ticks: audit what was, show what will be."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise, takewhile
from statistics import median
from typing import Any, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo

from bon_scheduler import ledger
from bon_scheduler.cli.in_force import InForce, own_schedules, read_in_force, tell_liveness, tell_pause
from bon_scheduler.cli.parsing import BADLY, DONE, is_span, parse_instant, parse_span, reading
from bon_scheduler.cli.usage import UsageError
from bon_scheduler.clock import Clock
from bon_scheduler.config import Settings
from bon_scheduler.database import DatabaseUnavailableError, SchemaBehindError
from bon_scheduler.ledger import Pause
from bon_scheduler.report import Column, Report, format_offset
from bon_scheduler.schedule import Audit, AuditedTick, Transition, Verdict, audit_ticks, fire_times, transitions

__all__ = ["audit", "timeline"]

LISTED = (
    Verdict.GAP,
    Verdict.STUCK,
    Verdict.MISSED,
    Verdict.DEAD,
    Verdict.HELD,
    Verdict.PAUSED,
    Verdict.CANCELLED,
    Verdict.UNEXPECTED,
)
MOST_SHOWN = 50
MOST_NAMED = 3
MOST_DAYS = 3660
LEAST_FOLDED = 4
NOTHING_EXPECTED = (
    "No tick was expected in this span: none fell into it, or no `serve` had declared a schedule before it."
)
SUMMARY_COLUMNS = (
    *("job", "expected", "ran", "late"),
    Column("median lateness", importance=1),
    Column("worst", importance=4),
    *("missed", Column("resolved", importance=5), Column("paused", importance=3), "dead"),
    *(Column("cancelled", importance=2), "gaps"),
)
DETAIL_COLUMNS = (
    *("fire time", "job", "verdict", "late"),
    *(Column("host", importance=1), Column("attempts", importance=2), Column("resolved", importance=3)),
    Column("reason", wraps=16),
)


async def audit(settings: Settings, report: Report, clock: Clock, *, since: str) -> int:
    """Report whether every tick since then is accounted for."""
    start = _parse_since(since, settings, clock)
    async with reading(settings) as connection:
        found = await audit_ticks(connection, start)
    if report.as_json:
        report.document(_as_document(found))
    else:
        _show(report, found)
    return DONE if found.sound else BADLY


def _parse_since(text: str, settings: Settings, clock: Clock) -> datetime:
    now = clock.now()
    start = now - parse_span(text) if is_span(text) else parse_instant(text, settings)
    if start > now:
        raise UsageError(f"--since {text} is in the future. Give a span, or an instant that has passed.")
    return start


def _as_document(found: Audit) -> dict[str, Any]:
    lists = {
        "gaps": found.of(Verdict.GAP),
        "missed": found.of(Verdict.MISSED),
        "late": found.late,
        "paused": found.of(Verdict.PAUSED),
        "held": found.of(Verdict.HELD),
        "dead": found.of(Verdict.DEAD),
        "cancelled": found.of(Verdict.CANCELLED),
        "in_progress": found.of(Verdict.IN_PROGRESS),
        "waiting": found.of(Verdict.WAITING),
        "stuck": found.of(Verdict.STUCK),
        "unexpected": found.of(Verdict.UNEXPECTED),
        "ticks": found.ticks,
    }
    return {
        "since": found.since,
        "until": found.until,
        "sound": found.sound,
        "unusable": dict(found.unusable),
        "expected": len(found.ticks) - len(lists["unexpected"]),
        "ran": len(found.of(Verdict.RAN)),
        **{name: [tick.as_json() for tick in ticks] for name, ticks in lists.items()},
    }


def _show(report: Report, found: Audit) -> None:
    jobs = sorted({tick.job for tick in found.ticks})
    report.say(f"Ticks from {report.instant(found.since)} to {report.instant(found.until)}\n")
    report.table(SUMMARY_COLUMNS, [_summary(job, found) for job in jobs], empty=NOTHING_EXPECTED)
    worth_naming = [*found.of(*LISTED), *found.late]  # BEFORE the late, otherwise many of those hide a gap
    if worth_naming:
        report.table(
            DETAIL_COLUMNS, [_detail(report, tick) for tick in worth_naming[:MOST_SHOWN]], title="\nNot as scheduled"
        )
    if (more := len(worth_naming) - MOST_SHOWN) > 0:
        report.say(f"and {more} more; all of them with --json")
    for job, why in found.unusable.items():
        report.say(f"{job}: {why}.")
    if found.ticks or found.unusable:
        report.say(f"\n{'Every' if found.sound else 'Not every'} tick is accounted for.")
    if dead := found.of(Verdict.DEAD):
        report.say("Once the cause is mended, dead ticks run again with: bon-scheduler retry RUN_ID --reason …")
        named = ", ".join(str(tick.run_id) for tick in dead[: -MOST_NAMED - 1 : -1])
        rest = (
            f", and {len(dead) - MOST_NAMED:,} more: bon-scheduler runs --state dead" if len(dead) > MOST_NAMED else ""
        )
        report.say(f"Dead, the latest first: {named}{rest}")


def _summary(job: str, found: Audit) -> list[object]:
    ticks = [tick for tick in found.ticks if tick.job == job]
    seconds = [tick.late.total_seconds() for tick in ticks if tick.verdict is Verdict.RAN and tick.late is not None]
    count = {verdict: sum(tick.verdict is verdict for tick in ticks) for verdict in Verdict}
    return [
        job,
        len(ticks) - count[Verdict.UNEXPECTED],
        count[Verdict.RAN],
        sum(tick.job == job for tick in found.late),
        f"{median(seconds):.3f} s" if seconds else "—",
        f"{max(seconds):.3f} s" if seconds else "—",
        count[Verdict.MISSED],
        sum(tick.resolved is True for tick in ticks),
        count[Verdict.PAUSED],
        count[Verdict.DEAD],
        count[Verdict.CANCELLED],
        count[Verdict.GAP],
    ]


def _detail(report: Report, tick: AuditedTick) -> list[object]:
    late = f"{tick.late.total_seconds():.1f} s" if tick.late is not None else "—"
    resolved = "—" if tick.resolved is None else "yes" if tick.resolved else "no"
    verdict = "late" if tick.verdict is Verdict.RAN else tick.verdict
    return [
        report.instant(tick.fire_time),
        tick.job,
        verdict,
        late,
        tick.host or "—",
        tick.attempts or "—",
        resolved,
        tick.reason or "",
    ]


async def timeline(
    settings: Settings, report: Report, clock: Clock, *, start: str | None, days: int, job: str | None
) -> int:
    """Show what will fire when, in BON_TIMEZONE, with the nights that change the clocks marked."""
    begin = parse_instant(start, settings) if start else clock.now()
    if not 0 < days <= MOST_DAYS:
        raise UsageError(f"--days {days} is out of range. Give 1 to {MOST_DAYS}.")
    in_force, paused, unasked = await _read_plan(settings)
    if job is not None and job not in in_force.crons:
        raise UsageError(f'"{job}" has no schedule. Those that have: {", ".join(sorted(in_force.crons))}.')
    zone = settings.bon_timezone
    # Local days: a night that changes the clocks makes one an hour longer or shorter.
    end = (begin.astimezone(zone) + timedelta(days=days)).astimezone(UTC)
    ticks = sorted(
        Fire(instant, name, _join(_note(instant, zone), _note_pause(paused.get(name), instant)))
        for name, (cron, their_zone) in in_force.crons.items()
        if job in {None, name}
        for instant in takewhile(lambda fire: fire <= end, fire_times(cron.expression, their_zone, begin))
    )
    changes = transitions(zone, begin, end)
    if report.as_json:
        rows = [
            {"fire_time": at, "local": at.astimezone(zone).isoformat(), "job": name, "note": note or None}
            for at, name, note in ticks
        ]
        marks = [{"at": c.instant, "change_minutes": c.change.total_seconds() / 60} for c in changes]
        report.document(
            {
                "from": begin,
                "until": end,
                "timezone": zone.key,
                "ticks": rows,
                "transitions": marks,
                "differences": in_force.differences,
                "service_unknown": unasked,
            }
        )
        return DONE
    lines = [
        *_fold(ticks, zone),
        *((each.instant, _local(each.instant, zone), "", _describe(each)) for each in changes),
    ]
    report.table(
        [zone.key, "job", Column("note", wraps=16)],
        [cells for _, *cells in sorted(lines)],
        empty=f"Nothing fires in these {days} days.",
    )
    for name, pause in sorted(paused.items()):
        report.say(f"\n{name} is paused {tell_pause(pause)}")
    for line in in_force.differences:
        report.say(f"\n{line}")
    if unasked is not None:
        report.say(f"\nThese are this shell's schedules; the service's are not known: {unasked}")
    else:
        tell_liveness(report, in_force.beats)
    return DONE


async def _read_plan(settings: Settings) -> tuple[InForce, Mapping[str, Pause], str | None]:
    """Return the schedules in force, what is paused, and, where the database is away, why the service's are unknown."""
    try:
        async with reading(settings) as connection:
            return await read_in_force(connection, settings), await ledger.paused_jobs(connection), None
    except (DatabaseUnavailableError, SchemaBehindError) as error:
        return own_schedules(settings), {}, str(error)


class Fire(NamedTuple):
    """A fire time of a job, and what is to be said of it."""

    instant: datetime
    job: str
    note: str


Line: TypeAlias = tuple[datetime, str, str, str]


def _fold(ticks: Sequence[Fire], zone: ZoneInfo) -> list[Line]:
    """Return a line for each fire time; one for those of a job that follow each other evenly on one day."""
    alike: dict[tuple[object, ...], list[Fire]] = {}
    for tick in ticks:
        local = tick.instant.astimezone(zone)
        alike.setdefault((tick.job, local.date(), local.utcoffset(), tick.note), []).append(tick)
    lines: list[Line] = []
    for group in alike.values():
        apart = {after.instant - before.instant for before, after in pairwise(group)}
        if len(group) < LEAST_FOLDED or len(apart) > 1:
            lines += [(tick.instant, _local(tick.instant, zone), tick.job, tick.note) for tick in group]
            continue
        first, last = group[0].instant.astimezone(zone), group[-1].instant.astimezone(zone)
        span = f"{first:%a %Y-%m-%d %H:%M}–{last:%H:%M}{format_offset(first, zone)}"
        every = f"every {_length(apart.pop())} ({len(group)})"
        lines.append((group[0].instant, span, group[0].job, _join(every, group[0].note)))
    return lines


def _length(apart: timedelta) -> str:
    seconds = int(apart.total_seconds())
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds % length == 0:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _join(*notes: str | None) -> str:
    return "; ".join(note for note in notes if note)


def _note_pause(pause: Pause | None, instant: datetime) -> str | None:
    """Return that a fire time will be recorded as paused, not run."""
    if pause is None or (pause.until is not None and pause.until <= instant):
        return None
    return "paused: not run" if pause.until else "paused: not run unless resumed"


def _local(instant: datetime, zone: ZoneInfo) -> str:
    local = instant.astimezone(zone)
    seconds = f":{local:%S}" if local.second else ""
    return f"{local:%a %Y-%m-%d %H:%M}{seconds}{format_offset(instant, zone)}"


def _describe(change: Transition) -> str:
    minutes = int(change.change.total_seconds() / 60)
    if minutes > 0:
        return f"clocks go forward {minutes} minutes: a gap"
    return f"clocks go back {-minutes} minutes: the local times before this repeat (a fold)"


def _note(instant: datetime, zone: ZoneInfo) -> str | None:
    """Return which of two equal local times this is, in a fold; None elsewhere."""
    local = instant.astimezone(zone)
    if local.replace(fold=1 - local.fold).utcoffset() == local.utcoffset():
        return None
    return "the second of two" if local.fold else "the first of two"
