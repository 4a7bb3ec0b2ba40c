"""Copies of files that share their extents, or else their holes.

FICLONE (ioctl_ficlone(2)) makes one file share another's extents: no data is copied,
and the first write to either unshares what it touches.  btrfs and XFS have it.  Both
calls of it are in this module, and what their callers rely on is:

- A clone is of one moment, even while somebody writes ("clones are atomic with
  regards to concurrent writes").  Nobody writes to a committed image anyway.
- It is not on the disk when the call returns; an fsync of the target brings it there.
- The target grows extent by extent and has its size in step with them, also on the
  disk.  So a clone that a crash or a power cut left incomplete is *shorter* than its
  source, and is recognised without reading it.  The tests of power cuts hold btrfs and
  XFS to that; a copy has no such sign, and needs its fsync before it gets its name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import struct
from typing import TYPE_CHECKING

from qubes_storage import files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = [
    "FICLONE",
    "clone",
    "clone_in_slices",
    "clone_or_copy",
    "copy_sparse",
    "data_extents",
    "places_of_data",
    "remove_leftovers",
    "supports_reflink",
]

# _IOW('f', 9, int); these architectures encode the direction in other bits.
_OTHER_ENCODING = ("ppc", "mips", "sparc", "alpha")
_WRITE = 0x80000000 if platform.machine().startswith(_OTHER_ENCODING) else 0x40000000
FICLONE = _WRITE | 0x00049409
_FICLONERANGE = _WRITE | 0x0020940D  # _IOW('f', 13, struct file_clone_range)

#: Bytes that `clone_in_slices` clones at a time: a few milliseconds' work even where
#: an image is fragmented.
SLICE = 16 * 1024**2

#: _IOWR('f', 11, struct fiemap), in both encodings, and its parts; linux/fiemap.h.
_FIEMAP = 0xC020660B
_FIEMAP_HEAD = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQ16xI12x")
_FIEMAP_SYNC = 1
_FIEMAP_COUNT = 512
_LAST = 1
#: LAST, MERGED and SHARED say nothing of where the data are. Every other flag does:
#: they are nowhere yet, encoded, among other data, or count as zeros where they lie.
_HARMLESS = _LAST | 0x1000 | 0x2000

_CHECK = ".reflink-check"

# Which one a filesystem without reflinks answers with is its own choice: EBADF, EINVAL
# and EOPNOTSUPP are in ioctl_ficlone(2), ENOTTY is that of one without such calls.
# Anything else (ETXTBSY, EISDIR, ENOSPC, EIO) is a failure, not a lack of support.
_NOT_SUPPORTED = frozenset(
    {errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY}
)


def clone(source: int, target: int) -> bool:
    """Have file descriptor `target` share all extents of `source`.

    :return: whether that worked; False where the filesystem has no such thing or
        the two are on different filesystems.
    :raise OSError: for any other failure.
    """
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return False
        raise
    return True


def clone_in_slices(source: int, target: int, go_on: Callable[[], bool]) -> bool:
    """Have the empty `target` share all extents of `source`, a slice at a time.

    The target has its full size only when all is done.

    :param go_on: asked before each slice; nothing more is cloned once it says no.
    :return: whether it came to the end.
    :raise OSError: for any failure, also where extents cannot be shared.
    """
    size = os.fstat(source).st_size
    position = _next_slice(source, 0, size)
    while position < size:
        if not go_on():
            return False
        # Ranges must be multiples of the filesystem's block, but for one that goes to
        # the end: that is a length of 0, as the size need not be such a multiple.
        length = SLICE if position + SLICE < size else 0
        request = struct.pack("qQQQ", source, position, length, position)
        fcntl.ioctl(target, _FICLONERANGE, request)
        position = _next_slice(source, position + SLICE, size)
    # Of use where the source ends in a hole; until here it is shorter, so not whole.
    os.ftruncate(target, size)
    return True


def data_extents(fd: int) -> Iterator[tuple[int, int]]:
    """Yield where each stretch of a file's data begins and ends, in bytes.

    The rest is holes (lseek(2)); a filesystem that knows of none has one stretch, and
    so has a block device.

    :raise OSError: as the operating system says.
    """
    size, end = os.lseek(fd, 0, os.SEEK_END), 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno != errno.EINVAL:
                raise
            start, end = end, size  # what block devices answer
        yield start, end


def places_of_data(fd: int) -> list[tuple[int, int, int]] | None:
    """Return where on the disk a file's data are: offset, place and length, in bytes.

    Two files on one filesystem whose data are in the same places hold the same, until
    one of them is written to: shared extents are never overwritten.

    :return: None where the filesystem cannot tell, or not with certainty.
    """
    found: list[tuple[int, int, int]] = []
    start = 0
    while True:
        request = bytearray(_FIEMAP_HEAD.size + _FIEMAP_COUNT * _FIEMAP_EXTENT.size)
        length = (1 << 64) - 1 - start
        _FIEMAP_HEAD.pack_into(
            request, 0, start, length, _FIEMAP_SYNC, 0, _FIEMAP_COUNT, 0
        )
        try:
            fcntl.ioctl(fd, _FIEMAP, request)
        except OSError:
            return None
        count = _FIEMAP_HEAD.unpack_from(request)[3]
        if count == 0:
            return found
        for number in range(count):
            place = _FIEMAP_HEAD.size + number * _FIEMAP_EXTENT.size
            logical, physical, size, flags = _FIEMAP_EXTENT.unpack_from(request, place)
            if flags & ~_HARMLESS:
                return None
            # One extent may be told in pieces, cut otherwise in each file.
            if found and found[-1][:2] == (
                logical - found[-1][2],
                physical - found[-1][2],
            ):
                logical, physical, before = found.pop()
                size += before
            found.append((logical, physical, size))
        if flags & _LAST:
            return found
        start = logical + size


def copy_sparse(source: int, target: int) -> None:
    """Copy what is not a hole from file descriptor `source` to the empty `target`.

    :param source: of a file or a block device, whose size its status does not tell.
    :raise OSError: as the operating system says.
    """
    os.ftruncate(target, os.lseek(source, 0, os.SEEK_END))
    for position, end in data_extents(source):
        os.lseek(target, position, os.SEEK_SET)
        while position < end:
            copied = os.sendfile(target, source, position, end - position)
            if not copied:  # truncated meanwhile
                return
            position += copied  # noqa: PLW2901 - what is left of this stretch


def clone_or_copy(source: int, target: int) -> bool:
    """Clone `source` to the empty `target`; copy sparsely where that cannot be.

    :return: whether extents are shared.
    :raise OSError: as the operating system says.
    """
    if clone(source, target):
        return True
    copy_sparse(source, target)
    return False


def supports_reflink(directory: Path) -> bool:
    """Tell by trying whether files in `directory` can share extents.

    :raise OSError: when files cannot be made there.
    """
    path = directory / _CHECK
    with files.scratch_file(path) as source, files.scratch_file(path) as target:
        os.write(source, b"\0" * 4096)
        return clone(source, target)


def remove_leftovers(directory: Path) -> None:
    """Remove what an interrupted `supports_reflink` left in `directory`.

    :raise OSError: as the operating system says.
    """
    for path in directory.glob(f"{_CHECK}~*"):
        if files.TEMPORARY.search(path.name):
            files.remove(path)


def _next_slice(fd: int, position: int, size: int) -> int:
    """Return where the slice with the next data begins."""
    try:
        return os.lseek(fd, position, os.SEEK_DATA) // SLICE * SLICE
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        raise
