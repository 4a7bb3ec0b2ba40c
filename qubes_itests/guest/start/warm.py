"""Saved states of guests that have no identity yet, from which VMs start."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.guest.link.agent import GuestAgent
from qubes_itests.host.cache import digest
from qubes_itests.hypervisor.exc import HypervisorError
from qubes_storage.ficlone import places_of_data

if TYPE_CHECKING:
    from qubes_itests.guest.link.agent import Identity
    from qubes_itests.host.cache import Cache
    from qubes_itests.hypervisor.contract import Disk, Domain, DomainSpec, Hypervisor

__all__ = ["WarmStarts", "WarmState"]

log = logging.getLogger("qubes_itests.guest")

_STAGE_ONE: Final = "stage-one"
_SYSTEMD: Final = "systemd"
_FILE: Final = "state"
_BOOT_TIMEOUT: Final = 60.0
_LOOK: Final = 0.05


@dataclass(frozen=True, slots=True)
class WarmState:
    """A saved state that fits a VM.

    :param kind: of its entry in the cache.
    :param key: likewise.
    :param path: what a domain is started from.
    :param root: the disk that it has, whose systemd runs and waits for an identity;
        None for a state of stage one, which has seen no disk.
    """

    kind: str
    key: str
    path: Path
    root: Disk | None

    @property
    def disks(self) -> tuple[str, ...]:
        """Names of the disks that it has."""
        return (self.root.name,) if self.root else ()


class WarmStarts:
    """Saves a guest of each kind of VM, on first use, for all later starts.

    A state has no name and no secret, so one serves any number of VMs, and any number
    of runs. That of stage one has seen no disk; that of systemd has the root mounted,
    but read-only, and fits every root that holds the same, to the byte. Nothing depends
    on states: without one VMs boot.

    :param cache: where the states last.
    :param hypervisor: what makes and loads them.
    """

    def __init__(self, cache: Cache, hypervisor: Hypervisor) -> None:
        self._cache = cache
        self._hypervisor = hypervisor
        self._making: dict[str, asyncio.Future[Path | None]] = {}
        self._roots: dict[Path, str] = {}

    def add_root(self, image: Path, content: str) -> None:
        """Have systemd start warm where it is that of a root image.

        :param image: which nobody writes to; roots of VMs are reflinks of it.
        :param content: a digest of its data.
        """
        self._roots[image] = content

    async def state_for(
        self, spec: DomainSpec, identity: Identity, timeout: float
    ) -> WarmState | None:
        """Return a state for this kind of VM, made if there is none yet.

        :param timeout: seconds for the making.
        :return: None when the back end has no saved states, or this one could not be
            made; then it is not tried again.
        """
        root, content = None, None
        if identity.init == "systemd":
            root = next((d for d in spec.disks if d.name == identity.root), None)
        if root is not None:
            content = await asyncio.to_thread(self._content, root.path)
        if content is None:
            root = None
        names = () if root is None else (root.name,)
        key = await self._hypervisor.state_key(spec, saved_disks=names)
        if key is None:
            return None
        kind = _STAGE_ONE
        if content is not None:
            kind, key = _SYSTEMD, digest(key, content)
        found = await asyncio.to_thread(self._cache.lookup, kind, key)
        if found is not None:
            return WarmState(kind, key, found / _FILE, root)
        if key not in self._making:
            limit = min(timeout, _BOOT_TIMEOUT)
            making = self._make(spec, kind, key, root, limit)
            self._making[key] = asyncio.ensure_future(making)
        # several starts may wait for it; one that gives up must not end it
        waiting = asyncio.shield(self._making[key])
        try:
            path = await asyncio.wait_for(waiting, timeout)
        except TimeoutError:
            log.warning("no saved state for %s within %.0f s", spec.name, timeout)
            return None
        return None if path is None else WarmState(kind, key, path, root)

    def _content(self, path: Path) -> str | None:
        """Return the digest of a root's data, None if nobody knows it."""
        places = _places(path)
        if not places:
            return None
        contents = (
            text for image, text in self._roots.items() if _places(image) == places
        )
        return next(contents, None)

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
        self, spec: DomainSpec, kind: str, key: str, root: Disk | None, limit: float
    ) -> Path | None:
        loop = asyncio.get_running_loop()

        def build(place: Path) -> None:
            # In a thread, which holds the lock of this key against other runs: flock(2)
            # blocks, and must not block the loop, on which the state is made meanwhile.
            making = self._save(spec, root, place / _FILE, limit)
            asyncio.run_coroutine_threadsafe(making, loop).result()

        try:
            place = await asyncio.to_thread(self._cache.entry, kind, key, build)
        except (HarnessError, OSError) as error:
            log.warning("no warm starts for %s: %s", spec.name, str(error))
            return None
        return place / _FILE

    async def _save(
        self, spec: DomainSpec, root: Disk | None, path: Path, limit: float
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
            # Read-only for QEMU, whatever the guest does: a state whose root has been
            # written to would fit no VM.
            disks=(replace(root, read_only=True),) if root else (),
            interfaces=(),
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
                if root is not None:
                    await agent.start_systemd(root.name, timeout=limit)
            finally:
                # Before it is saved, so that no connection is in the state: each start
                # begins with HELLO.
                await agent.close()
            await domain.save(path)
        finally:
            await domain.undefine()
            shutil.rmtree(directory, ignore_errors=True)


def _places(path: Path) -> list[tuple[int, int, int]] | None:
    try:
        with path.open("rb") as file:
            return places_of_data(file.fileno())
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
