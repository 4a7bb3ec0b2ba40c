"""Storage drivers of a core under test, behind our contract of pools and volumes."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from qubes_storage.exc import (
    InvalidSizeError,
    InvalidVolumeConfigError,
    StoragePoolException,
    VolumeExistsError,
    VolumeNotFoundError,
    VolumeStateError,
)
from qubes_storage.operation import typed_errors
from qubes_storage.pool import Pool
from qubes_storage.volume import BlockDevice, Volume

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qubes_storage.pool import VolumeOwner

__all__ = ["CorePool", "CoreVolume"]


class Refusal(  # noqa: N818 - as its bases
    VolumeStateError, VolumeNotFoundError, VolumeExistsError, InvalidSizeError
):
    """What a driver of core-admin refuses.

    There is one class for all that there, so this stands for each of ours.
    """


class CorePool(Pool):
    """A pool of a driver that is written for core-admin.

    :param theirs: the driver's object, not set up.
    """

    # Without the constructor of `Pool`, which checks what it is given: it is the
    # driver's own checks, or their lack, that are to be seen.
    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs
        self.name = theirs.name
        self.revisions_to_keep = theirs.revisions_to_keep
        self.ephemeral_volatile = theirs.ephemeral_volatile
        #: By the identity of the driver's objects: those of one volume are equal.
        self._ours: dict[int, CoreVolume] = {}

    @property
    def config(self) -> dict[str, object]:
        """The keyword arguments that make this pool, and its driver's name."""
        return dict(self.theirs.config)

    @property
    def size(self) -> int | None:
        """Bytes that it could hold."""
        size: int | None = self.theirs.size
        return size

    @property
    def usage(self) -> int | None:
        """Bytes in use."""
        usage: int | None = self.theirs.usage
        return usage

    @property
    def usage_details(self) -> Mapping[str, int]:
        """What `size` and `usage` are made of."""
        return dict(self.theirs.usage_details)

    async def setup(self) -> None:
        """Make the pool ready for use."""
        await _done(self.theirs.setup())

    async def destroy(self) -> None:
        """Forget the pool."""
        await _done(self.theirs.destroy())

    def included_in(self, pools: Iterable[Pool]) -> Pool | None:
        """Return the pool among `pools` that this one takes its space from."""
        theirs = {p.name: p.theirs for p in pools if isinstance(p, CorePool)}
        found = self.theirs.included_in(SimpleNamespace(pools=theirs))
        if found is None:
            return None
        return next(pool for pool in pools if pool.name == found.name)

    def _make_volume(self, **config: Any) -> Volume:
        raise NotImplementedError

    def init_volume(
        self, vm: VolumeOwner | None, volume_config: Mapping[str, Any]
    ) -> Volume:
        """Make the object of a volume, as the driver does it.

        :raise InvalidVolumeConfigError: the driver refuses it.
        """
        config = dict(volume_config)
        vid = str(config.get("vid") or config.get("name"))
        if vm is None:
            # core-admin always has one
            prefix, _, rest = vid.partition("/")
            vm = SimpleNamespace(name=rest.partition("/")[0], dir_path_prefix=prefix)
        source = config.get("source")
        if isinstance(source, str):
            source = self.get_volume(source)
        if isinstance(source, CoreVolume):
            config["source"] = source.theirs
        if config.get("revisions_to_keep", 0) is None:
            del config["revisions_to_keep"]
        try:
            theirs = self.theirs.init_volume(vm, config)
        except Exception as error:
            if _refuses(error):
                raise InvalidVolumeConfigError(vid, str(error)) from error
            raise
        return self._known(theirs, source)

    def get_volume(self, vid: str) -> Volume:
        """Return the volume of that id."""
        for volume in self.list_volumes():
            if volume.vid == vid:
                return volume
        reason = "there is none of that id"
        raise VolumeNotFoundError(self.name, vid, "find", reason)

    def list_volumes(self) -> list[Volume]:
        """Return the volumes that the driver knows."""
        return [self._known(theirs) for theirs in self.theirs.list_volumes()]

    async def find_volumes(self) -> list[str]:
        """Return their ids."""
        return [volume.vid for volume in self.list_volumes()]

    def _known(self, theirs: Any, source: Volume | None = None) -> CoreVolume:
        if id(theirs) not in self._ours:
            self._ours[id(theirs)] = CoreVolume(self, theirs, source)
        return self._ours[id(theirs)]


