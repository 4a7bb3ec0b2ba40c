"""Files that are complete or absent: temporary names, durable renames, hard links.

A file that takes a while to make is made under a temporary name in the same directory
(``NAME~`` and eight hex digits) and renamed.  Whatever happens in between, the name
shows the old file or the new one; what an interrupted operation leaves is recognised
by its name.

What is durable gets to the disk in this order: the contents (fsync of the file), the
name (rename, atomic), then the directory (fsync of it).  A rename does not wait for the
contents of its file, and fsync(2) of a file says nothing of its name: "for that an
explicit fsync() on a file descriptor for the directory is also needed".  Without the
first, a power cut can leave a name for an empty file; without the last, the old file
after the caller was told of the new one.

To remove a large file takes as long as to clone it, so where somebody waits it is only
given up: renamed to ``NAME~``, eight hex digits and ``.removed``.  No one uses a file
of such a name, and anyone may remove it at any time.

Everything that changes a name is logged at INFO.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "GIVEN_UP",
    "TEMPORARY",
    "empty",
    "fsync",
    "give_up",
    "given_up_name",
    "is_origin",
    "link",
    "make_directories",
    "mark_origin",
    "new_file",
    "open_image",
    "remove",
    "rename",
    "replace_with_link",
    "same_image",
    "scratch_file",
    "stat_image",
]

log = logging.getLogger(__name__)

#: The extended attribute by which a copy names the image that it was made of.
_ORIGIN = "user.qubes.origin"

#: What a temporary name ends in.
TEMPORARY = re.compile(r"~[0-9a-f]{8}\Z")

#: What the name of a file that only waits for its removal ends in.
GIVEN_UP = re.compile(r"~[0-9a-f]{8}\.removed\Z")


def stat_image(path: Path) -> os.stat_result | None:
    """Return the status of a regular file, None when there is nothing.

    :raise OSError: EMEDIUMTYPE when something else is there, a link for instance.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    _check_regular(status, path)
    return status


def same_image(one: Path, other: Path) -> bool:
    """Tell whether both names exist and mean the same file."""
    first, second = stat_image(one), stat_image(other)
    return bool(first and second and os.path.samestat(first, second))


def mark_origin(copy: int, image: os.stat_result) -> None:
    """Write down in a file which image it is a copy of, where it cannot be a link.

    :param copy: descriptor of the file.
    :param image: status of the image, which never changes.
    :raise OSError: as the operating system says.
    """
    os.setxattr(copy, _ORIGIN, _identity(image))


def is_origin(path: Path, image: Path) -> bool:
    """Tell whether `path` is a second name of an image, or a copy marked as its own."""
    found, wanted = stat_image(path), stat_image(image)
    if found is None or wanted is None:
        return False
    if os.path.samestat(found, wanted):
        return True
    try:
        return os.getxattr(path, _ORIGIN) == _identity(wanted)
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.EOPNOTSUPP}:
            return False
        raise


def _identity(image: os.stat_result) -> bytes:
    # The number of a removed file is given again, so its time belongs to it. The
    # number of the device does not: btrfs gives it anew at each mount.
    return f"{image.st_ino} {image.st_mtime_ns}".encode()


@contextlib.contextmanager
def open_image(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Yield a file descriptor of a regular file, never of anything else.

    :raise OSError: EMEDIUMTYPE when something else is there.
    """
    # Looked at before, as to open a device may do something to it, and after, as it may
    # be another one by then. O_NONBLOCK: a FIFO without a writer must not hang us.
    stat_image(path)
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(fd), path)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def new_file(path: Path, *, durable: bool = True) -> Iterator[int]:
    """Yield a descriptor of an empty file that becomes `path`, replacing what is there.

    When the block raises, `path` is as it was and nothing is left.

    :param durable: whether the file must survive a power cut once this returns.
    """
    temporary = _temporary_name(path)
    fd = _create(temporary)
    try:
        try:
            yield fd
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        rename(temporary, path, durable=durable)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def scratch_file(path: Path) -> Iterator[int]:
    """Yield a descriptor of an empty file, named after `path`, that goes away."""
    temporary = _temporary_name(path)
    fd = _create(temporary)
    try:
        yield fd
    finally:
        os.close(fd)
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Bring a file's content, or a directory's names, to the disk.

    :raise OSError: also for a write-back that failed before, if nobody was told yet: a
        new descriptor sees that (errseq_sample() in the kernel's lib/errseq.c).
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(source: Path, target: Path, *, durable: bool = True) -> None:
    """Rename within a directory, replacing `target`."""
    source.rename(target)
    log.info("renamed %s to %s", source, target)
    if durable:
        fsync(target.parent)


def link(source: Path, target: Path) -> None:
    """Make `target` a second name of the file `source`."""
    os.link(source, target, follow_symlinks=False)
    log.info("linked %s to %s", source, target)


def replace_with_link(source: Path, target: Path, *, durable: bool = True) -> None:
    """Make `target` a second name of `source`, replacing it in one step."""
    # rename(2) of two names of one file does nothing, successfully, and would leave the
    # temporary. link(2) cannot replace a name, hence the detour.
    if same_image(source, target):
        return
    temporary = _temporary_name(target)
    link(source, temporary)
    try:
        rename(temporary, target, durable=durable)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove a regular file; no error when there is nothing.

    :raise OSError: EMEDIUMTYPE when something else is there.
    """
    if stat_image(path) is None:
        return
    path.unlink(missing_ok=True)
    log.info("removed %s", path)


def empty(path: Path) -> None:
    """Free all that a regular file occupies.

    :raise OSError: ENOENT when there is none, EMEDIUMTYPE when it is something else.
    """
    with open_image(path, os.O_RDWR) as image:
        os.ftruncate(image, 0)


def give_up(path: Path) -> bool:
    """Rename a regular file so that it is as good as removed, whatever its size.

    :return: whether there was one.
    :raise OSError: EMEDIUMTYPE when something else is there.
    """
    if stat_image(path) is None:
        return False
    # Without an fsync: if a power cut brings the name back, no harm is done. The next
    # start gives it up anew, or it is a revision more than was to be kept.
    rename(path, given_up_name(path), durable=False)
    return True


def given_up_name(path: Path) -> Path:
    """Return a new name for a file that is given up."""
    return path.with_name(f"{TEMPORARY.sub('', path.name)}{_unique()}.removed")


def make_directories(path: Path) -> None:
    """Make a directory and its parents, for the owner only, durably."""
    if path.is_dir():
        return
    make_directories(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
        fsync(path.parent)


def _temporary_name(path: Path) -> Path:
    return path.with_name(path.name + _unique())


def _unique() -> str:
    return f"~{secrets.token_hex(4)}"


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _check_regular(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EMEDIUMTYPE, "not a regular file", str(path))
