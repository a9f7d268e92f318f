"""Every statement that reads a table which grows, with the parameters of an ordinary call, and how much it may read."""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias
from uuid import UUID

BUSINESSES = 4_200
"""And a few whose credentials BON has deleted."""

Arguments: TypeAlias = tuple[str | None, ...]


def named(kind: str, number: int) -> str:
    """The id that `full.sql` gives."""
    return str(UUID(hashlib.md5(f"{kind}{number}".encode(), usedforsecurity=False).hexdigest()))


def _many(*ids: str) -> str:
    return "{" + ",".join(ids) + "}"


WORKER = named("worker", 1)
RUNNING = named("running", 1)
RUNNINGS = _many(*(named("running", n) for n in range(1, 11)))
ONES = _many(*["1"] * 10)
RUN = named("run", 7)
LETTER = named("letter", 300)
DIGEST = named("digest", 1)
DEADS = _many(*(named("run", 3 + 2000 * n) for n in range(10)))
HELD = _many(named("run", 5))
WAITING = named("waiting", 1)
UNKNOWN, INTENDED = named("delivery", 5001), named("delivery", 149_997)
BUSINESS = named("business", 12)
PAID = named("business", 1)
INVOICES = _many(*(named("invoice", n) for n in range(3, 503)))
DRAFTS = _many(*(named("invoice", 1 + 100 * n) for n in range(20)))
NOBODY = "00000000-0000-0000-0000-000000000000"
FINGERPRINT = "\\x" + hashlib.sha256(b"token 12").hexdigest()
REFRESH = "refresh 12"
KEPT, NOW = "400 days", "now"
NIGHT: Arguments = ("infinity", "380 days", "2000")  # nothing is that old
WORKLOAD: Arguments = (WORKER, "h", "20", "2", "{generate-pdf,send-overdue-digest}", "{20,20}", "{0,0}", "{null,null}")
DAY_AGO, DAYS_30 = "yesterday", "2999-01-01"

