"""
What the documents say is so: two pages are the code's, links lead somewhere, and every block of code runs.

A block's language says how: `bash`, `sql`, `js` and `python` are executed on the demo's sample data, in a copy of this
checkout that has the README's job; `text` is shown only. A comment `-- fails with SQLSTATE` ends a statement that must
fail; the first line of a `python` block names its file.
"""

import asyncio
import os
import re
import secrets
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID
from zoneinfo import ZoneInfo

import asyncpg
import pytest

from bon_scheduler.database import connections
from bon_scheduler.demo.sample import load_sample
from bon_scheduler.shaam import TokenCipher
from tests.conftest import Connection
from tests.demo.test_keeping import STATE, demo
from tests.tools.reference import REFERENCE, ROLES, reference, roles
from tests.waiting import until

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/decisions/*.md")]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
FAILS = re.compile(r"^-- fails with (\w{5})$", re.MULTILINE)
PSQL = re.compile(r'^psql "\$DATABASE_URL" -c "([^"]*)"$', re.MULTILINE)
LANGUAGES = {"bash", "sql", "js", "python", "text"}
ELSEWHERE = re.compile(
    r"python3 dev\.py (?:demo|test(?! tests/handlers/test_address)|lint)"
    r"|export DATABASE_URL=|bash \.ci/run|\.venv/bin/pre-commit"
)
"""Lines that are not executed here: the whole suite, the demo (tests/demo), an address in whose place is the test's."""
# $1 state: text; null for any.
LATEST = """
    select id
      from bon_scheduler.runs
     where $1::text is null or state::text = $1
     order by enqueued_at desc
     limit 1
"""


@dataclass(frozen=True, slots=True)
class Block:
    page: Path
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(page, language, text) for language, text in BLOCK.findall(page.read_text("utf-8"))]


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if any(block.language in languages for block in blocks(page))]


def test_two_pages_are_what_the_code_says() -> None:
    assert REFERENCE.read_text("utf-8") == reference(), "run: python -m tests.tools.reference"
    assert ROLES.read_text("utf-8") == roles(), "run: python -m tests.tools.reference"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_how_it_runs(page: Path) -> None:
    found = blocks(page)
    assert 2 * len(found) == len(re.findall("^```", page.read_text("utf-8"), re.MULTILINE))
    assert {block.language for block in found} <= LANGUAGES


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of this checkout that a document may change, and the environment of its commands."""

    root: Path
    environ: dict[str, str]

    async def bash(self, script: str) -> tuple[int, str]:
        """Run a script as somebody types it; return its status and what it printed."""
        process = await asyncio.create_subprocess_exec(
            *("bash", "-eu", "-o", "pipefail", "-c", script),
            cwd=self.root,
            env=self.environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(240):
            out, _ = await process.communicate()
        return process.returncode or 0, out.decode()


def add_example(root: Path) -> None:
    """Put the README's job where the README says, and the line it asks for."""
    (source,) = (block.text for block in blocks(ROOT / "README.md") if block.language == "python")
    (root / source.partition("\n")[0].removeprefix("# ")).write_text(source, "utf-8")
    listed = root / "handlers" / "__init__.py"
    text = listed.read_text("utf-8")
    before = "from handlers.draft"
    text = text.replace(before, f"from handlers.address_cleanup import address_cleanup\n{before}")
    listed.write_text(text.replace("= (\n", "= (\n    address_cleanup,\n"), "utf-8")


def add_its_table(root: Path) -> None:
    """Put the job's table where the tutorial says."""
    (table,) = (block.text for block in blocks(ROOT / "docs" / "tutorial.md") if block.language == "sql")
    with (root / "bon_scheduler" / "demo" / "bon.sql").open("a", encoding="utf-8") as bon:
        bon.write(f"\n{table}")


@pytest.fixture
async def copy(connection: Connection, database_url: str, server_url: str, tmp_path: Path) -> Copy:
    """A copy of this checkout on a database with the demo's sample data, where a job has run."""
    root = tmp_path / "checkout"
    root.mkdir()
    left_out = shutil.ignore_patterns("__pycache__")
    for name in ("bon_scheduler", "docs", "handlers", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=left_out)
    shutil.copy(ROOT / "dev.py", root)
    for name in ("health", "requirements", "pyproject.toml", ".venv"):
        (root / name).symlink_to(ROOT / name)
    await load_sample(
        connection,
        now=datetime.now(UTC),
        zone=ZoneInfo("Asia/Jerusalem"),
        encrypt=TokenCipher(secrets.token_hex(32)).encrypt,
    )
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    # What the documents export, with the address of this database.
    urls = {"DATABASE_URL": database_url, "EMAIL_MODE": "log", "SHAAM_MODE": "mock", "TEST_DATABASE_URL": server_url}
    environ = {**keep, **urls, "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    made = Copy(root, environ)
    status, told = await made.bash("python3 dev.py run-once session-cleanup")
    assert status == 0, told
    add_example(root)  # AFTER the run, as in the tutorial: nobody has made the job known yet
    return made


async def latest_run(connection: Connection, state: str | None = None) -> str:
    return str(await connection.fetchval(LATEST, state))


async def fail_once(copy: Copy) -> None:
    """Do what the tutorial says: raise before the return, run, and take the line out."""
    file = copy.root / "handlers" / "address_cleanup.py"
    sound = file.read_text("utf-8")
    line = "        return await ctx.finish"
    file.write_text(sound.replace(line, f'        raise ValueError("no")\n{line}'), "utf-8")
    status, told = await copy.bash("python3 dev.py run-once address-cleanup")
    assert status == 1
    assert "ValueError: no (at handlers/address_cleanup.py:" in " ".join(told.split())
    file.write_text(sound, "utf-8")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", pages_with("bash"), ids=lambda page: page.name)
async def test_what_is_typed_at_a_shell_works(page: Path, copy: Copy, connection: Connection, tmp_path: Path) -> None:
    if page.name == "tutorial.md" and shutil.which("psql") is None:
        pytest.skip("no psql: apt install postgresql-client")
    if page.name == "testing.md":
        add_its_table(copy.root)  # it says that the tutorial has done so
    for block in blocks(page):
        if block.language == "python":
            (copy.root / block.text.partition("\n")[0].removeprefix("# ")).write_text(block.text, "utf-8")
        if block.language != "bash":
            continue
        dead = "retry RUN_ID" in block.text
        if dead:
            await fail_once(copy)
        script = "\n".join(line for line in block.text.splitlines() if not ELSEWHERE.match(line))
        script = script.replace("RUN_ID", await latest_run(connection, "dead" if dead else None))
        status, told = await copy.bash(script.replace("/tmp/", f"{tmp_path}/"))
        assert status == 0, f"{script}\n{told}"
        if "address-cleanup" in script and page.name == "tutorial.md":
            expected = {"--dry-run": "deleted 7", "again": "deleted 0"}
            assert all(word in told for mark, word in expected.items() if mark in script), told


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TEST_POSTGRES") == "container", reason="the demo runs a server of its own")
async def test_the_tutorials_demo_is_stopped_and_goes_on_with_the_readers_work(copy: Copy, tmp_path: Path) -> None:
    """Step 5: the run waits for a `serve` that knows the job; the demo is started again for that."""
    shutil.copy(ROOT / "handlers" / "__init__.py", copy.root / "handlers")  # as before the reader's job
    tutorial = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    async with demo(tmp_path / "kept", cwd=copy.root) as first, connections.connect(first.url) as connection:
        at_the_demo = Copy(copy.root, {**copy.environ, "DATABASE_URL": first.url})
        add_example(copy.root)
        for statement in PSQL.findall(tutorial):
            await connection.execute(statement)
        await fail_once(at_the_demo)
        run_id = await latest_run(connection, "dead")
        status, told = await at_the_demo.bash(f'python3 dev.py retry {run_id} --reason "took the line out"')
        assert status == 0, told
        assert await latest_run(connection, "queued") == run_id
    async with demo(tmp_path / "kept", cwd=copy.root) as second, connections.connect(second.url) as connection:

        async def succeeded() -> bool:
            return bool(await connection.fetchval(STATE, UUID(run_id)) == "succeeded")

        await until(succeeded, seconds=30)
        status, told = await at_the_demo.bash("python3 dev.py runs --job address-cleanup --json")
        assert (status, '"succeeded"' in told) == (0, True), told
        assert await connection.fetchval("select count(*) from address_drafts") == 7


@pytest.mark.parametrize("page", pages_with("sql"), ids=lambda page: page.name)
async def test_sql_does_what_is_written_beside_it(page: Path, connection: Connection) -> None:
    transaction = connection.transaction()
    await transaction.start()
    for block in (each for each in blocks(page) if each.language == "sql"):
        if expected := FAILS.search(block.text):
            with pytest.raises(asyncpg.PostgresError) as raised:
                async with connection.transaction():
                    await connection.execute(block.text)
            assert raised.value.sqlstate == expected[1]
        else:
            await connection.execute(block.text)
    await transaction.rollback()


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package pg; the test is skipped where that cannot be had."""
    import subprocess  # noqa: PLC0415 - for this alone

    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("no node or npm: apt install nodejs npm")
    directory = tmp_path_factory.mktemp("node")
    command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(directory), "pg@8"]
    if subprocess.run(command, check=False, capture_output=True, timeout=120).returncode:
        pytest.skip("npm could not install pg@8")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("js"), ids=lambda page: page.name)
async def test_node_asks_for_a_run(page: Path, node_modules: Path, connection: Connection, database_url: str) -> None:
    for number, block in enumerate(each for each in blocks(page) if each.language == "js"):
        file = node_modules / f"{page.stem}-{number}.mjs"
        file.write_text(block.text, "utf-8")
        told = []
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                *("node", str(file)),
                env={**os.environ, "DATABASE_URL": database_url},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            out, _ = await process.communicate()
            assert process.returncode == 0, out.decode()
            told.append(out.decode().strip())
        assert told == [await latest_run(connection), "the key is taken"]


async def test_the_example_of_a_test_passes_and_fails_when_the_job_is_broken(copy: Copy) -> None:
    (source,) = (block.text for block in blocks(ROOT / "docs" / "testing.md") if block.language == "python")
    file = source.partition("\n")[0].removeprefix("# ")
    (copy.root / file).write_text(source, "utf-8")
    add_its_table(copy.root)
    script = f"{sys.executable} -m pytest -q -n 0 -p no:cacheprovider {file}"
    status, told = await copy.bash(script)
    assert status == 0, told
    job = copy.root / "handlers" / "address_cleanup.py"
    job.write_text(job.read_text("utf-8").replace("'7 days'", "'6 days'"), "utf-8")
    status, told = await copy.bash(script)
    assert status == 1, told
