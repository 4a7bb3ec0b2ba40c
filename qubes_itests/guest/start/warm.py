"""Saved states of guests that have no identity yet, from which VMs start."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import uuid
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests import timeline
from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.guest.link.agent import GuestAgent
from qubes_itests.guest.link.process import answer_of
from qubes_itests.host.cache import digest
from qubes_itests.hypervisor.exc import HypervisorError
from qubes_storage.ficlone import places_of_data

if TYPE_CHECKING:
    from qubes_itests.guest.link.agent import Identity
    from qubes_itests.guest.start.ahead import ClonesAhead
    from qubes_itests.host.cache import Cache
    from qubes_itests.hypervisor.contract import Disk, Domain, DomainSpec, Hypervisor

__all__ = ["WarmStarts", "WarmState"]

log = logging.getLogger("qubes_itests.guest")

_STAGE_ONE: Final = "stage-one"
#: By what is process 1 there.
_IN_ROOT: Final = {"agent": "root", "systemd": "systemd"}
_FILE: Final = "state"
_BOOT_TIMEOUT: Final = 60.0
_LOOK: Final = 0.05
#: The starts in a run after which a state in a root of our init is made: it takes as
#: long as that many starts gain.
_WORTH: Final = 15
#: A program of the root that reads what starts need, where there is one.
_REHEARSAL: Final = "[ ! -x /usr/lib/qubes/rehearse ] || /usr/lib/qubes/rehearse"
#: Bytes of a disk that is blank.
_BLANK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class WarmState:
    """A saved state that fits a VM.

    :param kind: of its entry in the cache.
    :param key: likewise.
    :param path: what a domain is started from.
    :param disks: names of the disks that it has: the root, over which its init waits
        for an identity, and blank ones. Stage one has seen none.
    :param root: an image with the data of that root, None for stage one.
    """

    kind: str
    key: str
    path: Path
    disks: tuple[str, ...]
    root: Path | None


class WarmStarts:
    """Saves a guest of each kind of VM, on first use, for all later starts.

    A state has no name and no secret, so one serves any number of VMs, and any number
    of runs. One that has the root mounted, but read-only, fits every root that holds
    the same, to the byte; that of stage one has seen no disk, and fits all. Nothing
    depends on states: without one VMs boot.

    :param cache: where the states last.
    :param hypervisor: what makes and loads them.
    :param ahead: what loads them before VMs need them; None for nothing.
    """

    def __init__(
        self, cache: Cache, hypervisor: Hypervisor, ahead: ClonesAhead | None = None
    ) -> None:
        self._cache = cache
        self._hypervisor = hypervisor
        self.ahead = ahead
        self._making: dict[str, asyncio.Future[Path | None]] = {}
        self._roots: dict[Path, str] = {}
        #: How states are made shapes them, too.
        self._recipe = digest(Path(__file__))
        #: How often a VM was started for which a state in its root would do.
        self._starts: Counter[str] = Counter()

    def add_root(self, image: Path, content: str) -> None:
        """Have VMs start warm with what is in a root image, where it is theirs.

        :param image: which nobody writes to; roots of VMs are reflinks of it.
        :param content: a digest of its data.
        """
        self._roots[image] = content

    async def state_for(
        self, spec: DomainSpec, identity: Identity, timeout: float
    ) -> WarmState | None:
        """Return a state for this kind of VM, made if there is none yet.

        :param timeout: seconds for the making.
        :return: None when the back end has no saved states, or none could be made;
            then it is not tried again.
        """
        end = asyncio.get_running_loop().time() + timeout
        root = state = None
        paths = {disk.name: disk.path for disk in spec.disks}
        if identity.root in paths and identity.init in _IN_ROOT:
            root = await asyncio.to_thread(self._same_root, paths[identity.root])
        if root is not None and await self._is_worth(spec, identity, self._roots[root]):
            state = await self._find(spec, identity, root, timeout)
        # Where that one cannot be made, too: better than to boot.
        left = end - asyncio.get_running_loop().time()
        return state or await self._find(spec, identity, None, left)

    async def _find(
        self, spec: DomainSpec, identity: Identity, root: Path | None, timeout: float
    ) -> WarmState | None:
        """Return the state in a root like that image, or without one stage one."""
        kind, names, content = _STAGE_ONE, tuple[str, ...](), None
        if root is not None:
            kind, names = _IN_ROOT[identity.init], identity.disks
            content = self._roots[root]
        key = await self._key(spec, names, content)
        if key is None:
            return None
        found = await asyncio.to_thread(self._cache.lookup, kind, key)
        if found is not None:
            return WarmState(kind, key, found / _FILE, names, root)
        if key not in self._making:
            limit = min(timeout, _BOOT_TIMEOUT)
            disks = tuple(disk for disk in spec.disks if disk.name in names)
            bare = replace(spec, disks=disks, interfaces=())
            making = self._make(bare, identity, kind, key, limit)
            self._making[key] = asyncio.ensure_future(making)
        # several starts may wait for it; one that gives up must not end it
        waiting = asyncio.shield(self._making[key])
        try:
            async with asyncio.timeout(timeout):
                path = await waiting
        except TimeoutError:
            log.warning("no saved state for %s within %.0f s", spec.name, timeout)
            return None
        return None if path is None else WarmState(kind, key, path, names, root)

    async def _key(
        self, spec: DomainSpec, names: tuple[str, ...], content: str | None
    ) -> str | None:
        key = await self._hypervisor.state_key(spec, saved_disks=names)
        return key and digest(key, self._recipe, content or "")

    async def _is_worth(
        self, spec: DomainSpec, identity: Identity, content: str
    ) -> bool:
        """Tell whether a state in this root is there, or saves more than it costs."""
        if identity.init == "systemd":
            return True
        key = await self._key(spec, identity.disks, content)
        if key is None:
            return False
        self._starts[key] += 1
        if self._starts[key] >= _WORTH:
            return True
        kind = _IN_ROOT[identity.init]
        return await asyncio.to_thread(self._cache.lookup, kind, key) is not None

    def _same_root(self, path: Path) -> Path | None:
        """Return the image with a root's data, None if none has the same."""
        if (places := _places(path)) is None:
            return None
        # a copy: another thread may add one meanwhile
        return next((i for i in [*self._roots] if _places(i) == places), None)

    async def discard(self, state: WarmState, vm: str) -> None:
        """Throw away a state that turned out not to load; none is made in this run.

        :param vm: whose start it was.
        """
        log.warning("the saved state for %s does not load: dropped", vm)
        never: asyncio.Future[Path | None] = asyncio.Future()
        never.set_result(None)
        self._making[state.key] = never
        await asyncio.to_thread(self._cache.discard, state.kind, state.key)

    async def _make(
        self,
        spec: DomainSpec,
        identity: Identity,
        kind: str,
        key: str,
        limit: float,
    ) -> Path | None:
        loop = asyncio.get_running_loop()

        def build(place: Path) -> None:
            # In a thread, which holds the lock of this key against other runs: flock(2)
            # blocks, and must not block the loop, on which the state is made meanwhile.
            making = self._save(spec, identity, place / _FILE, limit)
            asyncio.run_coroutine_threadsafe(making, loop).result()

        try:
            place = await asyncio.to_thread(self._cache.entry, kind, key, build)
        except (HarnessError, OSError) as error:
            log.warning("no warm starts for %s: %s", spec.name, str(error))
            return None
        return place / _FILE

    async def _save(
        self,
        spec: DomainSpec,
        identity: Identity,
        path: Path,
        limit: float,
    ) -> None:
        directory = Path(tempfile.mkdtemp(dir=spec.directory, prefix=""))
        # Another name, identity and directory than the VM's: its own domain is defined
        # already, and all that this one has been given would be in the state.
        identifier = uuid.uuid4()
        blank = replace(
            spec,
            name=f"stage-one-{identifier.hex[:12]}",
            uuid=identifier,
            directory=directory,
            disks=tuple(_disk_to_save(d, identity, directory) for d in spec.disks),
        )
        domain = await self._hypervisor.define(blank)
        try:
            try:
                await domain.start(to_save=path)
            except HypervisorError as error:
                # such as a filesystem of the cache that files cannot be mapped from
                log.warning("VMs like %s share no memory: %s", spec.name, str(error))
                await domain.start()
            agent = await GuestAgent.connect(domain, timeout=limit)
            try:
                await _balloon_up(domain, limit)
                if spec.disks:
                    await agent.prepare(identity, timeout=limit)
                    # so that its shell, and more, is in memory when a VM starts
                    with timeline.unrecorded():
                        process = await agent.spawn(_REHEARSAL, user="root")
                    await answer_of(process, "rehearse a start", timeout=limit)
            finally:
                # Before it is saved, so that no connection is in the state: each start
                # begins with HELLO.
                await agent.close()
            await domain.save(path)
        finally:
            await domain.undefine()
            shutil.rmtree(directory, ignore_errors=True)


