"""
Tell a business's owners, once, that BON needs their consent to the tax authority again.

Asked for in the transaction that flags the business. An owner who has consented by the time the letter is written
gets none, and the delivery ledger sees to it that each gets one a day however often the run is repeated.
"""

from collections import Counter
from datetime import timedelta
from uuid import UUID

import structlog

from bon_scheduler.config import Settings
from bon_scheduler.jobs import BusinessOutcome, Counts, JobContext, Payload, Retry, RetryLaterError, job
from bon_scheduler.letters import Letter
from bon_scheduler.mail import Delivery, Mailer
from handlers.digest import render
from handlers.statement import read_recipients

__all__ = ["REAUTH_KIND", "NotifyReauth", "notify_reauth"]

log = structlog.get_logger()

REAUTH_KIND = "shaam-reauth"
"""The kind under which the delivery ledger knows these letters."""
COUNTS = (*(delivery.value for delivery in Delivery), "no_recipient", "consented")

# $1 business. Index: businesses_pkey, unique (business_id).
READ_FLAGGED = """
    select b.name
      from businesses b
      join business_shaam_credentials c on c.business_id = b.id
     where b.id = $1
       and c.needs_reauth
       and b.is_active = true
       and b.deleted_at is null
"""


class NotifyReauth(Payload):
    """Whose owners."""

    business_id: UUID


@job(
    "notify-reauth",
    retry=Retry(attempts=8, delay=timedelta(seconds=30), longest=timedelta(minutes=30)),
    timeout=timedelta(minutes=5),
)
async def notify_reauth(ctx: JobContext, payload: NotifyReauth) -> Counts:
    """Tell a business's owners that the tax authority needs their consent again."""
    async with ctx.connection() as connection:
        business_name = await connection.fetchval(READ_FLAGGED, payload.business_id)
        recipients = await read_recipients(connection, payload.business_id)
    tally: Counter[str] = Counter()
    if business_name is None:
        tally["consented"] = 1
    elif not recipients:
        log.warning("reauth.unaddressed", business_id=str(payload.business_id))
        tally["no_recipient"] = 1
    else:
        tally.update(await _deliver(ctx, payload.business_id, business_name, recipients))
    counts = {name: tally[name] for name in COUNTS}
    async with ctx.transaction() as tx:
        await ctx.record(_outcomes(payload.business_id, counts), on=tx)
        return await ctx.finish(counts, on=tx)


async def _deliver(ctx: JobContext, business_id: UUID, business_name: str, recipients: list[str]) -> list[str]:
    """Write to each; raises RetryLaterError after everybody was tried, if someone must be tried again."""
    settings = ctx.get(Settings)
    language = settings.email_language
    values = {"business_name": business_name, "link": settings.app_origin, "language": language}
    subject, text, html = render("reauth", language, values)
    deliveries = []
    trouble: RetryLaterError | None = None
    for recipient in recipients:
        letter = Letter(REAUTH_KIND, business_id, ctx.business_date, recipient, subject, text, html, language)
        try:
            delivery = await ctx.get(Mailer).deliver(letter, run_id=ctx.run_id, attempt=ctx.attempt)
        except RetryLaterError as error:
            trouble = error
        else:
            deliveries.append(delivery.value)
    if trouble is not None:
        raise trouble
    return deliveries


def _outcomes(business_id: UUID, counts: Counts) -> list[BusinessOutcome]:
    told = {name: n for name, n in counts.items() if n and name not in {"logged", "already_sent", "consented"}}
    if counts["refused"] or counts["unknown"]:
        error = f"{counts['refused']} refused, {counts['unknown']} unknown; see deliveries"
        return [BusinessOutcome(business_id, "failed", told, error)]
    if counts["no_recipient"]:
        return [BusinessOutcome(business_id, "kept", told, "no recipient: no owner and no address of its own")]
    return [BusinessOutcome(business_id, "done", told)] if told else []
