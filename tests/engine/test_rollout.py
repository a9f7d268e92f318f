"""Two versions side by side, as in the middle of a deploy."""

from datetime import timedelta
from uuid import UUID

import pytest

from bon_scheduler import Counts, JobContext, Payload, job, service
from bon_scheduler.engine import runner
from tests.conftest import Connection, MakeSettings
from tests.waiting import until

NEWER = """
    insert into bon_scheduler.workers (id, host, pid, version, serves, lease)
    values (gen_random_uuid(), 'elsewhere', 1, '99.0.0', $1, '1 hour')
"""
RUN = "select state::text, attempt, given_back, error from bon_scheduler.runs where id = $1"


class Whom(Payload):
    name: str


@job("a-test")
async def greet(_: JobContext, __: Whom) -> Counts:
    """Take what this version knows."""
    return {}


@pytest.mark.parametrize("serves", [True, False], ids=["a service", "a person's process"])
async def test_a_payload_of_the_next_version_waits_while_a_newer_service_lives(
    make_settings: MakeSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch, serves: bool
) -> None:
    monkeypatch.setattr(runner, "UNTIL_NEWER_TAKES_IT", timedelta(seconds=0.1))
    await service.prepare(make_settings(), jobs=[greet])
    await connection.execute(NEWER, serves)
    payload = {"name": "dana", "greeting": "new in 99"}
    run_id: UUID = await connection.fetchval("select bon_scheduler.enqueue('a-test', $1)", payload)

    async def given_back(times: int) -> bool:
        row = await connection.fetchrow(RUN, run_id)
        assert row is not None
        return bool(row["given_back"] >= times and row["state"] != "dead")

    async def dead() -> bool:
        return bool(await connection.fetchval("select state = 'dead' from bon_scheduler.runs where id = $1", run_id))

    async with service.serving(make_settings(), jobs=[greet]):
        if serves:
            await until(lambda: given_back(3))
            await connection.execute("delete from bon_scheduler.workers where version = '99.0.0'")
        await until(dead)
    row = await connection.fetchrow(RUN, run_id)
    assert row is not None
    assert row["attempt"] - row["given_back"] == 1
    assert "greeting" in row["error"]
