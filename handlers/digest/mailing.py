"""
What every job that writes to a business's owners does alike: try each letter on its own, and remember how it went.

A refusal or trouble with one recipient never keeps another from getting theirs. Repeating is harmless: the
delivery ledger knows who was written to.
"""

from collections.abc import Iterable
from datetime import date
from uuid import UUID

from bon_scheduler import mail
from bon_scheduler.jobs import BusinessOutcome, Counts, JobContext, NeverRetryError, RetryLaterError
from bon_scheduler.mail import Delivery, Letter

__all__ = ["LETTER_COUNTS", "deliver_each", "refuse_day_to_come", "told"]

LETTER_COUNTS = (*(delivery.value for delivery in Delivery), "no_recipient")
REMEMBERED = ("sent", "refused", "unknown", "no_recipient")


async def deliver_each(ctx: JobContext, letters: Iterable[Letter]) -> Counts:
    """
    Deliver each letter; return how many ended in each of LETTER_COUNTS.

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
    return counts


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
    if counts["refused"] or counts["unknown"]:
        error = f"{counts['refused']} refused, {counts['unknown']} unknown; see deliveries"
        return [BusinessOutcome(business_id, "failed", remembered, error)]
    if counts["no_recipient"]:
        return [BusinessOutcome(business_id, "kept", remembered, "no recipient: no owner and no address of its own")]
    return [BusinessOutcome(business_id, "done", remembered)] if remembered else []
