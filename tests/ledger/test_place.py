"""What is compared with where the ledger lives, case by case; the same with real servers is in tests/copies."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from bon_scheduler.environment import SettingsError, load_settings
from bon_scheduler.ledger import Caller, Found, Place, Whereabouts, fault

STARTED = datetime(2026, 11, 1, tzinfo=UTC)
HERE = Whereabouts(server="7", version=17, database=16384, ledger=16500, started=STARTED)
RESTARTED = replace(HERE, started=STARTED + timedelta(days=1))
PLACE = Place(
    id=uuid4(),
    deployment=None,
    addresses=frozenset({"db:5432"}),
    whereabouts=HERE,
    mark=9,
    behind=None,
    since=STARTED,
)
NAMED = replace(PLACE, deployment="production")
KNOWN, UNKNOWN = frozenset({"db:5432"}), frozenset({"other:5432"})
PLAIN = Caller(None, KNOWN)

SAME = [
    ("nothing has changed", PLACE, HERE, PLAIN),
    ("the server was restarted", PLACE, RESTARTED, PLAIN),
    ("the same server by another name", PLACE, HERE, Caller(None, UNKNOWN)),
    ("a replica was promoted behind the same name", PLACE, RESTARTED, PLAIN),
    ("a replica was promoted, and one of several names is known", PLACE, RESTARTED, Caller(None, KNOWN | UNKNOWN)),
    ("a replica was promoted under another name", NAMED, RESTARTED, Caller("production", UNKNOWN)),
    ("it is given a name", PLACE, RESTARTED, Caller("production", KNOWN)),
    ("the server does not tell its identifier", PLACE, replace(RESTARTED, server=None), PLAIN),
    ("pg_upgrade", PLACE, replace(RESTARTED, server="8", version=18), PLAIN),
]
OTHER = [
    ("a physical copy elsewhere", PLACE, RESTARTED, Caller(None, UNKNOWN), "lives at db:5432"),
    ("another name", NAMED, HERE, Caller("development", KNOWN), 'DEPLOYMENT "production", which is "development"'),
    ("no name", NAMED, HERE, PLAIN, "which is not set here"),
    ("it is given a name elsewhere", PLACE, RESTARTED, Caller("production", UNKNOWN), "lives at"),
    ("restored on another server", NAMED, replace(HERE, server="8"), Caller("production", KNOWN), "another server"),
    ("restored on a newer one", PLACE, replace(HERE, server="8", version=18, ledger=17000), PLAIN, "another server"),
    ("restored on an older one", PLACE, replace(HERE, server="8", version=16), PLAIN, "another server"),
    ("create database … template", PLACE, replace(HERE, database=17000), PLAIN, "another database"),
    ("restored in place", PLACE, replace(HERE, ledger=17000), PLAIN, "restored from a dump"),
    ("another server that does not tell", PLACE, replace(HERE, server=None, ledger=1), PLAIN, "restored from a dump"),
    ("who remembers more has said so", replace(PLACE, behind=12), HERE, PLAIN, "mark 9, and 12 was seen"),
]


@pytest.mark.parametrize(("what", "place", "here", "caller"), SAME, ids=[case[0] for case in SAME])
def test_it_is_the_same_place(what: str, place: Place, here: Whereabouts, caller: Caller) -> None:
    assert fault(Found(here, place), caller) is None, what


@pytest.mark.parametrize(("what", "place", "here", "caller", "said"), OTHER, ids=[case[0] for case in OTHER])
def test_it_is_another_place(what: str, place: Place, here: Whereabouts, caller: Caller, said: str) -> None:
    assert said in str(fault(Found(here, place), caller)), what


def test_who_was_admitted_is_not_judged_again_by_how_it_comes_but_by_where_it_is() -> None:
    assert fault(Found(RESTARTED, NAMED), Caller(None, UNKNOWN), admitted=True) is None
    assert fault(Found(replace(HERE, ledger=1), NAMED), Caller("production", KNOWN), admitted=True) is not None


@pytest.mark.parametrize(
    ("url", "listen", "addresses"),
    [
        ("postgresql://u:p@DB.internal/bon", None, {"db.internal:5432"}),
        ("postgresql://u@pooler:6432/bon", "postgresql://u@db:5432/bon", {"db:5432"}),
        ("postgresql://u@a:1,b:2/bon", None, {"a:1", "b:2"}),
        ("postgresql:///bon?host=/run/postgresql", None, {"/run/postgresql:5432"}),
        ("postgresql:///bon", None, {"socket:5432"}),
        ("postgresql://[::1]:5433/bon", None, {"::1:5433"}),
    ],
)
def test_the_address_is_the_servers_own_and_holds_no_login(url: str, listen: str | None, addresses: set[str]) -> None:
    values = {"DATABASE_URL": url} | ({"DATABASE_LISTEN_URL": listen} if listen else {})
    assert Caller.of(load_settings(values)).addresses == addresses


@pytest.mark.parametrize("name", ["-x", "pro duction", "a" * 64, "יצור"])
def test_a_deployment_has_a_name_that_can_be_typed(name: str) -> None:
    with pytest.raises(SettingsError, match="DEPLOYMENT"):
        load_settings({"DATABASE_URL": "postgresql://db/bon", "DEPLOYMENT": name})
