"""Driver ``file-reflink``: volumes are files that share extents.

It is the driver ``file``, but for what it does instead of copying: an image that a VM
writes to is a clone (`qubes_storage.ficlone`) of the committed one, made when it is
needed or before.

A clone need not be on the disk before the VM writes to it: FICLONE enlarges a file as
it goes, so one that a power cut left incomplete is shorter than what it was cloned
from, and is given up.  All that a VM had brought to the disk includes the whole clone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qubes_storage import ficlone, files
from qubes_storage.exc import StoragePoolException
from qubes_storage.image_pool import ImagePool
from qubes_storage.image_volume import ImageVolume
from qubes_storage.locks import hold
from qubes_storage.operation import typed_errors
from qubes_storage.pool import parse_bool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["ReflinkPool", "ReflinkVolume"]


class ReflinkVolume(ImageVolume):
    """A volume of the driver ``file-reflink``."""

    def copy(self, source: int, target: int) -> bool:
        """Have a file share another's extents; copy it where that cannot be.

        :return: whether they share extents now.
        :raise OSError: as the operating system says.
        """
        return ficlone.clone_or_copy(source, target)

    def provide_clone(self, image: Path) -> None:
        """Make what a VM writes to out of its committed image, or take what is ready.

        A clone in the making is not taken, nor waited for: it has another name yet.
        """
        precache = self.files.precache
        if _is_clone_of(files.stat_image(precache), image.stat()):
            files.rename(precache, self.files.dirty, durable=False)
        else:
            files.give_up(precache)
            super().provide_clone(image)

    async def prepare(self) -> Self:
        """Make the clone that the next start needs ahead of time.

        Worth doing while nobody waits: the next start is then a rename.  No error
        when there is nothing to prepare.
        """
        with typed_errors(self, "prepare"):
            await asyncio.to_thread(self._prepare, lambda: True)
        return self

    def clean_up(self) -> None:
        """Do in the background what an operation has left to be done."""
        super().clean_up()
        if self.pool.shares_extents:
            self.pool.background.when_idle(f"prepare {self.vid}", self._prepare)

    def _prepare(self, go_on: Callable[[], bool]) -> None:
        """Clone the committed image for the next start, if that needs it; blocking.

        It takes no lock before it is done, so nothing waits for it.  Then it is taken
        only if the committed image is still the one that was cloned; it bears that
        image's time of last write, by which a start can tell what it is a clone of.

        :param go_on: asked every few milliseconds; the clone is abandoned once it says
            no.
        :raise OSError: as the operating system says; nothing is left then.
        """

        def still_wanted() -> bool:
            return go_on() and not os.path.lexists(self.files.dirty)

        if not self._wants_clone():
            return
        with (
            contextlib.suppress(TimeoutError, FileNotFoundError),
            # Entered first and so left last: `new_file` renames when it is left, and an
            # operation that came before that could commit another image.
            contextlib.ExitStack() as locks,
            files.new_file(
                self.files.precache, durable=not self.pool.shares_extents
            ) as target,
            files.open_image(self.files.clean) as source,
        ):
            if not self.pool.shares_extents:
                ficlone.copy_sparse(source, target)
            elif not ficlone.clone_in_slices(source, target, still_wanted):
                raise TimeoutError("an operation came before the clone was whole")
            locks.enter_context(hold(self.pool.dir_path, self.vid, timeout=0))
            image = os.fstat(source)
            current = files.stat_image(self.files.clean)
            is_same = current is not None and os.path.samestat(current, image)
            if not (is_same and self._wants_clone()):
                raise TimeoutError("an operation has committed another image")
            # Not before: until then its time tells that it is no one's clone.
            os.utime(target, ns=(image.st_atime_ns, image.st_mtime_ns))

    def _wants_clone(self) -> bool:
        if self.snap_on_start or not self.save_on_stop or self.revisions_to_keep < 0:
            return False
        if self._has(self.files.dirty) or self.use.is_used():
            return False
        image = files.stat_image(self.files.clean)
        clone = files.stat_image(self.files.precache)
        return image is not None and not _is_clone_of(clone, image)


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

    def _check(self) -> None:
        self.shares_extents = ficlone.supports_reflink(self.dir_path)
        if self.setup_check and not self.shares_extents:
            raise StoragePoolException(
                f"pool {self.name!r}: files in {self.dir_path} cannot share extents (no"
                " reflinks): move it to btrfs, or to XFS made with reflink=1; or set"
                " setup_check=no to have images copied instead"
            )


def _is_clone_of(clone: os.stat_result | None, image: os.stat_result) -> bool:
    """Tell whether a prepared clone is whole, and of this image."""
    return clone is not None and (clone.st_mtime_ns, clone.st_size) == (
        image.st_mtime_ns,
        image.st_size,
    )
