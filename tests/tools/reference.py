"""
Write `docs/reference.md` and `docs/roles.md` from the code: settings, commands, exit statuses, metrics; privileges.

Run as `python -m tests.tools.reference`.
"""

import ast
import inspect
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
import typer.main
from prometheus_client import Metric, ProcessCollector
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bon_scheduler.cli.app import app
from bon_scheduler.cli.usage import EXIT_STATUSES
from bon_scheduler.config import Settings
from bon_scheduler.database.contract import USES, Privilege, privileges
from bon_scheduler.environment import SECRETS
from bon_scheduler.metrics import Metrics, OldNames

REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"
ROLES = REFERENCE.with_name("roles.md")
BY_JOB = {"schedules": "SCHEDULE_<JOB_NAME>", "deadman_urls": "DEADMAN_URL_<JOB_NAME>"}
HEAD = """# Reference

Written from the code by `python -m tests.tools.reference`; a test compares the two.

"""


def reference() -> str:
    """Return the page."""
    return HEAD + "\n".join([*_settings(), *_commands(), *_statuses(), *_metrics()]) + "\n"


def _settings() -> Iterator[str]:
    yield "## Settings\n"
    yield "Environment variables. Every fault is named at once, and nothing starts. Those marked * are secrets: each"
    yield "may also be given as `NAME_FILE`, a text file that is not empty.\n"
    yield "| variable | default | values | |"
    yield "|---|---|---|---|"
    meanings = _docstrings(Settings)
    for field, info in Settings.model_fields.items():
        name = BY_JOB.get(field, field.upper())
        star = " *" if name in SECRETS else ""
        meaning = " ".join(meanings.get(field, "").split())
        yield f"| `{name}`{star} | {_default(info)} | {_values(info)} | {meaning} |"
    yield ""


