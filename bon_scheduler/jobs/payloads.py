"""
What may be wrong with the class of a job's payload, told with the remedy.

Checked when `@job` is executed: what is decided here would otherwise end each run `dead`, or keep `serve` from
starting.
"""

import types
import warnings
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError

__all__ = ["faults_of_payload", "unfilled"]

OF_BUSINESS = {"business_id", "businessId"}
"""The names by which the ledger knows a payload's business."""
LONGEST_TOLD = 200


def faults_of_payload(payload: type[BaseModel], *, ticks: bool, by_business: bool) -> Iterator[str]:
    """
    Yield what is wrong with the fields of a payload's class.

    `ticks` says that a schedule asks for runs, which gives no payload; `by_business` that runs of one business exclude
    each other.
    """
    if payload.model_fields:
        yield from _faults_of_fields(payload, ticks=ticks)
    if by_business and not OF_BUSINESS & payload.model_fields.keys() and payload.model_config.get("extra") != "allow":
        yield (
            f"Its exclusive is Exclusive.BUSINESS, and {payload.__name__} names no business. "
            "Give it the field business_id: UUID, or write exclusive=Exclusive.JOB."
        )


def _faults_of_fields(payload: type[BaseModel], *, ticks: bool) -> Iterator[str]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of a default that JSON cannot hold; it is checked below
            payload.model_json_schema()
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        remedy = "Give each field a type that JSON has, as int, str, date or UUID, defined in this file or imported."
        yield f"The fields of {payload.__name__} have no JSON schema: {_first_line(error)} {remedy}"
        return
    yield from _faults_of_aliases(payload)
    for field, what in _faults_of_nothing(payload):
        if what is not None and field is not None:
            yield f"The default of {payload.__name__}.{field} is not usable: {what}. Give one that its type allows."
    if ticks and (what := unfilled(payload)) is not None:
        yield what


def unfilled(payload: type[BaseModel]) -> str | None:
    """Return why a schedule cannot ask for runs with this payload, with the remedy; None: it can."""
    found = list(_faults_of_nothing(payload))
    if missing := [field for field, what in found if field is not None and what is None]:
        of = payload.model_fields[missing[0]].annotation
        told = of.__name__ if isinstance(of, type) else str(of)
        names = " and ".join(f"{payload.__name__}.{field}" for field in missing)
        has = "have" if len(missing) > 1 else "has"
        return (
            f"{names} {has} no default, and a run that a schedule asks for is given no payload. "
            f"Give {'each' if len(missing) > 1 else 'the field'} a default, as in: {missing[0]}: {told} = …"
        )
    refused = [what for field, what in found if field is None and what is not None]
    if refused:
        return (
            f"{payload.__name__} refuses its own defaults, and a run that a schedule asks for is given no payload: "
            f"{refused[0].rstrip('.')}. Let it accept them."
        )
    return None


def _faults_of_aliases(payload: type[BaseModel]) -> Iterator[str]:
    """Yield which fields are stored by one name and looked for by another."""
    config = payload.model_config
    if config.get("populate_by_name") or config.get("validate_by_name"):
        return
    for name, field in payload.model_fields.items():
        if (alias := field.validation_alias or field.alias) is not None and alias != name:
            yield (
                f"{payload.__name__}.{name} is stored by its name and read by its alias. Leave the alias out, or set "
                f"model_config = ConfigDict(populate_by_name=True) in {payload.__name__}."
            )


def _faults_of_nothing(payload: type[BaseModel]) -> Iterator[tuple[str | None, str | None]]:
    """
    Yield (field, what is wrong) of a payload that is made of its defaults.

    (field, None) says that there is no default, (None, what) that the whole is refused.
    """
    body = {"__module__": payload.__module__, "model_config": ConfigDict(validate_default=True)}
    try:
        checked: Any = types.new_class(payload.__name__, (payload,), exec_body=lambda names: names.update(body))
        checked.model_validate({})
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False, include_context=False):
            field = str(item["loc"][0]) if item["loc"] else None
            missing = item["type"] == "missing" and len(item["loc"]) == 1
            message = item["msg"].removeprefix("Value error, ").rstrip(".")[:LONGEST_TOLD]
            yield field, None if missing else f"{message[:1].lower()}{message[1:]}"
    except Exception as error:  # noqa: BLE001 - whatever a validator of the author's raises
        yield None, _first_line(error)


def _first_line(error: BaseException) -> str:
    told = str(error).partition("\n")[0].rstrip(".")[:LONGEST_TOLD]
    return f"{type(error).__name__}: {told}."
