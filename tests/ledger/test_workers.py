"""Who is taken for dead: by what was watched, never by a clock that can be set."""

from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from bon_scheduler.engine.reconcile import pass_seconds
from bon_scheduler.ledger.workers import LastBeat, Watch, Worker

LEASE = timedelta(seconds=16)


class Watched:
    """A watch with two workers: this one, which speaks at every look unless told, and another, which is silent."""

    def __init__(self, *, others_lease: timedelta = LEASE) -> None:
        self.me = Worker(lease=LEASE)
        self.other = LastBeat(uuid4(), uuid4(), others_lease)
        self.now = 1000.0
        self._own = uuid4()
        self.watch = Watch(self.me, elapsed=lambda: self.now)

    def look(self, after_seconds: float, *, heard: bool = True) -> list[UUID]:
        self.now += after_seconds
        self._own = uuid4() if heard else self._own
        return self.watch.silent([LastBeat(self.me.id, self._own, LEASE), self.other])

    def looks(self, seconds: int, *, heard: bool = True) -> bool:
        """Whether the other was taken for dead at any of so many looks, a second apart."""
        return any(self.look(1, heard=heard) for _ in range(seconds))


@pytest.mark.parametrize("others_lease_seconds", [2, 16, 60])
def test_a_worker_is_dead_when_it_was_silent_for_the_longer_of_the_two_leases(others_lease_seconds: int) -> None:
    watched = Watched(others_lease=timedelta(seconds=others_lease_seconds))
    assert not watched.looks(max(others_lease_seconds, 16))
    assert watched.look(1) == [watched.other.id]


def test_whoever_speaks_once_has_a_whole_lease_again() -> None:
    watched = Watched()
    assert not watched.looks(15)
    watched.other = LastBeat(watched.other.worker, uuid4(), LEASE)
    assert not watched.looks(16)
    assert watched.looks(1)


def test_a_process_that_has_just_started_or_stood_still_judges_nobody_for_a_lease() -> None:
    watched = Watched()
    assert not watched.look(3600)
    assert not watched.watch.steady
    assert not watched.looks(15)
    assert watched.looks(1)
    assert watched.watch.steady


def test_silence_proves_nothing_while_this_worker_is_not_heard_itself() -> None:
    """The ledger can be read, and nobody can write a heartbeat."""
    watched = Watched()
    assert not watched.looks(4)
    assert not watched.looks(60, heard=False)
    assert not watched.looks(15)
    assert watched.looks(2)


@pytest.mark.parametrize(("lease_seconds", "seconds"), [(2, 0.5), (15, 2), (60, 2), (3600, 2)])
def test_a_last_word_is_noticed_one_pass_late_and_its_silence_another(lease_seconds: int, seconds: float) -> None:
    """Rescue takes a lease and 5 s at most, however long the lease is."""
    assert pass_seconds(timedelta(seconds=lease_seconds)) == seconds
