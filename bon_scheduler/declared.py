"""
What this deployment declares: its jobs, its settings, and which job runs when.

Imports what jobs declare and nothing that works on runs, so that commands which only read start at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bon_scheduler.config import Settings
from bon_scheduler.environment import load_settings
from bon_scheduler.jobs import AnyJob, Cron
from bon_scheduler.schedule import check_cron
from handlers import JOBS

__all__ = ["JOBS", "read_settings", "schedules_of"]


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read settings, knowing the jobs; raises SettingsError with every fault."""
    return load_settings(environ, jobs=[job.name for job in JOBS], check_cron=check_cron)


def schedules_of(settings: Settings, jobs: Sequence[AnyJob] = JOBS) -> dict[str, Cron]:
    """Return the schedule of each job that has one, as declared or as overridden by the environment."""
    schedules = {}
    for job in jobs:
        declared = job.schedule
        override = settings.schedules.get(job.name)
        if override is not None:
            declared = replace(declared or Cron(override), expression=override) if override else None
        if declared is not None:
            schedules[job.name] = declared
    return schedules
