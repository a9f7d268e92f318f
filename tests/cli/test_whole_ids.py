"""Each id on each screen is whole, or a beginning that is marked as one and that commands take; at any width."""

import re
from collections.abc import Mapping
from uuid import UUID

import pytest

from tests import arrange
from tests.cli.test_screens import LETTER, OUTCOME, make
from tests.conftest import Connection
from tests.process import run_command
from tests.terminal import at_terminal

PIPED = 0
WIDTHS = [PIPED, 120, 80, 60]
CHANGED = """
    insert into bon_scheduler.changed_rows (run_id, change, ids, businesses, items, updated)
    values ($1, 'deleted', $2, $3, '{3}', '{2026-11-01T00:00Z}')
"""
SHOWN = re.compile(
    r"(?<![\w-])(?P<command>(?:show|retry|cancel|release|resend) )?(?P<id>[0-9a-f]{6,}[0-9a-f-]*)(?P<on>…?)"
)


async def arrange_all(connection: Connection) -> Mapping[str, str]:
    """Make a run with everything that has an id, and one behind it."""
    business = await arrange.business(connection)
    invoice = UUID("1112b1b7-0000-4000-8000-683dd3d28a1f")
    run = await make(connection, "partial", "overdue-detection", error="the mail server said no " * 9)
    caused = await make(connection, "dead", "send-overdue-digest", error="no such column")
    waiting = await make(connection, "queued")
    await make(connection, "running")
    await connection.execute(CHANGED, UUID(run), [invoice], [business])
    await connection.execute(OUTCOME, UUID(run), business, "failed", {"marked": 3}, "deadlock detected " * 5)
    letter = await connection.fetchval(LETTER, business, "hmac:a", "unknown", UUID(run))
    await connection.execute("update bon_scheduler.runs set concurrency_key = job where job = 'draft-cleanup'")
    await connection.execute(
        "update bon_scheduler.runs set caused_by = $2 where id = $1",
        UUID(caused),
        UUID(run),
    )
    await connection.execute(
        "insert into bon_scheduler.business_pauses (business_id, by, reason) values ($1, 'noa', $2)",
        business,
        "x " * 50,
    )
    return {
        name: str(value)
        for name, value in {
            "business": business,
            "invoice": invoice,
            "run": run,
            "caused": caused,
            "waiting": waiting,
            "letter": letter,
        }.items()
    }


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.samples(1)
async def test_no_screen_shows_an_id_that_lacks_characters(
    connection: Connection, database_url: str, columns: int
) -> None:
    ids = await arrange_all(connection)
    every = [str(row[0]) for row in await connection.fetch("select id from bon_scheduler.runs")]
    known = {*every, *ids.values()}
    screens = {
        ("history", "--business", ids["business"]): ("run", "invoice"),
        ("show", ids["run"]): ("run", "business", "letter", "caused"),
        ("show", ids["run"], "--rows"): ("business", "invoice"),
        ("show", ids["waiting"]): ("waiting",),
        ("runs",): ("run", "caused", "waiting"),
        ("runs", "--business", ids["business"]): ("run", "letter"),
        ("jobs",): ("business",),
        ("check",): ("letter",),
        ("audit",): (),
    }
    for command, expected in screens.items():
        if columns == PIPED:
            shown = (await run_command(*command, DATABASE_URL=database_url)).out
        else:
            _, shown = await at_terminal(*command, columns=columns, DATABASE_URL=database_url)
        found = set()
        for match in SHOWN.finditer(shown):
            meant = {each for each in known if each.startswith(match["id"])}
            if not meant:
                assert len(match["id"]) < 8 or "-" not in match["id"], (command, match[0], shown)
                continue
            found |= meant
            assert match["id"] in known or match["on"] or match["command"], (command, match[0], shown)
        assert {ids[name] for name in expected} <= found, (command, shown)


async def test_a_beginning_is_taken_as_it_is_shown(connection: Connection, database_url: str) -> None:
    ids = await arrange_all(connection)
    listed = await run_command("runs", "--job", "overdue-detection", DATABASE_URL=database_url)
    shown = listed.out.splitlines()[1].split()[0]
    assert shown == f"{ids['run'][:8]}…"
    assert ids["run"] in (await run_command("show", shown, DATABASE_URL=database_url)).out
