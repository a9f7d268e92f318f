"""
What every job that writes to a business's owners does alike: try each letter on its own, and remember how it went.

A refusal or trouble with one recipient never keeps another from getting theirs. Repeating is harmless: the
delivery ledger knows who was written to.
"""

from collections.abc import Collection, Iterable
from datetime import date
from uuid import UUID

import structlog

from bon_scheduler import mail
from bon_scheduler.config import Settings, mail_off
from bon_scheduler.jobs import BusinessOutcome, Counts, JobContext, NeverRetryError, RetryLaterError
from bon_scheduler.mail import Delivery, Letter
from handlers.digest.statement import MOST_OWNERS, count_owners

__all__ = ["LETTER_COUNTS", "count_left_out", "deliver_each", "refuse_day_to_come", "told", "why_not_sent"]

log = structlog.get_logger()

LEFT_OUT = "left_out"
"""Counted where there are any: owners beyond MOST_OWNERS, to whom nobody writes."""
LETTER_COUNTS = (*(delivery.value for delivery in Delivery), "no_recipient")
REMEMBERED = ("sent", "refused", "unknown", "no_recipient")


async def deliver_each(ctx: JobContext, letters: Iterable[Letter]) -> dict[str, int]:
    """
    Deliver each letter; return how many ended in each of LETTER_COUNTS, in this attempt of the run and those before.

    Raises RetryLaterError AFTER everybody was tried, when someone must be tried again; NotNowError at once.
    """
    counts = dict.fromkeys(LETTER_COUNTS, 0)
    trouble: RetryLaterError | None = None
    for letter in letters:
        try:
            delivery = await ctx.get(mail.Mailer).deliver(letter, run_id=ctx.run_id, attempt=ctx.attempt)
        except RetryLaterError as error:
            trouble = error
        else:
            counts[delivery.value] += 1
    if trouble is not None:
        raise trouble
    if ctx.attempt > 1 and counts[Delivery.ALREADY_SENT]:
        async with ctx.connection() as connection:
            earlier = await mail.count_sent(connection, ctx.run_id, before=ctx.attempt)
        counts[Delivery.SENT] += earlier
        counts[Delivery.ALREADY_SENT] -= earlier
    return counts


async def count_left_out(ctx: JobContext, business_id: UUID, recipients: Collection[str]) -> Counts:
    """Count the owners beyond MOST_OWNERS, and log how many; nothing where there are none."""
    if len(recipients) < MOST_OWNERS:
        return {}
    async with ctx.connection() as connection:
        left_out = await count_owners(connection, business_id) - len(recipients)
    if left_out <= 0:
        return {}
    log.warning("owners.left_out", business_id=str(business_id), written_to=len(recipients), left_out=left_out)
    return {LEFT_OUT: left_out}


def why_not_sent(ctx: JobContext, counts: Counts) -> str | None:
    """Return why letters were logged instead of sent; None where none was, or where EMAIL_MODE asks for it."""
    off = mail_off(ctx.get(Settings))
    return off.fault if off is not None and counts[Delivery.LOGGED] else None


def refuse_day_to_come(ctx: JobContext, as_of: date) -> None:
    """Raise NeverRetryError where a digest's day has not come: it would dun for what is not due yet."""
    # The fire time too, which is no clock of this worker's: that one may be slow.
    latest = max(ctx.today, ctx.business_date)
    if as_of > latest:
        raise NeverRetryError(
            f"The digest of {as_of} is of a day that has not come: what falls due until then is not overdue. Ask for "
            f'{latest} or an earlier day, "as_of" of the payload.'
        )


def told(business_id: UUID, counts: Counts) -> list[BusinessOutcome]:
    """Return what to remember of the business: nothing of a mere repeat."""
    remembered = {name: counts[name] for name in REMEMBERED if counts[name]}
    if remembered and LEFT_OUT in counts:
        remembered[LEFT_OUT] = counts[LEFT_OUT]
    if counts["refused"] or counts["unknown"]:
        error = f"{counts['refused']} refused, {counts['unknown']} unknown; see deliveries"
        return [BusinessOutcome(business_id, "failed", remembered, error)]
    if counts["no_recipient"]:
        return [BusinessOutcome(business_id, "kept", remembered, "no recipient: no owner and no address of its own")]
    return [BusinessOutcome(business_id, "done", remembered)] if remembered else []
