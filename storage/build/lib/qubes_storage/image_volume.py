"""The life of volumes whose images are plain files: from creation to removal."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from typing import TYPE_CHECKING, Self

from qubes_storage import files
from qubes_storage.exc import InvalidSizeError, VolumeExistsError, system_reason
from qubes_storage.image_content import ImageContent

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ImageVolume"]

log = logging.getLogger(__name__)


class ImageVolume(ImageContent):
    """A volume of the driver ``file``, and what those of ``file-reflink`` build on."""

    async def check_absent(self) -> Self:
        """Check that the volume has no image.

        :raise VolumeExistsError: names the file that is there.
        """
        return await self._run("create", self._check_absent)

    async def create(self) -> Self:
        """Make an empty image of the configured size, if it keeps one.

        :raise VolumeExistsError: when there is an image of its name already.
        :raise InvalidSizeError: when the configured size is 0.
        """
        return await self._change("create", self._create)

    async def remove(self) -> Self:
        """Remove the volume with its revisions; no error when it is gone already.

        :raise VolumeStateError: while it is started.
        """
        return await self._change("remove", self._remove)

    async def start(self) -> Self:
        """Provide `path` for a VM that is about to start.

        :raise VolumeStateError: when it is started, or an import is under way.
        :raise VolumeNotFoundError: when it, or its source, has no image.
        :raise OutOfSpaceError: when there is no room for the clone.
        """
        return await self._change("start", self._start)

    async def stop(self) -> Self:
        """Commit or drop what a VM wrote; no error when it is not started."""
        return await self._change("stop", self._stop)

    async def verify(self) -> Self:
        """Check that a start would find what it needs."""
        return await self._run("verify", self._verify)

    # What follows blocks, runs in a thread, and holds the locks.

    def _check_absent(self) -> None:
        # One that keeps no image too: its start replaces what has these names.
        for path in (self.files.clean, self.files.dirty):
            if self._has(path):
                reason = f"{path} is there already"
                raise VolumeExistsError(*self._about("create"), reason)
        self._use.refuse_if_importing("create")

    def _create(self) -> None:
        self._check_absent()
        if not self.keeps_image:
            return
        if not self._size:
            raise InvalidSizeError(*self._about("create"), "its size must not be 0")
        self._remove_all()  # what an interrupted removal left
        files.make_directories(self.files.directory)
        with files.new_file(self.files.clean) as image:
            os.ftruncate(image, self._size)

    def _remove(self) -> None:
        self._use.refuse_if_started("remove")
        # Without its committed image it is gone, whatever a crash leaves beside.
        files.remove(self.files.clean)
        self._remove_all()
        with contextlib.suppress(OSError):
            self.files.directory.rmdir()
        self._use.end()
        self.pool.forget(self)

    def _remove_all(self) -> None:
        for revision in self.files.revisions():
            files.remove(self.files.revision(revision))
        for path in (self.files.dirty, self.files.precache, self.files.origin):
            files.remove(path)
        for path in (*self.files.leftovers(), *self.files.given_up()):
            files.remove(path)
        if self.files.directory.is_dir():
            files.fsync(self.files.directory)

    def _start(self) -> None:
        self._use.refuse_if_started("start")
        self._use.refuse_if_importing("start")
        files.make_directories(self.files.directory)
        self._give_up_leftovers()
        if not (self.is_read_only or self._is_dirty()):
            files.give_up(self.files.dirty)
        self._use.begin("start")
        try:
            self._provide_image()
        except BaseException:
            self._use.end()
            raise
        self._use.go_on()

    def _provide_image(self) -> None:
        if self.is_read_only:
            self._committed_image("start")
        elif self._is_dirty():
            log.info("going on with %s", self.files.dirty)  # a crash kept it back
        elif self.snap_on_start:
            self._snapshot_source()
        elif self.save_on_stop:
            self._snapshot_self()
        else:
            with files.new_file(self.files.dirty, durable=False) as image:
                os.ftruncate(image, self._size)

    def _snapshot_source(self) -> None:
        # Once it has a second name nobody writes it, and its owner may go on.
        with self.pool.operations.reading(self._source):
            image = self._source._committed_image("start")  # noqa: SLF001 - one class
            self._remember_origin(image)
        try:
            self._copy(self._origin, self.files.dirty)
        except BaseException:
            files.remove(self._origin)
            raise

    def _remember_origin(self, image: Path) -> None:
        try:
            files.replace_with_link(image, self._origin, durable=False)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # The directory is a subvolume, or a mount, and links do not cross those.
            # On the disk before the clone of it is: a start after a power cut takes
            # what the VM wrote for whole if it is not shorter than its origin.
            self._copy(image, self._origin, durable=True, mark_origin=True)

    def _snapshot_self(self) -> None:
        image = self._committed_image("start")
        if self._may_write_committed(image):
            files.rename(image, self.files.dirty)
        else:
            self._clone(image)

    def _may_write_committed(self, image: Path) -> bool:
        # Another name of it, or a reader, still relies on its content.
        may = self.revisions_to_keep < 0 and image.stat().st_nlink == 1
        return may and not self._use.is_exported()

    def _clone(self, image: Path) -> None:
        """Make what a VM writes to out of its committed image."""
        self._copy(image, self.files.dirty)

    def _stop(self) -> None:
        self._use.refuse_if_lost("stop")
        if self._use.import_size is not None:
            return  # it is not started
        if self._is_dirty():
            self._sync_dirty()
            self._history.commit(self.files.dirty, self.revisions_to_keep)
        elif not self.keeps_image:
            self._drop_dirty()
        elif self.save_on_stop and self._use.started:
            files.fsync(self.files.directory)  # where a former attempt ended
        if self.snap_on_start:
            files.give_up(self._origin)
        self._use.end()

    def _sync_dirty(self) -> None:
        try:
            files.fsync(self.files.dirty)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                self._use.lose(system_reason(error))
            raise

    def _drop_dirty(self) -> None:
        if self.is_volatile and self.pool.ephemeral_volatile:
            with contextlib.suppress(FileNotFoundError):
                files.empty(self.files.dirty)
        files.give_up(self.files.dirty)

    def _verify(self) -> None:
        if self.snap_on_start:
            self._source._committed_image("verify")  # noqa: SLF001 - one class
        elif self.keeps_image and not self._has(self.files.dirty):
            self._committed_image("verify")
