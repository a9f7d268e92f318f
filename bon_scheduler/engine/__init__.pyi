# What other packages may use. Each name is imported when it is first asked for.

from .claiming import (
    Engine as Engine,
)
from .deadman import (
    Deadman as Deadman,
)
from .dry_run import (
    DryRunner as DryRunner,
)
from .heartbeat import (
    Heartbeat as Heartbeat,
)
from .parts import (
    RunnerParts as RunnerParts,
)
from .quarantine import (
    Quarantine as Quarantine,
    QuarantinedError as QuarantinedError,
)
from .reconcile import (
    Reconciler as Reconciler,
    pass_seconds as pass_seconds,
)
from .run_once import (
    AlreadyRunningError as AlreadyRunningError,
    JobPausedError as JobPausedError,
    Order as Order,
    RunReport as RunReport,
    run_once as run_once,
)
from .runner import (
    Runner as Runner,
)
from .stood_aside import (
    StoodAside as StoodAside,
    find_stood_aside as find_stood_aside,
    report_stood_aside as report_stood_aside,
)
