"""
What this deployment declares: its jobs, its settings, and which job runs when.

Imports what jobs declare and nothing that works on runs, so that commands which only read start at once. A job that
cannot be used as it is declared is left out of JOBS and told in FAULTS, so that commands go on without it; `serve` and
`migrate` ask `require_sound` first.
"""

import ast
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import cast

from bon_scheduler.config import Settings
from bon_scheduler.environment import load_settings
from bon_scheduler.jobs import AnyJob, Cron, Job, JobDeclarationError, declared_at, shown, unfilled
from bon_scheduler.schedule import check_cron

__all__ = ["FAULTS", "JOBS", "BrokenJobsError", "Fault", "read_settings", "require_sound", "schedules_of", "unlisted"]

PACKAGE = "handlers"
_NAMED = re.compile(r"""@(?:\w+\.)?job\(\s*["']([^"'\n]*)["']""")
_MISSING = object()
"""Stands in for a job whose module cannot be imported."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A job that cannot be used, where that is written, and the remedy."""

    at: str
    """File and line."""
    jobs: tuple[str, ...]
    """The names of the jobs that it takes away, where they can be read."""
    what: str

    def __str__(self) -> str:
        """Return it as one line."""
        named = ", ".join(f'"{name}"' for name in self.jobs)
        return f"{self.at}: {f'job {named}: ' if named else ''}{self.what}"


class BrokenJobsError(Exception):
    """Some job cannot be used as it is declared; the message names each with file and line."""


def _load() -> tuple[list[object], list[Fault]]:
    """Return what stands in `handlers.JOBS`, and why the rest does not."""
    try:
        package = importlib.import_module(PACKAGE)
        faults: list[Fault] = []
    except (Exception, SystemExit):  # noqa: BLE001 - whatever a module does when it is imported
        package, faults = _load_by_statement()
    listed = getattr(package, "JOBS", ())
    if not isinstance(listed, tuple | list):
        at = f"{shown(package.__file__ or PACKAGE)}:1"
        return [], [*faults, Fault(at, (), "JOBS is no tuple. Write each job with a comma after it, in parentheses.")]
    return list(listed), faults


