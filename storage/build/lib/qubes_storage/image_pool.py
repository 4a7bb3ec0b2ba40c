"""A pool of images as plain files: a directory, whatever the filesystem."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qubes_storage import ficlone, files, lock, tree
from qubes_storage.background import Background
from qubes_storage.claims import Claims
from qubes_storage.exc import PoolError, system_reason
from qubes_storage.image_volume import ImageVolume
from qubes_storage.layout import VolumeFiles
from qubes_storage.operation import Operations
from qubes_storage.pool import Pool
from qubes_storage.use import VolumeUse

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qubes_storage.image_content import ImageContent
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
            raise PoolError(name, f"dir_path must be a directory, not {dir_path!r}")
        self.dir_path = Path(dir_path).absolute()
        self.background = Background()
        self.operations = Operations(self.dir_path, self.background)
        self._claims = Claims(self.dir_path)
        self._states: dict[str, VolumeUse] = {}

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

        :raise PoolError: when the directory cannot be made, read or written; if it was
            made it is gone again then.
        """
        try:
            found = await asyncio.to_thread(self._setup)
        except OSError as error:
            reason = f"cannot set it up: {system_reason(error)}"
            raise PoolError(self.name, reason) from error
        for vid in found:
            if vid not in self._volumes:
                self._make_found(vid)

    async def claim(self) -> None:
        """Keep other owners of the directory out; see `Pool.claim`.

        :raise PoolError: when another owner has it, in this process or in another.
        """
        if self._claims.is_held(_OWNED):
            return
        try:
            taken = await asyncio.to_thread(self._claims.take, _OWNED)
        except OSError as error:
            reason = f"cannot claim it: {system_reason(error)}"
            raise PoolError(self.name, reason) from error
        if not taken:
            reason = (
                f"{self.dir_path} is in use by another server: end that one, or give"
                " the pool a directory of its own"
            )
            raise PoolError(self.name, reason)

    def unclaim(self) -> None:
        """Undo `claim`; no error when there was none."""
        self._claims.drop(_OWNED)

    async def find_volumes(self) -> list[str]:
        """Return the ids of the volumes that have an image, whoever made them."""
        try:
            found = await asyncio.to_thread(lambda: [*tree.find_volumes(self.dir_path)])
        except OSError as error:
            reason = f"cannot read it: {system_reason(error)}"
            raise PoolError(self.name, reason) from error
        return [volume.vid for volume in found if volume.has_image]

    async def settled(self) -> None:
        """Wait until all work in the background is done; nothing ever needs that."""
        await asyncio.to_thread(self.background.settle)

    async def destroy(self) -> None:
        """Forget the pool, and what it has started.  Its directory and images stay."""
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

    def state(self, vid: str) -> VolumeUse:
        """Return what this process knows of the use of the volume `vid`."""
        if vid not in self._states:
            use = VolumeUse(self.name, vid, self._claims)
            return self._states.setdefault(vid, use)
        return self._states[vid]

    def copy(self, source: int, target: int) -> bool:
        """Copy between file descriptors; the target is empty.

        :return: whether they share extents now.
        :raise OSError: as the operating system says.
        """
        ficlone.copy_sparse(source, target)
        return False

    def clean_up_after(self, volume: ImageContent) -> None:
        """Do in the background what an operation on a volume left to be done."""
        self._remove_given_up(volume.files)

    def _remove_given_up(self, volume_files: VolumeFiles) -> None:
        def remove(_go_on: object) -> None:
            for path in volume_files.given_up():
                files.remove(path)

        if volume_files.given_up():
            self.background.soon(f"remove {volume_files.clean}", remove)

    def _make_volume(self, **config: Any) -> ImageVolume:
        return self.volume_class(pool=self, **config)

    def _setup(self) -> list[str]:
        lock_file = self.dir_path / lock.LOCK_FILE
        with contextlib.ExitStack() as undo:
            for path in reversed((self.dir_path, *self.dir_path.parents)):
                if not path.exists():
                    undo.callback(_remove_if_empty, path)
            files.make_directories(self.dir_path)
            if lock.mark_if_empty(self.dir_path):
                undo.callback(files.remove, lock_file)
            is_ours = lock.is_marked(self.dir_path)
            if is_ours:
                ficlone.remove_leftovers(self.dir_path)
            self._check()
            found = self._scan(clean_up=is_ours)
            undo.pop_all()
        return found

    def _check(self) -> None:
        with files.scratch_file(self.dir_path / ".check"):
            pass  # it can be written

    def _scan(self, *, clean_up: bool) -> list[str]:
        found = list(tree.find_volumes(self.dir_path))
        for volume in found:
            if volume.has_leftovers and clean_up:
                self._give_up_leftovers(volume.vid)
        return [volume.vid for volume in found if volume.has_image]

    def _give_up_leftovers(self, vid: str) -> None:
        volume_files = VolumeFiles.of(self.dir_path, vid)
        # Who holds the lock is at work, and looks for leftovers by himself.
        with (
            contextlib.suppress(TimeoutError),
            lock.hold(self.dir_path, write=[vid], timeout=0),
        ):
            if not self.state(vid).is_used():
                for path in volume_files.leftovers():
                    files.give_up(path)
        self._remove_given_up(volume_files)

    def _statvfs(self) -> os.statvfs_result | None:
        try:
            return os.statvfs(self.dir_path)
        except FileNotFoundError:
            return None


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
