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

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["LOCK_FILE", "LOCK_TIMEOUT", "hold"]

#: Name of the lock file in the directory of a pool.
LOCK_FILE = ".lock"

#: Seconds that another process may work on a volume while we wait.
LOCK_TIMEOUT = 300.0

_POLL_INTERVAL = 0.02


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
    path = directory / LOCK_FILE
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        # In one order for everybody, or two holders could wait for each other.
        for byte in sorted(kinds):
            _lock_byte(fd, byte, kinds[byte], timeout)
        yield
    finally:
        os.close(fd)


def _byte_of(vid: str) -> int:
    digest = hashlib.blake2b(vid.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2  # an offset must stay below 2**63


def _lock_byte(fd: int, byte: int, kind: int, timeout: float) -> None:
    # struct flock: type, whence, start, length, pid (zero for this kind of lock).
    request = struct.pack("hhqqi", kind, os.SEEK_SET, byte, 1, 0)
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
