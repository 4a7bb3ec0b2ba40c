"""The record of what a cache entry held when it was made, to notice changes.

A file counts as unchanged if its size and its time of change are those that were
recorded. If only the time differs, as after a copy or an unpacked archive, its data is
compared by a digest, and the time put back, so that it is read once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["damage", "data_digest", "last_use", "note_use", "record"]

#: In the directory itself; its time of change is that of the last use. (That of the
#: directory stays that of its making: the jobs of CI systems tell new ones by it.)
_RECORD: Final = ".contents"
#: Python makes and replaces what is in it as it likes.
_IGNORED: Final = "__pycache__"
_BLOCK: Final = 1 << 20


def record(directory: Path) -> None:
    """Write down what a directory holds. Blocking: all data is read, but for holes."""
    found = {
        str(path.relative_to(directory)): [
            (status := path.stat()).st_size,
            status.st_mtime_ns,
            _digest(path, status.st_size),
        ]
        for path in _files(directory)
    }
    # names that are no UTF-8 come as escapes, and so return
    (directory / _RECORD).write_text(json.dumps(found))


def damage(directory: Path) -> str | None:
    """Return what is wrong with a directory, None if it is as it was recorded.

    Blocking, for a few milliseconds. One without a record is of no use: it would be
    unknown when that was used last, and the first to go when the cache is full.

    :raise OSError: it cannot be looked at, which says nothing about it: for lack of
        descriptors, for instance.
    """
    try:
        found = json.loads((directory / _RECORD).read_text())
        for name, (size, changed, digest) in found.items():
            if problem := _difference(directory / name, size, changed, digest):
                return f"{name} {problem}"
    except FileNotFoundError:
        return f"{_RECORD} is missing"
    except (ValueError, TypeError, AttributeError):
        return f"{_RECORD} cannot be read"
    return None


def data_digest(path: Path) -> str:
    """Return a digest of a file's data, which differs for other data. Blocking.

    That of an entry's file is the one that was recorded.
    """
    with contextlib.suppress(FileNotFoundError):
        recorded = json.loads((path.parent / _RECORD).read_text()).get(path.name)
        if recorded is not None:
            return str(recorded[-1])
    return _digest(path, path.stat().st_size)


def note_use(directory: Path) -> None:
    """Write down that a directory is used now."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(directory / _RECORD)


def last_use(directory: Path) -> float:
    """Return when a directory was used last, seconds since the epoch; 0 for never.

    That is so without a record: it is half made, or another process has dropped it.
    """
    with contextlib.suppress(FileNotFoundError):
        return (directory / _RECORD).stat().st_mtime
    return 0.0


def _difference(path: Path, size: int, changed: int, digest: str) -> str | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "is gone"
    if status.st_size != size:
        return f"has {status.st_size} bytes in place of {size}"
    if status.st_mtime_ns == changed:
        return None
    if _digest(path, size) != digest:
        return "has other data"
    # the data is the same: the next look need not read it all again
    os.utime(path, ns=(status.st_atime_ns, changed))
    return None


def _files(directory: Path) -> Iterator[Path]:
    for place, names, files in os.walk(directory):
        names[:] = [name for name in names if name != _IGNORED]
        for path in (Path(place, name) for name in files):
            if path.is_file() and not path.is_symlink():
                yield path


def _digest(path: Path, size: int) -> str:
    """Return a digest of a file's data, for which a hole is what zeros are."""
    total = hashlib.blake2b(digest_size=20)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for position in _data(descriptor, size):
            block = os.pread(descriptor, _BLOCK, position)
            if block != bytes(len(block)):
                total.update(position.to_bytes(8, "big") + block)
    finally:
        os.close(descriptor)
    return total.hexdigest()


def _data(descriptor: int, size: int) -> Iterator[int]:
    """Yield where blocks begin that are not in a hole."""
    position = 0
    while position < size:
        try:
            data = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        position = max(position, data - data % _BLOCK)
        yield position
        position += _BLOCK
