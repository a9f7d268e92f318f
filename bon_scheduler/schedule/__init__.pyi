# What other packages may use. Each name is imported when it is first asked for.

from .audit import (
    Audit as Audit,
    AuditedTick as AuditedTick,
    Verdict as Verdict,
    audit_ticks as audit_ticks,
    unaccounted as unaccounted,
)
from .clocks import (
    ClockError as ClockError,
    Clocks as Clocks,
)
from .schedules import (
    read_histories as read_histories,
)
from .timing import (
    Transition as Transition,
    check_cron as check_cron,
    describe_cron as describe_cron,
    fire_times as fire_times,
    next_fire_time as next_fire_time,
    transitions as transitions,
)
from .triggers import (
    Triggers as Triggers,
)
