"""Contract of a volume: one disk of a VM.

What a volume does at its VM's start and stop follows from its flags:

=============  =============  =====  ==============================================
save_on_stop   snap_on_start  rw     what it is
=============  =============  =====  ==============================================
yes            no             any    *saved*: changes are committed at stop (private)
no             yes            any    *snapshot* of its source, lost at stop (the root
                                     of an AppVM)
yes            yes            any    snapshot of its source whose changes are
                                     committed to an image of its own
no             no             yes    *volatile*: empty at every start
no             no             no     *read-only*: its image never changes but by
                                     import (a kernel)
=============  =============  =====  ==============================================

The attributes `size`, `usage`, `revisions`, `is_dirty` and `is_outdated` look at a few
names in one directory and block for microseconds; everything else is a coroutine.

What begins an import or an export makes a claim that only its end drops.  So nobody but
drivers calls `Volume.import_data` and `Volume.export` by themselves: `Import` and
`exporting` begin and end together, and a cancelled caller leaves nothing to be ended.
"""

from __future__ import annotations

import abc
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from qubes_storage.exc import InvalidSizeError, InvalidVolumeConfigError
from qubes_storage.layout import check_vid
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from qubes_storage.pool import Pool

__all__ = ["MAX_SIZE", "BlockDevice", "Import", "Volume", "exporting"]

#: The largest size of a volume, bytes: what a signed 64-bit offset can address, but for
#: a margin that hypervisors take (QEMU opens nothing larger: BDRV_MAX_LENGTH).
MAX_SIZE = 2**63 - 2**30


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """What a hypervisor must know of a started volume.

    :param path: image file or block device of the host.
    :param name: name of the volume, as in "private".
    :param rw: whether the VM may write.
    """

    path: Path
    name: str
    rw: bool


