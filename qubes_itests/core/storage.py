"""The volumes of a VM: made, started and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import (
    QubesPoolNotFoundError,
    QubesValueError,
    QubesVMNotHaltedError,
    QubesVMStorageError,
)
from qubes_itests.host.exc import CommandError
from qubes_itests.host.filesystem import make_ext4
from qubes_itests.hypervisor.contract import Disk
from qubes_storage.ficlone import clone_or_copy
from qubes_storage.transfer import Import
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_storage.volume import Volume

__all__ = ["Storage", "copy_image", "in_pool", "kept_by"]

#: What the guest calls the standard volumes; others follow from xvde on.
_DISK_NAMES: Final = {
    "root": "xvda",
    "private": "xvdb",
    "volatile": "xvdc",
    "kernel": "xvdd",
}
_FIRST_EXTRA: Final = ord("e")
_LAST_EXTRA: Final = ord("z")

#: Has the guest enlarge the filesystem of a volume; the volume's name is its input.
_RESIZE_SERVICE: Final = "qubes.ResizeDisk"
_WITH_FILESYSTEM: Final = ("root", "private")

VolumeAction = Callable[["Volume"], Awaitable[object]]


class Storage:
    """The storage of one VM.

    :param vm: the VM; its class says which volumes it has (`volume_config`).
    """

    def __init__(self, vm: QubesVM) -> None:
        self.vm = vm
        self.volumes: dict[str, Volume] = {}

    def init_volumes(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Bind the VM's volumes; nothing is made on disk.

        :param configs: for each volume's name what the pool's `init_volume` takes, and
            ``pool``.
        """
        for name, config in configs.items():
            self.init_volume(name, config)

    def init_volume(self, name: str, config: Mapping[str, Any]) -> Volume:
        """Bind one volume, and return it; nothing is made on disk.

        :param name: what the volume is called in the VM.
        :param config: as for `init_volumes`.
        :raise QubesPoolNotFoundError: when there is no such pool.
        """
        settings = dict(config)
        pool_name = str(settings.pop("pool", self.vm.app.default_pool))
        pools = self.vm.app.pools
        if pool_name not in pools:
            raise QubesPoolNotFoundError(pool_name, pools)
        if len(self.volumes) >= _LAST_EXTRA - ord("a"):
            raise QubesValueError(f"VM {self.vm} has as many volumes as disk names")
        volume = pools[pool_name].init_volume(self.vm, {**settings, "name": name})
        self.volumes[name] = volume
        return volume

    def disk_name(self, volume: str) -> str:
        """Return what the guest calls a volume under /dev."""
        if volume in _DISK_NAMES:
            return _DISK_NAMES[volume]
        extra = [name for name in self.volumes if name not in _DISK_NAMES]
        return f"xvd{chr(_FIRST_EXTRA + extra.index(volume))}"

    def disks(self) -> Iterator[Disk]:
        """Yield the disks of the started volumes."""
        for name, volume in self.volumes.items():
            yield Disk(self.disk_name(name), volume.path, read_only=not volume.rw)

    async def create(self, images: Mapping[str, Path] | None = None) -> None:
        """Make all volumes; the private one gets its filesystem.

        If one fails, those made before are removed again.

        :param images: raw images that volumes begin with, by the volumes' names.
        """
        images = images or {}

        async def make(volume: Volume) -> None:
            if volume.name in images:
                image = images[volume.name]
                await _import(volume, lambda path: copy_image(image, path))
            elif volume.name == "private" and volume.save_on_stop:
                size = volume.size
                await _import(volume, lambda path: make_ext4(path, size, "private"))
            else:
                await volume.create()

        async def make_or_say(volume: Volume) -> None:
            try:
                await make(volume)
            except (CommandError, OSError) as error:
                raise QubesVMStorageError(self.vm, volume, _said(error)) from error

        await self._all(make_or_say, undo=lambda v: v.remove())

    async def remove(self) -> None:
        """Remove all volumes, each of them even if another cannot be removed."""
        failure: BaseException | None = None
        for volume in self.volumes.values():
            try:
                await volume.remove()
            except Exception as error:  # noqa: BLE001 - raised below
                failure = failure or error
        if failure is not None:
            raise failure

    async def start(self) -> None:
        """Get the volumes ready for the VM; if one fails, stop the others again."""
        await self._all(lambda v: v.start(), undo=lambda v: v.stop())

    async def stop(self) -> None:
        """Commit, or drop, what the VM wrote; every volume even if another fails."""
        failure: BaseException | None = None
        for volume in self.volumes.values():
            try:
                await volume.stop()
            except Exception as error:  # noqa: BLE001 - raised below
                failure = failure or error
        if failure is not None:
            raise failure

    @property
    def outdated_volumes(self) -> list[Volume]:
        """The volumes whose source was committed anew since the VM started."""
        return [volume for volume in self.volumes.values() if volume.is_outdated()]

    async def resize(self, volume: Volume | str, size: int) -> None:
        """Enlarge a volume; if the VM runs, it has the new size when this returns.

        The filesystems of root and private grow with their volumes.  A VM that is
        paused gets the larger disk, and its filesystem stays as it is.

        :param volume: the volume, or its name.
        :param size: bytes.
        :raise VolumeError: nothing has changed then.
        :raise subprocess.CalledProcessError: the volume and the disk have their new
            size, and the guest could not enlarge its filesystem.
        :raise DeadlineError: likewise; it did not within the VM's `qrexec_timeout`.
        :raise GuestError: likewise; it wrote without end, or went away.
        """
        if isinstance(volume, str):
            volume = self.volumes[volume]
        await volume.resize(size)
        if self.vm.domain is None or not self.vm.is_running():
            return
        await self.vm.domain.resize_disk(self.disk_name(volume.name), size)
        if volume.name in _WITH_FILESYSTEM and not self.vm.is_paused():
            await self.vm.ask_service(
                _RESIZE_SERVICE,
                f"enlarge the filesystem of its volume {volume.name}",
                timeout=self.vm.qrexec_timeout,
                input=f"{volume.name}\n".encode(),
                user="root",
            )

    @contextlib.asynccontextmanager
    async def importing(self, volume: Volume, size: int) -> AsyncIterator[Path]:
        """Replace the content of a volume, as `Import` does, and tell handlers of it.

        :param volume: one of the VM's, which is halted.
        :param size: bytes.
        :raise QubesVMNotHaltedError: when it is not.
        :raise VolumeError: as the driver says.
        """
        if not self.vm.is_halted():
            raise QubesVMNotHaltedError(self.vm)
        transfer, begun = Import(volume, size), False
        try:
            async with transfer as path:
                begun = True
                self.vm.fire_event(
                    "domain-volume-import-begin", volume=volume.name, size=size
                )
                yield path
        finally:
            if begun:
                self.vm.fire_event(
                    "domain-volume-import-end",
                    volume=volume.name,
                    success=transfer.committed,
                )

    async def verify(self) -> None:
        """Raise what the first volume that is not in order raises."""
        await self._all(lambda v: v.verify())

    async def clone(self, source: QubesVM, pool: str | None = None) -> None:
        """Make the volumes as copies of another VM's.

        Only those that keep their contents are copied; the others are made anew.  If
        one fails, those made before are removed again.

        :param pool: as for `in_pool`.
        """
        own = self.vm.volume_settings()
        self.volumes.clear()
        for name, volume in source.volumes.items():
            config = {**volume.config, "pool": str(volume.pool)}
            del config["vid"]
            if type(self.vm) is not type(source):
                # what is kept, and what begins anew, is a matter of the class
                config.pop("source", None)
                flags = ("snap_on_start", "save_on_stop", "source")
                config |= {k: v for k, v in own.get(name, {}).items() if k in flags}
            self.init_volume(name, in_pool(config, pool))

        async def copy(volume: Volume) -> None:
            if volume.save_on_stop or volume.is_read_only:
                await volume.import_volume(kept_by(source.volumes[volume.name]))
            else:
                await volume.create()

        await self._all(copy, undo=lambda v: v.remove())

    async def _all(
        self, action: VolumeAction, undo: VolumeAction | None = None
    ) -> None:
        done: list[Volume] = []

        async def act(volume: Volume) -> None:
            await action(volume)
            done.append(volume)

        try:
            for volume in self.volumes.values():
                await to_its_end(act(volume))
        except BaseException:
            if undo is not None:
                await to_its_end(_undo(done, undo))
            raise


