"""The scheduled jobs of BON. What a job's author needs is here; everything else may change."""

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
