"""The state that a server keeps: its app's store, and filesystems in images."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import TYPE_CHECKING, Final, Self

from qubes_itests.exc import DeadlineError, HarnessError, UsageError
from qubes_itests.host.filesystem import (
    FilesystemType,
    make_filesystem,
    mount,
    unmount,
)
from qubes_itests.host.loop import loop_devices_over

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FILESYSTEMS", "State"]

#: What there is to put pools on: by name, with the bytes of its image, which is sparse.
FILESYSTEMS: Final = {"btrfs": 64 << 30, "xfs": 16 << 30}

_RELEASE_TIMEOUT: Final = 20.0
_POLL_INTERVAL: Final = 0.02


class State:
    """A directory with a store and mounted filesystems, while the context lasts.

    What is in it stays; the mounts are this sandbox's own.

    :param directory: made when it is not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._exit = contextlib.ExitStack()

    @property
    def store(self) -> Path:
        """The file of the app's state."""
        return self.directory / "qubes.xml"

    @property
    def block(self) -> Path:
        """A folder of links to what dom0 exposes as block devices."""
        return self.directory / "block"

    def mount_point(self, name: str) -> Path:
        """Return where one of `FILESYSTEMS` is mounted; HarnessError for others."""
        if name not in FILESYSTEMS:
            known = ", ".join(FILESYSTEMS)
            raise HarnessError(f"Pools are served from {known}, not from {name!r}.")
        return self.directory / name

    def __enter__(self) -> Self:
        """Mount; filesystems that are not there yet are made.

        :raise UsageError: when another server has it.
        :raise CommandError: when one cannot be made or mounted.
        :raise OSError: when the directory cannot be used.
        """
        with contextlib.ExitStack() as stack:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.callback(os.close, self._locked())
            self.block.mkdir(mode=0o700, exist_ok=True)
            # behind the lock: two mounts of one image would destroy it
            for name, size in FILESYSTEMS.items():
                image, place = self.directory / f"{name}.img", self.mount_point(name)
                if image.exists():
                    _wait_unused(image)
                else:
                    # under another name until it is whole: one that was killed makes
                    # it again
                    new = image.with_suffix(".new")
                    make_filesystem(new, FilesystemType(name), size)
                    new.rename(image)
                place.mkdir(mode=0o700, exist_ok=True)
                mount(image, place)
                stack.callback(unmount, place)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._exit.close()

    def _locked(self) -> int:
        # of the directory itself: no file that is left, and free when its owner dies
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"{self.directory} is in use by another `serve`: end that one, or give"
                " this one another --directory."
            ) from None
        return descriptor


def _wait_unused(image: Path) -> None:
    """Wait until the mounts of a server that was killed are gone.

    The kernel drops them in its own time, and a filesystem must not be mounted over
    two loop devices.
    """
    deadline = time.monotonic() + _RELEASE_TIMEOUT
    while devices := loop_devices_over(image):
        if time.monotonic() > deadline:
            used = ", ".join(map(str, devices))
            what = f"release of {image} by its last user"
            raise DeadlineError(what, _RELEASE_TIMEOUT, f"it is under {used}")
        time.sleep(_POLL_INTERVAL)
