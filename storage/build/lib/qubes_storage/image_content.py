"""What is in the volumes of drivers that keep images as plain files.

A committed image is never written again, whoever has its name.  So a revision is a
second name for it, and a commit or a revert is a rename.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Self, cast

from qubes_storage import files
from qubes_storage.exc import (
    ImportSizeError,
    InvalidSizeError,
    RevisionNotFoundError,
    VolumeNotFoundError,
    VolumeStateError,
)
from qubes_storage.history import History
from qubes_storage.layout import VolumeFiles
from qubes_storage.loop import update_loop_devices
from qubes_storage.operation import typed_errors
from qubes_storage.transfer import exporting
from qubes_storage.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from qubes_storage.image_pool import ImagePool
    from qubes_storage.layout import Revision
    from qubes_storage.use import VolumeUse

__all__ = ["ImageContent"]

log = logging.getLogger(__name__)


class ImageContent(Volume):
    """Reads and replaces what a volume holds; `ImageVolume` starts and stops it."""

    pool: ImagePool

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.files = VolumeFiles.of(self.pool.dir_path, self.vid)
        self._history = History(self.files)

    @property
    def path(self) -> Path:
        """The image that a VM opens."""
        return self.files.clean if self.is_read_only else self.files.dirty

    @property
    def size(self) -> int:
        """Size that a VM sees, bytes; what was configured where there is no image."""
        if self.is_volatile:
            return self._size
        status = self._current()
        if status is None and self.source is not None:
            return self.source.size
        return status.st_size if status else self._size

    @property
    def usage(self) -> int:
        """Bytes allocated to the current image, those that it shares included."""
        status = self._current()
        return status.st_blocks * 512 if status else 0

    @property
    def revisions(self) -> Mapping[str, str]:
        """Ids of the revisions and their times (ISO 8601, UTC), oldest first."""
        with typed_errors(self, "list revisions of"):
            revisions = self._history.revisions()
        return {revision.id: revision.time for revision in revisions}

    def is_dirty(self) -> bool:
        """Tell whether there are changes that `stop` has yet to commit."""
        with typed_errors(self, "inspect"):
            return self._is_dirty()

    def is_outdated(self) -> bool:
        """Tell whether the source was committed anew since this snapshot started."""
        with typed_errors(self, "inspect"):
            if self.source is None or not self._has(self._origin):
                return False
            return not files.is_origin(self._origin, self._source.files.clean)

    async def export(self) -> Path:
        """Return the committed image, to be read only, until `export_end`."""
        await self._run("export", self._export)
        return self.files.clean

    async def export_end(self, path: Path) -> None:  # noqa: ARG002 - the contract
        """End what `export` began."""
        self._use.end_export()

    async def import_data(self, size: int | None = None) -> Path:
        """Begin to replace the content: return a file of `size` bytes to write to."""
        size = self.size if size is None else self._check_size("import", size)
        await self._change("import", lambda: self._import_data(size))
        return self.files.imported

    async def import_data_end(self, success: bool) -> None:  # noqa: FBT001
        """Commit the new content, or drop it.

        :raise ImportSizeError: when it is not as long as was declared.
        """
        await self._change("import", lambda: self._import_data_end(success=success))

    async def import_volume(self, src_volume: Volume) -> Self:
        """Replace the content and size by those committed in another volume."""
        if not self.keeps_image:
            return self
        async with exporting(src_volume) as image:
            return await self._change("import", lambda: self._import_image(image))

    async def resize(self, size: int) -> Self:
        """Enlarge the volume, also while a VM runs; loop devices over it follow.

        A volume that is stopped may also become smaller, whatever is in what it loses.

        :raise InvalidSizeError: when that is less than it has, and it is started.
        """
        self._check_size("resize", size)
        return await self._change("resize", lambda: self._resize(size))

    async def revert(self, revision: str | None = None) -> Self:
        """Make a revision the committed image; the present one becomes a revision.

        :param revision: one of `revisions`; None for the latest.
        """
        return await self._change("revert", lambda: self._revert(revision))

    # What follows blocks, runs in a thread, and holds the locks.

    def _export(self) -> None:
        if not self.keeps_image:
            raise VolumeStateError(*self._about("export"), "it keeps no image")
        self._committed_image("export")
        self._use.begin_export()

    def _import_data(self, size: int) -> None:
        self._check_importable()
        if not size:
            raise InvalidSizeError(*self._about("import"), "the size must not be 0")
        files.make_directories(self.files.directory)
        self._give_up_leftovers()
        with files.new_file(self.files.imported, durable=False) as image:
            os.ftruncate(image, size)
        self._use.begin("import")
        self._use.import_size = size

    def _import_data_end(self, *, success: bool) -> None:
        size = self._use.import_size
        if size is None:
            raise VolumeStateError(*self._about("import"), "no import is under way")
        self._use.end()
        try:
            if success:
                self._commit_import(size)
        finally:
            files.remove(self.files.imported)

    def _commit_import(self, size: int) -> None:
        status = files.stat_image(self.files.imported)
        if status is None or status.st_size != size:
            found = "nothing" if status is None else f"{status.st_size} bytes"
            reason = f"{size} bytes were declared and {found} written"
            raise ImportSizeError(*self._about("import"), reason)
        files.fsync(self.files.imported)
        self._history.commit(self.files.imported, self.revisions_to_keep)

    def _import_image(self, image: Path) -> None:
        self._check_importable()
        files.make_directories(self.files.directory)
        self._give_up_leftovers()
        self._copy(image, self.files.imported, durable=True)
        try:
            self._history.commit(self.files.imported, self.revisions_to_keep)
        finally:
            files.remove(self.files.imported)

    def _check_importable(self) -> None:
        if not self.keeps_image:
            raise VolumeStateError(*self._about("import"), "it keeps no image")
        self._refuse_unless_idle("import")

    def _resize(self, size: int) -> None:
        self._use.refuse_if_importing("resize")
        if size == self.size:
            return
        started = self._is_dirty() or self._use.started
        if size < self.size and (started or size == 0):
            when = " while it is started" if started else ""
            reason = f"it has {self.size} bytes and cannot shrink to {size}{when}"
            raise InvalidSizeError(*self._about("resize"), reason)
        if started:
            self._resize_running(size)
        elif self.save_on_stop:
            self._resize_committed(size)
        elif not self.is_volatile:
            reason = "only a volume that is written can be resized"
            raise VolumeStateError(*self._about("resize"), reason)
        self._size = size

    def _resize_committed(self, size: int) -> None:
        image = self._committed_image("resize")
        files.give_up(self.files.precache)
        self._copy(image, self.files.clean, size=size, durable=True)

    def _resize_running(self, size: int) -> None:
        if self.is_read_only:
            raise VolumeStateError(*self._about("resize"), "it is read-only")
        with files.open_image(self.files.dirty, os.O_RDWR) as image:
            os.ftruncate(image, size)
            os.fsync(image)
        update_loop_devices(self.files.dirty)

    def _revert(self, wanted: str | None) -> None:
        self._refuse_unless_idle("revert")
        revision = self._find_revision(wanted)
        self._history.revert(revision, self.revisions_to_keep)

    def _find_revision(self, wanted: str | None) -> Revision:
        revisions = self._history.revisions()
        if wanted is None and revisions:
            return revisions[-1]
        for revision in revisions:
            if revision.id == wanted:
                return revision
        reason = f"it has no revision {wanted!r}" if wanted else "it has no revisions"
        raise RevisionNotFoundError(*self._about("revert"), reason)

    def _committed_image(self, action: str) -> Path:
        if self._has(self.files.clean):
            return self.files.clean
        if self._has(self.files.dirty):
            reason = f"{self.vid} is started and keeps no snapshot meanwhile"
            raise VolumeStateError(*self._about(action), reason)
        reason = f"{self.vid} has no image: create or import it first"
        raise VolumeNotFoundError(*self._about(action), reason)

    def _refuse_unless_idle(self, action: str) -> None:
        self._use.refuse_if_importing(action)
        self._use.refuse_if_started(action)
        if self._is_dirty():
            reason = "it has changes that are not committed; stop it first"
            raise VolumeStateError(*self._about(action), reason)

    def _give_up_leftovers(self) -> None:
        for path in self.files.leftovers():
            files.give_up(path)

    def _copy(
        self,
        source: Path,
        target: Path,
        *,
        size: int | None = None,
        durable: bool = False,
        mark_origin: bool = False,
    ) -> None:
        # A copy's data is not on the disk as a clone's is, and its size tells nothing.
        durable = durable or not self.pool.shares_extents
        with (
            files.open_image(source) as original,
            files.new_file(target, durable=durable) as copy,
        ):
            shared = self.pool.copy(original, copy)
            log.info("%s %s to %s", "cloned" if shared else "copied", source, target)
            if size is not None:
                os.ftruncate(copy, size)
            if mark_origin:
                files.mark_origin(copy, os.fstat(original))

    def _is_dirty(self) -> bool:
        if not self.save_on_stop:
            return False
        dirty = files.stat_image(self.files.dirty)
        cloned = self._origin if self.snap_on_start else self.files.clean
        image = files.stat_image(cloned)
        return dirty is not None and (image is None or dirty.st_size >= image.st_size)

    def _current(self) -> os.stat_result | None:
        with typed_errors(self, "inspect"):
            if self.keeps_image and not self._is_dirty():
                return files.stat_image(self.files.clean)
            dirty = files.stat_image(self.files.dirty)
            return dirty or files.stat_image(self.files.clean)

    def _about(self, action: str) -> tuple[str, str, str]:
        return self.pool.name, self.vid, action

    @staticmethod
    def _has(path: Path) -> bool:
        return files.stat_image(path) is not None

    @property
    def _origin(self) -> Path:
        return self.files.origin if self.save_on_stop else self.files.clean

    @property
    def _source(self) -> ImageContent:
        return cast("ImageContent", self.source)

    @property
    def _use(self) -> VolumeUse:
        return self.pool.state(self.vid)

    async def _run(self, action: str, function: Callable[[], None]) -> Self:
        await self.pool.operations.run(self, action, function)
        return self

    async def _change(self, action: str, function: Callable[[], None]) -> Self:
        def change() -> None:
            self._use.refuse_if_used_elsewhere(action)
            function()
            self.pool.clean_up_after(self)

        return await self._run(action, change)