CASES: Mapping[str, tuple[Arguments, int]] = MappingProxyType(
    {
        "ledger.attempts.FENCE": ((RUNNING, "1", WORKER, "f"), 5),
        "ledger.attempts.FINISH": ((RUNNINGS, ONES, WORKER, _many(*['"{}"'] * 10), _many(*["null"] * 10)), 80),
        "ledger.attempts.PROGRESS": ((RUNNING, "1", WORKER, '{"sent": 1}'), 10),
        "ledger.attempts.PRETEND": ((NOBODY, "1", WORKER, "generate-pdf"), 5),
        "ledger.attempts.FAIL": ((RUNNING, "1", WORKER, "failed", "why", "1 min"), 10),
        "ledger.attempts.GIVE_BACK": ((RUNNINGS, ONES, WORKER, None, None), 80),
        "ledger.attempts.LET_GO": ((RUNNINGS, ONES, WORKER), 60),
        "ledger.attempts.LOSE": ((RUNNING, "1", "why"), 10),
        "ledger.attempts.HELD_BY": ((WORKER,), 100),
        "ledger.attempts.LOST_BY": ((RUNNINGS, ONES, WORKER), 30),
        "ledger.attempts.RELEASE_LOST": ((), 400),
        "ledger.attempts.RECORD_OUTCOMES": ((RUNNING, _many(BUSINESS), "{done}", '{"{}"}', "{null}"), 10),
        "ledger.brakes.USUAL": (("overdue-detection", "marked", "14"), 80),
        "ledger.brakes.HOLD": ((RUNNING, "1", WORKER, "why", "{}"), 10),
        "ledger.brakes.COUNT_CHANGED": ((named("overdue-detection", 9),), 20),
        "ledger.brakes.ROWS_OF_RUN": ((named("overdue-detection", 9),), 20),
        "ledger.brakes.ROWS_OF_BUSINESS": ((BUSINESS,), 200),
        "ledger.changes.LOCK_RUNS": ((DEADS,), 30),
        "ledger.changes.RETRY": ((DEADS, "me", "why"), 60),
        "ledger.changes.CANCEL": ((DEADS, "me", "why"), 100),
        "ledger.changes.RELEASE": ((HELD, "me", "why"), 20),
        "ledger.changes.DEAD_RUNS": ((None,), 500),
        "ledger.changes.WAITING_RUNS": (("generate-pdf",), 11_000),
        "ledger.claims.CLAIM": ((*WORKLOAD, "{f,f}", "0.1 s", "t", "t", "0"), 600),
        "ledger.claims.CLAIM_ONE": ((WAITING, WORKER, "h", "f", None, "0"), 50),
        "ledger.claims.CLAIM_NEW": (("generate-pdf", "{}", None, "me", None, WORKER, "h", "f", None, "0"), 80),
        "ledger.entries.RECORD_TICK": (("ledger-pruning", "2020-01-01", None, "2020-01-02", None), 100),
        "ledger.entries.ACTIVE_TICKS": ((), 50),
        "ledger.entries.ENQUEUE": (
            ("generate-pdf", f'{{"business_id": "{BUSINESS}"}}', "a key", None, "0", None, "program", "me", None),
            50,
        ),
        "ledger.entries.ENQUEUE_MANY": (
            ("generate-pdf", _many(*['"{}"'] * 50), _many(*(f"key {n}" for n in range(50))), "0", "me", DIGEST),
            400,
        ),
        "ledger.entries.MAKE_OVERTAKEN_READY": ((), 12_000),  # the backlog, once the database's clock was set back
        "ledger.entries.RECORD_DRY_RUN": (
            (NOBODY, "generate-pdf", "{}", None, "me", "succeeded", NOW, "{}", None),
            5,
        ),
        "ledger.history.LIST_RUNS": ((None, "50"), 150),
        "ledger.history.LIST_CERTAIN_RUNS": ((None, "50", None, "dead"), 1_300),
        "ledger.history.FIND_RUN": ((RUN,), 5),
        "ledger.history.ATTEMPTS_OF": ((RUN,), 5),
        "ledger.history.BUSINESSES_OF": ((named("overdue-detection", 9),), 500),
        "ledger.history.ACTIONS_ON": ((RUN,), 10),
        "ledger.history.OUTCOME_TOTALS": ((named("overdue-detection", 9),), 500),
        "ledger.history.CAUSED_BY": ((RUN,), 5),
        "ledger.history.DESCENDANTS": ((RUN,), 10),
        "ledger.history.UNFINISHED": ((_many(DIGEST), "{send-overdue-digest}"), 300),
        "ledger.history.HOLDER_OF_KEY": (("shaam-token-refresh", "key 7"), 5),
        "ledger.history.JOB_OVERVIEW": (("10000",), 12_000),
        "ledger.history.READ_QUEUE": (("10000",), 15_000),
        "ledger.pauses.KNOWS_BUSINESS": ((BUSINESS,), 5),
        "ledger.pauses.RECORD_ACTION": (("me", "pause", "x", "why"), 5),
        "ledger.retention.PRUNE_RUNS": (NIGHT, 10),
        "ledger.retention.PRUNE_DELIVERIES": (NIGHT, 10),
        "ledger.retention.PRUNE_OUTCOMES": (NIGHT, 10),
        "ledger.retention.PRUNE_TOKENS": (NIGHT, 10),
        "ledger.retention.PRUNE_ACTIONS": (("infinity", "9 years 1 day", "2000"), 10),
        "ledger.retention.PRUNE_REFRESHES": (NIGHT, 2 * BUSINESSES),
        "mail.deliveries.GIVE_UP_UNANSWERED": ((), 100),
        "mail.deliveries.COUNT_UNKNOWN": (("14 days",), 50),
        "mail.deliveries.SOME_UNKNOWN": (("14 days", "5"), 50),
        "mail.deliveries.DELIVERIES_OF": ((LETTER,), 10),
        "mail.deliveries.LOCK_DELIVERY": ((UNKNOWN,), 10),
        "mail.deliveries.RELEASE": ((UNKNOWN, "me", "why"), 10),
        "mail.mailer.INTEND": (("overdue-digest", BUSINESS, "1999-01-01", "hmac:x", "<1@bon>", RUNNING, "1"), 10),
        "mail.mailer.GIVE_UP": (("overdue-digest", named("business", 1998), "today", "hmac:1", RUNNING, "1"), 20),
        "mail.mailer.FIND_STATE": (("overdue-digest", BUSINESS, "today", "hmac:1"), 5),
        "mail.recording.SETTLE": ((INTENDED, named("letter", 99_997), "1", "sent", "ok"), 10),
        "mail.recording.WITHDRAW_UNHEARD": (
            ("overdue-digest", named("business", 1998), "today", "hmac:1", RUNNING, "1"),
            20,
        ),
        "mail.recording.WITHDRAW": ((INTENDED, named("letter", 99_997), "1"), 10),
        "schedule.schedules.BRING_BACK": (("2019-01-01", "{ledger-pruning}"), 20),
        "schedule.audit.TICKS": ((DAY_AGO, "tomorrow"), 1_000),
        "shaam.consent.COUNT_JUDGED": ((DAY_AGO,), BUSINESSES),
        "shaam.consent.ASK_AGAIN": ((None,), BUSINESSES),
        "shaam.consent.FLAG_WAITING": ((), 2 * BUSINESSES),
        "shaam.consent.CHOOSE_ONE": ((_many(BUSINESS),), 10),
        "shaam.ownership.REGISTER": ((_many(f'"\\{FINGERPRINT}"'), _many(BUSINESS), _many(f'"\\{FINGERPRINT}"')), 10),
        "shaam.ownership.FIND_OWNER": ((FINGERPRINT,), 5),
        "shaam.refreshes.CLAIM": ((BUSINESS, REFRESH, FINGERPRINT, NOBODY, "30 s", None, "1 h"), 20),
        "shaam.refreshes.FIND_REFUSAL": ((BUSINESS, REFRESH, FINGERPRINT), 20),
        "shaam.refreshes.IS_CLAIMED": ((BUSINESS, NOBODY), 5),
        "shaam.refreshes.SAVE": ((BUSINESS, REFRESH, "a", "b", "1 h", None, FINGERPRINT, None, "\\x00"), 30),
        "shaam.refreshes.ASK_FOR_CONSENT": ((BUSINESS, REFRESH), 10),
        "shaam.refreshes.IS_FLAGGED": ((BUSINESS, REFRESH), 5),
        "shaam.refreshes.SETTLE": ((BUSINESS, NOBODY, "failed", "f", "1 min", None, "why"), 10),
        "shaam.refreshes.NOTE": ((BUSINESS, "failed", "why"), 10),
        "shaam.refreshes.RELEASE_ABANDONED": ((NOBODY, "{}"), 10),
        "shaam.standing.FIND_STANDING": ((BUSINESS,), 5),
        "shaam.standing.SUMMARISE": ((), 3 * BUSINESSES),
        "cli.ids.FIND[run]": ((RUN, RUN[:-1] + "f", "5"), 20),
        "cli.ids.FIND[delivery]": ((UNKNOWN, UNKNOWN[:-1] + "f", "5"), 20),
        "cli.ids.FIND[business]": ((BUSINESS, BUSINESS[:-1] + "f", "5"), 20),
        "cli.ids.NEIGHBOURS[run]": ((DEADS,), 60),
        "cli.ids.NEIGHBOURS[delivery]": ((_many(UNKNOWN),), 10),
        "handlers.digest.statement.READ_STATEMENT": (
            (named("business", 43), "2999-01-01", "20", "overdue-digest", "5"),
            500,
        ),
        "handlers.digest.statement.READ_RECIPIENTS": ((BUSINESS, "20"), 20),
        "handlers.digest.statement.COUNT_OWNERS": ((BUSINESS,), 20),
        "handlers.draft_cleanup.LEFT_STALE": (("{}", NOW), 4_100),
        "handlers.draft_cleanup.COUNT_DRAFTS": ((), 4_100),
        "handlers.draft_cleanup.COUNT_PAUSED": ((NOW,), 10),
        "handlers.notify_reauth.READ_FLAGGED": ((named("business", 100),), 10),
        "handlers.overdue_detection.LEFT_OVERDUE": (("{}", "2999-01-01"), 6_000),
        "handlers.overdue_detection.MARK": ((RUN, INVOICES, "2999-01-01"), 3_000),
        "handlers.overdue_detection.FIND_PIECES": (("2999-01-01", "1000", "200000"), 6_000),
        "handlers.overdue_detection.CLEAR_SETTLED": ((RUN, INVOICES), 3_000),
        "handlers.overdue_detection.CLEAR_MOVED": ((RUN, INVOICES, "2026-01-01"), 3_000),
        "handlers.overdue_detection.LOCK": ((INVOICES,), 1_100),
        "handlers.overdue_detection.FIND_OVERDUE": (("{}", "500", "2999-01-01"), 1_100),
        "handlers.overdue_detection.FIND_SETTLED": (("{}", "500"), 1_100),
        "handlers.overdue_detection.COUNT_OVERDUE": (("2999-01-01", None), 6_000),
        "handlers.batches.BUSINESS_OF": ((named("invoice", 3),), 5),
        "handlers.draft_cleanup.FIND_STALE": (("{}", "500", NOW), 1_100),
        "handlers.draft_cleanup.LOCK_STALE": ((DRAFTS, NOW), 60),
        "handlers.draft_cleanup.COUNT_STALE": ((NOW, None), 4_100),
        "handlers.draft_cleanup.FIND_KEPT": ((DRAFTS,), 40),
        "handlers.session_cleanup.FIND_EXPIRED": (("{}", "500", NOW), 1_100),
        "handlers.session_cleanup.COUNT_EXPIRED": ((NOW, None), 1_100),
        "handlers.session_cleanup.END_OF_RANGE": (("1970-01-01", "500", NOW), 1_100),
        "handlers.session_cleanup.DELETE_RANGE": (("1970-01-01", "now", NOW), 2_100),
        "handlers.session_cleanup.LOCK": ((_many(*(named("session", n) for n in range(100))),), 300),
        "ledger.alive.HELD_COUNTS": ((), 400),
        "ledger.alive.LATEST_RUN": (("generate-pdf",), 100),
        "ledger.alive.OBSTACLE": ((WAITING,), 30),
        "ledger.alive.OPEN_COUNTS": (("generate-pdf",), 8_000),
        "ledger.alive.STOPPED_FOR_ALL": (("2020-01-01", None, None), 400),
        "ledger.brakes.END_HELD": ((named("run", 5), "why"), 10),
        "ledger.brakes.RECORD_CHANGED": ((RUN,), 1_000),
        "ledger.history.COUNT_HELD": ((), 400),
        "ledger.history.LAST_SUCCESSES": ((), 4_000),
        "ledger.place.ADOPT": ((None, "{}", "dana", "why"), 20),
        "mail.deliveries.COUNT_SENT": ((RUN, "2"), 20),
        "shaam.consent.HOLD": ((RUN,), 20),
        "handlers.overdue_detection.LEFT_SETTLED": (("{}",), 1_100),
        "handlers.overdue_detection.COUNT_PAUSED": ((NOW, NOW), 10),
        "handlers.overdue_digest.COUNT_OWNERS": ((), 3 * BUSINESSES),
        "handlers.session_cleanup.LEFT_EXPIRED": (("{}", NOW), 1_100),
        "handlers.session_cleanup.DELETE": ((_many(*(named("session", n) for n in range(100))), NOW), 300),
        "handlers.shaam_refresh_batch.DUE": ((NOW, None, "t"), 3 * BUSINESSES),
        "handlers.shaam_refresh_batch.COUNT_PAUSED": ((NOW,), 10),
        "handlers.shaam_refresh_batch.READ_TOKENS": ((_many(BUSINESS, PAID),), 10),
        "handlers.shaam_refresh_batch.READ_SAMPLE": ((), BUSINESSES),
        "handlers.shaam_token_refresh.READ_CREDENTIAL": ((BUSINESS,), 5),
    }
)

