"""Filesystems in image files: made, mounted over a loop device, taken down again.

A thin layer over btrfs-progs, xfsprogs, e2fsprogs and mount.  What a tool says on its
standard error is in the `CommandError`.
"""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Self

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.host.command import CommandError, run
from qubes_itests.host.loop import LoopDevice
from qubes_itests.program import typed

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "FilesystemType",
    "LoopFilesystem",
    "create_subvolume",
    "is_mounted",
    "make_ext4",
    "make_filesystem",
    "mount",
    "mount_tmpfs",
    "remove_tree",
    "unmount",
]

_MIB = 1024 * 1024
#: Of the root of each btrfs subvolume: BTRFS_FIRST_FREE_OBJECTID.
_SUBVOLUME_INODE = 256


class FilesystemType(enum.Enum):
    """The filesystems that an image can have."""

    BTRFS = "btrfs"
    XFS = "xfs"
    #: XFS made without reflinks, as those of older machines are.
    XFS_NO_REFLINK = "xfs_no_reflink"
    EXT4 = "ext4"

    @property
    def minimum_size(self) -> int:
        """The smallest image that it fits in, journal included, bytes."""
        return _MINIMUM_SIZE[self]


_MINIMUM_SIZE = {
    FilesystemType.BTRFS: 128 * _MIB,
    FilesystemType.XFS: 300 * _MIB,
    FilesystemType.XFS_NO_REFLINK: 300 * _MIB,
    # mke2fs makes one of 1 MiB without a journal: it survives no power cut
    FilesystemType.EXT4: 8 * _MIB,
}

#: MiB that the smallest of new filesystems take of a disk, and some.
_ROOM = 16

# Images are sparse and new: there is nothing to discard.  A small btrfs with a single
# copy of its metadata has so little room for it that, once full, it stays full whatever
# is removed; so the metadata stays doubled, as is the default.
_MAKE: dict[FilesystemType, tuple[str, ...]] = {
    FilesystemType.BTRFS: (
        "mkfs.btrfs",
        "--quiet",
        "--force",
        "--nodiscard",
    ),
    FilesystemType.XFS: ("mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1"),
    FilesystemType.XFS_NO_REFLINK: ("mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=0"),
    FilesystemType.EXT4: (
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-m",
        "0",
        "-E",
        "nodiscard,lazy_itable_init=1,lazy_journal_init=1,assume_storage_prezeroed=1",
    ),
}

# An image of a run is removed with it, whatever happens to the machine: nothing in it
# need survive a power cut. Else each fsync there waits for the disk of the host twice
# and for the journal of the filesystem under it. XFS has no such option any more.
_DISPOSABLE: dict[FilesystemType, tuple[str, ...]] = {
    FilesystemType.BTRFS: ("nobarrier",),
    FilesystemType.EXT4: ("nobarrier",),
}


def make_filesystem(
    image: Path, kind: FilesystemType, size: int, *, options: Sequence[str] = ()
) -> None:
    """Make a new sparse image file with an empty filesystem; replaces what is there.

    :param image: path of the file.
    :param size: bytes.
    :param options: further arguments for mkfs, ``["-L", "pool"]`` for instance.
    :raise ValueError: when the filesystem does not fit into `size`.
    :raise CommandError: when mkfs fails; the file is gone then.
    :raise EnvironmentNotReadyError: when it failed for want of room on the disk.
    """
    if size < kind.minimum_size:
        least = kind.minimum_size // _MIB
        raise ValueError(f"{kind.value} needs at least {least} MiB, not {size} bytes")
    try:
        with image.open("wb") as file:
            file.truncate(size)
        run([*_MAKE[kind], *options, image])
    except BaseException as error:
        image.unlink(missing_ok=True)
        # Of a full disk mkfs says no more than that it cannot write.
        left = shutil.disk_usage(image.parent).free // _MIB
        if isinstance(error, CommandError | OSError) and left < _ROOM:
            raise EnvironmentNotReadyError(
                f"The disk is full that {image} would be on: {left} MiB are left.",
                f"Make room there: {typed('clean', '--cache')}; or name a directory on"
                " another one in QUBES_ITESTS_CACHE.",
            ) from error
        raise


def make_ext4(
    path: Path, size: int, label: str = "", contents: Path | None = None
) -> None:
    """Make an ext4 filesystem in a file without mounting it; replaces its content.

    :param path: the file; need not exist.
    :param size: bytes.
    :param label: volume label, at most 16 bytes.
    :param contents: a directory that it begins with a copy of, owners included.
    :raise CommandError: when mke2fs fails; a file that was there is empty then.
    """
    # In place: the file may be one that somebody else made for us to fill.
    with path.open("wb") as file:
        file.truncate(size)
    copied = () if contents is None else ("-d", contents)
    run([*_MAKE[FilesystemType.EXT4], "-L", label, *copied, path])


