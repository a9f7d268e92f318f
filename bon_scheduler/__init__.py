"""The scheduled jobs of BON. What a job's author needs is here; everything else may change."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bon_scheduler.jobs import (
        BusinessOutcome,
        CatchUp,
        Counts,
        Cron,
        Exclusive,
        Job,
        JobContext,
        NeverRetryError,
        NoPayload,
        NotNowError,
        Payload,
        Retry,
        RetryLaterError,
        job,
    )

__all__ = [
    "BusinessOutcome",
    "CatchUp",
    "Counts",
    "Cron",
    "Exclusive",
    "Job",
    "JobContext",
    "NeverRetryError",
    "NoPayload",
    "NotNowError",
    "Payload",
    "Retry",
    "RetryLaterError",
    "job",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever `jobs` has of that name
    """Bring what a job's author needs when it is asked for: `--help` answers without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("bon_scheduler.jobs"), name)
