"""What the documents say is so: the reference is the code's, links lead somewhere, the README's job runs."""

import importlib.util
import re
from pathlib import Path

import pytest

from bon_scheduler.jobs import AnyJob
from tests.conftest import Connection, RunJob
from tests.tools.reference import REFERENCE, reference

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/decisions/*.md")]
EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
TUTORIAL_SQL = re.compile(r'psql "\$DATABASE_URL" -c "([^"]+)"')
LINK = re.compile(r"\]\(([^)#:]+)\)")


def test_the_reference_is_what_the_code_says() -> None:
    assert REFERENCE.read_text("utf-8") == reference(), "run: python -m tests.tools.reference"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def example_job(directory: Path) -> AnyJob:
    """The README's job, as if somebody had copied it into a file."""
    match = EXAMPLE.search((ROOT / "README.md").read_text("utf-8"))
    assert match
    path = directory / "address_cleanup.py"
    path.write_text(match.group(1), "utf-8")
    spec = importlib.util.spec_from_file_location("address_cleanup", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    job: AnyJob = module.address_cleanup
    return job


async def test_the_readmes_job_does_on_the_tutorials_rows_what_the_tutorial_says(
    connection: Connection, run_job: RunJob, tmp_path: Path
) -> None:
    tutorial = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    statements = TUTORIAL_SQL.findall(tutorial)
    assert len(statements) == 3
    for statement in statements:
        await connection.execute(statement)
    job = example_job(tmp_path)
    first = await run_job(job, jobs=[job])
    assert (first.run["state"], first.run["counts"]) == ("succeeded", {"deleted": 7})
    assert "`deleted 7`" in tutorial
    again = await run_job(job, jobs=[job])
    assert again.run["counts"] == {"deleted": 0}
    assert await connection.fetchval("select count(*) from address_drafts") == 7
