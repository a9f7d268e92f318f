"""
Ids as people write and read them: the first characters of a UUID, as many as name one row.

A run, a delivery or a business may be named by any beginning of its id that no other has, of four characters at least.
Where a beginning is shown it ends with "…", except within a command; commands take it with that or without.
"""

import re
from collections.abc import Collection, Sequence
from enum import StrEnum
from itertools import takewhile
from uuid import UUID

from bon_scheduler import ledger
from bon_scheduler.cli.usage import UsageError
from bon_scheduler.jobs import Connection

__all__ = ["Kind", "find_ids", "find_run_id", "mark", "shorten"]

SHORTEST, USUAL, DIGITS, WHOLE = 4, 8, 32, 36
BEGINNING = re.compile(r"[0-9a-fA-F-]{4,36}")
MOST_NAMED = 4


class Kind(StrEnum):
    """What has an id."""

    RUN = "run"
    DELIVERY = "delivery"
    BUSINESS = "business"


# $1 lowest: uuid, $2 highest: uuid, $3 limit: int. Index: runs_pkey, deliveries_pkey or businesses_pkey.
FIND = {
    Kind.RUN: "select id from bon_scheduler.runs where id between $1 and $2 order by id limit $3",
    Kind.DELIVERY: "select id from bon_scheduler.deliveries where id between $1 and $2 order by id limit $3",
    Kind.BUSINESS: "select id from public.businesses where id between $1 and $2 order by id limit $3",
}
# $1 ids: uuid[]. The ids next to each, which share most with it. Index: runs_pkey or deliveries_pkey.
NEIGHBOURS = {
    Kind.RUN: """
        select i.id,
               (select r.id from bon_scheduler.runs r where r.id < i.id order by r.id desc limit 1) as below,
               (select r.id from bon_scheduler.runs r where r.id > i.id order by r.id limit 1) as above
          from unnest($1::uuid[]) as i (id)
    """,
    Kind.DELIVERY: """
        select i.id,
               (select d.id from bon_scheduler.deliveries d where d.id < i.id order by d.id desc limit 1) as below,
               (select d.id from bon_scheduler.deliveries d where d.id > i.id order by d.id limit 1) as above
          from unnest($1::uuid[]) as i (id)
    """,
}
WHERE_LISTED = {
    Kind.RUN: "List runs with: bon-scheduler runs",
    Kind.DELIVERY: "See those that are uncertain with: bon-scheduler check",
    Kind.BUSINESS: "Its id is in BON's table businesses.",
}


async def find_ids(connection: Connection, kind: Kind, texts: Sequence[str]) -> list[UUID]:
    """
    Return the ids that are meant, each once, in their order.

    Raises UsageError that names each text which is the beginning of no id or of several. A whole id is taken as it is.
    """
    ids: dict[UUID, None] = {}
    faults = []
    for text in (typed.removesuffix("…") for typed in texts):
        try:
            ids[UUID(text)] = None
            continue
        except ValueError:
            if not BEGINNING.fullmatch(text) or len(text.replace("-", "")) > DIGITS:
                faults.append(f'"{text}" is not a {kind}\'s id, nor {SHORTEST} or more of its first characters')
                continue
        found = await _beginning_with(connection, kind, text)
        if len(found) == 1:
            ids[found[0]] = None
        elif found:
            some = ", ".join(str(each) for each in found[:MOST_NAMED])
            faults.append(f'"{text}" begins the ids of several: {some}{" and more" if len(found) > MOST_NAMED else ""}')
        else:
            faults.append(f'No {kind}\'s id begins with "{text}"')
    if faults:
        raise UsageError(f"{'. '.join(faults)}. {WHERE_LISTED[kind]}")
    return list(ids)


async def find_run_id(connection: Connection, text: str) -> UUID:
    """Return the run that is meant by its id's first characters, or by a job's name: its last. Raises UsageError."""
    if text in {row["name"] for row in await ledger.job_overview(connection)}:
        latest = await ledger.latest_run(connection, text)
        if latest is None:
            raise UsageError(f"{text} has no run yet. Ask for one with: bon-scheduler enqueue {text}")
        return latest
    (run_id,) = await find_ids(connection, Kind.RUN, [text])
    return run_id


async def _beginning_with(connection: Connection, kind: Kind, text: str) -> list[UUID]:
    digits = text.replace("-", "")
    bounds = UUID(digits.ljust(DIGITS, "0")), UUID(digits.ljust(DIGITS, "f"))
    rows = await connection.fetch(FIND[kind], *bounds, MOST_NAMED + 1)
    return [row["id"] for row in rows if str(row["id"]).startswith(text.lower())]


async def shorten(connection: Connection, kind: Kind, ids: Collection[UUID | None]) -> dict[UUID | None, str]:
    """Return the beginning of each id that no other has, of eight characters at least; a dash for None."""
    wanted = {each for each in ids if each is not None}
    short: dict[UUID | None, str] = {None: "—"}
    for row in await connection.fetch(NEIGHBOURS[kind], list(wanted)):
        whole = str(row["id"])
        others = [str(row[side]) for side in ("below", "above") if row[side] is not None]
        shared = max((_shared(whole, other) for other in others), default=0)
        short[row["id"]] = whole[: max(USUAL, shared + 1)]
    return short


def mark(short: str) -> str:
    """Return what `shorten` made of an id with a sign that it goes on; a whole one and the dash as they are."""
    return f"{short}…" if 1 < len(short) < WHOLE else short


def _shared(one: str, other: str) -> int:
    """Return how many characters two ids begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True)))
