"""Volumes whose images are plain files: their life, contents, sizes and revisions.

Those of its methods that are an `operation` are coroutines to their callers.  What is
written here blocks, in a thread and under the volume's lock.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from typing import TYPE_CHECKING, Any, Self, cast

from qubes_storage import ficlone, files
from qubes_storage.exc import (
    InvalidSizeError,
    VolumeExistsError,
    VolumeNotFoundError,
    VolumeStateError,
    system_reason,
)
from qubes_storage.layout import VolumeFiles
from qubes_storage.locks import hold
from qubes_storage.loop import update_loop_devices
from qubes_storage.operation import operation, typed_errors
from qubes_storage.volume import Volume, exporting

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qubes_storage.image_pool import ImagePool
    from qubes_storage.locks import VolumeUse

__all__ = ["ImageVolume"]

log = logging.getLogger(__name__)


class ImageVolume(Volume):
    """A volume of the driver ``file``, and what those of ``file-reflink`` build on."""

    pool: ImagePool

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.files = VolumeFiles.of(self.pool.dir_path, self.vid)

    # What it is, from the names and sizes of its files

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
            return {revision.id: revision.time for revision in self.files.revisions()}

    @property
    def use(self) -> VolumeUse:
        """What its files do not tell, for all objects of this volume."""
        return self.pool.state(self.vid)

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

    def _is_dirty(self) -> bool:
        if not self.save_on_stop:
            return False
        dirty = files.stat_image(self.files.dirty)
        if dirty is None:
            return False
        cloned = self._origin if self.snap_on_start else self.files.clean
        image = files.stat_image(cloned)
        # A start waits for no disk, so a power cut may leave less of the clone than was
        # made. FICLONE enlarges its target as it goes: what is shorter than the image
        # is incomplete, and nothing that a VM wrote was promised to be there.
        return image is None or dirty.st_size >= image.st_size

    def _current(self) -> os.stat_result | None:
        with typed_errors(self, "inspect"):
            if self.keeps_image and not self._is_dirty():
                return files.stat_image(self.files.clean)
            dirty = files.stat_image(self.files.dirty)
            return dirty or files.stat_image(self.files.clean)

    @property
    def _origin(self) -> Path:
        return self.files.origin if self.save_on_stop else self.files.clean

    @property
    def _source(self) -> ImageVolume:
        return cast("ImageVolume", self.source)

    @staticmethod
    def _has(path: Path) -> bool:
        return files.stat_image(path) is not None

    def _about(self, action: str) -> tuple[str, str, str]:
        return self.pool.name, self.vid, action

    # From creation to removal

    @operation("create", changes=False)
    def check_absent(self) -> Self:
        """Check that the volume has no image.

        :raise VolumeExistsError: names the file that is there.
        """
        self._check_absent()
        return self

    @operation("create")
    def create(self) -> Self:
        """Make an empty image of the configured size, if it keeps one.

        :raise VolumeExistsError: when there is an image of its name already.
        :raise InvalidSizeError: when the configured size is 0.
        """
        self._check_absent()
        if not self.keeps_image:
            return self
        if not self._size:
            raise InvalidSizeError(*self._about("create"), "its size must not be 0")
        self._remove_all()  # what an interrupted removal left
        files.make_directories(self.files.directory)
        with files.new_file(self.files.clean) as image:
            os.ftruncate(image, self._size)
        return self

    def _check_absent(self) -> None:
        # One that keeps no image too: its start replaces what has these names.
        for path in (self.files.clean, self.files.dirty):
            if self._has(path):
                reason = f"{path} is there already"
                raise VolumeExistsError(*self._about("create"), reason)
        self.use.refuse_if_importing("create")

    @operation("remove")
    def remove(self) -> Self:
        """Remove the volume with its revisions; no error when it is gone already.

        :raise VolumeStateError: while it is started.
        """
        self.use.refuse_if_started("remove")
        # First what tells that it exists: without these it is gone, whatever a crash or
        # a power cut leaves beside. The uncommitted one has all that the other has.
        files.remove(self.files.clean)
        files.remove(self.files.dirty)
        self._remove_all()
        with contextlib.suppress(OSError):
            self.files.directory.rmdir()
        self.use.end()
        self.pool.forget(self)
        return self

    def _remove_all(self) -> None:
        for revision in self.files.linked_revisions():
            files.remove(self.files.revision(revision))
        for path in (self.files.precache, self.files.origin):
            files.remove(path)
        for path in (*self.files.leftovers(), *self.files.given_up()):
            files.remove(path)
        if self.files.directory.is_dir():
            # Or the next volume of this name would find an image after a power cut.
            files.fsync(self.files.directory)

    @operation("start")
    def start(self) -> Self:
        """Provide `path` for a VM that is about to start.

        :raise VolumeStateError: when it is started, or an import is under way.
        :raise VolumeNotFoundError: when it, or its source, has no image.
        """
        self.use.refuse_if_started("start")
        self.use.refuse_if_importing("start")
        files.make_directories(self.files.directory)
        self._give_up_leftovers()
        if not (self.is_read_only or self._is_dirty()):
            files.give_up(self.files.dirty)
        # The claim before any file: the lock is held for this operation only, and what
        # keeps others out until the stop must be there before it is released.
        self.use.begin("start")
        try:
            self._provide_image()
        except BaseException:
            self.use.end()
            raise
        self.use.go_on()
        return self

    def _provide_image(self) -> None:
        if self.is_read_only:
            self._committed_image("start")
        elif self._is_dirty():
            log.info("going on with %s", self.files.dirty)  # a crash kept it back
        elif self.snap_on_start:
            self._snapshot_source()
        elif self.save_on_stop:
            image = self._committed_image("start")
            # Another name of it, or a reader, still relies on its content.
            may = self.revisions_to_keep < 0 and image.stat().st_nlink == 1
            if may and not self.use.is_exported():
                # On the disk before the VM writes: else the file that it has written
                # to could still be the committed image after a power cut.
                files.rename(image, self.files.dirty)
            else:
                self.provide_clone(image)
        else:
            with files.new_file(self.files.dirty, durable=False) as image_file:
                os.ftruncate(image_file, self._size)

    def _snapshot_source(self) -> None:
        # Once it has a second name nobody writes it, and its owner may go on: a clone
        # takes long, and would keep the source's stop waiting.
        with self.pool.operations.reading(self._source):
            image = self._source._committed_image("start")  # noqa: SLF001 - one class
            try:
                files.replace_with_link(image, self._origin, durable=False)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # The directory is a subvolume, or a mount, and links do not cross them.
                # On the disk before the clone of it is: a start after a power cut takes
                # what the VM wrote for whole if it is not shorter than its origin.
                self._copy(image, self._origin, durable=True, mark_origin=True)
        try:
            self._copy(self._origin, self.files.dirty)
        except BaseException:
            files.remove(self._origin)
            raise

    def provide_clone(self, image: Path) -> None:
        """Make what a VM writes to out of its committed image; blocking."""
        self._copy(image, self.files.dirty)

    @operation("stop")
    def stop(self) -> Self:
        """Commit or drop what a VM wrote; no error when it is not started."""
        self.use.refuse_if_lost("stop")
        if self.use.import_size is not None:
            return self  # it is not started
        if self._is_dirty():
            # Contents first, then the names: see `qubes_storage.files`.
            try:
                files.fsync(self.files.dirty)
            except OSError as error:
                # The kernel reports a failed write-back once and drops the pages
                # (Documentation/filesystems/vfs.rst, "Handling errors during
                # writeback"): a second fsync would succeed, and commit what is not
                # there. No space is another matter, as the pages stay.
                if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                    self.use.lose(system_reason(error))
                raise
            self.files.commit(self.files.dirty, self.revisions_to_keep)
        elif not self.keeps_image:
            if self.is_volatile and self.pool.ephemeral_volatile:
                with contextlib.suppress(FileNotFoundError):
                    files.empty(self.files.dirty)
            files.give_up(self.files.dirty)
        elif self.save_on_stop and self.use.started:
            files.fsync(self.files.directory)  # where a former attempt ended
        if self.snap_on_start:
            # Last: until it is committed, the origin tells whether the clone is whole.
            files.give_up(self._origin)
        # After all else: while it is claimed, a stop that failed can be repeated.
        self.use.end()
        return self

    @operation("verify", changes=False)
    def verify(self) -> Self:
        """Check that a start would find what it needs."""
        if self.snap_on_start:
            self._source._committed_image("verify")  # noqa: SLF001 - one class
        elif self.keeps_image and not self._has(self.files.dirty):
            self._committed_image("verify")
        return self

    # Contents, size and revisions

    @operation("export", changes=False)
    def export(self) -> Path:
        """Return the committed image, to be read only, until `export_end`."""
        if not self.keeps_image:
            raise VolumeStateError(*self._about("export"), "it keeps no image")
        image = self._committed_image("export")
        self.use.begin_export()
        return image

    async def export_end(self, path: Path) -> None:  # noqa: ARG002 - the contract
        """End what `export` began."""
        self.use.end_export()

    @operation("import")
    def import_data(self, size: int | None = None) -> Path:
        """Begin to replace the content: return a file of `size` bytes to write to."""
        size = self.size if size is None else self._check_size("import", size)
        self._check_importable()
        if not size:
            raise InvalidSizeError(*self._about("import"), "the size must not be 0")
        self._make_way()
        with files.new_file(self.files.imported, durable=False) as image:
            os.ftruncate(image, size)
        self.use.begin("import")
        self.use.import_size = size
        return self.files.imported

    @operation("import")
    def import_data_end(self, success: bool) -> None:
        """Commit the new content, or drop it.

        :raise InvalidSizeError: when it is not as long as was declared.
        """
        size = self.use.import_size
        if size is None:
            raise VolumeStateError(*self._about("import"), "no import is under way")
        # Ended whatever comes: an import that fails is dropped, and must not keep the
        # volume from being used. The lock of this operation still keeps others out.
        self.use.end()
        try:
            if not success:
                return
            status = files.stat_image(self.files.imported)
            if status is None or status.st_size != size:
                found = "nothing" if status is None else f"{status.st_size} bytes"
                reason = f"expected {size} bytes as declared, got {found}"
                raise InvalidSizeError(*self._about("import"), reason)
            files.fsync(self.files.imported)
            self.files.commit(self.files.imported, self.revisions_to_keep)
        finally:
            files.remove(self.files.imported)

    async def import_volume(self, src_volume: Volume) -> Self:
        """Replace the content and size by those committed in another volume."""
        if self.keeps_image:
            async with exporting(src_volume) as image:
                await self._import_image(image)
        return self

    @operation("import")
    def _import_image(self, image: Path) -> None:
        self._check_importable()
        self._make_way()
        self._copy(image, self.files.imported, durable=True)
        try:
            self.files.commit(self.files.imported, self.revisions_to_keep)
        finally:
            files.remove(self.files.imported)

    def _check_importable(self) -> None:
        if not self.keeps_image:
            raise VolumeStateError(*self._about("import"), "it keeps no image")
        self._refuse_unless_idle("import")

    def _make_way(self) -> None:
        files.make_directories(self.files.directory)
        self._give_up_leftovers()
        if not self.files.has_image():
            # Of one of this name whose removal was interrupted, perhaps another VM's.
            for revision in self.files.linked_revisions():
                files.give_up(self.files.revision(revision))

    @operation("resize")
    def resize(self, size: int) -> Self:
        """Enlarge the volume, also while a VM runs; loop devices over it follow.

        A volume that is stopped may also become smaller, whatever is in what it loses.

        :raise InvalidSizeError: when that is less than it has, and it is started.
        """
        self._check_size("resize", size)
        self.use.refuse_if_importing("resize")
        if size == self.size:
            return self
        started = self._is_dirty() or self.use.started
        if size < self.size and (started or size == 0):
            when = " while it is started" if started else ""
            reason = f"it has {self.size} bytes and cannot shrink to {size}{when}"
            raise InvalidSizeError(*self._about("resize"), reason)
        if self.is_read_only or not (started or self.save_on_stop or self.is_volatile):
            reason = "only a volume that is written can be resized"
            raise VolumeStateError(*self._about("resize"), reason)
        if started:
            with files.open_image(self.files.dirty, os.O_RDWR) as image:
                os.ftruncate(image, size)
                # before the VM learns of the size, and writes there: after a power cut
                # a shorter image would count as an incomplete clone (`_is_dirty`)
                os.fsync(image)
            update_loop_devices(self.files.dirty)
        elif self.save_on_stop:
            # Revisions and readers may share the committed image, so not even its size
            # changes: another file takes its name.
            committed = self._committed_image("resize")
            files.give_up(self.files.precache)
            self._copy(committed, self.files.clean, size=size, durable=True)
        self._size = size
        return self

    @operation("revert")
    def revert(self, revision: str | None = None) -> Self:
        """Make a revision the committed image; the present one becomes a revision.

        :param revision: one of `revisions`; None for the latest.
        """
        self._refuse_unless_idle("revert")
        found = self.files.revisions()
        if revision is not None:
            found = [each for each in found if each.id == revision]
        if not found:
            what = "revisions" if revision is None else f"revision {revision!r}"
            raise VolumeNotFoundError(*self._about("revert"), f"it has no {what}")
        self.files.revert(found[-1], self.revisions_to_keep)
        return self

    def _committed_image(self, action: str) -> Path:
        if self._has(self.files.clean):
            return self.files.clean
        if self._has(self.files.dirty):
            reason = f"{self.vid} is started and keeps no snapshot meanwhile"
            raise VolumeStateError(*self._about(action), reason)
        reason = f"{self.vid} has no image: create or import it first"
        raise VolumeNotFoundError(*self._about(action), reason)

    def _refuse_unless_idle(self, action: str) -> None:
        self.use.refuse_if_importing(action)
        self.use.refuse_if_started(action)
        if self._is_dirty():
            reason = "it has changes that are not committed; stop it first"
            raise VolumeStateError(*self._about(action), reason)

    # Its files

    def copy(self, source: int, target: int) -> bool:
        """Copy an image between file descriptors; for drivers to do better.

        :param target: descriptor of an empty file.
        :return: whether they share extents now.
        :raise OSError: as the operating system says.
        """
        ficlone.copy_sparse(source, target)
        return False

    def _copy(
        self,
        source: Path,
        target: Path,
        *,
        size: int | None = None,
        durable: bool = False,
        mark_origin: bool = False,
    ) -> None:
        # A copy has its full size from the beginning, and its data may not be on the
        # disk: after a power cut it would look whole. See `_is_dirty` for clones.
        durable = durable or not self.pool.shares_extents
        with (
            files.open_image(source) as original,
            files.new_file(target, durable=durable) as copy,
        ):
            shared = self.copy(original, copy)
            log.info("%s %s to %s", "cloned" if shared else "copied", source, target)
            if size is not None:
                os.ftruncate(copy, size)
            if mark_origin:
                files.mark_origin(copy, os.fstat(original))

    def tidy(self) -> None:
        """Give up what an interrupted operation left, unless one goes on; blocking."""
        # An operation that holds the lock looks for leftovers itself.
        with (
            contextlib.suppress(TimeoutError),
            hold(self.pool.dir_path, self.vid, timeout=0),
        ):
            if not self.use.is_used():
                self._give_up_leftovers()
        self.clean_up()

    def _give_up_leftovers(self) -> None:
        for path in self.files.leftovers():
            files.give_up(path)

    def clean_up(self) -> None:
        """Do in the background what an operation has left to be done."""

        def remove(_go_on: object) -> None:
            for path in self.files.given_up():
                files.remove(path)

        if self.files.given_up():
            self.pool.background.soon(f"remove {self.files.clean}", remove)
