"""The driver ``file-reflink``: a pool of images that share extents."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qubes_storage import ficlone, files
from qubes_storage.exc import PoolError, ReflinkNotSupportedError
from qubes_storage.operation import Operations
from qubes_storage.pool import Pool
from qubes_storage.reflink_volume import ReflinkVolume, VolumeState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qubes_storage.volume import Volume

__all__ = ["ReflinkPool", "ReflinkVolume"]


class ReflinkPool(Pool):
    """A directory on a filesystem with reflinks (btrfs, XFS).

    :param name: name of the pool.
    :param dir_path: the directory; `setup` makes it.
    :param revisions_to_keep: what its volumes have unless configured otherwise.
    :param setup_check: whether `setup` refuses a filesystem without reflinks; with
        False (or "no") images are copied sparsely there.
    """

    driver = "file-reflink"

    def __init__(
        self,
        *,
        name: str,
        dir_path: str | os.PathLike[str],
        revisions_to_keep: int = 1,
        setup_check: bool | str = True,
    ) -> None:
        super().__init__(name=name, revisions_to_keep=revisions_to_keep)
        self.dir_path = Path(dir_path).absolute()
        self.setup_check = _parse_bool(name, setup_check)
        self.operations = Operations(self.dir_path)
        self._states: dict[str, VolumeState] = {}

    @property
    def config(self) -> dict[str, object]:
        """The keyword arguments that make this pool, and its driver's name."""
        return {
            "name": self.name,
            "driver": self.driver,
            "dir_path": str(self.dir_path),
            "revisions_to_keep": self.revisions_to_keep,
            "setup_check": self.setup_check,
        }

    @property
    def size(self) -> int | None:
        """Bytes of its filesystem; None while it is absent."""
        status = self._statvfs()
        return status and status.f_blocks * status.f_frsize

    @property
    def usage(self) -> int | None:
        """Bytes in use on its filesystem; None while it is absent."""
        status = self._statvfs()
        return status and (status.f_blocks - status.f_bfree) * status.f_frsize

    async def setup(self) -> None:
        """Make the directory, and check that its files can share extents.

        :raise ReflinkNotSupportedError: when they cannot and `setup_check` is set.
        :raise PoolError: when the directory cannot be made or written.
        """
        await asyncio.to_thread(self._setup)

    async def destroy(self) -> None:
        """Forget the pool.  Its directory and all images stay."""
        self._volumes.clear()
        self._states.clear()

    def included_in(self, pools: Iterable[Pool]) -> Pool | None:
        """Return the pool whose directory is nearest above this one's."""
        above = [
            pool
            for pool in pools
            if isinstance(pool, ReflinkPool) and pool.dir_path in self.dir_path.parents
        ]
        return max(above, key=lambda pool: len(pool.dir_path.parts), default=None)

    def forget(self, volume: Volume) -> None:
        """Drop a volume that was removed."""
        self._volumes.pop(volume.vid, None)
        self._states.pop(volume.vid, None)

    def state(self, vid: str) -> VolumeState:
        """Return what this process knows of the volume `vid`."""
        return self._states.setdefault(vid, VolumeState())

    def _make_volume(self, **config: Any) -> ReflinkVolume:
        return ReflinkVolume(pool=self, **config)

    def _setup(self) -> None:
        try:
            files.make_directories(self.dir_path)
            ficlone.remove_leftovers(self.dir_path)
            supported = ficlone.supports_reflink(self.dir_path)
        except OSError as error:
            raise PoolError(self.name, f"cannot set it up: {error}") from error
        if self.setup_check and not supported:
            reason = (
                f"files in {self.dir_path} cannot share extents (no reflinks): move it"
                " to btrfs, or to XFS made with reflink=1; or set setup_check=no to"
                " have images copied instead"
            )
            raise ReflinkNotSupportedError(self.name, reason)

    def _statvfs(self) -> os.statvfs_result | None:
        try:
            return os.statvfs(self.dir_path)
        except FileNotFoundError:
            return None


def _parse_bool(pool: str, value: bool | str) -> bool:  # noqa: FBT001
    words = {"yes": True, "true": True, "1": True, "no": False, "false": False}
    if isinstance(value, bool):
        return value
    try:
        return {**words, "0": False}[value.lower()]
    except (KeyError, AttributeError):
        raise PoolError(pool, f"setup_check is yes or no, not {value!r}") from None
