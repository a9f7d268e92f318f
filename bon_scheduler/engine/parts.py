"""What a runner needs of its process."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from zoneinfo import ZoneInfo

from bon_scheduler.clock import Clock
from bon_scheduler.database import Pool
from bon_scheduler.engine.deadman import Deadman
from bon_scheduler.engine.quarantine import Quarantine
from bon_scheduler.jobs import Cron
from bon_scheduler.ledger import Worker
from bon_scheduler.mail import MailGate
from bon_scheduler.metrics import Metrics

__all__ = ["RunnerParts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerParts:
    """What a runner needs of its process."""

    pool: Pool
    """For handlers."""
    control: Pool
    """For the ledger."""
    worker: Worker
    resources: Mapping[type, object]
    """What handlers get, by type."""
    gate: MailGate | None
    """None while letters are only logged."""
    schedules: Mapping[str, Cron]
    zone: ZoneInfo
    clock: Clock
    metrics: Metrics
    deadman: Deadman
    quarantine: Quarantine
    farewell: timedelta
    """How long a handler may take to end when this process is stopping."""
