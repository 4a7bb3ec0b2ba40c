"""Thawing: the app and the VMs of a frozen test, where they were at its moment."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.core.exc import QubesException
from qubes_itests.core.network.addresses import DOWNLINK_MAC
from qubes_itests.core.volume_content import import_blocks, write_blocks
from qubes_itests.exc import HarnessError
from qubes_itests.frozen.folder import FrozenError
from qubes_itests.frozen.freezing import kind_of
from qubes_itests.guest.image.template import Template
from qubes_itests.host import memory
from qubes_itests.host.bridge import Bridge, Tap
from qubes_itests.hypervisor.contract import Disk, DomainSpec, Interface
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.frozen.folder import Folder
    from qubes_itests.frozen.manifest import FrozenDisk, FrozenVM
    from qubes_itests.run.testbed import Testbed

__all__ = ["thaw"]

log = logging.getLogger("qubes_itests.frozen")


async def thaw(testbed: Testbed, folder: Folder, wanted: Iterable[str] = ()) -> Qubes:
    """Return the app of a frozen test; its VMs go on that ran when it was frozen.

    The folder is only read.

    :param wanted: names of VMs that go on also if they were paused.
    :raise FrozenError: the folder cannot be used; this machine is of another kind, and
        it says in what.
    :raise HarnessError: what went wrong; the app is closed with the testbed then.
    """
    manifest = folder.manifest
    there, here = manifest.machine, await kind_of(testbed.hypervisor)
    differing = [
        f"{name}: {there.get(name, 'unknown')} there, {here.get(name, 'unknown')} here"
        for name in dict.fromkeys((*there, *here))
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise FrozenError(
            "it was frozen on a machine of another kind, and does not start on this"
            f" one: {'; '.join(differing)}"
        )
    limit = testbed.hypervisor.memory_limit or memory.for_vms()
    if folder.memory >> 20 > limit:
        raise FrozenError(
            f"its VMs have {folder.memory >> 20} MiB in their memory, of {limit} MiB"
            " that VMs may take of this machine's (--host-memory)"
        )
    try:
        return await _thaw(testbed, folder, wanted)
    except OSError as error:
        raise FrozenError(f"{folder.path} cannot be thawed: {error}") from error


async def _thaw(testbed: Testbed, folder: Folder, wanted: Iterable[str]) -> Qubes:
    manifest = folder.manifest
    await asyncio.to_thread(folder.require_whole)
    kernels = {
        each.name: Template(
            name=each.name,
            kernel=folder.file(each.kernel),
            initramfs=folder.file(each.initramfs),
            # the app's template has a volume with it
            root_image=Path(os.devnull),
            kernel_options=each.options,
            init=each.init,
        )
        for each in manifest.kernels
    }
    document = await asyncio.to_thread(folder.app)
    app = await testbed.copy_app(
        document, folder.path / "app.xml", kernels, manifest.policy
    )
    for link in manifest.volumes:
        volume = _vm(app, link.vm).volumes.get(link.volume)
        if volume is None:
            raise FrozenError(f"VM {link.vm} has no volume {link.volume!r}")
        await import_blocks(volume, link.image.size, folder.blocks(link.image))
    frozen = {_vm(app, each.name): each for each in manifest.vms}
    if len(frozen) < len(manifest.vms):
        raise FrozenError("a VM is frozen twice")
    running = [vm for vm, each in frozen.items() if each.running or vm.name in wanted]
    async with contextlib.AsyncExitStack() as stack:
        wires = _Wires(frozen, stack)
        await asyncio.to_thread(wires.make)
        for vm, each in frozen.items():
            await _load(vm, each, folder, wires)
        # One tight loop, as they were stopped.
        await asyncio.gather(*(vm.running_domain().resume() for vm in running))
        await asyncio.gather(*map(_go_on, running))
        await wires.hand_over([vm for vm in running if vm.agent is not None])
        stack.pop_all()
    return app


async def _go_on(vm: QubesVM) -> None:
    try:
        await vm.life.go_on()
    except (HarnessError, QubesException) as error:
        # a guest that hung when the test failed is one that somebody looks for
        log.warning("VM %s goes on, and does not answer: %s", vm.name, str(error))


def _vm(app: Qubes, name: str) -> QubesVM:
    vm = next((vm for vm in app.domains.startable() if vm.name == name), None)
    if vm is None:
        raise FrozenError(f"app.xml has no VM {name!r}")
    return vm


async def _load(vm: QubesVM, frozen: FrozenVM, folder: Folder, wires: _Wires) -> None:
    """Have a VM be where it was frozen; its virtual CPUs stand still."""
    kernel = vm.app.kernels.get(frozen.kernel)
    if kernel is None and frozen.kernel:
        raise FrozenError(f"VM {vm} booted {frozen.kernel!r}, which is not there")
    await vm.storage.start()
    try:
        disks = [await _disk(vm, disk, folder) for disk in frozen.disks]
        spec = DomainSpec(
            name=vm.name,
            uuid=vm.uuid,
            directory=vm.directory,
            memory=frozen.memory,
            max_memory=frozen.max_memory,
            vcpus=frozen.vcpus,
            kernel=kernel.kernel if kernel else None,
            initramfs=kernel.initramfs if kernel else None,
            kernel_options=frozen.options,
            disks=tuple(disks),
            interfaces=wires.interfaces(vm),
            balanced=frozen.balanced,
        )
        await vm.life.thaw(spec, folder.file(frozen.state))
    except BaseException:
        await to_its_end(vm.storage.stop())
        raise


async def _disk(vm: QubesVM, each: FrozenDisk, folder: Folder) -> Disk:
    """Return a disk with its contents of the moment."""
    if each.volume:
        if each.volume not in vm.volumes:
            raise FrozenError(f"VM {vm} has no volume {each.volume!r}")
        volume = vm.volumes[each.volume]
        path, has_it = volume.path, volume.is_read_only
    else:
        vm.directory.mkdir(parents=True, exist_ok=True)
        path, has_it = vm.directory / f"{each.name}.img", False
        path.touch()
    if not has_it:
        size, blocks = each.image.size, folder.blocks(each.image)
        await to_its_end(asyncio.to_thread(write_blocks, path, size, blocks))
    return Disk(each.name, path, read_only=each.read_only)


class _Wires:
    """The bridges and taps of thawed VMs, until they have them.

    :param frozen: the VMs.
    :param stack: removes what was made.
    """

    def __init__(
        self, frozen: dict[QubesVM, FrozenVM], stack: contextlib.AsyncExitStack
    ) -> None:
        self._frozen = frozen
        self._stack = stack
        self._bridges: dict[QubesVM, Bridge] = {}
        self._taps: dict[QubesVM, dict[str, Tap]] = {}

    def make(self) -> None:
        """Make all that the VMs are plugged into; blocking."""
        for vm, each in self._frozen.items():
            if any(link.link == "down" for link in each.interfaces):
                self._bridges[vm] = Bridge.create()
                self._stack.callback(self._bridges[vm].remove)
        for vm, each in self._frozen.items():
            self._taps[vm] = dict(self._plug(vm, each))

    def _plug(self, vm: QubesVM, frozen: FrozenVM) -> Iterator[tuple[str, Tap]]:
        for each in frozen.interfaces:
            bridge, own = None, None
            if each.link == "down":
                bridge = self._bridges[vm]
            elif each.link == "up" and vm.netvm is not None and each.mac == vm.mac:
                bridge, own = self._bridges.get(vm.netvm), [vm.net.address]
            if bridge is None:
                # what it was plugged into is gone
                nowhere = Bridge.create()
                tap = Tap.create(nowhere, each.mac)
                tap.cut()
                nowhere.remove()
            else:
                tap = Tap.create(bridge, each.mac, own)
            self._stack.callback(tap.remove)
            yield each.mac, tap

    def interfaces(self, vm: QubesVM) -> tuple[Interface, ...]:
        """Return a VM's interfaces, in their places."""
        places = {each.mac: each.place for each in self._frozen[vm].interfaces}
        return tuple(
            Interface(mac, tap=tap.name, place=places[mac])
            for mac, tap in self._taps[vm].items()
        )

    async def hand_over(self, running: list[QubesVM]) -> None:
        """Have VMs that go on take up what connects them, net VMs first."""
        for vm in running:
            if vm in self._bridges:
                with _warning(vm):
                    tap = self._taps[vm][DOWNLINK_MAC]
                    vm.net.take_up_clients(self._bridges[vm], tap)
        for vm in running:
            downlink = None if vm.netvm is None else vm.netvm.net.downlink
            if downlink is not None and vm.mac in self._taps[vm]:
                with _warning(vm):
                    await vm.net.take_up(downlink, self._taps[vm][vm.mac])


@contextlib.contextmanager
def _warning(vm: QubesVM) -> Iterator[None]:
    """Have one VM whose network does not go on stop no other."""
    try:
        yield
    except (HarnessError, QubesException) as error:
        log.warning("VM %s goes on without all of its network: %s", vm.name, str(error))
