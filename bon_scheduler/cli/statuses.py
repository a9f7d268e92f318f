"""Which exit status an error ends the command line with. Imported once there is an error."""

import health
from bon_scheduler.cli.usage import UsageError
from bon_scheduler.database import (
    DatabaseUnavailableError,
    MigrationBlockedError,
    OtherDatabaseError,
    PoolerError,
    RoleRefusedError,
    SchemaBehindError,
)
from bon_scheduler.declared import BrokenJobsError
from bon_scheduler.engine import AlreadyRunningError, JobPausedError, QuarantinedError
from bon_scheduler.environment import SettingsError
from bon_scheduler.ledger import RefusedError, RefusedRequestError
from bon_scheduler.mail import NotUncertainError
from bon_scheduler.schedule import ClockError

__all__ = ["EXIT_STATUS"]

EXIT_STATUS: dict[type[Exception], int] = {
    SettingsError: 2,
    UsageError: 2,
    BrokenJobsError: 2,
    RefusedRequestError: 2,
    PoolerError: 2,
    OtherDatabaseError: 2,
    RefusedError: 2,
    NotUncertainError: 2,
    health.CannotListenError: 2,
    JobPausedError: 2,
    AlreadyRunningError: 4,
    ClockError: 1,
    QuarantinedError: 1,
    DatabaseUnavailableError: 1,
    SchemaBehindError: 1,
    RoleRefusedError: 1,
    MigrationBlockedError: 1,
}
