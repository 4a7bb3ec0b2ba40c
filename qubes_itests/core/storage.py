"""The volumes of a VM: made, started and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
)
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import (
    QubesValueError,
    QubesVMError,
    QubesVMInUseError,
    QubesVMNotHaltedError,
    QubesVMStorageError,
)
from qubes_itests.core.store.journal import MAKE, REMOVE
from qubes_itests.host.exc import CommandError
from qubes_itests.host.filesystem import make_ext4
from qubes_itests.hypervisor.contract import Disk
from qubes_storage import Import, exporting
from qubes_storage.exc import (
    InvalidSizeError,
    StoragePoolException,
    VolumeExistsError,
)
from qubes_storage.ficlone import clone_or_copy
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_storage.pool import Pool
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
#: To what size a guest enlarges its filesystem, bytes. An emulated one takes 20 s for
#: each TiB, at the next start if not now: larger ones would not start in time any more,
#: and beyond some PiB ext4 does not go at all.
_LARGEST_FILESYSTEM: Final = 1 << 40

#: The number of revisions to keep that stands for not even a snapshot.
_NO_SNAPSHOTS: Final = -1

#: What of an image is looked at in one go, bytes.
_PART: Final = 1 << 16

VolumeAction = Callable[["Volume"], Awaitable[object]]


class Storage:
    """The storage of one VM.

    :param vm: the VM; its class says which volumes it has (`volume_config`).
    """

    def __init__(self, vm: QubesVM) -> None:
        self.vm = vm
        self.volumes: dict[str, Volume] = {}
        #: Whether they are there; those of a VM that is loaded from a store are.
        self.is_made = True
        #: What this object has made, and would undo.
        self._made: list[Volume] = []
        self._changes = 0

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
        app = self.vm.app
        named = settings.pop("pool", None) or app.default_pool_of(name)
        pool = app.get_pool("" if named is None else named)
        if len(self.volumes) >= _LAST_EXTRA - ord("a"):
            raise QubesValueError(f"VM {self.vm} has as many volumes as disk names")
        volume = pool.init_volume(self.vm, {**settings, "name": name})
        self.volumes[name] = volume
        return volume

    def get_volume(self, volume: Volume | str) -> Volume:
        """Return a volume by itself or its name; KeyError if there is none of that."""
        return self.volumes[volume] if isinstance(volume, str) else volume

    def unbind(self) -> None:
        """Forget the volumes; nothing happens on disk."""
        for volume in self.volumes.values():
            volume.pool.unbind(volume)
        self.volumes.clear()

    def forget(self, pool: Pool) -> None:
        """Forget the volumes in a pool that is gone with all that was in it."""
        gone = [volume for volume in self.volumes.values() if volume.pool is pool]
        for volume in gone:
            del self.volumes[volume.name]
        self._made = [volume for volume in self._made if volume not in gone]

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

    async def create(
        self, images: Mapping[str, Path] | None = None, *, adopt: bool = False
    ) -> None:
        """Make all volumes; the private one gets its filesystem.

        If one fails, those made before are removed again.

        :param images: raw images that volumes begin with, by the volumes' names.
        :param adopt: whether to take over volumes that are there and no VM has.
        :raise VolumeExistsError: when one is there already; it names the file.
        """
        images = images or {}
        adopted = await self._adoptable() if adopt else set()

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

        await self._make(make_or_say, besides=adopted)

    async def _adoptable(self) -> set[Volume]:
        keeping = [v for v in self.volumes.values() if v.keeps_image]
        pools = {volume.pool for volume in keeping}
        orphans = {
            (pool, vid)
            for pool in pools
            for vid in await self.vm.app.find_orphans(pool, besides=self.vm)
        }
        return {volume for volume in keeping if (volume.pool, volume.vid) in orphans}

    async def _make(self, make: VolumeAction, besides: Collection[Volume] = ()) -> None:
        """Make all volumes but some, or none; what is there already stays as it is."""
        wanted = [v for v in self.volumes.values() if v not in besides]
        for volume in wanted:
            _check_size(volume, "create", volume.size)
            await volume.check_absent()
        if self.vm.app.journal is not None:
            await self._note(MAKE, wanted)

        async def make_and_note(volume: Volume) -> None:
            # it was absent, so what a failure leaves is ours too
            self._made.append(volume)
            try:
                await make(volume)
            except VolumeExistsError:
                # meanwhile somebody else has made it
                self._made.remove(volume)
                raise

        try:
            for volume in wanted:
                await to_its_end(make_and_note(volume))
        except BaseException:
            await to_its_end(self.undo())
            raise
        self.is_made = True

    async def _note(self, action: str, volumes: list[Volume]) -> None:
        journal = self.vm.app.journal
        assert journal is not None  # noqa: S101 - its callers have looked
        work = asyncio.to_thread(journal.begin, action, self.vm, volumes)
        try:
            await to_its_end(work)
        except asyncio.CancelledError:
            journal.discard(self.vm.uuid)
            raise
        except OSError as error:
            raise QubesVMError(
                self.vm,
                f"VM {self.vm} cannot be {action}d: no note of that can be written in"
                f" {journal.directory}: {error.strerror}",
            ) from error

    async def undo(self, *, keep_note: bool = False) -> None:
        """Remove the volumes that this object has made, and no others.

        What cannot be removed is noted in the app's `problems`, and tried again when
        its store is loaded.

        :param keep_note: until the next save, as the store may have the VM.
        """
        failed = False
        while self._made:
            volume = self._made.pop()
            try:
                await volume.remove()
            except Exception as error:  # noqa: BLE001 - there is an error to be raised
                failed = True
                self.vm.app.problems.append(f"a volume of {self.vm} is left: {error}")
        self.is_made = False
        journal = self.vm.app.journal
        if journal is not None and not failed:
            if keep_note:
                journal.settle(self.vm.uuid)
            else:
                await asyncio.to_thread(journal.discard, self.vm.uuid)

    async def remove(self) -> None:
        """Remove all volumes, each of them even if another cannot be removed.

        Nothing happens when they were never made: what is there is not the VM's.  If
        one cannot be removed and another one is gone, the rest follows when the VM's
        store is loaded; with all that it keeps still there, the VM just stays.
        """
        if not self.is_made:
            self.unbind()
            return
        journal = self.vm.app.journal
        if journal is not None:
            await self._note(REMOVE, list(self.volumes.values()))
        failures: list[Exception] = []
        for volume in self.volumes.values():
            try:
                await volume.remove()
            except Exception as error:  # noqa: BLE001 - raised below
                failures.append(error)
        if failures:
            if journal is not None and await self._may_be_whole():
                # who was told that the VM stays may go on to use it
                await asyncio.to_thread(journal.discard, self.vm.uuid)
            raise failures[0]
        self.is_made = False
        self._made.clear()

    async def _may_be_whole(self) -> bool:
        try:
            return await self.is_whole()
        except StoragePoolException:
            return True  # as when a disk went away, with all that is on it

    async def is_whole(self) -> bool:
        """Tell whether all volumes that keep something are there."""
        kept = [volume for volume in self.volumes.values() if volume.keeps_image]
        for volume in kept:
            if volume.vid not in await volume.pool.find_volumes():
                return False
        return True

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Keep the VM from being removed for as long as a volume gets new content.

        That would else be put where no VM has it.

        :raise QubesVMError: when the VM is being made or removed.
        """
        self.vm.check_whole()
        self._changes += 1
        try:
            yield
        finally:
            self._changes -= 1

    def check_unchanging(self) -> None:
        """Raise QubesVMInUseError when a volume gets new content now."""
        if self._changes:
            raise QubesVMInUseError(
                self.vm, f"VM {self.vm} has a volume whose content is being replaced"
            )

    async def start(self) -> None:
        """Get the volumes ready for the VM; if one fails, stop the others again.

        A private volume that is empty gets a filesystem, as a new one does.
        """
        await self._fill_empty()
        await self._all(lambda v: v.start(), undo=lambda v: v.stop())

    async def _fill_empty(self) -> None:
        """Make a filesystem in an empty private volume, as one that was cleared is.

        It is committed before the start: a crash meanwhile leaves the volume empty, and
        a VM that begins with the volume of another finds the same there.
        """
        if "private" not in self.volumes:
            return
        volume = kept_by(self.volumes["private"])
        if not volume.save_on_stop or volume.is_dirty():
            return
        try:
            async with exporting(volume) as image:
                empty = await to_its_end(asyncio.to_thread(_is_empty, image))
            if empty:
                size = volume.size
                await _import(volume, lambda path: make_ext4(path, size, "private"))
        except (CommandError, OSError) as error:
            raise QubesVMStorageError(self.vm, volume, _said(error)) from error

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
        volume = self.get_volume(volume)
        _check_size(volume, "resize", size)
        with self.changing():
            await volume.resize(size)
        if self.vm.domain is None or not self.vm.is_running():
            return
        disk = self.disk_name(volume.name)
        await self.vm.domain.resize_disk(disk, size)
        if self.vm.agent is None or self.vm.is_paused():
            return
        timeout = self.vm.qrexec_timeout
        await self.vm.running_agent().wait_for_disk(disk, str(size), timeout=timeout)
        if volume.name in _WITH_FILESYSTEM:
            await self.vm.ask_service(
                _RESIZE_SERVICE,
                f"enlarge the filesystem of its volume {volume.name}",
                timeout=timeout,
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
        _check_size(volume, "import", size)
        transfer, begun = Import(volume, size), False
        try:
            with self.changing():
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

    async def export(self, volume: Volume | str) -> Path:
        """Return the committed image of a volume, to be read only, until `export_end`.

        For suites of the core: `exporting` begins and ends it, whatever happens.
        """
        return await self.get_volume(volume).export()

    async def export_end(self, volume: Volume | str, export_path: Path) -> None:
        """End what `export` began.

        :param export_path: what that has returned.
        """
        await self.get_volume(volume).export_end(export_path)

    async def import_data(self, volume: Volume | str, size: int | None) -> Path:
        """Begin to replace the content of a volume; `importing` does all of it.

        :param size: bytes; None for the present size.
        :return: the file to be written to, until `import_data_end`.
        """
        return await self.get_volume(volume).import_data(size)

    async def import_data_end(
        self,
        volume: Volume | str,
        success: bool,  # noqa: FBT001 - as in Qubes OS
    ) -> None:
        """End what `import_data` began.

        :param success: whether to commit the new content, or to drop it.
        """
        await self.get_volume(volume).import_data_end(success)

    async def import_volume(self, dst_volume: Volume, src_volume: Volume) -> Volume:
        """Replace the content of one of the VM's volumes by that of another volume.

        ``domain-import-volume`` (`name`, `source`) is fired then.

        :param dst_volume: of this VM, which must be halted.
        :param src_volume: any one.
        :return: the first.
        """
        _check_size(dst_volume, "import", src_volume.size)
        with self.changing():
            done = await dst_volume.import_volume(src_volume)
        await self.vm.fire_event_async(
            "domain-import-volume", name=dst_volume.name, source=src_volume
        )
        return done

    def set_revisions_to_keep(self, volume: str, value: int) -> None:
        """Set how many former images of a volume are kept.

        :param volume: its name.
        :param value: as for `Volume`; -1 takes away even the snapshot that a start
            begins with.
        :raise QubesValueError: for a value that cannot be.
        :raise QubesVMNotHaltedError: when there are to be no snapshots any more, or
            some again, while the VM, or a disposable VM that is made from it, runs.
        """
        if value < _NO_SNAPSHOTS:
            raise QubesValueError(
                f"revisions_to_keep is a number from {_NO_SNAPSHOTS}, not {value!r}"
            )
        found = self.volumes[volume]
        if (value == _NO_SNAPSHOTS) != (found.revisions_to_keep == _NO_SNAPSHOTS):
            for vm in self.vm.app.domains:
                is_made_from_it = vm.klass == "DispVM" and vm.template is self.vm
                if (vm is self.vm or is_made_from_it) and not vm.is_halted():
                    raise QubesVMNotHaltedError(vm)
        found.revisions_to_keep = value

    def get_disk_utilization(self) -> int:
        """Return the bytes that the volumes have allocated."""
        return sum(volume.usage for volume in self.volumes.values())

    async def verify(self) -> bool:
        """Raise what the first volume that is not in order raises; True if none is."""
        await self._all(lambda v: v.verify())
        self.vm.fire_event("domain-verify-files")
        return True

    async def clone(self, source: QubesVM, pool: str | None = None) -> None:
        """Make the volumes as copies of another VM's.

        Only those that keep their contents are copied; the others are made anew.  If
        one fails, those made before are removed again.

        :param pool: as for `in_pool`.
        :raise VolumeExistsError: when one is there already; it names the file.
        """
        own = self.vm.volume_settings()
        self.unbind()
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
            if volume.keeps_image:
                await volume.import_volume(kept_by(source.volumes[volume.name]))
            else:
                await volume.create()

        await self._make(copy)

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


def _check_size(volume: Volume, action: str, size: int) -> None:
    """Raise InvalidSizeError for one to which a guest enlarges no filesystem."""
    if volume.name in _WITH_FILESYSTEM and size > _LARGEST_FILESYSTEM:
        raise InvalidSizeError(
            volume.pool.name,
            volume.vid,
            action,
            f"its filesystem grows to {_LARGEST_FILESYSTEM} bytes at most (1 TiB),"
            f" not to {size}",
        )


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


def _is_empty(image: Path) -> bool:
    """Tell whether a file has nothing but zeroes in it; holes take no time."""
    with image.open("rb", buffering=0) as file:
        size, place = file.seek(0, os.SEEK_END), 0
        while place < size:
            try:
                place = file.seek(place, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return True  # the rest is a hole
                raise
            part = os.pread(file.fileno(), _PART, place)
            if part.strip(b"\0"):
                return False
            place += len(part)
    return True


def copy_image(source: Path, target: Path) -> None:
    """Give an existing file the contents of another, by reflink where that works.

    :raise OSError: as the operating system says.
    """
    with source.open("rb") as reader, target.open("r+b") as writer:
        clone_or_copy(reader.fileno(), writer.fileno())
