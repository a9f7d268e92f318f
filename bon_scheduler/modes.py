"""
What this deployment's settings have switched off, and whether somebody said so or it is a default.

A default that keeps a job from doing what it is for is warned of at start and by `check`, and ends its runs `partial`.
"""

from dataclasses import dataclass

from bon_scheduler.config import Settings, ShaamMode

__all__ = ["SwitchedOff", "mail_off", "shaam_off", "switched_off"]


@dataclass(frozen=True, slots=True)
class SwitchedOff:
    """Something that the service does not do, by its settings."""

    name: str
    what: str
    """What is so, and by which setting."""
    remedy: str
    chosen: bool
    """Whether the settings say so in so many words."""

    @property
    def fault(self) -> str | None:
        """Why a run that it keeps from its work has not done it; None where that was chosen."""
        return None if self.chosen else f"{self.what}. {self.remedy}"


def mail_off(settings: Settings) -> SwitchedOff | None:
    """Return that letters are not sent, if so."""
    if settings.smtp_host is not None:
        return None
    chosen = settings.email_mode is not None
    return SwitchedOff(
        "mail",
        f"letters are logged, not sent: {'EMAIL_MODE is log' if chosen else 'SMTP_HOST is not set'}",
        "Set SMTP_HOST, or EMAIL_MODE=log if none is to be sent.",
        chosen,
    )


def shaam_off(settings: Settings) -> SwitchedOff | None:
    """Return that the tax authority is not called, if so."""
    if settings.shaam_mode is not ShaamMode.MOCK:
        return None
    chosen = "shaam_mode" in settings.model_fields_set
    return SwitchedOff(
        "shaam",
        f"no token is refreshed: SHAAM_MODE is {'mock' if chosen else 'not set, and mock by default'}",
        "Set SHAAM_MODE=production (or sandbox), or SHAAM_MODE=mock if the authority is not to be called.",
        chosen,
    )


def switched_off(settings: Settings) -> list[SwitchedOff]:
    """Return everything that the settings have switched off."""
    found = [off for off in (mail_off(settings), shaam_off(settings)) if off is not None]
    for job, expression in settings.schedules.items():
        if not expression:
            variable = f"SCHEDULE_{job.replace('-', '_').upper()}"
            remedy = f"Leave {variable} out if it is to run by itself."
            found.append(SwitchedOff(f"schedule {job}", f"{job} has no schedule: {variable} is empty", remedy, True))
    return found
