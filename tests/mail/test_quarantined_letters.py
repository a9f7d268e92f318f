"""A letter of a run that was under way when its ledger turned out to be a copy."""

import pytest

from bon_scheduler.database.connections import Pool
from bon_scheduler.engine import Quarantine, QuarantinedError
from tests.conftest import Connection, MakeSettings
from tests.mailworld import World

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")


async def test_no_letter_leaves_until_the_ledger_is_adopted(
    world: World, pool: Pool, connection: Connection, make_settings: MakeSettings
) -> None:
    quarantine = Quarantine(make_settings(), pool, serves=True)
    await quarantine.look()
    mailer = await world.mailer()
    mailer.require_permission = quarantine.require
    await connection.execute("update bon_scheduler.place set mark = 0")
    with pytest.raises(QuarantinedError):
        await world.deliver(mailer)
    assert (world.server.received, await world.rows()) == ([], [])
    await connection.execute("update bon_scheduler.place set mark = 9, behind = null")
    await world.deliver(mailer)
    assert len(world.server.received) == 1