def kept_by(volume: Volume) -> Volume:
    """Return the volume whose committed image a start of this one begins with.

    A snapshot that keeps nothing of its own begins with what its source does.
    """
    while volume.source is not None and not volume.save_on_stop:
        volume = volume.source
    return volume


async def _undo(done: list[Volume], undo: VolumeAction) -> None:
    for volume in reversed(done):
        with contextlib.suppress(Exception):
            await undo(volume)


def in_pool(config: Mapping[str, Any], pool: str | None) -> dict[str, Any]:
    """Return a volume's configuration with another pool, where it can have another.

    A snapshot has to be where its source is, and stays there.

    :param pool: name of the pool; None to change nothing.
    """
    if pool is None or config.get("snap_on_start"):
        return dict(config)
    return {**config, "pool": str(pool)}


def _said(error: CommandError | OSError) -> str:
    if isinstance(error, CommandError):
        # tools warn first and say last what ended them
        return error.stderr.strip().rpartition("\n")[2] or str(error)
    return error.strerror or str(error)


async def _import(volume: Volume, fill: Callable[[Path], None]) -> None:
    # not created first: the empty image would become a revision
    async with Import(volume, volume.size) as path:
        await to_its_end(asyncio.to_thread(fill, path))


def copy_image(source: Path, target: Path) -> None:
    """Give an existing file the contents of another, by reflink where that works.

    :raise OSError: as the operating system says.
    """
    with source.open("rb") as reader, target.open("r+b") as writer:
        clone_or_copy(reader.fileno(), writer.fileno())
