"""Mistakes in a job's declaration are told with file, line, job and remedy, and take nothing else away."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from bon_scheduler import declared
from bon_scheduler.jobs import JobDeclarationError
from tests.process import Finished, run_program

ROOT = Path(__file__).parents[1]
HEAD = """
from dataclasses import dataclass
from datetime import timedelta
from typing import Callable
from pydantic import BaseModel, Field, field_validator, model_validator
from bon_scheduler import CatchUp, Counts, Cron, Exclusive, JobContext, NoPayload, Payload, Retry, job

class Model(BaseModel):
    name: str

@dataclass
class Data:
    name: str
"""
WITH_PAYLOAD = "async def a_test(ctx: JobContext, payload: P) -> Counts: return {}"
SOUND = "async def a_test(ctx: JobContext, _: NoPayload) -> Counts: return {}"


def of(declaration: str = '@job("a-test")', function: str = SOUND) -> str:
    return f"{HEAD}\n{declaration}\n{function}\n"


LINE = len(HEAD.splitlines()) + 2

MISTAKES = {
    "a name with spaces": (of('@job("Send digests")'), '"send-digests"'),
    "upper case": (of('@job("SendDigests")'), '"send-digests"'),
    "an underscore": (of('@job("send_digests")'), '"send-digests"'),
    "no name at all": (of('@job("")'), "lower-case words joined by hyphens"),
    "a name of 101 characters": (of('@job("a" * 101)'), "100 characters at most"),
    "a number as a name": (of("@job(3)"), "Its name is 3"),
    "job without parentheses": (of("@job"), '@job("its-name")'),
    "a text as schedule": (of('@job("a-test", schedule="0 6 * * *")'), "schedule=Cron('0 6 * * *')"),
    "a number as schedule": (of('@job("a-test", schedule=6)'), "schedule=Cron("),
    "no text in Cron": (of('@job("a-test", schedule=Cron(6))'), 'Cron("0 6 * * *")'),
    "a text as catch_up": (of('@job("a-test", schedule=Cron("0 6 * * *", catch_up="all"))'), "CatchUp.LATEST, .ALL"),
    "hours as grace": (of('@job("a-test", schedule=Cron("0 6 * * *", grace=18))'), "grace=timedelta("),
    "a number as retry": (of('@job("a-test", retry=5)'), "retry=Retry(attempts=5)"),
    "no attempt": (of('@job("a-test", retry=Retry(attempts=0))'), "The attempts of its Retry are 0"),
    "seconds as delay": (of('@job("a-test", retry=Retry(delay=10))'), "delay=timedelta("),
    "seconds as timeout": (of('@job("a-test", timeout=600)'), "timeout=timedelta("),
    "no time": (of('@job("a-test", timeout=timedelta(0))'), "Give a longer one"),
    "a text as exclusive": (of('@job("a-test", exclusive="job")'), "Exclusive.JOB"),
    "nothing at once": (of('@job("a-test", at_once=0)'), "at_once is 0"),
    "a text as sends_mail": (of('@job("a-test", sends_mail="yes")'), "True or False"),
    "def": (of(function="def a_test(ctx: JobContext, _: NoPayload) -> Counts: return {}"), '"async def a_test"'),
    "a yield": (of(function="async def a_test(ctx: JobContext, _: NoPayload): yield {}"), "Take the yield out"),
    "a class": (of(function="class ATest: pass"), "Put @job above an async def"),
    "no parameter": (of(function="async def a_test() -> Counts: return {}"), "takes 0 parameters"),
    "no payload": (of(function="async def a_test(ctx: JobContext) -> Counts: return {}"), "takes 1 parameter "),
    "a third": (of(function="async def a_test(ctx: JobContext, _: NoPayload, n: int): return {}"), "3 parameters"),
    "a keyword": (of(function="async def a_test(ctx: JobContext, _: NoPayload, *, n: int): return {}"), "3 param"),
    "swapped": (of(function="async def a_test(_: NoPayload, ctx: JobContext) -> Counts: return {}"), "are swapped"),
    "no annotation": (of(function="async def a_test(ctx, payload): return {}"), 'Nothing says what "payload"'),
    "a model of its own": (of(function="async def a_test(ctx: JobContext, p: Model): return {}"), "Model, which is no"),
    "a dataclass": (of(function="async def a_test(ctx: JobContext, p: Data): return {}"), "Data, which is no Payload"),
    "a dict": (of(function="async def a_test(ctx: JobContext, p: dict): return {}"), "dict, which is no Payload"),
    "maybe": (of(function="async def a_test(ctx: JobContext, p: NoPayload | None): return {}"), "is no Payload"),
    "an unknown name": (of(function='async def a_test(ctx: JobContext, p: "Later"): return {}'), '"Later" is not def'),
    "a field without a default, and a schedule": (
        of('class P(Payload): days: int\n@job("a-test", schedule=Cron("0 6 * * *"))', WITH_PAYLOAD),
        "P.days has no default, and a run that a schedule asks for is given no payload. Give the field a default, "
        "as in: days: int = …",
    ),
    "two of them": (
        of('class P(Payload): days: int; name: str | None\n@job("a-test", schedule=Cron("0 6 * * *"))', WITH_PAYLOAD),
        "P.days and P.name have no default",
    ),
    "defaults that it refuses, and a schedule": (
        of(
            "class P(Payload):\n"
            "    days: int = 0\n"
            '    @model_validator(mode="after")\n'
            "    def check(self):\n"
            '        raise ValueError("name days")\n'
            '@job("a-test", schedule=Cron("0 6 * * *"))',
            WITH_PAYLOAD,
        ),
        "P refuses its own defaults, and a run that a schedule asks for is given no payload: name days. Let it",
    ),
    "a default of another type": (
        of('class P(Payload): days: int = "x"\n@job("a-test")', WITH_PAYLOAD),
        "The default of P.days is not usable: input should be a valid integer",
    ),
    "a default out of bounds": (
        of('class P(Payload): days: int = Field(0, ge=1)\n@job("a-test")', WITH_PAYLOAD),
        "The default of P.days is not usable: input should be greater than or equal to 1",
    ),
    "a field that JSON cannot hold": (
        of('class P(Payload): what: Callable[[], int]\n@job("a-test")', WITH_PAYLOAD),
        "The fields of P have no JSON schema",
    ),
    "a field of an unknown type": (
        of('class P(Payload): what: "Later"\n@job("a-test")', WITH_PAYLOAD),
        "The fields of P have no JSON schema",
    ),
    "an alias": (
        of('class P(Payload): days: int = Field(1, alias="theDays")\n@job("a-test")', WITH_PAYLOAD),
        "P.days is stored by its name and read by its alias",
    ),
    "exclusive by business without one": (of('@job("a-test", exclusive=Exclusive.BUSINESS)'), "NoPayload names no bus"),
    "one run at a time, and four": (of('@job("a-test", exclusive=Exclusive.JOB, at_once=4)'), "Leave one of them out"),
    "attempts without end": (of('@job("a-test", retry=Retry(attempts=2**31))'), "from 1 to 1,000,000"),
    "runs without end": (of('@job("a-test", at_once_here=2**31)'), "from 1 to 1,000,000"),
    "a factor that is no number": (of('@job("a-test", retry=Retry(factor=float("nan")))'), "from 1 to 1000"),
    "a factor without end": (of('@job("a-test", retry=Retry(factor=1e9))'), "from 1 to 1000"),
    "a delay that is cut": (of('@job("a-test", retry=Retry(delay=timedelta(hours=1)))'), "Give longest=timedelta("),
    "a wait of ages": (of('@job("a-test", retry=Retry(longest=timedelta.max))'), "Give 366 days at most"),
    "a time-out of ages": (of('@job("a-test", timeout=timedelta.max)'), "Give 366 days at most"),
    "a grace of ages": (of('@job("a-test", schedule=Cron("0 6 * * *", grace=timedelta.max))'), "366 days at most"),
    "a grace of nothing": (
        of('@job("a-test", schedule=Cron("0 6 * * *", grace=timedelta(milliseconds=1)))'),
        "each fire time is noticed later",
    ),
    "None as counts": (of(function="async def a_test(ctx: JobContext, _: NoPayload) -> None: ..."), "Return counts"),
}


def execute(source: str, path: Path) -> None:
    path.write_text(source, "utf-8")
    spec = importlib.util.spec_from_file_location("a_mistake", path)
    assert spec
    assert spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_place_its_job_and_the_remedy(mistake: str, tmp_path: Path) -> None:
    source, remedy = MISTAKES[mistake]
    path = tmp_path / "a_mistake.py"
    with pytest.raises(JobDeclarationError) as raised:
        execute(source, path)
    told = str(raised.value)
    assert remedy in told
    if mistake == "a class":
        assert "a_mistake" in told
    else:
        line = source[: source.rindex("@job")].count("\n") + 1
        assert told.startswith(f"{path}:{line}: ")
    if '"a-test"' in source:
        assert 'job "a-test": ' in told


SOUND_ONES = {
    "a payload of defaults": of(
        "class P(Payload): days: int = Field(30, ge=1); name: str | None = None\n"
        '@job("a-test", schedule=Cron("0 6 * * *"))',
        WITH_PAYLOAD,
    ),
    "a field without a default and no schedule": of('class P(Payload): days: int\n@job("a-test")', WITH_PAYLOAD),
    "BON's spelling of a business": of(
        'class P(Payload): businessId: str\n@job("a-test", exclusive=Exclusive.BUSINESS)', WITH_PAYLOAD
    ),
    "a default that JSON writes otherwise": of(
        'class P(Payload): grace: timedelta = timedelta(days=1)\n@job("a-test")', WITH_PAYLOAD
    ),
    "an alias beside the name": of(
        "class P(Payload, populate_by_name=True): days: int = Field(1, alias='theDays')\n@job('a-test')", WITH_PAYLOAD
    ),
}


@pytest.mark.parametrize("name", SOUND_ONES)
def test_a_sound_payload_is_accepted(name: str, tmp_path: Path) -> None:
    execute(SOUND_ONES[name], tmp_path / "a_sound_one.py")


def test_every_mistake_of_a_declaration_is_told_at_once(tmp_path: Path) -> None:
    source = of('@job("A test", schedule="daily", timeout=5)', "def a_test(ctx: JobContext): return {}")
    with pytest.raises(JobDeclarationError) as raised:
        execute(source, tmp_path / "a_mistake.py")
    assert len(raised.value.faults) == 5


def test_every_job_in_handlers_is_listed_and_usable() -> None:
    assert declared.FAULTS == ()
    assert declared.unlisted() == []


@pytest.fixture
def handlers(tmp_path: Path) -> Path:
    """A copy of handlers that a test may spoil."""
    return Path(shutil.copytree(ROOT / "handlers", tmp_path / "handlers", ignore=shutil.ignore_patterns("__pycache__")))


def spoil(file: Path, before: str, after: str) -> int:
    """Replace a text that stands in the file; return the line it began in."""
    text = file.read_text("utf-8")
    assert before in text
    file.write_text(text.replace(before, after, 1), "utf-8")
    return text[: text.index(before)].count("\n") + 1


async def command(handlers: Path, *arguments: str, **environ: str) -> Finished:
    """Run a command of the program with other handlers."""
    path = f"{handlers.parent}:{ROOT}"
    return await run_program(sys.executable, "-P", "-m", "bon_scheduler", *arguments, PYTHONPATH=path, **environ)


async def test_a_broken_job_is_named_and_the_others_go_on(handlers: Path, database_url: str) -> None:
    file = handlers / "ledger_pruning.py"
    spoil(
        file,
        'schedule=Cron("30 4 * * *", catch_up=CatchUp.LATEST, grace=timedelta(hours=24))',
        'schedule="30 4 * * *"',
    )
    for arguments in (["jobs"], ["runs"], ["audit"], ["timeline"], ["enqueue", "draft-cleanup"]):
        done = await command(handlers, *arguments, DATABASE_URL=database_url)
        assert done.status == 0, done.err
        assert f'{file}:24: job "ledger-pruning": Its schedule is' in done.err
    listed = await command(handlers, "jobs", "--json", DATABASE_URL=database_url)
    rows = {row["job"]: row["summary"] for row in listed.document["jobs"]}
    assert rows["ledger-pruning"].startswith("broken: ")
    assert rows["draft-cleanup"].startswith("Delete")
    checked = await command(handlers, "check", "--json", DATABASE_URL=database_url)
    assert checked.status == 1
    found = [each for each in checked.document["findings"] if each["name"] == "jobs"]
    assert [each["level"] for each in found] == ["failure"]
    done = await command(handlers, "run-once", "draft-cleanup", DATABASE_URL=database_url)
    assert done.status == 0
    done = await command(handlers, "run-once", "ledger-pruning", DATABASE_URL=database_url)
    assert done.status == 2
    assert f'Job "ledger-pruning" cannot be used. {file}:24' in done.err
    # Its variable is no unknown one.
    done = await command(handlers, "runs", DATABASE_URL=database_url, SCHEDULE_LEDGER_PRUNING="0 5 * * *")
    assert done.status == 0


@pytest.mark.parametrize("arguments", [["serve"], ["migrate"]])
async def test_what_needs_every_job_is_refused_while_one_is_broken(
    handlers: Path, database_url: str, arguments: list[str]
) -> None:
    line = spoil(handlers / "ledger_pruning.py", "async def ledger_pruning(", "async def ledger_pruning(ctx) = (")
    done = await command(handlers, *arguments, DATABASE_URL=database_url)
    assert done.status == 2
    assert f'ledger_pruning.py:{line}: job "ledger-pruning": It cannot be imported: SyntaxError' in done.err
    assert "One job is broken" in done.err


SPOILED = {
    "an exception": (
        "ledger_pruning.py",
        '__all__ = ["ledger_pruning"]',
        "IN_TIME = timedelta(eons=8)",
        "TypeError",
    ),
    "a name": ("ledger_pruning.py", '__all__ = ["ledger_pruning"]', "IN_TIME = span(8)", "name 'span'"),
    "an exit": ("ledger_pruning.py", '__all__ = ["ledger_pruning"]', "raise SystemExit(3)", "SystemExit: 3"),
    "cron": ("ledger_pruning.py", '"30 4 * * *"', '"0 25 * * *"', '"0 25 * * *" is not a cron expression'),
    "never": ("ledger_pruning.py", '"30 4 * * *"', '"0 4 30 2 *"', "bad day-of-month"),
    "not decorated": (
        "ledger_pruning.py",
        "@job(",
        "@(lambda *_, **__: lambda f: f)(",
        "stands in JOBS and is no job",
    ),
    "no such name": ("__init__.py", "import ledger_pruning", "import session_clean", "cannot import name"),
    "no such module": ("__init__.py", "handlers.ledger_pruning", "handlers.session_clean", "ModuleNotFoundError"),
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.samples(4)
async def test_whatever_breaks_a_module_takes_only_its_jobs_away(handlers: Path, database_url: str, how: str) -> None:
    name, before, after, told = SPOILED[how]
    line = spoil(handlers / name, before, after)
    done = await command(handlers, "jobs", "--json", DATABASE_URL=database_url)
    assert done.status == 0, done.err
    assert told in done.err
    place = next(each for each in done.err.split() if ".py:" in each).rstrip(":")
    assert place.startswith(f"{handlers / name}:")
    assert abs(int(place.rpartition(":")[2]) - line) <= 4
    usable = {row["job"] for row in done.document["jobs"] if not row["summary"].startswith(("broken", "its"))}
    assert usable == {job.name for job in declared.JOBS} - {"ledger-pruning"}


async def test_what_imports_a_broken_module_is_named_with_it(handlers: Path, database_url: str) -> None:
    line = spoil(handlers / "send_overdue_digest.py", "async def send_overdue_digest(", "def send_overdue_digest(")
    done = await command(handlers, "runs", DATABASE_URL=database_url)
    told = [text for text in done.err.splitlines() if ".py:" in text]
    assert len(told) == 4
    assert 'job "send-overdue-digest": It cannot be imported: SyntaxError: ' in done.err
    assert 'overdue_detection.py:1: job "overdue-detection": It imports what cannot be used' in done.err
    assert 'Write "async def"' in done.err
    assert line


async def test_two_jobs_of_one_name_are_both_named_and_neither_runs(handlers: Path, database_url: str) -> None:
    spoil(handlers / "ledger_pruning.py", '"ledger-pruning"', '"draft-cleanup"')
    done = await command(handlers, "jobs", "--json", DATABASE_URL=database_url)
    assert "ledger_pruning.py:24: " in done.err
    assert "draft_cleanup.py:" in done.err
    assert "Another job has this name" in done.err
    done = await command(handlers, "run-once", "draft-cleanup", DATABASE_URL=database_url)
    assert done.status == 2


async def test_a_job_that_is_not_listed_is_found(handlers: Path, database_url: str) -> None:
    (handlers / "extra.py").write_text(of('@job("extra")'), "utf-8")
    done = await command(handlers, "run-once", "extra", DATABASE_URL=database_url)
    assert done.status == 2
    assert f'extra.py:{LINE}: job "extra": a_test is not in handlers.JOBS' in done.err
    checked = await command(handlers, "check", "--json", DATABASE_URL=database_url)
    found = [each for each in checked.document["findings"] if each["name"] == "jobs"]
    assert [(each["level"], "extra.py" in each["what"]) for each in found] == [("warning", True)]
