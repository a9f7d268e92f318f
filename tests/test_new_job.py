"""A job added as the documents say leaves the suite green; what is forgotten is one failure with the lines to write."""

import asyncio
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_docs import add_example, add_its_table, blocks

ROOT = Path(__file__).parents[1]
CONTRACT = (ROOT / "bon_scheduler" / "database" / "contract.py").read_text("utf-8")
ABOUT_SQL = (
    *("tests/database/test_contract.py", "tests/handlers/test_sql.py"),
    "tests/test_docs.py::test_two_pages_are_what_the_code_says",
)
SUITE = (*ABOUT_SQL, "tests/test_structure.py", "tests/test_declarations.py")
"""What a job may break. tests/test_docs.py has the README's own job tested."""
WITHOUT_SQL = '''
"""Count the hours of the day."""

from bon_scheduler import Counts, Cron, JobContext, NoPayload, job


@job("hour-count", schedule=Cron("0 7 * * *"))
async def new_job(ctx: JobContext, _: NoPayload) -> Counts:
    """Count how many hours of the day are over."""
    return {"hours": ctx.fire_time.hour}
'''
TO_WRITE = re.compile(r"in (USES|COLUMNS)\n(?:E +)?( {4}.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of this checkout."""

    root: Path
    environ: dict[str, str]

    def add(self, source: str) -> None:
        """Write the job's file, and its line in JOBS."""
        (self.root / "handlers" / "a_new_job.py").write_text(source.lstrip(), "utf-8")
        self.edit(
            "handlers/__init__.py", "from handlers.draft", "from handlers.a_new_job import new_job\nfrom handlers.draft"
        )
        self.edit("handlers/__init__.py", "= (\n", "= (\n    new_job,\n")

    def edit(self, name: str, before: str, after: str) -> None:
        text = (self.root / name).read_text("utf-8")
        assert before in text
        (self.root / name).write_text(text.replace(before, after, 1), "utf-8")

    async def run(self, *command: str) -> str:
        """Run what a developer types; return what it printed."""
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=self.root,
            env=self.environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(300):
            out, _ = await process.communicate()
        return out.decode()

    async def test(self, *files: str) -> tuple[list[str], str]:
        """Run tests; return which failed, and what was printed."""
        told = await self.run("python3", "dev.py", "test", *files, "-q", "-n", "2", "-p", "no:cacheprovider")
        assert " passed" in told, told
        return re.findall(r"^(?:FAILED|ERROR) (\S+)", told, re.MULTILINE), told


@pytest.fixture
def copy(server_url: str, tmp_path: Path) -> Copy:
    left_out = shutil.ignore_patterns("__pycache__")
    for name in ("bon_scheduler", "docs", "handlers", "health", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    for name in ("requirements", "pyproject.toml", "README.md", "CONTRIBUTING.md", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "dev.py", tmp_path)
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return Copy(tmp_path, {**keep, "TEST_DATABASE_URL": server_url, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"})


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_job_without_sql_needs_its_file_and_its_line(copy: Copy) -> None:
    copy.add(WITHOUT_SQL)
    failed, told = await copy.test(*SUITE)
    assert failed == [], told


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_what_a_job_with_a_table_of_its_own_lacks_is_one_failure_that_says_what_to_write(copy: Copy) -> None:
    add_example(copy.root)
    failed, told = await copy.test(*ABOUT_SQL)
    assert failed == ["tests/handlers/test_sql.py::test_every_statement_is_valid_in_the_real_schema"], told
    assert "say so in bon_scheduler/demo/bon.sql" in told
    add_its_table(copy.root)

    failed, told = await copy.test(*ABOUT_SQL)
    assert len(failed) == 1, told
    assert failed[0].endswith("with_one_less_it_does_not[address-cleanup]")
    assert "bon_scheduler/database/contract.py: write in USES" in told
    (in_tutorial,) = (block.text for block in blocks(ROOT / "docs" / "tutorial.md") if block.language == "text")
    to_write = TO_WRITE.findall(told)
    assert [line for _, line in to_write] == in_tutorial.splitlines(), told

    for name, line in to_write:
        before = re.search(rf"^{name}: .*\n", CONTRACT, re.MULTILINE)
        assert before
        copy.edit("bon_scheduler/database/contract.py", before[0], f"{before[0]}{line}\n")
    failed, told = await copy.test(*ABOUT_SQL)
    assert failed == ["tests/test_docs.py::test_two_pages_are_what_the_code_says"], told
    assert "run: python -m tests.tools.reference" in told
    await copy.run(".venv/bin/python", "-m", "tests.tools.reference")
    failed, told = await copy.test(*SUITE)
    assert failed == [], told