def _load_by_statement() -> tuple[ModuleType, list[Fault]]:
    """Import the package statement by statement, so that a module that fails takes only its own jobs away."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"There is no package {PACKAGE} here.", name=PACKAGE)
    package, faults = importlib.util.module_from_spec(spec), []
    sys.modules[PACKAGE] = package
    try:
        statements = ast.parse(Path(spec.origin).read_bytes(), spec.origin).body
    except SyntaxError as error:
        return package, [Fault(_place(error, spec.origin, 1), (), _describe(error))]
    for statement in (part for whole in statements for part in _parts(whole)):
        if (entries := _entries(statement)) is not None:
            vars(package)["JOBS"] = listed = []
            for entry in entries:
                try:
                    listed.append(eval(compile(ast.Expression(entry), spec.origin, "eval"), vars(package)))  # noqa: S307
                except Exception as error:  # noqa: BLE001 - each is told
                    faults.append(_fault_of(error, entry, spec.origin))
            continue
        try:
            exec(compile(ast.Module([statement], []), spec.origin, "exec"), vars(package))  # noqa: S102 - our own package
        except (Exception, SystemExit) as error:  # noqa: BLE001 - each is told
            faults.append(_fault_of(error, statement, spec.origin))
            for alias in getattr(statement, "names", ()):
                setattr(package, alias.asname or alias.name, _MISSING)
    return package, faults


def _parts(statement: ast.stmt) -> Iterator[ast.stmt]:
    if isinstance(statement, ast.ImportFrom):
        for alias in statement.names:
            yield ast.copy_location(ast.ImportFrom(statement.module, [alias], statement.level), statement)
    else:
        yield statement


def _entries(statement: ast.stmt) -> list[ast.expr] | None:
    """Return the entries of JOBS, where this is the statement that lists them."""
    targets = [statement.target] if isinstance(statement, ast.AnnAssign) else getattr(statement, "targets", [])
    value = getattr(statement, "value", None)
    listed = any(isinstance(each, ast.Name) and each.id == "JOBS" for each in targets)
    return value.elts if listed and isinstance(value, ast.Tuple | ast.List) else None


def _fault_of(error: BaseException, statement: ast.stmt | ast.expr, origin: str) -> Fault:
    file = _file_of(statement, origin)
    names = tuple(_NAMED.findall(file.read_text("utf-8", "replace"))) if file else ()
    at = _place(error, origin, statement.lineno)
    if isinstance(error, JobDeclarationError):
        what = " ".join(error.faults)
        names = (error.job, *(name for name in names if name != error.job)) if error.job in names else names
    else:
        what = _describe(error)
    if file is not None and not at.startswith((f"{shown(str(file))}:", f"{shown(origin)}:")):
        return Fault(f"{shown(str(file))}:1", names, f"It imports what cannot be used: {at}: {what}")
    return Fault(at, names, what)


def _file_of(statement: ast.stmt | ast.expr, origin: str) -> Path | None:
    """Return the file that an import names."""
    if not isinstance(statement, ast.ImportFrom) or not statement.module:
        return None
    path = Path(origin).parent.joinpath(*statement.module.removeprefix(f"{PACKAGE}.").split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _place(error: BaseException, origin: str, line: int) -> str:
    """Return file and line of the innermost place in our package that an error comes from."""
    if isinstance(error, JobDeclarationError):
        return error.at
    if isinstance(error, SyntaxError) and error.filename:
        return f"{shown(error.filename)}:{error.lineno}"
    inside = f"{Path(origin).parent}/"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(inside)]
    return f"{shown(frames[-1].filename)}:{frames[-1].lineno}" if frames else f"{shown(origin)}:{line}"


def _describe(error: BaseException) -> str:
    told = error.msg if isinstance(error, SyntaxError) else str(error)
    remedy = ' Write "async def" where the handler begins.' if "outside async function" in told else ""
    return f"It cannot be imported: {type(error).__name__}: {told.partition(chr(10))[0][:300]}.{remedy}"


def _choose(listed: Iterable[object]) -> tuple[list[AnyJob], list[Fault]]:
    """Return the jobs that can be used, and what is wrong with the others."""
    jobs: list[AnyJob] = []
    faults = []
    for entry in listed:
        if isinstance(entry, Job):
            expression = entry.schedule.expression if entry.schedule else None
            if expression is not None and (what := check_cron(expression)):
                faults.append(Fault(declared_at(entry.handler), (entry.name,), f'Its schedule "{expression}" {what}.'))
            else:
                jobs.append(entry)
        elif entry is not _MISSING:
            name = getattr(entry, "__name__", None) or repr(entry)[:60]
            remedy = 'Put @job("its-name") above it.' if callable(entry) else "Put the decorated function there."
            faults.append(Fault(declared_at(entry), (), f"{name} stands in JOBS and is no job. {remedy}"))
    for name in dict.fromkeys(job.name for job in jobs):
        places = [declared_at(job.handler) for job in jobs if job.name == name]
        if len(places) > 1:
            faults.append(Fault(places[1], (name,), _tell_double(places)))
            jobs = [job for job in jobs if job.name != name]
    return jobs, faults


def _tell_double(places: Sequence[str]) -> str:
    others = [place for place in places if place != places[1]]
    if not others:
        return "It stands in JOBS twice. Take one out."
    return f"Another job has this name, at {', '.join(others)}. Give each its own; neither is used."


_listed, _import_faults = _load()
_chosen, _faults = _choose(_listed)
JOBS: tuple[AnyJob, ...] = tuple(_chosen)
"""The jobs that can be used."""
FAULTS: tuple[Fault, ...] = (*_import_faults, *_faults)
"""Why others cannot."""


def require_sound() -> None:
    """Raise BrokenJobsError where some job cannot be used."""
    if FAULTS:
        many = "One job is broken" if len(FAULTS) == 1 else f"{len(FAULTS)} jobs are broken"
        raise BrokenJobsError(
            "\n".join([f"{many}:", *(f"  - {fault}" for fault in FAULTS), "Mend it, or take it out of handlers.JOBS."])
        )


def unlisted() -> list[Fault]:
    """Return the jobs that files of `handlers` declare and JOBS does not name."""
    package = Path(cast("str", sys.modules[PACKAGE].__file__)).parent
    known = {declared_at(entry.handler) for entry in _listed if isinstance(entry, Job)}
    broken = {fault.at.rpartition(":")[0] for fault in FAULTS}
    found = []
    for file in sorted(package.rglob("*.py")):
        if shown(str(file)) in broken:
            continue
        for function in ast.walk(ast.parse(file.read_bytes())):
            if not isinstance(function, ast.AsyncFunctionDef | ast.FunctionDef):
                continue
            at = f"{shown(str(file))}:{min([each.lineno for each in function.decorator_list], default=0)}"
            names = tuple(name for each in function.decorator_list for name in _NAMED.findall(f"@{ast.unparse(each)}"))
            if names and at not in known:
                what = f"{function.name} is not in handlers.JOBS, so nothing runs it. Add it there."
                found.append(Fault(at, names, what))
    return found


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read settings, knowing the jobs; raises SettingsError with every fault."""
    names = [job.name for job in JOBS] + [name for fault in FAULTS for name in fault.jobs]
    return load_settings(environ, jobs=names, check_schedule=_check_override)


def _check_override(name: str, expression: str) -> str | None:
    """Return why an expression cannot be a job's schedule; None: it can."""
    if what := check_cron(expression):
        return what
    job = next((each for each in JOBS if each.name == name), None)
    what = unfilled(job.payload) if job is not None else None
    return f'cannot be the schedule of "{name}": {what}' if what else None


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