def mount(image: Path, directory: Path, *, options: Sequence[str] = ()) -> None:
    """Mount a filesystem image over a loop device that goes away with the mount.

    :param options: further mount options.
    :raise EnvironmentNotReadyError: when the machine hands out no loop device.
    :raise CommandError: when mount fails.
    """
    all_options = ",".join(["noatime", *options])
    with LoopDevice(image) as device:
        run(["mount", "-o", all_options, device.path, directory])


def mount_tmpfs(directory: Path, size: int) -> None:
    """Mount an empty filesystem that lives in memory.

    :param size: what it may hold, bytes.
    :raise CommandError: when mount fails.
    """
    run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", directory])


def unmount(directory: Path, *, lazy: bool = False) -> None:
    """Unmount what is mounted on a directory.

    :param lazy: also when it is in use, with all that is mounted below.  Who has a file
        open there keeps it; the filesystem goes when the last of them does.
    :raise CommandError: when it is in use, or not a mount point.
    """
    run(["umount", *(["--lazy"] if lazy else []), directory])


def is_mounted(directory: Path) -> bool:
    """Tell whether something is mounted on a directory, in this mount namespace."""
    return directory.resolve() in _mount_points()


def remove_tree(directory: Path) -> None:
    """Remove a directory with whatever somebody may have left in it.

    Mounts are detached, read-only subvolumes and immutable files removed like others.

    :raise CommandError: when a mount cannot be detached.
    :raise OSError: when something cannot be removed.
    """
    root = directory.resolve()
    # First of all, for what is mounted is not the test's to remove. Those below others,
    # and what covers others, come last in the list.
    for place in reversed(_mount_points()):
        if root in place.parents:
            unmount(place, lazy=True)
    with contextlib.suppress(OSError):
        shutil.rmtree(root)
        return
    for name, _, _ in os.walk(root):
        # A directory of another filesystem may have the number too.
        if Path(name).stat().st_ino == _SUBVOLUME_INODE:
            with contextlib.suppress(CommandError):
                run(["btrfs", "property", "set", "-f", "-t", "s", name, "ro", "false"])
    with contextlib.suppress(CommandError):  # where there are no such attributes
        run(["chattr", "-R", "-f", "-i", "-a", root])
    shutil.rmtree(root)


def create_subvolume(path: Path) -> None:
    """Make an empty btrfs subvolume.

    :raise CommandError: when btrfs refuses, or it is not a btrfs.
    """
    run(["btrfs", "subvolume", "create", path])


class LoopFilesystem:
    """A new filesystem, mounted while the context lasts.

    Entering makes image and mount point; leaving removes both.  When entering fails
    half-way, nothing is left.  Leaving raises `CommandError` while it is in use.

    An fsync in it waits for no disk, but on XFS: `faultdisk` has disks for what must
    survive a power cut.

    :param image: path for the image file.
    :param mount_point: path for the directory; its parent exists.
    :param kind: which filesystem.
    :param size: bytes; the image is sparse.
    :param make_options: further arguments for mkfs.
    :param mount_options: further mount options.
    :param lazy: leave also while it is in use; see `unmount`.
    """

    def __init__(
        self,
        image: Path,
        mount_point: Path,
        *,
        kind: FilesystemType,
        size: int,
        make_options: Sequence[str] = (),
        mount_options: Sequence[str] = (),
        lazy: bool = False,
    ) -> None:
        self.image = image
        self.mount_point = mount_point
        self.kind = kind
        self.size = size
        self._make_options = tuple(make_options)
        # those of the caller last: of two that contradict the kernel takes the second
        self._mount_options = (*_DISPOSABLE.get(kind, ()), *mount_options)
        self._lazy = lazy

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            make_filesystem(
                self.image, self.kind, self.size, options=self._make_options
            )
            undo.callback(self.image.unlink, missing_ok=True)
            self.mount_point.mkdir(mode=0o700)
            undo.callback(self.mount_point.rmdir)
            mount(self.image, self.mount_point, options=self._mount_options)
            undo.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        # While something has a file open there, all of it stays, and the error says so.
        unmount(self.mount_point, lazy=self._lazy)
        self.mount_point.rmdir()
        self.image.unlink(missing_ok=True)

    def remount(self) -> None:
        """Unmount and mount again, as a restart of the machine does.

        :raise CommandError: when it is in use; it stays mounted then.
        """
        unmount(self.mount_point)
        mount(self.image, self.mount_point, options=self._mount_options)


def _mount_points() -> list[Path]:
    """Return where something is mounted in this mount namespace, in its order."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    # blanks and backslashes are written as \ooo
    fields = (line.split(" ")[4].encode().decode("unicode_escape") for line in lines)
    return [Path(os.fsdecode(field.encode("latin-1"))) for field in fields]
