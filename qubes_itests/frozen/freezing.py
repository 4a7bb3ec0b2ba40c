"""Freezing: memory and disks of all VMs of an app, as of one moment, into a folder.

All virtual CPUs are stopped first, one right after the other, and go on when the memory
is written.  The disks are cloned meanwhile, and copied out of the clones later.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests import __version__
from qubes_itests.core.network.addresses import DOWNLINK_MAC
from qubes_itests.core.store.document import to_bytes
from qubes_itests.core.store.saving import state_of
from qubes_itests.core.volume_content import copy_committed, copy_image, data_blocks
from qubes_itests.exc import HarnessError
from qubes_itests.frozen.folder import BlockFile, FrozenError, write_manifest
from qubes_itests.frozen.manifest import (
    MOST_BYTES,
    FrozenDisk,
    FrozenInterface,
    FrozenVM,
    Image,
    Kernel,
    Link,
    Manifest,
)
from qubes_itests.hypervisor.contract import DomainState
from qubes_itests.hypervisor.exc import StateError
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.hypervisor.contract import Domain, DomainSpec, Hypervisor

__all__ = ["freeze", "kind_of"]

#: States of a VM that has a domain which can be stopped where it is.
_LIVE: Final = ("Running", "Paused", "Suspended")
#: Seconds that an agent has to answer before its VM is frozen, and afterwards.
_AGENT_TIMEOUT: Final = 3.0


async def kind_of(hypervisor: Hypervisor) -> dict[str, str]:
    """Return what must be the same where a VM of it is thawed; see `Manifest`.

    :raise FrozenError: when it freezes nothing.
    """
    machine = await hypervisor.machine()
    if not machine:
        raise FrozenError(f"the back end {hypervisor.name!r} freezes no VMs")
    return {**machine, "qubes_itests": __version__}


async def freeze(app: Qubes, place: Path, scratch: Path, test: str) -> None:
    """Make a folder from which `thaw` makes the app as it is now; the VMs go on.

    :param place: of the folder, which is made as a whole or not at all.
    :param scratch: a directory on the filesystem of the app's disks.
    :param test: the id of the test.
    :raise HarnessError: says what could not be frozen; OSError likewise.
    """
    kind = await kind_of(app.hypervisor)
    # First: should the second not be made, this one goes with the run.
    clones = Path(tempfile.mkdtemp(prefix="frozen-", dir=scratch))
    # A name of its own until it is whole: what is found under the other is taken so.
    new = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        async with _commands_left(app), _stopped(app) as moment:
            for number, (vm, domain) in enumerate(moment.domains.items(), 1):
                await moment.capture(new / f"memory-{number}", vm, domain, clones)
            committed = await _clone_committed(app, clones)
            state = state_of(app)
        for pool in state.grandchildren("pools", "pool"):
            # where they are is of no meaning elsewhere, and nobody's business
            pool.attributes = {"name": pool.attributes["name"]}
        await asyncio.to_thread(app.policy.refresh)
        rules = tuple(map(str, app.policy.all_rules))
        write = _Writing(app, new, moment, committed)
        await to_its_end(
            asyncio.to_thread(write.write, place, to_bytes(state), rules, kind, test)
        )
    except BaseException:
        await to_its_end(asyncio.to_thread(shutil.rmtree, new, ignore_errors=True))
        raise
    finally:
        await to_its_end(asyncio.to_thread(shutil.rmtree, clones, ignore_errors=True))


class _Moment:
    """The moment at which all virtual CPUs of an app stand still."""

    def __init__(self, domains: dict[QubesVM, Domain], spread: float) -> None:
        self.domains = domains
        self.spread = spread
        self.time = time.time()
        #: Of the VMs that ran before.
        self.running: set[QubesVM] = set()
        self.specs: dict[QubesVM, DomainSpec] = {}
        #: Of each VM, by the name of the disk, its clone.
        self.disks: dict[QubesVM, dict[str, Path]] = {}

    async def capture(
        self, state: Path, vm: QubesVM, domain: Domain, clones: Path
    ) -> None:
        """Keep what a VM is now: its memory in a file, and clones of its disks."""
        spec = self.specs[vm] = await domain.freeze(state)
        written = sum(path.stat().st_size for path in state.parent.iterdir())
        if written > MOST_BYTES:
            raise FrozenError(f"the memory is more than {MOST_BYTES >> 30} GiB")
        self.disks[vm] = {}
        for disk in spec.disks:
            clone = self.disks[vm][disk.name] = clones / f"{state.name}-{disk.name}"
            clone.touch()
            await to_its_end(asyncio.to_thread(copy_image, disk.path, clone))


@contextlib.asynccontextmanager
async def _stopped(app: Qubes) -> AsyncIterator[_Moment]:
    """Have all virtual CPUs stand still, and those that ran go on afterwards."""
    live = {
        vm: vm.running_domain()
        for vm in app.domains.startable()
        if vm.get_power_state() in _LIVE
    }
    ran = {vm for vm in live if not vm.is_paused()}
    # One tight loop: each domain has a thread of its own that waits for QEMU.
    begun = time.monotonic()
    try:
        # To its end: the threads go on when this is cancelled.
        ends = await to_its_end(
            asyncio.gather(
                *(domain.pause() for domain in live.values()), return_exceptions=True
            )
        )
        spread = 1000 * (time.monotonic() - begun)
        for vm, end in zip(list(live), ends, strict=True):
            if isinstance(end, StateError):
                del live[vm]  # it has just ended by itself
            elif end is not None:
                raise end
        moment = _Moment(live, spread)
        moment.running = ran & live.keys()
        yield moment
    finally:
        await to_its_end(_resume([live[vm] for vm in ran & live.keys()]))


@contextlib.asynccontextmanager
async def _commands_left(app: Qubes) -> AsyncIterator[None]:
    """Have the agents, as they are meanwhile, leave what runs when they lose the host.

    They do when they are thawed: the command that hung is what somebody looks for.
    """
    vms = [vm for vm in app.domains.startable() if not vm.is_paused()]
    agents = [vm.agent for vm in vms if vm.agent is not None]

    async def tell(agent: GuestAgent, *, leave: bool) -> None:
        # one that does not answer is frozen as it is
        with contextlib.suppress(HarnessError):
            await agent.leave_running(leave=leave, timeout=_AGENT_TIMEOUT)

    await asyncio.gather(*(tell(agent, leave=True) for agent in agents))
    try:
        yield
    finally:
        await to_its_end(
            asyncio.gather(*(tell(agent, leave=False) for agent in agents))
        )


async def _resume(domains: Iterable[Domain]) -> None:
    for domain in domains:
        # one that has crashed meanwhile is the core's affair
        with contextlib.suppress(HarnessError):
            if await domain.state() is DomainState.PAUSED:
                await domain.resume()


async def _clone_committed(app: Qubes, clones: Path) -> dict[tuple[str, str], Path]:
    """Return clones of what the volumes of VMs begin with, by VM and volume."""
    found = {}
    for number, vm in enumerate(app.domains.startable()):
        for name, volume in vm.volumes.items():
            clone = clones / f"volume-{number}-{name}"
            clone.touch()
            if await copy_committed(volume, clone):
                found[vm.name, name] = clone
    return found


class _Writing:
    """Writes all but the memory into the folder. In a thread."""

    def __init__(
        self,
        app: Qubes,
        folder: Path,
        moment: _Moment,
        committed: dict[tuple[str, str], Path],
    ) -> None:
        self._app = app
        self._folder = folder
        self._moment = moment
        self._committed = committed

    def write(
        self,
        place: Path,
        state: bytes,
        policy: tuple[str, ...],
        kind: dict[str, str],
        test: str,
    ) -> None:
        """Write it, and give the folder its name."""
        (self._folder / "app.xml").write_bytes(state)
        kernels = []
        for number, (name, each) in enumerate(self._app.kernels.items(), 1):
            kernel, initramfs = f"kernel-{number}", f"initramfs-{number}"
            shutil.copyfile(each.kernel, self._folder / kernel)
            shutil.copyfile(each.initramfs, self._folder / initramfs)
            said = each.kernel_options, each.init
            kernels.append(Kernel(name, kernel, initramfs, *said))
        blocks = BlockFile(self._folder)
        with contextlib.closing(blocks):
            vms = tuple(
                self._vm(f"memory-{number}", vm, blocks)
                for number, vm in enumerate(self._moment.domains, 1)
            )
            volumes = tuple(
                Link(vm, name, _add(blocks, clone))
                for (vm, name), clone in self._committed.items()
            )
        manifest = Manifest(
            test=test,
            time=self._moment.time,
            spread=round(self._moment.spread, 3),
            machine=kind,
            kernels=tuple(kernels),
            vms=vms,
            volumes=volumes,
            policy=policy,
        )
        write_manifest(self._folder, manifest)
        for path in (self._folder, *self._folder.iterdir()):
            # what gathers artefacts may be another user's
            path.chmod(0o755 if path.is_dir() else 0o644)
        self._folder.replace(place)

    def _vm(self, state: str, vm: QubesVM, blocks: BlockFile) -> FrozenVM:
        spec = self._moment.specs[vm]
        booted = [n for n, t in self._app.kernels.items() if t.kernel == spec.kernel]
        volumes = {volume.path: name for name, volume in vm.volumes.items()}
        clones = self._moment.disks[vm]
        return FrozenVM(
            name=vm.name,
            running=vm in self._moment.running,
            state=state,
            memory=spec.memory,
            max_memory=spec.max_memory,
            vcpus=spec.vcpus,
            balanced=spec.balanced,
            kernel=booted[0] if booted else "",
            options=spec.kernel_options,
            disks=tuple(
                FrozenDisk(
                    disk.name,
                    volumes.get(disk.path, ""),
                    _add(blocks, clones[disk.name]),
                    disk.read_only,
                )
                for disk in spec.disks
            ),
            interfaces=tuple(
                FrozenInterface(each.mac, each.place or 0, _link(vm, each.mac))
                for each in spec.interfaces
            ),
        )


def _add(blocks: BlockFile, image: Path) -> Image:
    return blocks.add(image.stat().st_size, data_blocks(image))


def _link(vm: QubesVM, mac: str) -> str:
    """Return what an interface connects: clients, the net VM, or nothing any more."""
    if mac == DOWNLINK_MAC:
        return "down" if vm.net.downlink is not None else ""
    uplink = vm.net.uplink
    return "up" if uplink and uplink.mac == mac and not uplink.is_cut else ""