THROUGH: Mapping[str, str] = MappingProxyType(
    {
        "ledger.alive.RUNS_FOR_BUSINESS": "reads the runs of the days asked for: no index has their businesses",
        "handlers.overdue_detection.FIND_MOVED": "reads BON's open invoices through: none of its indexes serves it",
        "handlers.overdue_detection.LEFT_MOVED": "as FIND_MOVED",
        "handlers.overdue_detection.COUNT_UNMARKED": "reads BON's invoices through, where the brake may trip",
        "handlers.overdue_digest.FIND_OWED": "reads BON's invoices through, once a day: no index has what is marked",
        "handlers.draft_cleanup.DELETE_UNREFERENCED": "BON lacks indexes on two of the references: see `check`",
        "handlers.session_cleanup.COUNT_SESSIONS": "counts all of BON's sessions, where the brake may trip",
        "shaam.ownership.LOOK_AT_ROWS": "a cursor over all credentials; each one's token is looked up",
        "shaam.ownership.LOCK": "reads nothing",
        "demo.run.RUNS": "counts the demo's few runs",
        "demo.run.TOKENS": "reads the demo's few credentials",
    }
)
"""What has no bound here, and why."""
EITHER: Mapping[str, set[str]] = MappingProxyType(
    {
        **{
            name: {"deliveries_pkey", "deliveries_run"} for name in ("mail.recording.SETTLE", "mail.recording.WITHDRAW")
        },
        **{name: {"runs_pkey", "deliveries_pkey"} for name in CASES if name.startswith("cli.ids.")},
        "mail.deliveries.GIVE_UP_UNANSWERED": {"runs_held", "runs_pkey"},
        "mail.recording.WITHDRAW_UNHEARD": {
            "deliveries_kind_business_id_as_of_recipient_hash_key",
            "deliveries_run",
        },
        "mail.mailer.GIVE_UP": {"deliveries_kind_business_id_as_of_recipient_hash_key", "deliveries_uncertain"},
        "ledger.history.READ_QUEUE": {"runs_held", "runs_by_job"},
        "shaam.consent.FLAG_WAITING": {"shaam_tokens_sealed", "shaam_tokens_pkey", "shaam_refreshes_pkey"},
    }
)
"""Indexes of which each will do: the planner searches one of them."""
