"""A volume of the driver ``file-reflink``: images as files that share extents.

A committed image is never written again, whoever has its name.  So a revision is a
second name for it, a commit is a rename, and neither costs more for a larger image.
The one thing that does is the clone that a start writes to.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

from qubes_storage import ficlone, files
from qubes_storage.exc import (
    ImportSizeError,
    InvalidSizeError,
    RevisionNotFoundError,
    VolumeExistsError,
    VolumeNotFoundError,
    VolumeStateError,
)
from qubes_storage.history import History
from qubes_storage.layout import VolumeFiles
from qubes_storage.loop import update_loop_devices
from qubes_storage.operation import typed_errors
from qubes_storage.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qubes_storage.layout import Revision
    from qubes_storage.reflink import ReflinkPool

__all__ = ["ReflinkVolume", "VolumeState"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class VolumeState:
    """What a process knows of a volume that its files do not tell."""

    started: bool = False
    import_size: int | None = None
    exports: int = 0


class ReflinkVolume(Volume):
    """A volume of the driver ``file-reflink``."""

    pool: ReflinkPool

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
        return {revision.id: revision.time for revision in self._history.revisions()}

    def is_dirty(self) -> bool:
        """Tell whether there are changes that `stop` has yet to commit."""
        return self.save_on_stop and os.path.lexists(self.files.dirty)

    def is_outdated(self) -> bool:
        """Tell whether the source was committed anew since this snapshot started."""
        if self.source is None or files.stat_image(self._origin) is None:
            return False
        return not files.same_image(self._origin, self._source.files.clean)

    async def create(self) -> Self:
        """Make an empty image of the configured size, if it keeps one.

        :raise VolumeExistsError: when it has an image already.
        :raise InvalidSizeError: when the configured size is 0.
        """
        return await self._run("create", self._create)

    async def remove(self) -> Self:
        """Remove the volume with its revisions; no error when it is gone already.

        :raise VolumeStateError: while it is started.
        """
        return await self._run("remove", self._remove)

    async def start(self) -> Self:
        """Provide `path` for a VM that is about to start.

        :raise VolumeStateError: when it is started, or an import is under way.
        :raise VolumeNotFoundError: when it, or its source, has no image.
        :raise OutOfSpaceError: when there is no room for the clone.
        """
        return await self._run("start", self._start)

    async def stop(self) -> Self:
        """Commit or drop what a VM wrote; no error when it is not started."""
        return await self._run("stop", self._stop)

    async def verify(self) -> Self:
        """Check that a start would find what it needs."""
        return await self._run("verify", self._verify)

    async def prepare(self) -> Self:
        """Make the clone that the next start needs ahead of time.

        Worth doing while nobody waits: the next start is then a rename.  No error
        when there is nothing to prepare.
        """
        return await self._run("prepare", self._prepare)

    async def export(self) -> Path:
        """Return the committed image, to be read only, until `export_end`."""
        await self._run("export", self._export)
        return self.files.clean

    async def export_end(self, path: Path) -> None:  # noqa: ARG002 - the contract
        """End what `export` began."""
        await self._run("export", self._export_end)

    async def import_data(self, size: int | None = None) -> Path:
        """Begin to replace the content: return a file of `size` bytes to write to."""
        size = self.size if size is None else self._check_size("import", size)
        await self._run("import", lambda: self._import_data(size))
        return self.files.imported

    async def import_data_end(self, success: bool) -> None:  # noqa: FBT001
        """Commit the new content, or drop it.

        :raise ImportSizeError: when it is not as long as was declared.
        """
        await self._run("import", lambda: self._import_data_end(success=success))

    async def import_volume(self, src_volume: Volume) -> Self:
        """Replace the content and size by those committed in another volume."""
        if not self._keeps_image:
            return self
        image = await src_volume.export()
        try:
            return await self._run("import", lambda: self._import_image(image))
        finally:
            await src_volume.export_end(image)

    async def resize(self, size: int) -> Self:
        """Enlarge the volume, also while a VM runs; loop devices over it follow.

        :raise InvalidSizeError: when that is less than it has.
        """
        self._check_size("resize", size)
        return await self._run("resize", lambda: self._resize(size))

    async def revert(self, revision: str | None = None) -> Self:
        """Make a revision the committed image; the present one becomes a revision.

        :param revision: one of `revisions`; None for the latest.
        """
        return await self._run("revert", lambda: self._revert(revision))

    # What follows blocks, runs in a thread, and holds the locks.

    def _create(self) -> None:
        if not self._keeps_image:
            return
        if self._has(self.files.clean) or self._has(self.files.dirty):
            raise VolumeExistsError(*self._about("create"), "it has an image already")
        if not self._size:
            raise InvalidSizeError(*self._about("create"), "its size must not be 0")
        self._remove_all()  # what an interrupted removal left
        files.make_directories(self.files.directory)
        with files.new_file(self.files.clean) as image:
            os.ftruncate(image, self._size)

    def _remove(self) -> None:
        if self.pool.state(self.vid).started:
            raise VolumeStateError(*self._about("remove"), "it is started")
        # Without its committed image it is gone, whatever a crash leaves beside.
        files.remove(self.files.clean)
        self._remove_all()
        with contextlib.suppress(OSError):
            self.files.directory.rmdir()
        self.pool.forget(self)

    def _remove_all(self) -> None:
        for revision in self.files.revisions():
            files.remove(self.files.revision(revision))
        for path in (self.files.dirty, self.files.precache, self.files.origin):
            files.remove(path)
        self._remove_leftovers()
        if self.files.directory.is_dir():
            files.fsync(self.files.directory)

    def _start(self) -> None:
        state = self.pool.state(self.vid)
        if state.started:
            raise VolumeStateError(*self._about("start"), "it is started already")
        self._refuse_during_import("start")
        self._remove_leftovers()
        files.make_directories(self.files.directory)
        self._provide_image()
        state.started = True

    def _provide_image(self) -> None:
        if self.is_read_only:
            self._committed_image("start")
        elif self.is_dirty():
            files.stat_image(self.files.dirty)  # a VM's changes that a crash kept back
        elif self.snap_on_start:
            self._snapshot_source()
        elif self.save_on_stop:
            self._snapshot_self()
        else:
            with files.new_file(self.files.dirty, durable=False) as image:
                os.ftruncate(image, self._size)

    def _snapshot_source(self) -> None:
        image = self._source._committed_image("start")  # noqa: SLF001 - one class
        files.replace_with_link(image, self._origin, durable=False)
        try:
            self._copy(self._origin, self.files.dirty, durable=self.save_on_stop)
        except BaseException:
            files.remove(self._origin)
            raise

    def _snapshot_self(self) -> None:
        image = self._committed_image("start")
        if self._may_write_committed(image):
            files.rename(image, self.files.dirty)
        elif self._has(self.files.precache):
            files.rename(self.files.precache, self.files.dirty)
        else:
            self._copy(image, self.files.dirty)

    def _may_write_committed(self, image: Path) -> bool:
        # Another name of it, or a reader, still relies on its content.
        exports = self.pool.state(self.vid).exports
        return self.revisions_to_keep < 0 and not exports and image.stat().st_nlink == 1

    def _stop(self) -> None:
        self.pool.state(self.vid).started = False
        if self.is_dirty():
            self._history.commit(self.files.dirty, self.revisions_to_keep)
        elif not self.save_on_stop:
            files.remove(self.files.dirty)
        if self.snap_on_start:
            files.remove(self._origin)

    def _verify(self) -> None:
        if self.snap_on_start:
            self._source._committed_image("verify")  # noqa: SLF001 - one class
        elif self._keeps_image and not self._has(self.files.dirty):
            self._committed_image("verify")

    def _prepare(self) -> None:
        clonable = self.save_on_stop and not self.snap_on_start
        if not clonable or self.revisions_to_keep < 0 or self.is_dirty():
            return
        if self._has(self.files.clean) and not self._has(self.files.precache):
            self._copy(self.files.clean, self.files.precache)

    def _export(self) -> None:
        if not self._keeps_image:
            raise VolumeStateError(*self._about("export"), "it keeps no image")
        self._committed_image("export")
        self.pool.state(self.vid).exports += 1

    def _export_end(self) -> None:
        state = self.pool.state(self.vid)
        state.exports = max(0, state.exports - 1)

    def _import_data(self, size: int) -> None:
        self._check_importable()
        if not size:
            raise InvalidSizeError(*self._about("import"), "the size must not be 0")
        files.make_directories(self.files.directory)
        self._remove_leftovers()
        with files.new_file(self.files.imported, durable=False) as image:
            os.ftruncate(image, size)
        self.pool.state(self.vid).import_size = size

    def _import_data_end(self, *, success: bool) -> None:
        state = self.pool.state(self.vid)
        size, state.import_size = state.import_size, None
        if size is None:
            raise VolumeStateError(*self._about("import"), "no import is under way")
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
        self._history.commit(self.files.imported, self.revisions_to_keep)

    def _import_image(self, image: Path) -> None:
        self._check_importable()
        files.make_directories(self.files.directory)
        self._remove_leftovers()
        self._copy(image, self.files.imported)
        try:
            self._history.commit(self.files.imported, self.revisions_to_keep)
        finally:
            files.remove(self.files.imported)

    def _resize(self, size: int) -> None:
        self._refuse_during_import("resize")
        if size < self.size:
            reason = f"it has {self.size} bytes and cannot shrink to {size}"
            raise InvalidSizeError(*self._about("resize"), reason)
        if size == self.size:
            return
        if self.is_dirty() or self.pool.state(self.vid).started:
            self._resize_running(size)
        elif self.save_on_stop:
            files.remove(self.files.precache)
            self._copy(self._committed_image("resize"), self.files.clean, size=size)
        elif not self.is_volatile:
            reason = "only a volume that is written can be resized"
            raise VolumeStateError(*self._about("resize"), reason)
        self._size = size

    def _resize_running(self, size: int) -> None:
        if self.is_read_only:
            raise VolumeStateError(*self._about("resize"), "it is read-only")
        with files.open_image(self.files.dirty, os.O_RDWR) as image:
            os.ftruncate(image, size)
            os.fsync(image)
        update_loop_devices(self.files.dirty)

    def _revert(self, wanted: str | None) -> None:
        self._refuse_during_import("revert")
        if self.is_dirty() or self.pool.state(self.vid).started:
            raise VolumeStateError(*self._about("revert"), "it is started or dirty")
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

    def _check_importable(self) -> None:
        if not self._keeps_image:
            raise VolumeStateError(*self._about("import"), "it keeps no image")
        if self.is_dirty() or self.pool.state(self.vid).started:
            raise VolumeStateError(*self._about("import"), "it is started or dirty")
        self._refuse_during_import("import")

    def _refuse_during_import(self, action: str) -> None:
        if self.pool.state(self.vid).import_size is not None:
            raise VolumeStateError(*self._about(action), "an import is under way")

    def _remove_leftovers(self) -> None:
        for path in self.files.leftovers():
            files.remove(path)

    @staticmethod
    def _copy(
        source: Path, target: Path, *, size: int | None = None, durable: bool = True
    ) -> None:
        with (
            files.open_image(source) as original,
            files.new_file(target, durable=durable) as copy,
        ):
            shared = ficlone.clone_or_copy(original, copy)
            log.info("%s %s to %s", "cloned" if shared else "copied", source, target)
            if size is not None:
                os.ftruncate(copy, size)

    @property
    def _keeps_image(self) -> bool:
        return self.save_on_stop or self.is_read_only

    @property
    def _origin(self) -> Path:
        return self.files.origin if self.save_on_stop else self.files.clean

    @property
    def _source(self) -> ReflinkVolume:
        return cast("ReflinkVolume", self.source)

    def _current(self) -> os.stat_result | None:
        with typed_errors(self, "inspect"):
            dirty = files.stat_image(self.files.dirty)
            return dirty or files.stat_image(self.files.clean)

    def _about(self, action: str) -> tuple[str, str, str]:
        return self.pool.name, self.vid, action

    @staticmethod
    def _has(path: Path) -> bool:
        return files.stat_image(path) is not None

    async def _run(self, action: str, function: Any) -> Self:
        await self.pool.operations.run(self, action, function)
        return self
