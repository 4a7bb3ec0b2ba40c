"""The driver ``file-reflink``: volumes are files that share extents.

It is the driver ``file``, but for what it does instead of copying: an image that a VM
writes to is a clone (FICLONE) of the committed one, made when it is needed or before.

A clone need not be on the disk before the VM writes to it: FICLONE enlarges a file as
it goes, so one that a power cut left incomplete is shorter than what it was cloned
from, and is given up.  All that a VM had brought to the disk includes the whole clone.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qubes_storage import ficlone, files
from qubes_storage.exc import ReflinkNotSupportedError
from qubes_storage.image_pool import ImagePool
from qubes_storage.image_volume import ImageVolume
from qubes_storage.operation import typed_errors
from qubes_storage.pool import parse_bool
from qubes_storage.preparation import is_clone_of, prepare

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_storage.image_content import ImageContent

__all__ = ["ReflinkPool", "ReflinkVolume"]


class ReflinkVolume(ImageVolume):
    """A volume of the driver ``file-reflink``."""

    def wants_clone(self) -> bool:
        """Tell whether its next start could do with a clone prepared ahead of it."""
        if self.snap_on_start or not self.save_on_stop or self.revisions_to_keep < 0:
            return False
        if self._has(self.files.dirty) or self.pool.state(self.vid).is_used():
            return False
        image = files.stat_image(self.files.clean)
        clone = files.stat_image(self.files.precache)
        return image is not None and not is_clone_of(clone, image)

    async def prepare(self) -> Self:
        """Make the clone that the next start needs ahead of time.

        Worth doing while nobody waits: the next start is then a rename.  No error
        when there is nothing to prepare.
        """
        with typed_errors(self, "prepare"):
            await asyncio.to_thread(prepare, self, lambda: True)
        return self

    def _clone(self, image: Path) -> None:
        precache = self.files.precache
        if is_clone_of(files.stat_image(precache), image.stat()):
            files.rename(precache, self.files.dirty, durable=False)
        else:
            files.give_up(precache)
            self._copy(image, self.files.dirty)


class ReflinkPool(ImagePool):
    """A directory on a filesystem with reflinks (btrfs, XFS).

    :param setup_check: whether `setup` refuses a filesystem without reflinks; with
        False (or "no") images are copied sparsely there.
    :param options: as for `ImagePool`.
    """

    driver = "file-reflink"
    volume_class: ClassVar[type[ImageVolume]] = ReflinkVolume

    def __init__(
        self, *, name: str, setup_check: bool | str = True, **options: Any
    ) -> None:
        super().__init__(name=name, **options)
        self.setup_check = parse_bool(name, "setup_check", setup_check)

    @property
    def config(self) -> dict[str, object]:
        """The keyword arguments that make this pool, and its driver's name."""
        return {**super().config, "setup_check": self.setup_check}

    def copy(self, source: int, target: int) -> bool:
        """Have a file share another's extents; copy it where that cannot be.

        :return: whether they share extents now.
        :raise OSError: as the operating system says.
        """
        return ficlone.clone_or_copy(source, target)

    def clean_up_after(self, volume: ImageContent) -> None:
        """Do in the background what an operation on a volume left to be done."""
        super().clean_up_after(volume)
        if self.shares_extents and isinstance(volume, ReflinkVolume):
            key = f"prepare {volume.vid}"
            self.background.when_idle(key, functools.partial(prepare, volume))

    def _check(self) -> None:
        self.shares_extents = ficlone.supports_reflink(self.dir_path)
        if self.setup_check and not self.shares_extents:
            reason = (
                f"files in {self.dir_path} cannot share extents (no reflinks): move it"
                " to btrfs, or to XFS made with reflink=1; or set setup_check=no to"
                " have images copied instead"
            )
            raise ReflinkNotSupportedError(self.name, reason)
