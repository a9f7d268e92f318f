"""
Files that nobody else may read, in directories that nobody else may write.

A directory is opened once and judged as it was opened, and files are named within what was opened: whoever changes
the path meanwhile changes nothing. No link is followed. A file is made beside its name and renamed over it, so that
what was there before, a link for instance, is replaced and not written to.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

__all__ = [
    "OWNER_ONLY",
    "WrongFileError",
    "fault_of_shared_directory",
    "open_private_directory",
    "read_file",
    "write_private",
]

OWNER_ONLY = 0o600
DIRECTORY_OWNER_ONLY = 0o700
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class WrongFileError(Exception):
    """What has a file's name is none, or larger than any that was written; the message says which."""


def open_private_directory(path: Path) -> int:
    """
    Return a descriptor of a directory that is ours alone to write, made (mode 0700) with its parents if need be.

    Raises ValueError for one that others may write or that is somebody else's, and OSError, also for a link.
    """
    _make(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid():
        what = "belongs to another user"
    elif found.st_mode & OTHERS_MAY_WRITE:
        what = "may be written by others"
    else:
        return descriptor
    os.close(descriptor)
    raise ValueError(what)


def _make(path: Path) -> None:
    """Make a directory and the parents it lacks, each for its owner alone (`mkdir` asks that of the last one only)."""
    if not path.parent.exists():
        _make(path.parent)
    with suppress(FileExistsError):
        path.mkdir(DIRECTORY_OWNER_ONLY)


def write_private(directory: int, name: str, content: bytes) -> None:
    """Write a file (mode 0600) in the opened directory, in place of what has that name. Raises OSError."""
    half = f".{uuid4().hex}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(half, flags, OWNER_ONLY, dir_fd=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.rename(half, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.unlink(half, dir_fd=directory)
        raise


def read_file(path: Path, most_bytes: int) -> bytes:
    """
    Return what is in a file, without waiting for anybody.

    Raises WrongFileError for what is not a regular file, is a link, or is longer; and OSError.
    """
    _require_file(path.lstat())  # BEFORE it is opened: opening a device may do something
    # A FIFO that was put there since does not block; a link that was is an OSError.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        _require_file(os.fstat(descriptor))
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise WrongFileError(f"it is longer than {most_bytes:,} bytes")
    return content


def _require_file(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise WrongFileError(f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}")


def fault_of_shared_directory(path: Path) -> str | None:
    """
    Return what is wrong with a directory that replicas may share, or None.

    It must belong to this user or root, and be writable by no more than a group this process is in: so are the
    volumes that Kubernetes mounts with `fsGroup` (root's, 2770 or 2775).
    """
    found = path.stat()
    if found.st_uid not in {os.geteuid(), 0}:
        return "must belong to the user this process runs as, or to root; chown it"
    if found.st_mode & stat.S_IWOTH:
        return "must not be writable by everybody; chmod o-w it, or make a directory with mode 0700 in it"
    if found.st_mode & stat.S_IWGRP and found.st_gid not in {os.getegid(), *os.getgroups()}:
        return "must not be writable by a group this process is not in; chmod g-w it, or mount it with that fsGroup"
    return None
