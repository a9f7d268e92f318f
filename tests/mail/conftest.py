"""A mail server whose certificate the mailer trusts, and a world around both."""

import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import trustme

from bon_scheduler.database.connections import Pool
from tests.mailserver import Server
from tests.mailworld import World


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def server(authority: trustme.CA) -> Server:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return Server(context)


@pytest.fixture
async def world(server: Server, pool: Pool, trusting: ssl.SSLContext) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(server, pool, trusting, stack)
