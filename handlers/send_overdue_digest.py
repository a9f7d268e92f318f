"""
Send one business's overdue digest to each of its owners.

Everything is read anew, so an invoice paid since it was marked is not dunned.
While the mail server is away the run waits for it without using up attempts, but
not beyond its day: then it is given up, until a person retries it.
"""

import asyncio
from datetime import date, timedelta
from uuid import UUID

import structlog

from bon_scheduler.config import Settings
from bon_scheduler.jobs import Counts, JobContext, NeverRetryError, NotNowError, Payload, Retry, job
from bon_scheduler.mail import Letter
from handlers import digest
from handlers.digest import (
    DIGEST_KIND,
    LETTER_COUNTS,
    Statement,
    count_left_out,
    deliver_each,
    is_paused,
    read_recipients,
    read_statement,
    refuse_day_to_come,
    told,
    why_not_sent,
)

__all__ = ["SendOverdueDigest", "send_overdue_digest"]

log = structlog.get_logger()

OF_ITS_DAY = timedelta(hours=18)
"""After so long a digest is old news: the next one is near, and tells it all."""


class SendOverdueDigest(Payload):
    """Which business's digest, of which day."""

    business_id: UUID
    as_of: date
    """An Israeli calendar date; what was due before it is overdue."""


@job(
    "send-overdue-digest",
    retry=Retry(attempts=8, delay=timedelta(seconds=30), longest=timedelta(minutes=30)),
    timeout=timedelta(minutes=20),
    sends_mail=True,
)
async def send_overdue_digest(ctx: JobContext, payload: SendOverdueDigest) -> Counts:
    """Send one business's overdue digest to each of its owners."""
    refuse_day_to_come(ctx, payload.as_of)
    nothing = dict.fromkeys(LETTER_COUNTS, 0)
    async with ctx.connection() as connection:
        if await is_paused(connection, payload.business_id):
            return nothing | {"paused": 1}
        statement = await read_statement(connection, payload.business_id, payload.as_of)
        recipients = await read_recipients(connection, payload.business_id)
    if statement is None:
        return nothing
    if not (ctx.retried or ctx.replay) and ctx.now - ctx.fire_time > OF_ITS_DAY:
        raise _given_up(payload.as_of, "it waited for its turn, or for the mail server, until its day was over")
    if recipients:
        # In a thread: two hundred rows take long enough to keep everybody else on the event loop waiting.
        letters = await asyncio.to_thread(_write_letters, statement, payload, recipients, ctx.get(Settings))
        counts = await _deliver(ctx, payload.as_of, letters)
        counts |= await count_left_out(ctx, payload.business_id, recipients)
    else:
        log.warning("digest.unaddressed", business_id=str(payload.business_id))
        counts = nothing | {"no_recipient": 1}
    async with ctx.transaction() as tx:
        await ctx.record(told(payload.business_id, counts), on=tx)
        return await ctx.finish(counts, on=tx, undone=why_not_sent(ctx, counts) or False)


async def _deliver(ctx: JobContext, as_of: date, letters: list[Letter]) -> dict[str, int]:
    try:
        return await deliver_each(ctx, letters)
    except NotNowError as error:
        if ctx.now - ctx.fire_time <= OF_ITS_DAY:
            raise
        raise _given_up(as_of, str(error)) from error


def _given_up(as_of: date, why: str) -> NeverRetryError:
    return NeverRetryError(
        f"The digest of {as_of} is given up after {OF_ITS_DAY}: {why}. "
        "Once mail goes out again, send it with: bon-scheduler retry RUN_ID --reason …"
    )


def _write_letters(
    statement: Statement, payload: SendOverdueDigest, recipients: list[str], settings: Settings
) -> list[Letter]:
    language = settings.email_language
    subject, text, html = digest.render_digest(statement, language=language, app_origin=settings.app_origin)
    return [
        Letter(DIGEST_KIND, payload.business_id, payload.as_of, recipient, subject, text, html, language)
        for recipient in recipients
    ]
