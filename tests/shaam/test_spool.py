"""The spool: what is kept survives, what is damaged is reported and kept aside, what is another's waits."""

import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from bon_scheduler.shaam.cipher import TokenCipher
from bon_scheduler.shaam.spool import Spool, SpoolCounts, count_files

CIPHER = TokenCipher("00" * 32)
NOBODY = 65534


def texts(spool: Spool) -> list[str]:
    return [text for _, text in spool.entries()]


@contextmanager
def as_nobody(directory: Path, *others: Path) -> Iterator[None]:
    """Be a user who may not read everything, and whose the directory is with all in it but `others`."""
    if os.geteuid() != 0:
        yield
        return
    for path in {directory, *directory.iterdir()} - {*others}:
        os.chown(path, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def only_entry(directory: Path) -> Path:
    (path,) = directory.glob("*.entry")
    return path


def test_what_is_written_is_found_again_by_the_next_process(tmp_path: Path) -> None:
    Spool(tmp_path, CIPHER).write("some tokens")
    spool = Spool(tmp_path, CIPHER)
    assert texts(spool) == ["some tokens"]
    ((path, _),) = spool.entries()
    spool.remove(path)
    assert texts(spool) == []


def test_entries_are_sealed_and_nobody_elses_to_read(tmp_path: Path) -> None:
    Spool(tmp_path, CIPHER).write("some tokens")
    path = only_entry(tmp_path)
    assert "some tokens" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_everything_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before it is renamed, the directory after."""
    synced: list[str] = []
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
    )
    spool = Spool(tmp_path, CIPHER)
    synced.clear()
    spool.write("some tokens")
    assert synced == [f".{only_entry(tmp_path).stem}.half", tmp_path.name]


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda _: "", lambda _: "bon-spool-1 x", lambda _: "?"])
def test_a_corrupt_entry_is_kept_aside_and_reported_once(
    tmp_path: Path, logged: Callable[[], str], damage: Callable[[str], str]
) -> None:
    spool = Spool(tmp_path, CIPHER)
    spool.write("some tokens")
    path = only_entry(tmp_path)
    path.write_text(damage(path.read_text()))
    spool.write("others")
    assert texts(spool) == texts(spool) == ["others"]
    assert count_files(tmp_path) == SpoolCounts(waiting=1, corrupt=1)
    assert logged().count("spool.corrupt") == 1


def test_an_entry_of_another_key_waits_for_its_key(tmp_path: Path, logged: Callable[[], str]) -> None:
    Spool(tmp_path, TokenCipher("11" * 32)).write("some tokens")
    spool = Spool(tmp_path, CIPHER)
    assert texts(spool) == texts(spool) == []
    assert logged().count("spool.foreign") == 1
    assert texts(Spool(tmp_path, TokenCipher("11" * 32))) == ["some tokens"]


def test_an_entry_that_cannot_be_read_holds_up_no_other_and_is_reported_once(logged: Callable[[], str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        spool = Spool(directory, CIPHER)
        spool.write("some tokens")
        locked = directory / "x.entry"
        locked.write_text("of somebody else")
        locked.chmod(0)
        with as_nobody(directory, locked):
            assert texts(spool) == texts(spool) == ["some tokens"]
        assert spool.blind
        assert logged().count("spool.unreadable") == 1
        locked.unlink()
        assert texts(spool) == ["some tokens"]
        assert not spool.blind


def plant_socket(path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(path))


def plant_huge_file(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


PLANTED: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a directory": lambda path: (path / "full").mkdir(parents=True),
    "a link": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a socket": plant_socket,
    "a file that is huge": plant_huge_file,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["x.entry", ".x.half"])
@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_no_entry_is_kept_aside_unopened_and_holds_up_none(
    tmp_path: Path, logged: Callable[[], str], name: str, kind: str
) -> None:
    spool = Spool(tmp_path, CIPHER)
    spool.write("some tokens")
    PLANTED[kind](tmp_path / name)
    assert texts(spool) == texts(spool) == ["some tokens"]
    assert not spool.blind
    assert logged().count("spool.corrupt") == 1
    assert count_files(tmp_path).corrupt == 1


def test_two_of_one_name_are_both_kept_aside(tmp_path: Path) -> None:
    spool = Spool(tmp_path, CIPHER)
    spool.write("some tokens")
    (tmp_path / "x.corrupt" / "full").mkdir(parents=True)
    for _ in range(2):
        (tmp_path / "x.entry").write_text("?")
        assert texts(spool) == ["some tokens"]
    assert count_files(tmp_path).corrupt == 3


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", PLANTED)
def test_an_identity_that_is_none_is_kept_aside_and_made_anew(
    tmp_path: Path, logged: Callable[[], str], kind: str
) -> None:
    Spool(tmp_path, CIPHER).write("some tokens")
    (tmp_path / ".spool-id").unlink()
    PLANTED[kind](tmp_path / ".spool-id")
    spool = Spool(tmp_path, CIPHER)
    assert texts(spool) == ["some tokens"]
    assert Spool(tmp_path, CIPHER).id == spool.id
    assert logged().count("spool.corrupt") == 1


def test_an_identity_that_cannot_be_read_as_one_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / ".spool-id").write_bytes(b"\xff no identity")
    assert Spool(tmp_path, CIPHER).id == Spool(tmp_path, CIPHER).id


def test_an_entry_whose_writer_died_before_it_was_renamed_counts_if_it_is_whole(tmp_path: Path) -> None:
    spool = Spool(tmp_path, CIPHER)
    spool.write("some tokens")
    half = only_entry(tmp_path).rename(tmp_path / ".x.half")
    assert texts(spool) == ["some tokens"]
    half.write_text(half.read_text()[:40])
    assert texts(spool) == []
    assert half.exists()  # it may still be being written


def test_an_entry_that_another_replica_has_removed_is_no_error(tmp_path: Path) -> None:
    spool = Spool(tmp_path, CIPHER)
    spool.write("some tokens")
    ((path, _),) = spool.entries()
    spool.remove(path)
    spool.remove(path)


def test_a_directory_has_one_identity_for_all(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert Spool(one, CIPHER).id == Spool(one, TokenCipher("11" * 32)).id != Spool(two, CIPHER).id
