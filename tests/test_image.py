"""
The image, as far as it can be made without a container engine.

The build stage's RUN instructions are executed as they are written, in a directory that holds what `.dockerignore`
lets through, with `/app` and `/tools` elsewhere. What they install is started where this checkout is not on the path.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

from bon_scheduler.cli.signals import ANSWERS_SECONDS, LEAVING_SECONDS
from bon_scheduler.config import Settings
from bon_scheduler.database import connections
from bon_scheduler.demo.sample import create_tables
from bon_scheduler.files import fault_of_shared_directory
from tests.process import Finished, run_program, serve

ROOT = Path(__file__).parents[1]
PACKAGES = ("bon_scheduler/", "handlers/", "health/")
DEMO = "bon_scheduler/demo/"
STAGE = re.compile(r"^FROM .*?(?=^FROM |\Z)", re.DOTALL | re.MULTILINE)
GRACES = re.compile(r"(?:--stop-timeout|--time|-t|terminationGracePeriodSeconds:) (\d+)\b|Give it (\d+) s")
MOUNTED = re.compile(r"(?:-v [\w/.-]+:|SPOOL_DIR=)(/\w+)")
MADE = re.compile(r"install -d -o (\d+) -g (\d+) -m 0700 (/\w+)")
RUN = re.compile(r"^RUN (.*?[^\\])$", re.DOTALL | re.MULTILINE)


def stages() -> list[str]:
    """The text of each stage of the Dockerfile."""
    return STAGE.findall((ROOT / "Dockerfile").read_text("utf-8"))


def files_in_git() -> list[str]:
    """The files that git knows, or would add, by their names from the root."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no checkout with git: what belongs to the project is not known")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def is_sent(name: str) -> bool:
    """Whether `.dockerignore` lets a file through: the last line that fits it or a directory above it decides."""
    sent = True
    above = [name, *map(str, Path(name).parents)]
    for line in (ROOT / ".dockerignore").read_text("utf-8").split():
        pattern = line.removeprefix("!").removeprefix("**/")
        if any(fnmatch(each, pattern) for each in above if each != "."):
            sent = line.startswith("!")
    return sent


@dataclass(frozen=True, slots=True)
class Installed:
    """What the build stage leaves: the wheel, and the environment it is installed in."""

    wheel: Path
    app: Path

    def command(self, *arguments: str) -> list[str]:
        return [str(self.app / "bin" / "bon-scheduler"), *arguments]

    async def run(self, *arguments: str, **environ: str) -> Finished:
        return await run_program(*self.command(*arguments), **environ)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """The build stage, executed."""
    root = tmp_path_factory.mktemp("image")
    context = root / "build"
    for name in filter(is_sent, files_in_git()):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, context / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for run in RUN.findall(stages()[0]):
        script = re.sub(r"(?<![\w/.])/(app|tools)\b", rf"{root}/\1", run)
        command = ["sh", "-eu", "-c", script]
        environ = {**os.environ, "PATH": path}
        done = subprocess.run(command, check=False, cwd=context, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    (wheel,) = (context / "dist").glob("*.whl")
    yield Installed(wheel, root / "app")
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_holds_each_file_of_the_packages_but_the_demos(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    packaged = {name for name in files_in_git() if name.startswith(PACKAGES) and not name.startswith(DEMO)}
    assert held == packaged


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_what_the_image_holds_migrates_checks_serves_and_answers(
    installed: Installed, empty_database_url: str
) -> None:
    async with connections.connect(empty_database_url) as connection:
        await create_tables(connection)
    environ = {"DATABASE_URL": empty_database_url}
    for arguments in (("migrate",), ("check",), ("jobs", "--help"), ("jobs",)):
        done = await installed.run(*arguments, **environ)
        assert done.status == 0, f"{arguments}: {done.out}{done.err}"
    async with serve(command=installed.command("serve"), **environ) as service:
        answer = await installed.run("healthcheck", "--ready", HEALTH_PORT=str(service.port))
        assert (answer.status, answer.out) == (0, "ok: /readyz 200\n"), answer.err
        assert await service.stop() == 0


def pages() -> dict[str, str]:
    """The Dockerfile and the pages for operators, by their names."""
    files = [ROOT / "Dockerfile", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    return {file.name: file.read_text("utf-8") for file in files}


def test_every_page_names_one_grace_and_the_program_needs_no_longer() -> None:
    found = {page: {int("".join(each)) for each in GRACES.findall(text)} for page, text in pages().items()}
    named = {page: graces for page, graces in found.items() if graces}
    assert {"Dockerfile", "image.md", "operations.md"} <= named.keys()
    (grace,) = set.union(*named.values())
    assert grace >= Settings.model_fields["shutdown_seconds"].default + LEAVING_SECONDS + ANSWERS_SECONDS


def test_each_directory_that_is_mounted_is_in_the_image_and_its_users_alone() -> None:
    """A new named volume takes owner and mode from what is there; without it, it is root's."""
    made_before, _, _ = stages()[-1].partition("\nUSER 65532:65532\n")
    made = {path: (int(user), int(group)) for user, group, path in MADE.findall(made_before)}
    mounted = {path for text in pages().values() for path in MOUNTED.findall(text)}
    assert made == dict.fromkeys(mounted, (65532, 65532))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives directories away")
def test_a_volume_that_is_made_from_it_is_accepted_as_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = RUN.findall(stages()[-1])
    subprocess.run(["sh", "-eu", "-c", made.replace("/spool", f"{tmp_path}/spool")], check=True)
    monkeypatch.setattr(os, "geteuid", lambda: 65532)
    assert fault_of_shared_directory(tmp_path / "spool") is None
    assert (tmp_path / "spool").stat().st_mode & 0o7777 == 0o700
