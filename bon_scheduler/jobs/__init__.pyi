# What other packages may use. Each name is imported when it is first asked for.

from .declaration import (
    AnyJob as AnyJob,
    BusinessOutcome as BusinessOutcome,
    CatchUp as CatchUp,
    Connection as Connection,
    Counts as Counts,
    Cron as Cron,
    Exclusive as Exclusive,
    Handler as Handler,
    Job as Job,
    JobContext as JobContext,
    NoPayload as NoPayload,
    P as P,
    Payload as Payload,
    Retry as Retry,
    Usual as Usual,
    job as job,
)
from .errors import (
    HeldError as HeldError,
    LostRunError as LostRunError,
    NeverRetryError as NeverRetryError,
    NotNowError as NotNowError,
    RetryLaterError as RetryLaterError,
)
from .explaining import (
    explain_payload as explain_payload,
)
from .mistakes import (
    JobDeclarationError as JobDeclarationError,
    code_of as code_of,
    declared_at as declared_at,
    shown as shown,
)
from .payloads import (
    unfilled as unfilled,
)
from .rehearsed import (
    Rehearsed as Rehearsed,
)
