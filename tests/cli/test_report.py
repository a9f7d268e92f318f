"""How tables come out: nothing is cut off, and an id can be copied."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from bon_scheduler.report import Column, Report, format_counts, format_distance

NOW = datetime(2026, 11, 27, 6, 0, tzinfo=UTC)
WIDTH = 160
LONG = "x" * 2 * WIDTH
WORDS = "the mail server said no " * 30


@pytest.mark.parametrize("columns", [2, 8, 20])
@pytest.mark.parametrize("other", [LONG, WORDS])
def test_an_id_stays_in_one_line_whatever_stands_beside_it(
    capsys: pytest.CaptureFixture[str], columns: int, other: str
) -> None:
    run_id, caused_by = uuid4(), uuid4()
    headings: list[Column | str] = ["run", *(Column(str(n), wraps=3) for n in range(columns - 2)), "caused by"]
    rows = [(run_id, *[other] * (columns - 2), caused_by), ("—", *[""] * (columns - 1))]
    report = Report(as_json=False)
    report.console.width = WIDTH
    report.table(headings, rows)
    out = capsys.readouterr().out
    for each in (run_id, caused_by):
        assert any(str(each) in line for line in out.splitlines())
    assert out.count("x") == (columns - 2) * other.count("x")
    assert "…" not in out


def test_what_matters_least_is_left_out_of_a_narrow_terminal_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    columns: list[Column | str] = [
        "job",
        Column("took", importance=2),
        Column("host", importance=1),
        Column("counts", wraps=20),
    ]
    rows = [("shaam-token-refresh", "33 ms", "a-host-with-a-name-of-thirty-ch", "due 10, refreshed 7, failed 3")]
    Report(as_json=False).table(columns, rows)
    assert capsys.readouterr().out.splitlines()[0].split() == ["job", "took", "host", "counts"]
    report = Report(as_json=False)
    report.console.width = 60
    report.table(columns, rows)
    narrow = capsys.readouterr().out
    assert narrow.splitlines()[0].split() == ["job", "took", "counts"]
    assert max(map(len, narrow.splitlines()[:-1])) <= 60
    assert "Left out for want of width: host." in narrow


@pytest.mark.parametrize("width", [90, 60, 40])
def test_what_does_not_fit_is_folded_between_words_and_then_listed_a_line_each(
    capsys: pytest.CaptureFixture[str], width: int
) -> None:
    run_id, invoice = uuid4(), uuid4()
    columns: list[Column | str] = ["when", "run", "job", "invoice", Column("items", importance=1)]
    report = Report(as_json=False)
    report.console.width = width
    report.table(
        columns, [("2026-11-27 06:00:00+02:00", f"{str(run_id)[:9]}…", "overdue-detection", invoice, "7 items")] * 2
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= max(width, 4 + 2 + 36 + 5)
    for whole in (f"{str(run_id)[:9]}…", "overdue-detection", str(invoice), "2026-11-27", "06:00:00+02:00"):
        assert sum(whole in line for line in lines) == 2, (whole, lines)
    assert (lines[0].split() == columns[:4]) is (width == 90)
    # A list has room for what a table leaves out.
    assert sum("7 items" in line for line in lines) == (0 if width == 90 else 2)


def test_nothing_to_list_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    Report(as_json=False).table(["run"], [], empty="No runs yet.")
    assert capsys.readouterr().out == "No runs yet.\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "now"),
        (59, "in 59 s"),
        (61, "in 1 min"),
        (3 * 3600 + 12 * 60 + 5, "in 3 h 12 min"),
        (-7200, "2 h ago"),
        (-(86_400 * 3 + 3600), "3 d 1 h ago"),
        (-(86_400 * 3 + 300), "3 d ago"),
    ],
)
def test_how_far_off_an_instant_is_reads_as_people_say_it(seconds: float, words: str) -> None:
    assert format_distance(NOW + timedelta(seconds=seconds), NOW) == words


def test_counts_in_brief_leave_out_what_did_not_happen() -> None:
    assert format_counts({"sent": 1, "refused": 0}, brief=True) == "sent 1"
    assert format_counts({"sent": 0, "refused": 0}, brief=True) == "sent 0, refused 0"
    assert format_counts({"sent": 1, "refused": 0}) == "sent 1, refused 0"


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
