"""
The spool: files that keep what the database would not take, until it does.

It must survive a process that dies at any instruction and a machine that loses power. So an entry is written
to a hidden file, synced, renamed into place, and the directory synced; only then does it count. It is removed
after the database has committed what it says, so it may be found again afterwards: whoever applies it must
recognise that. A file is sealed with the key of the tokens. One that cannot be opened with that key is kept
aside (`.corrupt`) and reported; one that was sealed with another key waits where it is for its key, and one that
cannot be read at all for whoever lets it be read. What has an entry's name and is no file (a FIFO, a link, a
device, a directory), or is longer than any entry, is kept aside without being opened: it holds up no other.

The directory may be shared by replicas or be each one's own; `id`, a file in it, says which.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

import structlog

from bon_scheduler.files import OWNER_ONLY, WrongFileError, read_file
from bon_scheduler.shaam.cipher import TokenCipher, UnreadableTokenError

__all__ = ["Spool", "SpoolCounts", "count_files"]

log = structlog.get_logger()
MAGIC = "bon-spool-1"
ENTRY, HALF, CORRUPT = ".entry", ".half", ".corrupt"
ID_FILE = ".spool-id"
MOST_BYTES = 4 * 1024 * 1024
"""Many times what the longest answer of the authority takes, sealed."""


@dataclass(frozen=True, slots=True)
class SpoolCounts:
    """How many entries wait in a spool, and how many files were put aside as unreadable."""

    waiting: int
    corrupt: int


class Spool:
    """Entries of text in a directory; blocking, so that it is used from a thread."""

    def __init__(self, directory: Path, cipher: TokenCipher) -> None:
        self._directory = directory
        self._cipher = cipher
        self._reported: set[str] = set()
        self.blind = False
        """Whether there are entries that could not be read at the last look: nobody knows whose they are."""
        self.id = _identify(directory)

    def write(self, text: str) -> None:
        """Keep an entry. When this returns it survives a loss of power. Raises OSError."""
        name = uuid4().hex
        half = self._directory / f".{name}{HALF}"
        content = f"{MAGIC} {self._cipher.key_id} {self._cipher.encrypt(text)}\n".encode()
        _write_synced(half, content)
        half.rename(self._directory / f"{name}{ENTRY}")
        _sync_directory(self._directory)

    def entries(self) -> Iterator[tuple[Path, str]]:
        """
        Yield each entry that can be opened, oldest first.

        Also one whose writer died before it was renamed, if it is whole: nobody else knows what it says.
        """
        blind = False
        for path in sorted(self._paths(), key=_age):
            try:
                text = self._open(path)
            except OSError as error:
                blind = True
                self._report("spool.unreadable", path, error.strerror or type(error).__name__)
                continue
            if text is not None:
                yield path, text
        self.blind = blind

    def remove(self, path: Path) -> None:
        """Forget an entry whose content is committed elsewhere; another replica may have done so."""
        path.unlink(missing_ok=True)
        _sync_directory(self._directory)

    def put_aside(self, path: Path, reason: str) -> None:
        """Keep what nobody can use for a person to look at."""
        try:
            kept = _put_aside(path)
        except OSError as error:
            self._report("spool.corrupt", path, f"{reason}; and it cannot be kept aside ({error.strerror})")
        else:
            log.error("spool.corrupt", file=kept.name, reason=reason)

    def _paths(self) -> list[Path]:
        return [path for path in self._directory.iterdir() if path.suffix in {ENTRY, HALF}]

    def _open(self, path: Path) -> str | None:
        try:
            words = read_file(path, MOST_BYTES).decode("ascii", "replace").split()
        except FileNotFoundError:
            return None  # another replica was faster
        except WrongFileError as error:
            self.put_aside(path, str(error))
            return None
        match words:
            case [magic, key_id, _] if magic == MAGIC and key_id != self._cipher.key_id:
                self._report("spool.foreign", path, "sealed with another SHAAM_ENCRYPTION_KEY")
                return None
            case [magic, _, sealed] if magic == MAGIC:
                reason = "it is damaged"
                with suppress(UnreadableTokenError):
                    return self._cipher.decrypt(sealed)
            case _:
                reason = "it is not an entry"
        if path.suffix == ENTRY:  # a half one may still be being written
            self.put_aside(path, reason)
        return None

    def _report(self, event: str, path: Path, reason: str) -> None:
        if path.name not in self._reported:
            self._reported.add(path.name)
            log.error(event, file=path.name, reason=reason)


def count_files(directory: Path) -> SpoolCounts:
    """Count what waits, and what was put aside."""
    suffixes = [path.suffix for path in directory.iterdir()]
    return SpoolCounts(suffixes.count(ENTRY), suffixes.count(CORRUPT))


def _identify(directory: Path) -> UUID:
    """Read the directory's identity; the first to come gives it one."""
    path = directory / ID_FILE
    try:
        return _read_id(path)
    except FileNotFoundError:
        pass
    except (WrongFileError, ValueError):
        with suppress(FileNotFoundError):  # another replica was faster
            kept = _put_aside(path)
            # Intents that name the old identity wait for as long as for a replica that is not there.
            log.error("spool.corrupt", file=kept.name, reason="it is not the spool's identity")  # noqa: TRY400 - expected
    half = directory / f".{uuid4().hex}.new"
    _write_synced(half, str(uuid4()).encode())
    try:
        # Linked, not renamed: of two that come at once, the second must not replace what the first has read.
        path.hardlink_to(half)
    except FileExistsError:
        pass
    finally:
        half.unlink()
    _sync_directory(directory)
    return _read_id(path)


def _read_id(path: Path) -> UUID:
    """Read the identity. Raises FileNotFoundError, WrongFileError, and ValueError for what is none."""
    return UUID(read_file(path, MOST_BYTES).decode("ascii").strip())


def _put_aside(path: Path) -> Path:
    """Rename what cannot be used so that nothing is in its way, whatever it is."""
    return path.rename(path.with_name(f"{path.stem}-{uuid4().hex[:8]}{CORRUPT}"))


def _age(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _write_synced(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
