"""
Break the code in one place at a time, and see whether the tests that guard it fail.

`python -m tests.tools.mutate [NAME …]`

Each mutation is made in a copy of the working directory, and its tests are run there. One that fails no test has
survived: write the test, or argue in a docstring of its test file that nobody could tell. Not run by CI: it takes
minutes. Exit status: how many survived, or no longer fit the code.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MUTATIONS", "Mutation", "main"]

ROOT = Path(__file__).parents[2]
LEFT_OUT = (".git", ".venv", "__pycache__", ".*_cache", "*.egg-info")
SQL = "bon_scheduler/database/schema/functions"
NO_TEST_FOUND = 5


@dataclass(frozen=True, slots=True)
class Mutation:
    """One text for another, once in a file, and the tests that must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: Sequence[str]


MUTATIONS = (
    Mutation(
        "declarer-tie-break",
        "bon_scheduler/schedule/schedules.py",
        "started_at desc, id\n",
        "started_at, id\n",
        ["tests/schedule/test_triggers.py", "-k", "replicas_one_declares"],
    ),
    Mutation(
        "declarer-last-tie-break",
        "bon_scheduler/schedule/schedules.py",
        "started_at desc, id\n",
        "started_at desc, id desc\n",
        ["tests/schedule/test_triggers.py", "-k", "replicas_one_declares"],
    ),
    Mutation(
        "bring-back-with-ticks",
        "bon_scheduler/schedule/schedules.py",
        "           and not exists (select from bon_scheduler.runs r where r.job = s.job and r.origin = 'schedule')\n",
        "",
        ["tests/schedule/test_triggers.py", "-k", "brought_back"],
    ),
    Mutation(
        "bring-back-by-clocks-that-differ",
        "bon_scheduler/schedule/triggers.py",
        "self._clocks.all_agree and await",
        "await",
        ["tests/schedule/test_triggers.py", "-k", "clock_far_ahead_declared"],
    ),
    Mutation(
        "release-without-day",
        "bon_scheduler/mail/deliveries.py",
        'payload = {**row["payload"], "as_of": row["as_of"].isoformat()}',
        'payload = row["payload"]',
        ["tests/mail/test_uncertain.py", "-k", "is_told_its_day"],
    ),
    Mutation(
        "compare-without-second-look",
        "bon_scheduler/engine/reconcile.py",
        "known = before | self._runner.under_way",
        "known = before",
        ["tests/engine/test_reconcile_races.py"],
    ),
    Mutation(
        "compare-without-first-look",
        "bon_scheduler/engine/reconcile.py",
        "known = before | self._runner.under_way",
        "known = self._runner.under_way",
        ["tests/engine/test_reconcile_races.py"],
    ),
    Mutation(
        "closed-gate-counts-others",
        f"{SQL}/close_mail_gate.sql",
        "if gate.closed_since is not null and not was_trial then",
        "if false then",
        ["tests/mail/test_gate.py", "-k", "beside_a_closed_gate"],
    ),
    Mutation(
        "open-gate-counts-nothing",
        f"{SQL}/close_mail_gate.sql",
        "if gate.closed_since is not null and not was_trial then",
        "if not was_trial then",
        ["tests/mail/test_gate.py", "-k", "wait_grows or down_is_said_once"],
    ),
    Mutation(
        "letter-of-an-earlier-attempt",
        "bon_scheduler/mail/deliveries.py",
        "                          and r.attempt = d.attempt\n",
        "",
        ["tests/mail/test_uncertain.py", "-k", "of_an_attempt_before"],
    ),
    Mutation(
        "letter-of-a-dead-worker",
        "bon_scheduler/mail/deliveries.py",
        "                          and bon_scheduler.is_alive(r.worker))",
        "                          )",
        ["tests/mail/test_uncertain.py", "-k", "dead_worker"],
    ),
    Mutation(
        "save-once-only",
        "bon_scheduler/shaam/refreshes.py",
        "and encrypted_refresh_token in ($2, $4)",
        "and encrypted_refresh_token = $2",
        ["tests/shaam/test_rotation.py", "-k", "save_whose_answer_was_lost"],
    ),
    Mutation(
        "save-over-another",
        "bon_scheduler/shaam/refreshes.py",
        "and encrypted_refresh_token in ($2, $4)",
        "and $2 = $2",
        ["tests/shaam/test_rotation.py", "-k", "save_whose_answer_was_lost"],
    ),
    Mutation(
        "slow-beat-taken-for-a-frozen-process",
        "bon_scheduler/engine/heartbeat.py",
        "                self._note_beat()\n",
        "                self._note_beat()\n                self._pulse = time.monotonic()\n",
        ["tests/engine/test_heartbeat.py", "-k", "slow_database"],
    ),
    Mutation(
        "overtaken-waits-never-looked-for",
        "bon_scheduler/engine/reconcile.py",
        "if ahead < self._ahead_seconds - SET_BACK_SECONDS:",
        "if ahead > self._ahead_seconds + SET_BACK_SECONDS:",
        ["tests/engine/test_reconcile.py", "tests/schedule/test_database_clock.py", "-k", "set_back"],
    ),
    Mutation(
        "fence-without-attempt",
        "bon_scheduler/ledger/attempts.py",
        "     where id = $1 and attempt = $2 and worker = $3\n       and (state = 'running' or",
        "     where id = $1 and worker = $3 and $2 = $2\n       and (state = 'running' or",
        ["tests/engine/test_runner.py", "tests/ledger/test_claims.py", "tests/engine/test_reconcile.py"],
    ),
    Mutation(
        "prune-a-cause",
        "bon_scheduler/ledger/retention.py",
        "           and not exists (select from bon_scheduler.runs c where c.caused_by = r.id offset 0)\n",
        "",
        ["tests/handlers/test_ledger_pruning.py"],
    ),
    Mutation(
        "prune-credentials-that-are-there",
        "bon_scheduler/ledger/retention.py",
        "where c.business_id = r.business_id\n",
        "where false\n",
        ["tests/handlers/test_ledger_pruning.py"],
    ),
    Mutation(
        "run-once-forgets-those-of-an-ended-cause",
        "bon_scheduler/engine/run_once.py",
        "                if not left:\n",
        "                if True:\n",
        ["tests/engine/test_run_once.py", "-k", "has_ended_caused"],
    ),
)


def _survives(mutation: Mutation, copy: Path) -> str | None:
    """Return what is wrong with the tests, or None when one of them fails."""
    path = copy / mutation.file
    text = path.read_text("utf-8")
    if text.count(mutation.old) != 1:
        return f"its text is {text.count(mutation.old)} times in {mutation.file}: mend the list"
    path.write_text(text.replace(mutation.old, mutation.new), "utf-8")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", *mutation.tests]
    try:
        ended = subprocess.run(command, cwd=copy, check=False, capture_output=True, text=True)
    finally:
        path.write_text(text, "utf-8")
    if ended.returncode == NO_TEST_FOUND:
        return "no test was found"
    return None if ended.returncode == 1 else "survived" if ended.returncode == 0 else ended.stdout[-2000:]


def main(names: Sequence[str]) -> int:
    """Make the named mutations, or all; print what became of each, and return how many no test noticed."""
    survivors = 0
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for mutation in MUTATIONS:
            if names and mutation.name not in names:
                continue
            fault = _survives(mutation, copy)
            survivors += fault is not None
            sys.stdout.write(f"{mutation.name}: {fault or 'killed'}\n")
            sys.stdout.flush()
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
