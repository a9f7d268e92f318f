"""What became of one business when its token was to be exchanged, as runs count and record it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias
from uuid import UUID

import structlog

from bon_scheduler.jobs import Connection

__all__ = ["Count", "Result", "Tell", "braked", "not_called", "superseded", "waits"]

log = structlog.get_logger()
Count: TypeAlias = Literal["refreshed", "joined", "needs_reauth", "deferred", "failed", "foreign", "braked"]
Tell: TypeAlias = Callable[[Connection, UUID], Awaitable[None]]
"""Called in the transaction that flags a business."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one business: where it is counted, and what is recorded for it."""

    business_id: UUID
    count: Count
    outcome: Literal["done", "kept", "failed"]
    error: str | None = None
    refused: bool = False
    """Whether the authority turned the application away."""
    called: bool = True
    """Whether its turn came at all; not when the breaker was open."""
    held: bool = False
    """Whether another exchange of this business is under way."""


def not_called(business_id: UUID, reason: str) -> Result:
    """Leave it for later, for a reason that lies elsewhere."""
    return Result(business_id, "deferred", "failed", f"not called: {reason}", called=False)


def braked(business_id: UUID, reason: str) -> Result:
    """Leave its owner alone until it is known whether the run's spent grants are few."""
    return Result(business_id, "braked", "kept", f"nobody is asked to consent yet: {reason}")


def waits(business_id: UUID, text: str) -> Result:
    """Leave it alone until its answer is found, or looked for long enough."""
    log.warning("token.waits", business_id=str(business_id), reason=text)
    return Result(business_id, "deferred", "kept", text)


def superseded(business_id: UUID) -> Result:
    """Keep what came into the row meanwhile: it is newer. The next run looks at it again."""
    log.info("token.superseded", business_id=str(business_id))
    return Result(business_id, "deferred", "kept")
