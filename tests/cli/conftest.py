"""The role of a careful operator, for the tests of `check`."""

from collections.abc import AsyncIterator

import pytest

from tests.conftest import Connection
from tests.roles import Role, all_privileges, grant, limited_role


@pytest.fixture
async def role(connection: Connection, database_url: str) -> AsyncIterator[Role]:
    """A role that may do what the jobs need, and nothing else."""
    async with limited_role(connection, database_url) as role:
        await grant(connection, role, all_privileges())
        yield role