def _disk_to_save(disk: Disk, identity: Identity, directory: Path) -> Disk:
    """Return what a saved guest has for a disk: it sees no data but the root's."""
    if disk.name == identity.root:
        # Read-only for QEMU, whatever the guest does: a state whose root has been
        # written to would fit no VM.
        return replace(disk, read_only=True)
    path = directory / f"{disk.name}.img"
    path.touch()
    os.truncate(path, _BLANK)
    return replace(disk, path=path)


def _places(path: Path) -> tuple[int, list[tuple[int, int, int]]] | None:
    """Return the filesystem of a file, and where its data are there."""
    try:
        with path.open("rb") as file:
            places = places_of_data(file.fileno())
            # other data may be in the same places of another filesystem
            return (os.fstat(file.fileno()).st_dev, places) if places else None
    except OSError:
        return None


async def _balloon_up(domain: Domain, limit: float) -> None:
    """Wait until the guest holds its initial memory only, as VMs begin with that.

    Until its balloon driver has come that far, a guest has all it may ever have.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + limit
    while (
        held := (await domain.memory_statistics()).actual >> 20
    ) > domain.spec.memory:
        if loop.time() > end:
            raise DeadlineError(f"balloon of {domain.spec.name}", limit, f"{held} MiB")
        await asyncio.sleep(_LOOK)
