"""Private disks: a filesystem with the directories that a guest would make there."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qubes_itests.guest.image.ext4 import root_directory
from qubes_itests.host.filesystem import make_ext4

__all__ = ["make_private"]

_DIRECTORIES: Final = ("config", "home", "usrlocal")
_HOME: Final = "home/user"
#: The sandbox's own: who is killed leaves nothing there.
_PLACE: Final = Path("/dev/shm")  # noqa: S108


def make_private(path: Path, size: int) -> None:
    """Make the filesystem of a private disk in a file. Blocking.

    Its first directories are there: to make them takes an emulated guest as long as it
    takes a disk to be mounted. It makes what is lacking, and gives the home to whose it
    is by its own list; one that has no such user has the directory all the same.

    :param path: the file; need not exist.
    :param size: bytes.
    :raise CommandError: when mke2fs fails; a file that was there is empty then.
    """
    with root_directory(_PLACE) as contents:
        for name in _DIRECTORIES:
            (contents / name).mkdir(mode=0o755)
            (contents / name).chmod(0o755)  # whatever the umask
        (contents / _HOME).mkdir(mode=0o700)
        make_ext4(path, size, "private", contents)
