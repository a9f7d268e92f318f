"""One run: its attempts, what it did for each business, what it caused, and what to do next. Changes nothing."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from bon_scheduler import ledger, mail
from bon_scheduler.cli import rehearsed as rehearsing
from bon_scheduler.cli.ids import Kind, find_ids, find_run_id, mark, shorten
from bon_scheduler.cli.in_force import tell_pause, unhandled, who_serves
from bon_scheduler.cli.look import describe
from bon_scheduler.cli.parsing import DONE, UsageError, reading
from bon_scheduler.clock import Clock
from bon_scheduler.config import Settings
from bon_scheduler.database import write_json
from bon_scheduler.ledger import OPEN_STATES, Heartbeat, Obstacle, Pause
from bon_scheduler.report import Column, Report, format_counts, format_distance, format_span

__all__ = ["next_steps", "show"]

MOST_NAMED = 3
NOT_BEGUN = "Nobody has begun it."
DRY_RUN = "A dry run has no attempts: whoever asked for it made it, and everything was rolled back."


async def show(settings: Settings, report: Report, clock: Clock, *, run: str, business: str | None = None) -> int:
    """Show one run, or what it did for one business; then what to do next."""
    async with reading(settings) as connection:
        run_id = await find_run_id(connection, run)
        only = None if business is None else (await find_ids(connection, Kind.BUSINESS, [business]))[0]
        found = await ledger.find_run(connection, run_id)
        if found is None:
            raise UsageError(f"No run {run_id}. List runs with: bon-scheduler runs")
        lists: dict[str, Sequence[Mapping[str, Any]]] = {
            "attempts": await ledger.attempts_of(connection, run_id),
            "businesses": _of(only, await ledger.businesses_of(connection, run_id)),
            "caused": await ledger.caused_by(connection, run_id),
            "actions": await ledger.actions_on(connection, run_id),
            "deliveries": _of(only, await mail.deliveries_of(connection, run_id)),
            "rehearsals": await ledger.rehearsals_of(connection, run_id),
        }
        waits = await ledger.obstacle(connection, run_id)
        pause = (await ledger.paused_jobs(connection)).get(found["job"])
        beats = await ledger.heartbeats(connection)
        ids = [run_id, *([waits.behind] if waits else []), *(row["run_id"] for row in lists["caused"])]
        ids += rehearsing.runs_of(lists["rehearsals"])
        short = {
            **await shorten(connection, Kind.RUN, ids),
            **await shorten(connection, Kind.DELIVERY, [row["delivery_id"] for row in lists["deliveries"]]),
        }
    obstacles = _obstacles(found, waits, pause, short, beats)
    if report.as_json:
        report.document({**found, **lists, "waits_for": obstacles})
        return DONE
    _show_facts(report, found, clock.now())
    _show_attempts(report, found, lists["attempts"])
    _show_lists(report, lists, short)
    rehearsing.show_comparison(report, lists["rehearsals"], short)
    if only is not None and not (lists["businesses"] or lists["deliveries"]):
        report.say(f"\nThis run did nothing for business {only}.")
    steps = [*obstacles, *next_steps(found, lists, short)]
    if steps:
        report.say("")
    for step in steps:
        report.say(step)
    return DONE


def _of(business: UUID | None, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [row for row in rows if business is None or row["business_id"] == business]


def _obstacles(
    run: ledger.Row,
    waits: Obstacle | None,
    pause: Pause | None,
    short: Mapping[UUID | None, str],
    beats: Sequence[Heartbeat],
) -> list[str]:
    """Say what a run waits for, a sentence each."""
    if run["state"] not in OPEN_STATES:
        return []
    found = []
    if waits is not None and pause is not None:
        paused = f"It waits because {run['job']} is paused {tell_pause(pause)}"
        found.append(f"{paused}. End the pause with: bon-scheduler resume {run['job']} --reason …")
    if waits is not None and waits.behind is not None:
        since = f" since {waits.behind_since:%Y-%m-%d %H:%M:%S} UTC" if waits.behind_since else ""
        behind = (
            f"It waits for run {mark(short[waits.behind])}, which must not run beside it "
            f"and runs on {waits.behind_on}{since}"
        )
        found.append(f"{behind}: bon-scheduler show {short[waits.behind]}")
    if waits is not None and not waits.ready and waits.run_at is not None:
        found.append(f"It is not to begin before {waits.run_at:%Y-%m-%d %H:%M:%S} UTC.")
    if waits is not None and (why := unhandled(run["job"], beats)) is not None:
        found.append(f"It waits because {why}: start a `serve` of a version that has the handler of {run['job']}.")
    if (nobody := who_serves(beats)) is not None:
        found.append(f"{nobody} Start one: bon-scheduler serve")
    return found


def next_steps(
    run: ledger.Row, lists: Mapping[str, Sequence[Mapping[str, Any]]], short: Mapping[UUID | None, str]
) -> list[str]:
    """Return what to do about a run, each with its command filled in."""
    if run["dry_run"]:
        return []
    this = short[run["run_id"]]
    of_failed = "the businesses that failed are tried again" if run["state"] == "partial" else "it runs again"
    retry = f"Once the cause is mended, {of_failed} with: bon-scheduler retry {this} --reason …"
    cancel = f"bon-scheduler cancel {this} --reason …"
    fire_time = run["fire_time"] and run["fire_time"].astimezone(UTC).isoformat()
    good = f"Make it good with: bon-scheduler run-once {run['job']} --fire-time {fire_time}"
    steps = {
        "dead": [retry, f"Not wanted any more: {cancel}"],
        "partial": [retry],
        "held": [f"Let it go on, once: bon-scheduler release {this} --reason …", f"Not wanted: {cancel}"],
        "queued": [f"Not wanted: {cancel}"],
        "retrying": [f"Not wanted: {cancel}"],
        "running": [f"Stop it with: {cancel}"],
        "cancelled": [f"Run it after all: bon-scheduler retry {this} --reason …"],
        "missed": [good],
        "paused": [good],
    }.get(run["state"], [])
    unknown = [short[row["delivery_id"]] for row in lists["deliveries"] if row["state"] == "unknown"]
    steps += [f"Send a letter again, knowingly: bon-scheduler resend {key} --reason …" for key in unknown[:MOST_NAMED]]
    if len(unknown) > MOST_NAMED:
        steps.append(f"And {len(unknown) - MOST_NAMED:,} more letters that are unknown, listed above.")
    ill = [row for row in lists["caused"] if row["state"] in {"dead", "partial", "held"}]
    steps += [f"It caused a {row['state']} run: bon-scheduler show {short[row['run_id']]}" for row in ill[:MOST_NAMED]]
    if len(ill) > MOST_NAMED:
        steps.append(f"And {len(ill) - MOST_NAMED:,} more that it caused, listed above.")
    return steps


def _show_facts(report: Report, run: ledger.Row, now: datetime) -> None:
    instants = ("fire_time", "run_at", "enqueued_at", "started_at", "finished_at")
    facts = dict(run)
    for name in instants:
        if run[name] is not None:
            facts[name] = f"{report.instant(run[name])} ({format_distance(run[name], now)})"
    facts["payload"] = write_json(run["payload"]) if run["payload"] else None
    facts["counts"] = format_counts(run["counts"]) if run["counts"] else None
    report.facts(facts)


def _show_attempts(report: Report, run: ledger.Row, attempts: Sequence[Mapping[str, Any]]) -> None:
    report.table(
        ["attempt", "outcome", "started", "took", Column("host", importance=1), Column("error", wraps=16)],
        [
            (
                row["attempt"],
                row["outcome"] or "running",
                report.instant(row["started_at"]),
                format_span(row["started_at"], row["ended_at"]),
                row["host"],
                row["error"] or "",
            )
            for row in attempts
        ],
        title="\nAttempts",
        empty=f"\n{DRY_RUN if run['dry_run'] else NOT_BEGUN}",
    )


def _show_lists(
    report: Report, lists: Mapping[str, Sequence[Mapping[str, Any]]], short: Mapping[UUID | None, str]
) -> None:
    tables: list[tuple[str, str, Sequence[Column | str], Callable[[Mapping[str, Any]], Sequence[object]]]] = [
        (
            "businesses",
            "Businesses",
            ["business", "outcome", Column("what it did, or why not", wraps=20)],
            lambda row: (row["business_id"], row["outcome"], describe(row)),
        ),
        (
            "deliveries",
            "Letters",
            ["delivery", "business", "day", "state", Column("reply", wraps=12)],
            lambda row: (
                mark(short[row["delivery_id"]]),
                row["business_id"],
                row["as_of"],
                row["state"],
                row["reply"] or "",
            ),
        ),
        (
            "caused",
            "Caused",
            ["run", "job", "state", Column("counts", wraps=20)],
            lambda row: (
                mark(short[row["run_id"]]),
                row["job"],
                row["state"],
                format_counts(row["counts"], brief=True),
            ),
        ),
        (
            "actions",
            "Operators",
            ["when", "action", "by", Column("reason", wraps=20)],
            lambda row: (report.instant(row["at"]), row["action"], row["by"], row["reason"]),
        ),
    ]
    for name, title, columns, cells in tables:
        if lists[name]:
            report.table(columns, [cells(row) for row in lists[name]], title=f"\n{title}")