class Volume(abc.ABC):
    """One disk of a VM; made by `Pool.init_volume`.

    Every method leaves the volume as it was when it raises.

    :param pool: the pool that it lives in.
    :param vid: its id within the pool, ``prefix/vm/volume``.
    :param name: its name within the VM, as in "private".
    :param size: bytes, for the image that `create` or a volatile start makes.
    :param rw: whether the VM may write.
    :param save_on_stop: whether what the VM wrote is committed when it stops.
    :param snap_on_start: whether each start begins with the image of `source`.
    :param source: the volume that a snapshot is taken of; of the same pool.
    :param revisions_to_keep: how many former images `revert` may choose from; 0 for
        none, -1 for not even a snapshot while the VM runs; None for the pool's.
    :raise InvalidVolumeConfigError: for a combination that makes no sense.
    """

    def __init__(
        self,
        *,
        pool: Pool,
        vid: str,
        name: str,
        size: int = 0,
        rw: bool = False,
        save_on_stop: bool = False,
        snap_on_start: bool = False,
        source: Volume | None = None,
        revisions_to_keep: int | None = None,
    ) -> None:
        self.pool = pool
        self.vid = check_vid(vid)
        self.name = name
        self.rw = rw
        self.save_on_stop = save_on_stop
        self.snap_on_start = snap_on_start
        self.source = source
        self._size = self._check_size("configure", size)
        self._revisions_to_keep = pool.revisions_to_keep
        if revisions_to_keep is not None:
            self.revisions_to_keep = revisions_to_keep
        if snap_on_start and source is None:
            raise InvalidVolumeConfigError(vid, "snap_on_start needs a source")
        if source is not None and not snap_on_start:
            raise InvalidVolumeConfigError(vid, "a source needs snap_on_start")
        if source is not None and source.pool is not pool:
            reason = f"its source is in another pool, {source.pool.name!r}"
            raise InvalidVolumeConfigError(vid, reason)
        if source is not None and source.vid == vid:
            raise InvalidVolumeConfigError(vid, "it is its own source")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.pool.name}:{self.vid}>"

    def __str__(self) -> str:
        return self.vid

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Volume):
            return NotImplemented
        return self.pool is other.pool and self.vid == other.vid

    def __hash__(self) -> int:
        return hash((id(self.pool), self.vid))

    @property
    def revisions_to_keep(self) -> int:
        """How many former images are kept; takes effect at the next commit."""
        return self._revisions_to_keep

    @revisions_to_keep.setter
    def revisions_to_keep(self, value: int) -> None:
        self._revisions_to_keep = check_revisions_to_keep(self.vid, value)

    @property
    def is_volatile(self) -> bool:
        """Whether it is empty at every start."""
        return self.rw and not self.save_on_stop and not self.snap_on_start

    @property
    def is_read_only(self) -> bool:
        """Whether its committed image itself is what the VM gets."""
        return not (self.rw or self.save_on_stop or self.snap_on_start)

    @property
    def keeps_image(self) -> bool:
        """Whether it has an image of its own while it is not started."""
        return self.save_on_stop or self.is_read_only

    @property
    def config(self) -> dict[str, object]:
        """The configuration that `Pool.init_volume` makes this volume from."""
        config: dict[str, object] = {
            "name": self.name,
            "pool": self.pool.name,
            "vid": self.vid,
            "size": self.size,
            "rw": self.rw,
            "save_on_stop": self.save_on_stop,
            "snap_on_start": self.snap_on_start,
            "revisions_to_keep": self.revisions_to_keep,
        }
        if self.source is not None:
            config["source"] = self.source.vid
        return config

    @property
    @abc.abstractmethod
    def path(self) -> Path:
        """The image or device that a VM opens while the volume is started."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Size that a VM sees, bytes; what was configured where there is no image."""

    @property
    @abc.abstractmethod
    def usage(self) -> int:
        """Bytes allocated to the current image, those that it shares included."""

    @property
    @abc.abstractmethod
    def revisions(self) -> Mapping[str, str]:
        """Ids of the revisions and their times (ISO 8601, UTC), oldest first."""

    @abc.abstractmethod
    def is_dirty(self) -> bool:
        """Tell whether there are changes that `stop` has yet to commit."""

    @abc.abstractmethod
    def is_outdated(self) -> bool:
        """Tell whether the source was committed anew since this snapshot started."""

    def block_device(self) -> BlockDevice:
        """Return what a hypervisor must know; of use once it is started."""
        return BlockDevice(self.path, self.name, self.rw)

    @abc.abstractmethod
    async def check_absent(self) -> Self:
        """Check that nothing of the volume is there, whatever its flags.

        What is imported into a new volume would else replace somebody's data, and so
        would the snapshot of a start.

        :raise VolumeExistsError: when there is; it names what was found.
        """

    @abc.abstractmethod
    async def create(self) -> Self:
        """Make the volume: an empty image of the configured size, if it keeps one.

        :raise VolumeExistsError: when something of it is there already, whether it
            keeps an image or not; see `check_absent`.
        :raise VolumeStateError: while an import is under way.
        """

    @abc.abstractmethod
    async def remove(self) -> Self:
        """Remove the volume with its revisions; no error when it is gone already.

        :raise VolumeStateError: while it is started.
        """

    @abc.abstractmethod
    async def start(self) -> Self:
        """Provide `path` for a VM that is about to start.

        Changes that a crash kept from being committed are gone on with.

        :raise VolumeStateError: when it is started, or an import is under way.
        :raise VolumeNotFoundError: when it, or its source, has no image.
        """

    @abc.abstractmethod
    async def stop(self) -> Self:
        """Commit or drop what a VM wrote; no error when it is not started."""

    @abc.abstractmethod
    async def verify(self) -> Self:
        """Check that a start would find what it needs.

        :raise VolumeNotFoundError: when it, or its source, has no image.
        :raise VolumeError: when something else is in its place.
        """

    @abc.abstractmethod
    async def export(self) -> Path:
        """Return the committed image, to be read only, until `export_end`.

        For drivers to implement; `exporting` begins and ends it.

        :raise VolumeStateError: when this kind of volume has none, or has none now.
        :raise VolumeNotFoundError: when it has no image yet.
        """

    @abc.abstractmethod
    async def export_end(self, path: Path) -> None:
        """End what `export` began.

        :param path: what `export` returned.
        """

    @abc.abstractmethod
    async def import_data(self, size: int | None = None) -> Path:
        """Begin to replace the content: return a file of `size` bytes to write to.

        For drivers to implement; `Import` begins and ends it.

        :param size: bytes; None for the present size.
        :raise VolumeStateError: when it is started or dirty, when an import is under
            way, or when this kind of volume keeps no image.
        """

    @abc.abstractmethod
    async def import_data_end(self, success: bool) -> None:
        """End what `import_data` began.

        :param success: whether to commit the new content, or to drop it.
        :raise InvalidSizeError: when it is not as long as was declared; the import is
            dropped then.
        """

    @abc.abstractmethod
    async def import_volume(self, src_volume: Volume) -> Self:
        """Replace the content and size by those committed in another volume.

        Nothing happens if this kind of volume keeps no image, as when a VM is cloned.

        :param src_volume: a volume of any pool.
        """

    @abc.abstractmethod
    async def resize(self, size: int) -> Self:
        """Enlarge the volume, also while a VM runs.

        A driver may also make a volume smaller that is stopped.  Client tools ask for
        that by ``--force`` only.

        :param size: bytes.
        :raise InvalidSizeError: when it cannot have that size.
        """

    @abc.abstractmethod
    async def revert(self, revision: str | None = None) -> Self:
        """Make a revision the committed image; the present one becomes a revision.

        :param revision: one of `revisions`; None for the latest.
        :raise VolumeStateError: while it is dirty.
        :raise VolumeNotFoundError: when there is no such revision.
        """

    def _check_size(self, action: str, size: object) -> int:
        if isinstance(size, bool) or not isinstance(size, int):
            reason = f"expected a number of bytes, got {size!r}"
        elif not 0 <= size <= MAX_SIZE:
            reason = f"expected 0 to {MAX_SIZE} bytes, got {size}"
        else:
            return size
        raise InvalidSizeError(self.pool.name, self.vid, action, reason)