def _docstrings(model: type) -> dict[str, str]:
    """Return what stands below each attribute. Read here alone: pydantic would read it at each start."""
    (declared,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(declared, ast.ClassDef)
    found = {}
    for attribute, told in pairwise(declared.body):
        match attribute, told:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = text
    return found


def _default(info: FieldInfo) -> str:
    if info.default is PydanticUndefined or info.default is None:
        return "needed" if info.is_required() else ""
    value = info.default.value if isinstance(info.default, StrEnum) else info.default
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _values(info: FieldInfo) -> str:
    kind = info.annotation
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return ", ".join(kind)
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    low = next((m.ge for m in info.metadata if isinstance(m, annotated_types.Ge)), None)
    above = next((m.gt for m in info.metadata if isinstance(m, annotated_types.Gt)), None)
    high = next((m.le for m in info.metadata if isinstance(m, annotated_types.Le)), None)
    if high is None:
        return ""
    return f"{low} to {high}" if low is not None else f"more than {above}, to {high}"


def _commands() -> Iterator[str]:
    yield "## Commands\n"
    yield "`bon-scheduler COMMAND`; in a clone `python3 dev.py COMMAND`; wherever the package is,"
    yield "`python -m bon_scheduler COMMAND`.\n"
    group = typer.main.get_command(app)
    for name, command in vars(group)["commands"].items():
        yield f"### {name}\n"
        yield f"{command.help}\n"
        options = [_parameter(vars(each)) for each in command.params]
        if options:
            yield "| | |\n|---|---|"
            yield from options
            yield ""


def _parameter(parameter: dict[str, Any]) -> str:
    metavar = (parameter["metavar"] or "").replace("|", "\\|")
    option = parameter["opts"][-1]
    if not option.startswith("-"):
        name = metavar or option.upper()
    else:
        name = option if parameter["is_flag"] else f"{option} {metavar or option.strip('-').upper()}"
    default = parameter["default"]
    shown = f" Default: {default}." if default not in {None, False} else ""
    needed = " Needed." if parameter["required"] else ""
    return f"| `{name}` | {parameter['help'] or ''}{needed}{shown} |"


def _statuses() -> Iterator[str]:
    yield "## Exit statuses\n"
    yield "| | |\n|---|---|"
    yield from (f"| {status} | {meaning} |" for status, meaning in EXIT_STATUSES.items())
    yield ""


def _metrics() -> Iterator[str]:
    yield "## Metrics\n"
    yield "At `/metrics`, as Prometheus text or OpenMetrics. No label holds a business, a person or an address."
    yield "What the database says is absent while it cannot be asked. Until the release after 0.1.0 `bon_email_…`,"
    yield "`bon_shaam_…`, `bon_db_pool_…`, `bon_health_check_…` and `bon_event_loop_…` are also there without"
    yield "`bon_`. Besides these there are the `process_…` metrics of every Prometheus client.\n"
    yield "| metric | type | labels | |"
    yield "|---|---|---|---|"
    for family, labels in sorted(_families(), key=lambda each: each[0].name):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        yield f"| `{name}` | {family.type} | {', '.join(labels)} | {family.documentation} |"


def _families() -> Iterator[tuple[Metric, Sequence[str]]]:
    """Each metric with its labels, which the library keeps to itself."""
    for collector in Metrics().registry._collector_to_names:
        if isinstance(collector, OldNames | ProcessCollector):
            continue
        yield next(iter(collector.collect())), getattr(collector, "_labelnames", ())


ROLES_HEAD = """# Roles and grants

Written from `bon_scheduler/database/contract.py` by `python -m tests.tools.reference`; a test compares the two, and
another executes each statement of ours as a role with these privileges and with each one less.

Three kinds of role are enough. `check`, with the service's `DATABASE_URL`, prints each GRANT that is missing.

| role | does | needs |
|---|---|---|
| owner | `migrate` | `create` on the database, once; it owns schema `bon_scheduler` |
| worker | `serve`, `run-once` and the other commands | what the second block grants |
| producer | [`bon_scheduler.enqueue(…)`](enqueue.md) | `usage` on schema `bon_scheduler`, and nothing on its tables |

Where BON's tables have row level security, the worker needs `bypassrls`, or a policy that shows it every row.

```sql
create role bon_scheduler_worker;
create role bon_scheduler_producer;
grant usage on schema bon_scheduler to bon_scheduler_producer;
```

After each `migrate` that adds a table or a function, grant the first three again.

"""


def roles() -> str:
    """Return the page of roles and grants."""
    return ROLES_HEAD + "\n".join([*_grants(), *_uses()]) + "\n"


def _grants() -> Iterator[str]:
    role = "bon_scheduler_worker"
    yield "```sql"
    yield f"grant usage on schema public, bon_scheduler to {role};"
    yield f"grant select, insert, update, delete on all tables in schema bon_scheduler to {role};"
    yield f"grant execute on all functions in schema bon_scheduler to {role};"
    yield ""
    wanted = dict.fromkeys(privilege for user in USES for privilege in privileges(user))
    for table in dict.fromkeys(each.table for each in wanted):
        named = ", ".join(_named([each for each in wanted if each.table == table]))
        yield f"grant {named} on public.{table} to {role};"
    yield "```"
    yield ""


def _named(wanted: Sequence[Privilege]) -> Iterator[str]:
    for kind, kinds in (("select", {"select"}), ("insert", {"insert"}), ("update", {"update", "lock"})):
        columns = sorted({each.column for each in wanted if each.kind in kinds and each.column is not None})
        if columns:
            yield f"{kind} ({', '.join(columns)})"
    if any(each.kind == "delete" for each in wanted):
        yield "delete"


def _uses() -> Iterator[str]:
    yield "By job; `metrics` and `commands` are those of the service itself.\n"
    yield "| job | reads | changes | deletes from |\n|---|---|---|---|"
    for user, tables in USES.items():
        changes = [
            f"{table} ({', '.join(dict.fromkeys(columns))})"
            for table, uses in tables.items()
            if (columns := (*uses.changes, *uses.inserts))
        ]
        deletes = [table for table, uses in tables.items() if uses.deletes]
        yield f"| `{user}` | {', '.join(tables)} | {'; '.join(changes)} | {', '.join(deletes)} |"


def write() -> None:
    """Write the pages anew."""
    REFERENCE.write_text(reference(), encoding="utf-8")
    ROLES.write_text(roles(), encoding="utf-8")


if __name__ == "__main__":
    write()
