"""
Tell a business's owners, once, that BON needs their consent to the tax authority again.

Asked for in the transaction that flags the business. An owner who has consented by the time the letter is written
gets none, nor does one whose business a person has paused, and the delivery ledger sees to it that each gets one a day
however often the run is repeated.
"""

from datetime import date, timedelta
from uuid import UUID

import structlog

from bon_scheduler.config import Settings
from bon_scheduler.jobs import Counts, JobContext, Payload, Retry, job
from bon_scheduler.mail import Letter
from handlers import digest
from handlers.digest import (
    LETTER_COUNTS,
    count_left_out,
    deliver_each,
    is_paused,
    read_recipients,
    told,
    why_not_sent,
)

__all__ = ["REAUTH_KIND", "NotifyReauth", "notify_reauth"]

log = structlog.get_logger()

REAUTH_KIND = "shaam-reauth"
"""The kind under which the delivery ledger knows these letters."""

# $1 business. Index: businesses_pkey, unique (business_id).
READ_FLAGGED = """
    select left(b.name, 400)
      from public.businesses b
      join public.business_shaam_credentials c on c.business_id = b.id
     where b.id = $1
       and c.needs_reauth
       and b.is_active = true
       and b.deleted_at is null
"""


class NotifyReauth(Payload):
    """Whose owners, of which day's letter."""

    business_id: UUID
    as_of: date | None = None
    """The Israeli calendar date on which the business was flagged. None: that of the fire time."""


@job(
    "notify-reauth",
    retry=Retry(attempts=8, delay=timedelta(seconds=30), longest=timedelta(minutes=30)),
    timeout=timedelta(minutes=5),
    sends_mail=True,
)
async def notify_reauth(ctx: JobContext, payload: NotifyReauth) -> Counts:
    """Tell a business's owners that the tax authority needs their consent again."""
    counts = dict.fromkeys((*LETTER_COUNTS, "consented"), 0)
    async with ctx.connection() as connection:
        if await is_paused(connection, payload.business_id):
            return counts | {"paused": 1}
        business_name = await connection.fetchval(READ_FLAGGED, payload.business_id)
        recipients = await read_recipients(connection, payload.business_id)
    if business_name is None:
        counts["consented"] = 1
    elif recipients:
        counts |= await deliver_each(ctx, _write_letters(ctx, payload, business_name, recipients))
        counts |= await count_left_out(ctx, payload.business_id, recipients)
    else:
        log.warning("reauth.unaddressed", business_id=str(payload.business_id))
        counts["no_recipient"] = 1
    async with ctx.transaction() as tx:
        await ctx.record(told(payload.business_id, counts), on=tx)
        return await ctx.finish(counts, on=tx, undone=why_not_sent(ctx, counts) or False)


def _write_letters(ctx: JobContext, payload: NotifyReauth, business_name: str, recipients: list[str]) -> list[Letter]:
    as_of = payload.as_of or ctx.business_date
    settings = ctx.get(Settings)
    language = settings.email_language
    values = {"business_name": business_name, "link": settings.app_origin, "language": language}
    subject, text, html = digest.render("reauth", language, values)
    return [
        Letter(REAUTH_KIND, payload.business_id, as_of, recipient, subject, text, html, language)
        for recipient in recipients
    ]