def check_revisions_to_keep(subject: str, value: object) -> int:
    """Return a number of revisions to keep, -1 or more.

    :raise InvalidVolumeConfigError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        reason = f"expected -1 or more for revisions_to_keep, got {value!r}"
        raise InvalidVolumeConfigError(subject, reason)
    return value


class Import:
    """An async context manager that replaces the content of a volume.

    Entered, it gives the file to be written to.  What was written is committed if the
    body ends well; if it raises, or is cancelled at whatever point, all of it is
    dropped.  A thread that writes to the file has to end before the body does.

    :param volume: of any driver.
    :param size: bytes; None for the present size.
    """

    def __init__(self, volume: Volume, size: int | None = None) -> None:
        self.volume = volume
        self.size = size
        #: Whether the volume has the new content.
        self.committed = False

    async def __aenter__(self) -> Path:
        """Begin.

        :raise VolumeError: as `Volume.import_data`.
        """
        return await to_its_end(
            self.volume.import_data(self.size),
            undo=lambda _path: self.volume.import_data_end(success=False),
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, *_error: object
    ) -> None:
        """Commit what was written, or drop it.

        :raise VolumeError: as `Volume.import_data_end`.
        """
        success = kind is None

        async def end() -> None:
            await self.volume.import_data_end(success)
            self.committed = success

        await to_its_end(end())


@contextlib.asynccontextmanager
async def exporting(volume: Volume) -> AsyncIterator[Path]:
    """Give the committed image of a volume, to be read only, as long as it is entered.

    :param volume: of any driver.
    :raise VolumeError: as `Volume.export`.
    """
    # Both to their ends: an export that is begun and never ended, or begun for a caller
    # who was cancelled meanwhile, would keep its claim as long as this process
    # lives, and a volume that keeps no snapshots could not start without a copy.
    path = await to_its_end(volume.export(), undo=volume.export_end)
    try:
        yield path
    finally:
        await to_its_end(volume.export_end(path))
