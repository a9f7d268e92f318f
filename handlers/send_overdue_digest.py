"""
Send one business's overdue digest to each of its owners.

Everything is read anew, so an invoice paid since it was marked is not dunned.
Each recipient's letter is delivered on its own: a refusal or trouble with one
never keeps another from getting theirs. Repeating the run is harmless, the
delivery ledger knows who was written to. While the mail server is away the run
waits for it without using up attempts, but not beyond its day.
"""

import asyncio
from datetime import date, timedelta
from uuid import UUID

import structlog

from bon_scheduler.config import Settings
from bon_scheduler.jobs import (
    BusinessOutcome,
    Counts,
    JobContext,
    NeverRetryError,
    NotNowError,
    Payload,
    Retry,
    RetryLaterError,
    job,
)
from bon_scheduler.letters import Letter
from bon_scheduler.mail import Delivery, Mailer
from handlers.digest import render_digest
from handlers.statement import DIGEST_KIND, Statement, is_paused, read_recipients, read_statement

__all__ = ["SendOverdueDigest", "send_overdue_digest"]

log = structlog.get_logger()

OF_ITS_DAY = timedelta(hours=18)
"""After so long a digest is old news: the next one is near, and tells it all."""
REMEMBERED = ("sent", "refused", "unknown", "no_recipient")
COUNTS = (*(delivery.value for delivery in Delivery), "no_recipient")


class SendOverdueDigest(Payload):
    """Which business's digest, of which day."""

    business_id: UUID
    as_of: date
    """An Israeli calendar date; what was due before it is overdue."""


@job(
    "send-overdue-digest",
    retry=Retry(attempts=8, delay=timedelta(seconds=30), longest=timedelta(minutes=30)),
    timeout=timedelta(minutes=20),
)
async def send_overdue_digest(ctx: JobContext, payload: SendOverdueDigest) -> Counts:
    """Send one business's overdue digest to each of its owners."""
    counts = dict.fromkeys(COUNTS, 0)
    async with ctx.connection() as connection:
        if await is_paused(connection, payload.business_id):
            return counts | {"paused": 1}
        statement = await read_statement(connection, payload.business_id, payload.as_of)
        recipients = await read_recipients(connection, payload.business_id)
    if statement is None:
        return counts
    if not recipients:
        log.warning("digest.unaddressed", business_id=str(payload.business_id))
        counts["no_recipient"] = 1
    trouble: RetryLaterError | None = None
    # In a thread: two hundred rows take long enough to keep everybody else on the event loop waiting.
    for letter in await asyncio.to_thread(_write_letters, statement, payload, recipients, ctx.get(Settings)):
        try:
            delivery = await ctx.get(Mailer).deliver(letter, run_id=ctx.run_id, attempt=ctx.attempt)
        except NotNowError as error:
            if ctx.now - ctx.fire_time > OF_ITS_DAY:
                raise NeverRetryError(
                    f"The digest of {payload.as_of} is given up after {OF_ITS_DAY}: {error}. "
                    "Once mail goes out again, send it with: python -m bon_scheduler retry RUN_ID --reason …"
                ) from error
            raise
        except RetryLaterError as error:
            trouble = error
        else:
            counts[delivery.value] += 1
    if trouble is not None:
        # AFTER everybody was tried; the next attempt skips those who have theirs.
        raise trouble
    async with ctx.transaction() as tx:
        await ctx.record(_outcomes(payload.business_id, counts), on=tx)
        return await ctx.finish(counts, on=tx)


def _write_letters(
    statement: Statement, payload: SendOverdueDigest, recipients: list[str], settings: Settings
) -> list[Letter]:
    language = settings.email_language
    subject, text, html = render_digest(statement, language=language, app_origin=settings.app_origin)
    return [
        Letter(DIGEST_KIND, payload.business_id, payload.as_of, recipient, subject, text, html, language)
        for recipient in recipients
    ]


def _outcomes(business_id: UUID, counts: Counts) -> list[BusinessOutcome]:
    """Say what to remember of the business: nothing of a mere repeat."""
    told = {name: counts[name] for name in REMEMBERED if counts[name]}
    if counts["refused"] or counts["unknown"]:
        error = f"{counts['refused']} refused, {counts['unknown']} unknown; see deliveries"
        return [BusinessOutcome(business_id, "failed", told, error)]
    if counts["no_recipient"]:
        return [BusinessOutcome(business_id, "kept", told, "no recipient: no owner and no address of its own")]
    return [BusinessOutcome(business_id, "done", told)] if told else []
