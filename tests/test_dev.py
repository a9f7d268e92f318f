"""`dev.py`: what it installs and when, and what its help lists."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Call `dev.py` with a command in a checkout of its own; return which files of requirements it installed."""
    shutil.copy(ROOT / "dev.py", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    dev = load(tmp_path / "dev.py")

    def call(command: str) -> list[str]:
        installed: list[str] = []

        def run(arguments: list[object], **_: object) -> subprocess.CompletedProcess[str]:
            installed.extend(path.name for path in arguments if isinstance(path, Path) and path.suffix == ".txt")
            return subprocess.CompletedProcess([], 0)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(os, "execv", lambda *_: sys.exit(0))
        monkeypatch.setattr(os, "chdir", lambda _: None)
        monkeypatch.setattr(sys, "argv", ["dev.py", command])
        with pytest.raises(SystemExit):
            dev.main()
        return installed

    monkeypatch.setenv("BON_SCHEDULER_STARTED_AS", "python3 dev.py")  # set by it, and unset after the test
    return call


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("dev_of_a_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("developed_before", [False, True])
@pytest.mark.parametrize("changed", ["demo.txt", "dev.txt"])
def test_what_is_required_is_installed_again_when_it_changes(
    installs: Callable[[str], list[str]], tmp_path: Path, changed: str, developed_before: bool
) -> None:
    wanted = "dev.txt" if developed_before else "demo.txt"
    assert installs("lint" if developed_before else "jobs") == [wanted]
    assert installs("jobs") == []
    with (tmp_path / "requirements" / changed).open("a") as file:
        file.write("# changed\n")
    assert installs("jobs") == ([wanted] if developed_before or changed == "demo.txt" else [])
    assert installs("jobs") == []


def test_the_tests_requirements_name_all_that_the_demos_do() -> None:
    """Whoever has them needs no second environment."""
    demo, dev = (
        {line.split("==")[0] for line in (ROOT / "requirements" / name).read_text("utf-8").splitlines() if "==" in line}
        for name in ("demo.txt", "dev.txt")
    )
    assert demo <= dev


def test_its_help_lists_its_own_commands(
    installs: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    installs("--help")
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == ["test", "lint"]
