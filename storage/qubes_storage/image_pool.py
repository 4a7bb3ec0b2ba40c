"""Pools of images as plain files: a directory, whatever the filesystem."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qubes_storage import ficlone, files, locks
from qubes_storage.exc import StoragePoolException, system_reason
from qubes_storage.image_volume import ImageVolume
from qubes_storage.layout import find_volumes
from qubes_storage.operation import Background, Operations
from qubes_storage.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qubes_storage.volume import Volume

__all__ = ["ImagePool"]

#: What an owner of a pool claims; no id of a volume.
_OWNED = "the pool"


class ImagePool(Pool):
    """A directory; its volumes are files in it.

    :param name: name of the pool.
    :param dir_path: the directory; `setup` makes it.
    :param revisions_to_keep: what its volumes have unless configured otherwise.
    :param ephemeral_volatile: whether a volatile volume is emptied before its stop
        returns.  It is not encrypted: what the disk itself retains can be recovered.
    """

    #: What its volumes are objects of.
    volume_class: ClassVar[type[ImageVolume]] = ImageVolume

    #: Whether its files share extents; `setup` finds out.
    shares_extents = False

    def __init__(
        self,
        *,
        name: str,
        dir_path: str | os.PathLike[str],
        revisions_to_keep: int | str = 1,
        ephemeral_volatile: bool | str = False,
    ) -> None:
        super().__init__(
            name=name,
            revisions_to_keep=revisions_to_keep,
            ephemeral_volatile=ephemeral_volatile,
        )
        if not isinstance(dir_path, str | os.PathLike) or not os.fspath(dir_path):
            raise StoragePoolException(
                f"pool {name!r}: expected a directory as dir_path, got {dir_path!r}"
            )
        self.dir_path = Path(dir_path).absolute()
        self.background = Background()
        self.operations = Operations(self.dir_path, self.background)
        self._claims = locks.Claims(self.dir_path)
        self._states: dict[str, locks.VolumeUse] = {}

    @property
    def config(self) -> dict[str, object]:
        """The keyword arguments that make this pool, and its driver's name."""
        return {**super().config, "dir_path": str(self.dir_path)}

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
        """Make the directory, and find the volumes in it.

        What operations that a crash interrupted have left is removed, where the
        directory was made by a pool or was empty when one got it.  In any other nothing
        is removed: its files may only look like ours.

        :raise StoragePoolException: when the directory cannot be made, read or written;
            if it was made it is gone again then.
        """
        try:
            found = await asyncio.to_thread(self._setup)
        except OSError as error:
            raise StoragePoolException(
                f"pool {self.name!r}: cannot set it up: {system_reason(error)}"
            ) from error
        for vid in found:
            if vid not in self._volumes:
                self._make_found(vid)

    async def claim(self) -> None:
        """Keep other owners of the directory out; see `Pool.claim`.

        :raise StoragePoolException: when another owner has it, in this process or in
            another.
        """
        if self._claims.is_held(_OWNED):
            return
        try:
            taken = await asyncio.to_thread(self._claims.take, _OWNED)
        except OSError as error:
            raise StoragePoolException(
                f"pool {self.name!r}: cannot claim it: {system_reason(error)}"
            ) from error
        if not taken:
            raise StoragePoolException(
                f"pool {self.name!r}: {self.dir_path} is in use by another server: end"
                " that one, or give the pool another directory"
            )

    def unclaim(self) -> None:
        """Undo `claim`; no error when there was none."""
        self._claims.drop(_OWNED)

    async def find_volumes(self) -> list[str]:
        """Return the ids of the volumes that have an image, no matter who made them."""
        try:
            found = await asyncio.to_thread(lambda: [*find_volumes(self.dir_path)])
        except OSError as error:
            raise StoragePoolException(
                f"pool {self.name!r}: cannot read it: {system_reason(error)}"
            ) from error
        return [volume.vid for volume in found if volume.has_image]

    async def settled(self) -> None:
        """Wait until all work in the background is done; nothing ever needs that."""
        await asyncio.to_thread(self.background.settle)

    async def destroy(self) -> None:
        """Forget the pool, and what it has started.  Its directory and images stay."""
        # Jobs first: one that is under way has files open, and may lock a volume.
        await asyncio.to_thread(self.background.close)
        self._claims.close()
        self._volumes.clear()
        self._states.clear()

    def included_in(self, pools: Iterable[Pool]) -> Pool | None:
        """Return the pool whose directory is nearest above this one's."""
        above = [
            pool
            for pool in pools
            if isinstance(pool, ImagePool) and pool.dir_path in self.dir_path.parents
        ]
        return max(above, key=lambda pool: len(pool.dir_path.parts), default=None)

    def forget(self, volume: Volume) -> None:
        """Drop a volume that was removed."""
        self._found.discard(volume.vid)
        # meanwhile a new one may have been bound to the id
        if self._volumes.get(volume.vid) is volume:
            del self._volumes[volume.vid]
        self._states.pop(volume.vid, None)

    def state(self, vid: str) -> locks.VolumeUse:
        """Return what this process knows of the use of the volume `vid`."""
        if vid not in self._states:
            use = locks.VolumeUse(self.name, vid, self._claims)
            # Of two threads that come first the same one must win for both.
            return self._states.setdefault(vid, use)
        return self._states[vid]

    def _make_volume(self, **config: Any) -> ImageVolume:
        return self.volume_class(pool=self, **config)

    def _setup(self) -> list[str]:
        with contextlib.ExitStack() as undo:
            for path in reversed((self.dir_path, *self.dir_path.parents)):
                if not path.exists():
                    undo.callback(_remove_if_empty, path)
            files.make_directories(self.dir_path)
            # Before anything of ours is in it: afterwards nobody could tell whether the
            # rest was here before, and what looks like a leftover may be removed.
            if locks.mark_if_empty(self.dir_path):
                undo.callback(files.remove, self.dir_path / locks.LOCK_FILE)
            is_ours = locks.is_marked(self.dir_path)
            if is_ours:
                ficlone.remove_leftovers(self.dir_path)
            self._check()
            found = list(find_volumes(self.dir_path))
            for volume in found:
                if volume.has_leftovers and is_ours:
                    name = volume.vid.rpartition("/")[2]
                    self._make_volume(vid=volume.vid, name=name).tidy()
            undo.pop_all()
        return [volume.vid for volume in found if volume.has_image]

    def _check(self) -> None:
        with files.scratch_file(self.dir_path / ".check"):
            pass  # it can be written

    def _statvfs(self) -> os.statvfs_result | None:
        try:
            return os.statvfs(self.dir_path)
        except FileNotFoundError:
            return None


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else uses it by now
        directory.rmdir()
