"""Root images: ext4 filesystems made from a directory, without mounting anything."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.host.command import run

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["make_root_image", "root_directory"]

#: Fixed, so that images of the same directory differ in nothing but the times of
#: change (ctime), which nobody can set.
_UUID: Final = "6f2f0d2e-7d0c-4d8b-9d57-1c6f0e8f5a11"
_EPOCH: Final = "1"
#: What it can grow to in a running guest, in blocks of 4 KiB: 1 TiB. By default more is
#: reserved for the tables of groups to come, 255 blocks for 2 GiB. The kernel wants all
#: of these in the transaction that adds groups, which has room for a quarter of the
#: journal, 256 blocks: it would not grow at all.
_LARGEST: Final = 1 << 28
_OPTIONS: Final = (
    # a guest must not spend its first seconds on zeroing tables
    f"lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,hash_seed={_UUID},"
    f"resize={_LARGEST}"
)


@contextlib.contextmanager
def root_directory(place: Path) -> Iterator[Path]:
    """Make a directory for the contents of a root image, gone with the context.

    What the directories above it hand down to new files would end in the image:
    access control lists, and the group of a directory with the bit for that.
    """
    with tempfile.TemporaryDirectory(dir=place) as made:
        for name in ("system.posix_acl_access", "system.posix_acl_default"):
            with contextlib.suppress(OSError):  # there is none
                os.removexattr(made, name)
        os.chown(made, os.geteuid(), os.getegid())
        Path(made).chmod(0o755)
        yield Path(made)


def make_root_image(
    directory: Path, image: Path, size: int, label: str, *, keep_times: bool = False
) -> None:
    """Make an image file whose ext4 filesystem holds what a directory holds. Blocking.

    :param directory: owners and modes are kept.
    :param image: the new file, sparse.
    :param size: bytes, less than 1 TiB.
    :param label: the filesystem's, at most 16 bytes.
    :param keep_times: also keep the times of change: Python's compiled modules are
        valid only for files of the right age.
    :raise CommandError: it does not fit, say.
    """
    if not keep_times:
        for path in (directory, *directory.rglob("*")):
            os.utime(path, (int(_EPOCH), int(_EPOCH)), follow_symlinks=False)
    with image.open("xb") as file:
        file.truncate(size)
    clock = (f"SOURCE_DATE_EPOCH={_EPOCH}", f"E2FSPROGS_FAKE_TIME={_EPOCH}")
    features = ("-t", "ext4", "-b", "4096", "-m", "0", "-J", "size=4")
    names = ("-U", _UUID, "-L", label, "-E", _OPTIONS)
    run(["env", *clock, "mke2fs", "-q", *features, *names, "-d", directory, image])
