"""One letter, one mail server, one mailer, one run: what tests of mail begin with."""

import ssl
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from pydantic import SecretStr

from bon_scheduler.config import Settings
from bon_scheduler.database.connections import Pool, Pools
from bon_scheduler.mail.keys import read_key, recipient_hash
from bon_scheduler.mail.mailer import Delivery, Mailer
from bon_scheduler.mail.message import Letter
from tests.conftest import SetClock
from tests.mailserver import PASSWORD, Server

AS_OF = date(2026, 11, 23)
NOW = datetime(2026, 11, 23, 4, tzinfo=UTC)
BUSINESS = UUID("00000000-0000-4000-8000-000000000001")
RECIPIENT = "Dana.Owner@shop.example"
LETTER = Letter("overdue-digest", BUSINESS, AS_OF, RECIPIENT, "נושא סודי", "שלום\n.\nsecret 1,234", "<p>שלום</p>", "he")


def settings(server: Server | None, **values: Any) -> Settings:
    defaults: dict[str, Any] = {"database_url": SecretStr("postgresql://x@127.0.0.1/x")}
    if server is not None:
        defaults |= {"smtp_host": "127.0.0.1", "smtp_port": server.port}
        defaults |= {"smtp_username": "bon", "smtp_password": SecretStr(PASSWORD)}
    return Settings(**{**defaults, **values})


class World:
    """One server, one mailer, one run."""

    def __init__(self, server: Server, pool: Pool, trusting: ssl.SSLContext, stack: AsyncExitStack) -> None:
        self.server = server
        self.pool = pool
        self.trusting = trusting
        self._stack = stack

    async def mailer(self, tls_context: ssl.SSLContext | None = None, seconds: float = 10, **values: Any) -> Mailer:
        if not self.server.port:
            await self._stack.enter_async_context(self.server.listening())
        mailer = Mailer(
            settings(self.server, **values),
            Pools(self.pool, self.pool),
            tls_context=tls_context or self.trusting,
            timeout=timedelta(seconds=seconds),
            clock=SetClock(NOW),
        )
        return await self._stack.enter_async_context(mailer)

    async def deliver(self, mailer: Mailer | None = None, letter: Letter = LETTER) -> Delivery:
        return await (mailer or await self.mailer()).deliver(letter, run_id=await a_run(self.pool), attempt=1)

    async def rows(self) -> list[tuple[str, str | None]]:
        found = await self.pool.fetch("select state, reply from bon_scheduler.deliveries order by intended_at")
        return [(row["state"], row["reply"]) for row in found]

    async def state(self) -> str:
        (row,) = await self.rows()
        return row[0]


async def a_run(pool: Pool, state: str = "running") -> UUID:
    """Put a run of `send-overdue-digest` in the ledger, in any state."""
    run_id: UUID = await pool.fetchval(
        "insert into bon_scheduler.runs (job, origin, state) values ('send-overdue-digest', 'run', $1) returning id",
        state,
    )
    return run_id


async def intend(pool: Pool, run: UUID, *, attempt: int = 1, state: str = "intended") -> None:
    await pool.execute(
        "insert into bon_scheduler.deliveries "
        "(kind, business_id, as_of, recipient_hash, state, message_id, run_id, attempt) "
        "values ($1, $2, $3, $4, $5, '<x@y>', $6, $7)",
        LETTER.kind,
        BUSINESS,
        AS_OF,
        recipient_hash(await read_key(pool), BUSINESS, RECIPIENT),
        state,
        run,
        attempt,
    )


def another(letter: Letter = LETTER) -> Letter:
    """The same letter for another business."""
    return replace(letter, business_id=uuid4())
