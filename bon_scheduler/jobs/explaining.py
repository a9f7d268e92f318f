"""What is wrong with a run's payload, told without its values."""

from pydantic import ValidationError

from bon_scheduler.jobs.declaration import AnyJob

__all__ = ["explain_payload"]

MOST_FAULTS, LONGEST_NAME = 10, 80
"""What is told of an unusable payload: its names are somebody else's, and may be of any length and number."""


def explain_payload(job: AnyJob, error: ValidationError) -> str:
    """Return which fields of a payload are wrong, without their values."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    faults = "; ".join(
        f"{'.'.join(map(str, item['loc']))[:LONGEST_NAME] or 'payload'}: {item['msg'][:1].lower()}{item['msg'][1:200]}"
        for item in found[:MOST_FAULTS]
    )
    if len(found) > MOST_FAULTS:
        faults += f"; and {len(found) - MOST_FAULTS:,} more"
    known = ", ".join(job.payload.model_fields) or "no fields"
    return f'The payload of "{job.name}" is not usable: {faults}. It takes: {known}.'
