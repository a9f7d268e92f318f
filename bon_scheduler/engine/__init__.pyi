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
    RunnerParts as RunnerParts,
)