class CoreVolume(Volume):
    """A volume of a driver that is written for core-admin.

    :param pool: what it lives in.
    :param theirs: the driver's object.
    :param source: of a snapshot.
    """

    # Without the constructor of `Volume`, for the same reason.
    def __init__(self, pool: CorePool, theirs: Any, source: Volume | None) -> None:
        self.pool = pool
        self.theirs = theirs
        self.source = source
        self.vid = theirs.vid
        self.name = theirs.name
        self.rw = theirs.rw
        self.save_on_stop = theirs.save_on_stop
        self.snap_on_start = theirs.snap_on_start

    @property
    def revisions_to_keep(self) -> int:
        """How many former images are kept."""
        keep: int = self.theirs.revisions_to_keep
        return keep

    @revisions_to_keep.setter
    def revisions_to_keep(self, value: int) -> None:
        self.theirs.revisions_to_keep = value

    @property
    def config(self) -> dict[str, object]:
        """The configuration that `CorePool.init_volume` makes this volume from."""
        return dict(self.theirs.config)

    @property
    def path(self) -> Path:
        """The image or device that a VM opens while the volume is started."""
        return Path(self.theirs.block_device().path)

    @property
    def size(self) -> int:
        """Size that a VM sees, bytes."""
        size: int = self.theirs.size
        return size

    @property
    def usage(self) -> int:
        """Bytes allocated to the current image."""
        usage: int = self.theirs.usage
        return usage

    @property
    def revisions(self) -> Mapping[str, str]:
        """Ids of the revisions and their times, oldest first."""
        return dict(self.theirs.revisions)

    def is_dirty(self) -> bool:
        """Tell whether there are changes that `stop` has yet to commit."""
        return bool(self.theirs.is_dirty())

    def is_outdated(self) -> bool:
        """Tell whether the source was committed anew since this snapshot started."""
        return bool(self.theirs.is_outdated())

    def block_device(self) -> BlockDevice:
        """Return what a hypervisor must know."""
        device = self.theirs.block_device()
        return BlockDevice(Path(device.path), device.name, device.rw)

    async def check_absent(self) -> Self:
        """Do nothing: there is no such operation in core-admin."""
        return self

    async def create(self) -> Self:
        """Make the volume."""
        return await self._self("create")

    async def remove(self) -> Self:
        """Remove the volume with its revisions."""
        return await self._self("remove")

    async def start(self) -> Self:
        """Provide `path` for a VM that is about to start."""
        return await self._self("start")

    async def stop(self) -> Self:
        """Commit or drop what a VM wrote."""
        return await self._self("stop")

    async def verify(self) -> Self:
        """Check that a start would find what it needs."""
        return await self._self("verify")

    async def export(self) -> Path:
        """Return the committed image, to be read only, until `export_end`."""
        return Path(await self._call("export"))

    async def export_end(self, path: Path) -> None:
        """End what `export` began."""
        await self._call("export_end", str(path))

    async def import_data(self, size: int | None = None) -> Path:
        """Begin to replace the content: return a file of `size` bytes to write to."""
        # as `Storage.import_data` of core-admin does it
        size = self.size if size is None else size
        return Path(await self._call("import_data", size))

    async def import_data_end(self, success: bool) -> None:
        """End what `import_data` began."""
        await self._call("import_data_end", success)

    async def import_volume(self, src_volume: Volume) -> Self:
        """Replace the content and size by those committed in another volume."""
        source = src_volume.theirs if isinstance(src_volume, CoreVolume) else src_volume
        return await self._self("import_volume", source)

    async def resize(self, size: int) -> Self:
        """Enlarge the volume."""
        return await self._self("resize", size)

    async def revert(self, revision: str | None = None) -> Self:
        """Make a revision the committed image."""
        return await self._self("revert", revision)

    async def _self(self, method: str, *arguments: object) -> Self:
        await self._call(method, *arguments)
        return self

    async def _call(self, action: str, *arguments: object) -> Any:
        """Call a method; what it refuses, and errors of the system, are ours then."""
        try:
            with typed_errors(self, action):
                return await _done(getattr(self.theirs, action)(*arguments))
        except StoragePoolException as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            # there is nothing that it looks at first
            reason = str(error.__cause__)
            raise Refusal(self.pool.name, self.vid, action, reason) from error.__cause__
        except Exception as error:
            if not _refuses(error):
                raise
            reason = str(error) or type(error).__name__
            raise Refusal(self.pool.name, self.vid, action, reason) from error


def _refuses(error: Exception) -> bool:
    """Tell whether an error of a driver says that it does not do such a thing."""
    own = any(cls.__name__ == "StoragePoolException" for cls in type(error).__mro__)
    return own or isinstance(error, NotImplementedError | LookupError | AssertionError)


async def _done(outcome: Any) -> Any:
    """Return what a method came to: some are coroutines, in one driver or another."""
    return await outcome if inspect.isawaitable(outcome) else outcome
