"""What CONTRIBUTING promises of the code's shape: doors, sizes, and no module outside a package."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import bon_scheduler

ROOT = Path(__file__).parents[1]
MODULES = [path for top in ("bon_scheduler", "handlers", "health") for path in (ROOT / top).rglob("*.py")]
STUBS = [path for top in ("bon_scheduler", "handlers") for path in (ROOT / top).rglob("__init__.pyi")]
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS, MOST_AT_THE_TOP = 400, 60, 6, 13
DECLARED_BY_FIELDS = {"job"}
"""A decorator whose parameters are the fields of `Job`."""


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in {"self", "cls"}])


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the parameters are a command's options, which typer reads."""
    return any(ast.unparse(decorator).startswith("app.command") for decorator in function.decorator_list)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_small_and_so_are_its_functions(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= MOST_LINES
    for function in functions(ast.parse(text)):
        assert (function.end_lineno or 0) - function.lineno < MOST_LINES_OF_A_FUNCTION, function.name
        if function.name not in DECLARED_BY_FIELDS and not is_command(function):
            assert parameters(function) <= MOST_PARAMETERS, function.name


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_every_name_of_a_door_is_there_and_public_where_it_comes_from(stub: Path) -> None:
    package = ".".join(stub.parent.relative_to(ROOT).parts)
    door = importlib.import_module(package)
    assert door.__doc__
    for node in ast.walk(ast.parse(stub.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            inside = importlib.import_module(f"{package}.{node.module}")
            for alias in node.names:
                assert getattr(door, alias.name) is getattr(inside, alias.name)
                assert alias.name in inside.__all__


def test_few_modules_lie_outside_a_package() -> None:
    top = [path.name for path in Path(bon_scheduler.__file__).parent.glob("*.py")]
    assert len(top) <= MOST_AT_THE_TOP, sorted(top)
