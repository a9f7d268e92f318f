"""How tables come out: nothing is cut off, and an id can be copied."""

from uuid import uuid4

import pytest

from bon_scheduler.report import PLAIN_WIDTH, Report

LONG = "x" * 2 * PLAIN_WIDTH
WORDS = "the mail server said no " * 30


@pytest.mark.parametrize("columns", [2, 8, 20])
@pytest.mark.parametrize("other", [LONG, WORDS])
def test_an_id_stays_in_one_line_whatever_stands_beside_it(
    capsys: pytest.CaptureFixture[str], columns: int, other: str
) -> None:
    run_id, caused_by = uuid4(), uuid4()
    names = [str(n) for n in range(columns)]
    Report(as_json=False).table(names, [(run_id, *[other] * (columns - 2), caused_by), ("—", *[""] * (columns - 1))])
    out = capsys.readouterr().out
    assert any(str(run_id) in line and str(caused_by) in line for line in out.splitlines())
    assert out.count("x") == (columns - 2) * other.count("x")
    assert "…" not in out


def test_facts_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    Report(as_json=False).facts({"run_id": uuid4(), "dedupe_key": LONG})
    out = capsys.readouterr().out
    assert ("dedupe_key" in out, out.count("x")) == (True, len(LONG))


def test_a_line_that_is_said_is_one_line_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    Report(as_json=False).say(WORDS)
    assert capsys.readouterr().out == f"{WORDS}\n"


def test_beside_a_document_everything_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(as_json=True)
    report.say("where to look")
    report.table(["a"], [["b"]])
    out, err = capsys.readouterr()
    assert (out, "where to look" in err, "b" in err) == ("", True, True)
