"""The command that asks for a run: enqueue. It needs none of what works on runs."""

from dataclasses import dataclass, replace

from bon_scheduler import declared, ledger
from bon_scheduler.cli.in_force import why_waits
from bon_scheduler.cli.parsing import (
    DONE,
    parse_span,
    person,
    read_key,
    read_payload,
    reading,
    require_known,
    type_payload,
)
from bon_scheduler.cli.telling import complain
from bon_scheduler.clock import Clock
from bon_scheduler.config import Settings
from bon_scheduler.ledger import Origin, Request
from bon_scheduler.report import Report
from bon_scheduler.schedule import Clocks

__all__ = ["Enqueue", "enqueue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Enqueue:
    """What `enqueue` was told, as it was typed."""

    name: str
    payload: str
    key: str | None
    after: str | None
    priority: int


async def enqueue(settings: Settings, report: Report, clock: Clock, told: Enqueue) -> int:
    """Ask for a run; say its id, or which run holds the key."""
    name, key = told.name, told.key
    arguments = read_payload(told.payload)
    ours = {job.name: job for job in declared.JOBS}
    if name in ours:
        arguments = type_payload(ours[name], arguments).model_dump(mode="json")
    request = Request(
        name,
        arguments,
        dedupe_key=None if key is None else read_key(key),
        priority=told.priority,
        origin=Origin.PERSON,
        asked_by=person(settings),
    )
    after = parse_span(told.after) if told.after else None
    async with reading(settings) as connection:
        if after is not None:
            # By the clock that will say when it is due.
            clocks = Clocks(clock)
            await clocks.read(connection)
            request = replace(request, run_at=clocks.database + after)
        if name not in ours:
            await require_known(connection, name)
        run_id = await ledger.enqueue(connection, request)
        holder = await ledger.holder_of_key(connection, name, key) if run_id is None and key is not None else None
        pause = (await ledger.paused_jobs(connection)).get(name)
        beats = await ledger.heartbeats(connection)
    answer = {"run_id": run_id or (holder or {}).get("run_id"), "duplicate": run_id is None}
    if report.as_json:
        report.document(answer)
    elif run_id is not None:
        report.say(str(run_id))
    if run_id is not None:
        for why in why_waits(name, pause, beats):
            complain(f"The run waits: {report.for_people(why)}")
    elif not report.as_json:
        state = holder["state"] if holder else "unknown"
        complain(f'The key "{key}" is held by run {answer["run_id"]}, which is {state}: nothing was enqueued.')
    return DONE
