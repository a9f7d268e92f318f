# What a job's author imports. Each name is imported when it is first asked for, so that `--help` needs none of them.

from .jobs import (
    BusinessOutcome as BusinessOutcome,
    CatchUp as CatchUp,
    Counts as Counts,
    Cron as Cron,
    Exclusive as Exclusive,
    Job as Job,
    JobContext as JobContext,
    NeverRetryError as NeverRetryError,
    NoPayload as NoPayload,
    NotNowError as NotNowError,
    Payload as Payload,
    Retry as Retry,
    RetryLaterError as RetryLaterError,
    job as job,
)

__version__: str
