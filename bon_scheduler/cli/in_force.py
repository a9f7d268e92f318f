"""
Whether anybody is at work, and the schedules in force: those of the service while it runs, else those of this shell.

The service's are the ones its replicas recorded in the ledger. Where this shell has others, both are told.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from bon_scheduler import declared, ledger, schedule
from bon_scheduler.config import Settings
from bon_scheduler.jobs import Connection, Cron
from bon_scheduler.ledger import Heartbeat, Pause
from bon_scheduler.report import Report, format_distance

__all__ = [
    "InForce",
    "is_handled",
    "own_schedules",
    "read_in_force",
    "tell_liveness",
    "tell_pause",
    "tell_unhandled",
    "unhandled",
    "who_serves",
    "why_waits",
]

MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class InForce:
    """What fires when, and on whose word."""

    crons: Mapping[str, tuple[Cron, ZoneInfo]]
    """By job that has a schedule."""
    beats: Sequence[Heartbeat]
    differences: Sequence[str]
    """Where this shell's schedules are not the service's, a sentence a job."""

    @property
    def serving(self) -> bool:
        """Whether a `serve` is alive."""
        return any(beat.serves and beat.alive for beat in self.beats)


def own_schedules(settings: Settings) -> InForce:
    """Return this shell's schedules, for where nobody can be asked."""
    crons = {job: (cron, settings.bon_timezone) for job, cron in declared.schedules_of(settings).items()}
    return InForce(crons, (), ())


async def read_in_force(connection: Connection, settings: Settings) -> InForce:
    """Return the schedules in force, and who was heard last."""
    beats = await ledger.heartbeats(connection)
    here = own_schedules(settings).crons
    if not any(beat.serves and beat.alive for beat in beats):
        return InForce(here, beats, ())
    histories = await schedule.read_histories(connection)
    theirs = {
        job: (history[-1].cron, history[-1].zone)
        for job, history in histories.periods.items()
        if history[-1].cron is not None
    }
    crons = {**{job: each for job, each in here.items() if job in histories.unusable}, **theirs}
    known = {job.name for job in declared.JOBS}
    differing = [job for job in sorted(known) if _words(theirs.get(job)) != _words(here.get(job))]
    return InForce(
        crons,
        beats,
        [
            f"{job}: the service has {_words(theirs.get(job))}, this shell {_words(here.get(job))}."
            for job in differing
            if job not in histories.unusable
        ],
    )


def _words(found: tuple[Cron, ZoneInfo] | None) -> str:
    return f'"{found[0].expression}" in {found[1].key}' if found else "no schedule"


def who_serves(beats: Sequence[Heartbeat]) -> str | None:
    """Return why nothing is done: no `serve` is alive, and who was heard last; None: one is."""
    serving = [beat for beat in beats if beat.serves]
    if any(beat.alive for beat in serving):
        return None
    if not serving:
        return "No `serve` is alive, and none has left a heartbeat: each ended in order, or none was started."
    last = min(serving, key=lambda beat: beat.silent)
    return f"No `serve` is alive. The last heartbeat was {_ago(last.silent)}, of process {last.pid} on {last.host}."


def is_handled(job: str, beats: Sequence[Heartbeat]) -> bool | None:
    """
    Return whether a living `serve` takes runs of the job; None: none is alive.

    One whose version does not say which it takes is believed to take those that this version has.
    """
    serving = [beat for beat in beats if beat.serves and beat.alive]
    if not serving:
        return None
    ours = {each.name for each in declared.JOBS}
    return any(job in (ours if beat.jobs is None else beat.jobs) for beat in serving)


def unhandled(job: str, beats: Sequence[Heartbeat]) -> str | None:
    """Return who does not handle the job, so that its runs wait: no worker that is alive, or no version here."""
    handled = is_handled(job, beats)
    if handled is None:
        return None if job in {each.name for each in declared.JOBS} else "no version here has its handler"
    if handled:
        return None
    serving = [beat for beat in beats if beat.serves and beat.alive]
    named = ", ".join(f"{beat.version} on {beat.host}" for beat in serving[:MOST_NAMED])
    rest = f" and {len(serving) - MOST_NAMED} more" if len(serving) > MOST_NAMED else ""
    return f"no living worker handles it ({named}{rest})"


def tell_unhandled(report: Report, jobs: Iterable[str], beats: Sequence[Heartbeat]) -> None:
    """Say, after what a command lists, of which jobs no living worker takes runs."""
    for job in sorted(set(jobs)):
        if (why := unhandled(job, beats)) is not None:
            report.say(f"\n{job}: {why}. Its runs wait until a `serve` that has its handler is started.")


def why_waits(job: str, pause: Pause | None, beats: Sequence[Heartbeat]) -> Iterator[str]:
    """Yield what a run of the job waits for, that is not begun as soon as it is due."""
    if pause is not None:
        yield f"{job} is paused {tell_pause(pause)}."
    if (why := unhandled(job, beats)) is not None:
        yield f"{why}."
    if (nobody := who_serves(beats)) is not None:
        yield nobody


def _ago(silent: timedelta) -> str:
    now = datetime(2000, 1, 1)  # noqa: DTZ001 - a distance, whatever the day
    return format_distance(now - min(silent, timedelta(days=36_500)), now)


def tell_liveness(report: Report, beats: Sequence[Heartbeat]) -> None:
    """Say, after what a command lists, that nobody is at work; nothing where somebody is."""
    if (nobody := who_serves(beats)) is not None:
        report.say(f"\n{nobody} What is due waits until one is: bon-scheduler serve")


def tell_pause(pause: Pause) -> str:
    """Return since when a pause lasts, by whom, why and until when; instants in UTC, which `Report` shows as local."""
    since = f"since {pause.since:%Y-%m-%d %H:%M:%S} UTC " if pause.since else ""
    until = f"until {pause.until:%Y-%m-%d %H:%M:%S} UTC" if pause.until else "until it is resumed"
    return f"{since}by {pause.by}: {pause.reason}; {until}"
