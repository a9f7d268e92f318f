"""Commands about ticks: audit what was, show what will be."""

from datetime import UTC, datetime, timedelta
from itertools import takewhile
from statistics import median
from typing import Any
from zoneinfo import ZoneInfo

from bon_scheduler import declared
from bon_scheduler.cli.parsing import BADLY, DONE, is_span, parse_instant, parse_span, reading
from bon_scheduler.cli.usage import UsageError
from bon_scheduler.clock import Clock
from bon_scheduler.config import Settings
from bon_scheduler.report import Column, Report
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
    worth_naming = [*found.late, *found.of(*LISTED)]
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
        report.say(
            "Once the cause is mended, dead ticks run again with: python -m bon_scheduler retry RUN_ID --reason …"
        )
        report.say(f"Dead, the latest first: {', '.join(str(tick.run_id) for tick in dead[: -MOST_NAMED - 1 : -1])}")


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
    """Show what will fire when, local and UTC, with the nights that change the clocks marked."""
    begin = parse_instant(start, settings) if start else clock.now()
    schedules = declared.schedules_of(settings)
    if job is not None and job not in schedules:
        raise UsageError(f'"{job}" has no schedule. Those that have: {", ".join(sorted(schedules))}.')
    if not 0 < days <= MOST_DAYS:
        raise UsageError(f"--days {days} is out of range. Give 1 to {MOST_DAYS}.")
    zone = settings.bon_timezone
    # Local days: a night that changes the clocks makes one an hour longer or shorter.
    end = (begin.astimezone(zone) + timedelta(days=days)).astimezone(UTC)
    ticks = sorted(
        (instant, name)
        for name, cron in schedules.items()
        if job in {None, name}
        for instant in takewhile(lambda fire: fire <= end, fire_times(cron.expression, zone, begin))
    )
    changes = transitions(zone, begin, end)
    rows = [
        {"fire_time": instant, "local": instant.astimezone(zone).isoformat(), "job": name, "note": _note(instant, zone)}
        for instant, name in ticks
    ]
    if report.as_json:
        marks = [{"at": c.instant, "change_minutes": c.change.total_seconds() / 60} for c in changes]
        report.document({"from": begin, "until": end, "timezone": zone.key, "ticks": rows, "transitions": marks})
        return DONE
    lines = [(instant, name, _note(instant, zone) or "") for instant, name in ticks]
    lines += [(change.instant, "", _describe(change)) for change in changes]
    report.table(
        [zone.key, Column("UTC", importance=1), "job", Column("note", wraps=16)],
        [(_local(at, zone), f"{at:%Y-%m-%d %H:%M:%S}", name, note) for at, name, note in sorted(lines)],
        empty=f"Nothing fires in these {days} days.",
    )
    return DONE


def _local(instant: datetime, zone: ZoneInfo) -> str:
    return f"{instant.astimezone(zone):%a %Y-%m-%d %H:%M:%S %z}"


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
