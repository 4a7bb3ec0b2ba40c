"""The volumes of a VM: made, started and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import (
    QubesValueError,
    QubesVMError,
    QubesVMInUseError,
    QubesVMNotHaltedError,
)
from qubes_itests.core.store.journal import MAKE, REMOVE, note
from qubes_itests.core.volume_content import (
    WITH_FILESYSTEM,
    check_size,
    fill_if_empty,
    import_image,
    kept_by,
    write_content,
)
from qubes_itests.host.exc import CommandError
from qubes_itests.hypervisor.contract import Disk
from qubes_storage import Import, Volume
from qubes_storage.exc import StoragePoolException, VolumeExistsError
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
        Iterable,
        Iterator,
        Mapping,
    )
    from pathlib import Path
    from typing import TypeAlias

    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_storage.pool import Pool

    VolumeAction: TypeAlias = Callable[[Volume], Awaitable[object]]

__all__ = ["Storage", "Volume", "in_pool"]

#: What the guest calls xvda, xvdb, xvdc and xvdd; others follow, up to xvdz.
_STANDARD: Final = ("root", "private", "volatile", "kernel")
_MOST_VOLUMES: Final = 25

#: Has the guest enlarge the filesystem of a volume; the volume's name is its input.
_RESIZE_SERVICE: Final = "qubes.ResizeDisk"

#: The number of revisions to keep that stands for not even a snapshot.
_NO_SNAPSHOTS: Final = -1


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

    def init_volume(self, name: str, volume_config: Mapping[str, Any]) -> Volume:
        """Bind one volume, and return it; nothing is made on disk.

        :param name: what the volume is called in the VM.
        :param volume_config: what the pool's `init_volume` takes, and ``pool``.
        :raise QubesPoolNotFoundError: when there is no such pool.
        """
        settings = dict(volume_config)
        app = self.vm.app
        named = settings.pop("pool", None) or app.pools.default_of(name)
        pool = app.get_pool("" if named is None else named)
        if len(self.volumes) >= _MOST_VOLUMES:
            raise QubesValueError(f"VM {self.vm} has as many volumes as disk names")
        volume = pool.init_volume(self.vm, {**settings, "name": name})
        self.volumes[name] = volume
        return volume

    def get_volume(self, volume_or_name: Volume | str) -> Volume:
        """Return a volume by itself or its name; KeyError if there is none of that."""
        if isinstance(volume_or_name, str):
            return self.volumes[volume_or_name]
        return volume_or_name

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
        extra = [name for name in self.volumes if name not in _STANDARD]
        return f"xvd{chr(ord('a') + [*_STANDARD, *extra].index(volume))}"

    def disks(self) -> Iterator[Disk]:
        """Yield the disks of the started volumes."""
        for name, volume in self.volumes.items():
            yield Disk(self.disk_name(name), volume.path, read_only=not volume.rw)

    async def create(
        self, images: Mapping[str, Path] | None = None, *, adopt: bool = False
    ) -> None:
        """Make all volumes; the private one gets its filesystem when the VM starts.

        If one fails, those made before are removed again.

        :param images: raw images that volumes begin with, by the volumes' names.
        :param adopt: whether to take over volumes that are there and no VM has.
        :raise VolumeExistsError: when one is there already; it names the file.
        """
        images = images or {}

        async def make(volume: Volume) -> None:
            if volume.name in images:
                await import_image(volume, images[volume.name])
            else:
                await volume.create()

        there: list[Volume] = []
        if adopt:
            keeping = [v for v in self.volumes.values() if v.keeps_image]
            for pool in {volume.pool for volume in keeping}:
                orphans = await self.vm.app.pools.find_orphans(pool, besides=self.vm)
                there += [v for v in keeping if v.pool is pool and v.vid in orphans]
        await self._make(make, besides=there)

    async def _make(self, make: VolumeAction, besides: Collection[Volume] = ()) -> None:
        """Make all volumes but some, or none; what is there already stays as it is."""
        wanted = [v for v in self.volumes.values() if v not in besides]
        for volume in wanted:
            check_size(volume, "create", volume.size)
            await volume.check_absent()
        await note(MAKE, self.vm, wanted)

        async def make_and_note(volume: Volume) -> None:
            # Before it is made: it was absent, so what a failure leaves is ours too.
            self._made.append(volume)
            try:
                with self._naming(volume):
                    await make(volume)
            except VolumeExistsError:
                # Made meanwhile by another process: `undo` must not remove it.
                self._made.remove(volume)
                raise

        try:
            for volume in wanted:
                # A thread fills the image, and goes on when its task is cancelled.
                # Undoing before it has ended would leave the file that it makes.
                await to_its_end(make_and_note(volume))
        except BaseException:
            await to_its_end(self.undo())
            raise
        self.is_made = True

    @contextlib.contextmanager
    def _naming(self, volume: Volume) -> Iterator[None]:
        """Have an error of a tool or of the system name the volume that it is of."""
        try:
            yield
        except (CommandError, OSError) as error:
            if isinstance(error, CommandError):
                # tools warn first and say last what ended them
                reason = error.stderr.strip().rpartition("\n")[2]
            else:
                reason = error.strerror or ""
            raise QubesVMError(
                self.vm,
                f"volume {volume.name} of VM {self.vm} could not be made in pool"
                f" {volume.pool}: {reason or error}",
            ) from error

    async def undo(self, *, keep_note: bool = False) -> None:
        """Remove the volumes that this object has made, and no others.

        What cannot be removed is noted in the app's `problems`, and tried again when
        its store is loaded.

        :param keep_note: until the next save, as the store may have the VM.
        """
        # Forgotten before the first await: `making` undoes once more what `create` has
        # undone, and others may have made volumes of these names by then.
        made, self._made = self._made[::-1], []
        failures = await _each(made, lambda volume: volume.remove())
        for error in failures:
            self.vm.app.problems.append(f"a volume of {self.vm} is left: {error}")
        self.is_made = False
        journal = self.vm.app.journal
        if journal is None or failures:
            return
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
        await note(REMOVE, self.vm, list(self.volumes.values()))
        failures = await _each(self.volumes.values(), lambda volume: volume.remove())
        if failures:
            try:
                whole = await self.is_whole()
            except StoragePoolException:
                # As when a disk went away: all may still be on it.
                whole = True
            if self.vm.app.journal is not None and whole:
                # The caller learns that the VM stays, and may use it: with the note the
                # next start would remove it after all.
                await asyncio.to_thread(self.vm.app.journal.discard, self.vm.uuid)
            raise failures[0]
        self.is_made = False
        self._made.clear()

    async def is_whole(self) -> bool:
        """Tell whether all volumes that keep something are there."""
        for volume in [v for v in self.volumes.values() if v.keeps_image]:
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
        # A count and no flag: several volumes may be imported at once.
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
        if private := self.volumes.get("private"):
            kept = kept_by(private)
            with self._naming(kept):
                await fill_if_empty(kept)
        started: list[Volume] = []
        try:
            for volume in self.volumes.values():
                # A thread starts it. Were the VM's start killed meanwhile, it would be
                # started a moment later, with nobody to stop it.
                await to_its_end(volume.start(), undo=lambda begun: begun.stop())
                started.append(volume)
        except BaseException:
            await to_its_end(_each(started[::-1], lambda volume: volume.stop()))
            raise

    async def stop(self) -> None:
        """Commit, or drop, what the VM wrote; every volume even if another fails."""
        failures = await _each(self.volumes.values(), lambda volume: volume.stop())
        if failures:
            raise failures[0]

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
            size, and the guest could not enlarge its filesystem; DeadlineError when it
            did not in the VM's `qrexec_timeout`, GuestError when it went away.
        """
        volume = self.get_volume(volume)
        check_size(volume, "resize", size)
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
        if volume.name in WITH_FILESYSTEM:
            await self.vm.commands.ask_service(
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
        check_size(volume, "import", size)
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

    async def import_content(
        self, volume: Volume, size: int, content: AsyncIterator[bytes]
    ) -> None:
        """Replace the content of a volume by a stream of bytes, as `importing` does.

        :param size: bytes that the volume has then; zeroes follow a shorter stream.
        :param content: the stream; if it raises, the volume stays as it was.
        """
        async with self.importing(volume, size) as path:
            await write_content(volume, path, content)

    # For suites of the core; `exporting` and `importing` begin and end together.

    async def export(self, volume: Volume | str) -> Path:
        """Return a volume's committed image, to be read only, until `export_end`."""
        return await self.get_volume(volume).export()

    async def export_end(self, volume: Volume | str, export_path: Path) -> None:
        """End what `export` began, which has returned `export_path`."""
        await self.get_volume(volume).export_end(export_path)

    async def import_data(self, volume: Volume | str, size: int | None) -> Path:
        """Begin to replace the content of a volume, until `import_data_end`.

        :param size: bytes; None for the present size.
        :return: the file to be written to.
        """
        return await self.get_volume(volume).import_data(size)

    async def import_data_end(
        self,
        volume: Volume | str,
        success: bool,
    ) -> None:
        """End what `import_data` began: commit the new content, or drop it."""
        await self.get_volume(volume).import_data_end(success)

    async def import_volume(self, dst_volume: Volume, src_volume: Volume) -> Volume:
        """Replace the content of one of the VM's volumes by that of another volume.

        ``domain-import-volume`` (`name`, `source`) is fired then.

        :param dst_volume: of this VM, which must be halted.
        :param src_volume: any one.
        :return: the first.
        """
        check_size(dst_volume, "import", src_volume.size)
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
        :raise QubesValueError: for an invalid value.
        :raise QubesVMNotHaltedError: when there are to be no snapshots any more, or
            some again, while the VM, or a disposable VM that is made from it, runs.
        """
        if value < _NO_SNAPSHOTS:
            raise QubesValueError(
                f"revisions_to_keep is a number from {_NO_SNAPSHOTS}, not {value!r}"
            )
        found = self.volumes[volume]
        if (value == _NO_SNAPSHOTS) != (found.revisions_to_keep == _NO_SNAPSHOTS):
            disposables = self.vm.app.domains.disposables()
            made_from_it = [vm for vm in disposables if vm.template_or_none is self.vm]
            for vm in (self.vm, *made_from_it):
                if not vm.is_halted():
                    raise QubesVMNotHaltedError(vm)
        found.revisions_to_keep = value

    def get_disk_utilization(self) -> int:
        """Return the bytes that the volumes have allocated."""
        return sum(volume.usage for volume in self.volumes.values())

    async def verify(self) -> bool:
        """Raise what the first volume that is not in order raises; True if none is."""
        for volume in self.volumes.values():
            await volume.verify()
        self.vm.fire_event("domain-verify-files")
        return True

    async def clone(self, source: QubesVM, pool: Pool | str | None = None) -> None:
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


def in_pool(config: Mapping[str, Any], pool: Pool | str | None) -> dict[str, Any]:
    """Return a volume's configuration with another pool, where it can have another.

    A snapshot has to be where its source is, and stays there.

    :param pool: name of the pool; None to change nothing.
    """
    if pool is None or config.get("snap_on_start"):
        return dict(config)
    return {**config, "pool": str(pool)}


async def _each(volumes: Iterable[Volume], action: VolumeAction) -> list[Exception]:
    """Do something to each volume, whatever that says of others; return failures."""
    failures: list[Exception] = []
    for volume in list(volumes):
        try:
            await action(volume)
        except Exception as error:  # noqa: BLE001 - for the caller to raise
            failures.append(error)
    return failures
