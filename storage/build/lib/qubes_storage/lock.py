"""Locks of volumes, between threads and between processes.

All volumes of a pool share one lock file; each has one byte of it, chosen by a hash
of its id.  The locks belong to the open file (``F_OFD_SETLK``), so two threads exclude
each other as two processes do, and the kernel drops them when a process dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
import time
from typing import TYPE_CHECKING

from qubes_storage import files

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = [
    "LOCK_FILE",
    "LOCK_TIMEOUT",
    "hold",
    "is_locked",
    "is_marked",
    "mark_if_empty",
    "open_lock_file",
    "try_lock",
    "unlock",
]

#: Name of the lock file in the directory of a pool.
LOCK_FILE = ".lock"

#: Seconds that another process may work on a volume while we wait.
LOCK_TIMEOUT = 300.0

_POLL_INTERVAL = 0.02

#: What the lock file holds in a directory that was empty when a pool got it.
_MARK = b"All files here were made by qubes_storage.\n"


@contextlib.contextmanager
def hold(
    directory: Path,
    *,
    write: Iterable[str] = (),
    read: Iterable[str] = (),
    timeout: float = LOCK_TIMEOUT,
) -> Iterator[None]:
    """Hold the locks of some volumes of the pool in `directory`.

    :param write: ids of volumes that nobody else may read or write meanwhile.
    :param read: ids of volumes that nobody else may write meanwhile.
    :param timeout: seconds to wait for each.
    :raise TimeoutError: when somebody else held one for that long.
    """
    kinds = {_byte_of(vid): fcntl.F_RDLCK for vid in read}
    kinds |= {_byte_of(vid): fcntl.F_WRLCK for vid in write}
    fd = open_lock_file(directory)
    try:
        # In one order for everybody, or two holders could wait for each other.
        for byte in sorted(kinds):
            _lock_byte(fd, byte, kinds[byte], timeout)
        yield
    finally:
        os.close(fd)


def open_lock_file(directory: Path) -> int:
    """Return a descriptor of a pool's lock file, which is made if it is not there."""
    path = directory / LOCK_FILE
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def mark_if_empty(directory: Path) -> bool:
    """Make the lock file of an empty directory, and say in it that all there is ours.

    :return: whether that was done.
    :raise OSError: when it cannot be made.
    """
    if any(directory.iterdir()):
        return False
    path = directory / LOCK_FILE
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except FileExistsError:
        # never replaced: somebody may hold locks on it by now
        return False
    try:
        os.write(fd, _MARK)
        os.fsync(fd)
    finally:
        os.close(fd)
    return True


def is_marked(directory: Path) -> bool:
    """Tell whether all files in a pool's directory are ours; see `mark_if_empty`."""
    try:
        with files.open_image(directory / LOCK_FILE) as fd:
            return os.pread(fd, len(_MARK), 0) == _MARK
    except FileNotFoundError:
        return False


def try_lock(fd: int, subject: str, *, shared: bool = False) -> bool:
    """Lock a subject's byte through the lock file `fd`, until that is closed.

    :return: False when somebody else's lock is in the way.
    """
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    return _try_lock(fd, _request(_byte_of(subject), kind))


def unlock(fd: int, subject: str) -> None:
    """Undo `try_lock`."""
    _try_lock(fd, _request(_byte_of(subject), fcntl.F_UNLCK))


def is_locked(fd: int, subject: str) -> bool:
    """Tell whether a lock on a subject, not made through `fd`, exists."""
    request = _request(_byte_of(subject), fcntl.F_WRLCK)
    (kind,) = struct.unpack_from("h", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request))
    return bool(kind != fcntl.F_UNLCK)


def _byte_of(subject: str) -> int:
    digest = hashlib.blake2b(subject.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2  # an offset must stay below 2**63


def _request(byte: int, kind: int) -> bytes:
    # struct flock: type, whence, start, length, pid (zero for this kind of lock).
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)


def _lock_byte(fd: int, byte: int, kind: int, timeout: float) -> None:
    request = _request(byte, kind)
    deadline = time.monotonic() + timeout
    while not _try_lock(fd, request):
        if time.monotonic() >= deadline:
            raise TimeoutError
        time.sleep(_POLL_INTERVAL)


def _try_lock(fd: int, request: bytes) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            return False
        raise
    return True
