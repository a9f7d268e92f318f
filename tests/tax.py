"""BON's side and the authority's side of SHAAM for a test: stored credentials, and a simulator that issued them."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

from bon_scheduler.demo.shaam_simulator import ShaamSimulator
from bon_scheduler.engine.run_once import RunReport
from bon_scheduler.jobs import BusinessOutcome, Counts
from bon_scheduler.ledger import history
from bon_scheduler.shaam.cipher import TokenCipher
from tests import arrange
from tests.conftest import Connection

Refresh: TypeAlias = Callable[..., Coroutine[Any, Any, RunReport]]

KEY = "aae24849842d7082b66f57ce8270bd04da2c39ffb97df22803c270983032c4e5"
CIPHER = TokenCipher(KEY)
CLIENT_ID = "client-id-of-bon"
CLIENT_SECRET = "client-s3cret-of-bon"
NOW = datetime.now(UTC)
NOTHING = {"due": 0, "refreshed": 0, "joined": 0, "needs_reauth": 0, "deferred": 0, "failed": 0}

# $1 how much time is to have passed: interval.
AGE = """
    update bon_scheduler.shaam_refreshes
       set lease_until = lease_until - $1::interval, next_attempt_at = next_attempt_at - $1::interval,
           silent_until = silent_until - $1::interval, changed_at = changed_at - $1::interval
"""


def environ(token_url: str) -> dict[str, str]:
    return {
        "SHAAM_MODE": "sandbox",
        "SHAAM_ENCRYPTION_KEY": KEY,
        "SHAAM_CLIENT_ID": CLIENT_ID,
        "SHAAM_CLIENT_SECRET": CLIENT_SECRET,
        "SHAAM_TOKEN_URL": token_url,
        "SHAAM_TIMEOUT_SECONDS": "5",
    }


@dataclass
class Gate:
    """The authority as one whose answers are long on their way: `answered`, but not before `proceed`."""

    url: str = ""
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    proceed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class Bon:
    """BON's rows, made and read by a test."""

    connection: Connection
    simulator: ShaamSimulator

    async def business(
        self,
        subject: str,
        *,
        expires_at: datetime = NOW + timedelta(minutes=1),
        needs_reauth: bool = False,
        active: bool = True,
        stored: str | None = None,
    ) -> UUID:
        business_id = await arrange.business(
            self.connection, name=subject, is_active=active, deleted_at=None if active else NOW
        )
        credentials = {
            "business_id": business_id,
            "encrypted_access_token": CIPHER.encrypt("old-access"),
            "encrypted_refresh_token": stored or CIPHER.encrypt(self.simulator.issue(subject)),
            "token_expires_at": expires_at,
            "needs_reauth": needs_reauth,
            "scope": "kept",
            "updated_at": arrange.LONG_AGO,
        }
        await arrange.insert(self.connection, "business_shaam_credentials", credentials)
        return business_id

    async def row(self, business_id: UUID) -> dict[str, Any]:
        query = "select * from business_shaam_credentials where business_id = $1"
        row = await self.connection.fetchrow(query, business_id)
        assert row is not None
        return dict(row)

    async def refresh_token(self, business_id: UUID) -> str:
        return CIPHER.decrypt((await self.row(business_id))["encrypted_refresh_token"])

    async def flagged(self) -> set[UUID]:
        """Whose owner is asked to consent again."""
        query = "select business_id from business_shaam_credentials where needs_reauth"
        return {row["business_id"] for row in await self.connection.fetch(query)}

    async def standing(self, business_id: UUID) -> dict[str, Any]:
        """Our own row of the business."""
        query = "select * from bon_scheduler.shaam_refreshes where business_id = $1"
        row = await self.connection.fetchrow(query, business_id)
        assert row is not None
        return dict(row)

    async def age(self, duration: timedelta) -> None:
        """Let so much time pass for what is in our table."""
        await self.connection.execute(AGE, duration)

    async def outcomes(self, run_id: UUID) -> dict[UUID, BusinessOutcome]:
        """What the ledger holds of each business."""
        rows = await history.businesses_of(self.connection, run_id)
        return {row["business_id"]: BusinessOutcome(**row) for row in rows}


def ended(report: RunReport) -> tuple[str, Counts]:
    return report.run["state"], report.run["counts"]


async def assert_secret(connection: Connection, simulator: ShaamSimulator, *texts: str) -> None:
    """Assert that neither these texts nor our schema hold a token, a fingerprint, or the client's id or secret."""
    dump = [*texts]
    tables = (
        "runs",
        "attempts",
        "business_outcomes",
        "shaam_refreshes",
        "shaam_tokens",
        "deliveries",
        "operator_actions",
    )
    for table in tables:
        row = "to_jsonb(t) - '{token_fingerprint,fingerprint,sealed}'::text[]"
        rows = await connection.fetch(f"select {row} as row from bon_scheduler.{table} t")
        dump.append(json.dumps([row["row"] for row in rows], ensure_ascii=False))
    fingerprints = await connection.fetch(
        "select token_fingerprint from bon_scheduler.shaam_refreshes"
        " union select fingerprint from bon_scheduler.shaam_tokens"
        " union select sealed from bon_scheduler.shaam_tokens"
    )
    stored = await connection.fetch(
        "select encrypted_access_token, encrypted_refresh_token from business_shaam_credentials"
    )
    secrets = {CLIENT_ID, CLIENT_SECRET, KEY, *simulator.secrets(), *(text for row in stored for text in row)}
    secrets |= {row[0].hex() for row in fingerprints if row[0]}
    whole = "\n".join(dump)
    assert [secret[:6] + "…" for secret in secrets if len(secret) > 6 and secret in whole] == []
