"""Ids as people write them: any beginning that only one has."""

from uuid import UUID

import pytest

from bon_scheduler.cli.ids import Kind, find_ids, shorten
from bon_scheduler.cli.usage import UsageError
from tests.conftest import Connection
from tests.process import run_command

ALIKE = [UUID("abcdef12-3400-4000-8000-000000000001"), UUID("abcdef12-3500-4000-8000-000000000001")]
OTHER = UUID("12345678-0000-4000-8000-000000000001")
NO_BEGINNINGS = ["", "abc", "----", "abcdef123400-", "%%%%", "abcdef1g", "ab cd", "0" * 33, "\u0665" * 8]
MAKE_RUN = """
    insert into bon_scheduler.runs (id, job, payload, state, ready, origin, turn)
    values ($1, 'draft-cleanup', '{}', 'dead', true, 'person', 0)
"""


async def make(connection: Connection, *ids: UUID) -> None:
    for each in ids:
        await connection.execute(MAKE_RUN, each)


async def test_a_run_is_shortened_to_what_no_other_begins_with(connection: Connection) -> None:
    await make(connection, *ALIKE, OTHER)
    short = await shorten(connection, Kind.RUN, [*ALIKE, OTHER, None])
    assert short == {ALIKE[0]: "abcdef12-34", ALIKE[1]: "abcdef12-35", OTHER: "12345678", None: "—"}
    for run_id in (*ALIKE, OTHER):
        assert await find_ids(connection, Kind.RUN, [short[run_id].upper()]) == [run_id]


@pytest.mark.parametrize("text", ["abcd", "ABCDEF12", "abcdef12-3"])
async def test_what_several_begin_with_is_refused_with_their_ids(connection: Connection, text: str) -> None:
    await make(connection, *ALIKE)
    with pytest.raises(UsageError, match="begins the ids of several") as refused:
        await find_ids(connection, Kind.RUN, [text])
    assert all(str(each) in str(refused.value) for each in ALIKE)


@pytest.mark.parametrize(
    "text", ["", "abc", "----", "abcdef123400-", "%%%%", "abcdef1g", "ab cd", "0" * 33, "\u0665" * 8]
)
async def test_what_is_the_beginning_of_none_is_refused(connection: Connection, text: str) -> None:
    await make(connection, *ALIKE)
    with pytest.raises(UsageError, match="List runs with"):
        await find_ids(connection, Kind.RUN, [text])


async def test_each_is_meant_once_in_the_order_given(connection: Connection) -> None:
    await make(connection, *ALIKE, OTHER)
    assert await find_ids(connection, Kind.RUN, ["1234", str(ALIKE[0]), "12345678", str(ALIKE[0])]) == [OTHER, ALIKE[0]]


async def test_an_operator_retries_by_the_id_that_runs_lists(connection: Connection, database_url: str) -> None:
    await make(connection, OTHER)
    listed = await run_command("runs", DATABASE_URL=database_url)
    short = listed.out.splitlines()[1].split()[0]
    assert short == "12345678…"
    retried = await run_command("retry", short, "--reason", "mended", DATABASE_URL=database_url)
    assert (retried.status, retried.err) == (0, "")
    shown = await run_command("show", short, DATABASE_URL=database_url)
    assert str(OTHER) in shown.out
