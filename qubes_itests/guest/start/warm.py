"""Saved states of stage one, from which VMs start without booting."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.guest.link.agent import GuestAgent
from qubes_itests.hypervisor.exc import HypervisorError

if TYPE_CHECKING:
    from qubes_itests.host.cache import Cache
    from qubes_itests.hypervisor.contract import Domain, DomainSpec, Hypervisor

__all__ = ["WarmStarts"]

log = logging.getLogger("qubes_itests.guest")

_KIND: Final = "stage-one"
_FILE: Final = "state"
_BOOT_TIMEOUT: Final = 60.0
_LOOK: Final = 0.05


class WarmStarts:
    """Saves stage one of each kind of VM, on first use, for all later starts.

    A state has seen no disk, no name and no secret, so one serves any number of VMs,
    and any number of runs. Nothing depends on it: without one VMs boot.

    :param cache: where the states last.
    :param hypervisor: what makes and loads them.
    """

    def __init__(self, cache: Cache, hypervisor: Hypervisor) -> None:
        self._cache = cache
        self._hypervisor = hypervisor
        self._making: dict[str, asyncio.Future[Path | None]] = {}

    async def state_for(self, spec: DomainSpec, timeout: float) -> Path | None:
        """Return a state for this kind of VM, made if there is none yet.

        :param timeout: seconds for the making.
        :return: None when the back end has no saved states, or this one could not be
            made; then it is not tried again.
        """
        key = await self._hypervisor.state_key(spec)
        if key is None:
            return None
        found = await asyncio.to_thread(self._cache.lookup, _KIND, key)
        if found is not None:
            return found / _FILE
        if key not in self._making:
            limit = min(timeout, _BOOT_TIMEOUT)
            self._making[key] = asyncio.ensure_future(self._make(spec, key, limit))
        # several starts may wait for it; one that gives up must not end it
        waiting = asyncio.shield(self._making[key])
        try:
            return await asyncio.wait_for(waiting, timeout)
        except TimeoutError:
            log.warning("no saved state for %s within %.0f s", spec.name, timeout)
            return None

    async def discard(self, spec: DomainSpec) -> None:
        """Throw away a state that turned out not to load; none is made in this run."""
        key = await self._hypervisor.state_key(spec)
        if key is not None:
            log.warning("the saved state for %s does not load: dropped", spec.name)
            never: asyncio.Future[Path | None] = asyncio.Future()
            never.set_result(None)
            self._making[key] = never
            await asyncio.to_thread(self._cache.discard, _KIND, key)

    async def _make(self, spec: DomainSpec, key: str, limit: float) -> Path | None:
        loop = asyncio.get_running_loop()

        def build(place: Path) -> None:
            # In a thread, which holds the lock of this key against other runs: flock(2)
            # blocks, and must not block the loop, on which the state is made meanwhile.
            making = self._save_stage_one(spec, place / _FILE, limit)
            asyncio.run_coroutine_threadsafe(making, loop).result()

        try:
            place = await asyncio.to_thread(self._cache.entry, _KIND, key, build)
        except (HarnessError, OSError) as error:
            log.warning("no warm starts for %s: %s", spec.name, str(error))
            return None
        return place / _FILE

    async def _save_stage_one(self, spec: DomainSpec, path: Path, limit: float) -> None:
        directory = Path(tempfile.mkdtemp(dir=spec.directory, prefix=""))
        # Another name, identity and directory than the VM's: its own domain is defined
        # already, and all that this one has been given would be in the state.
        identifier = uuid.uuid4()
        blank = replace(
            spec,
            name=f"stage-one-{identifier.hex[:12]}",
            uuid=identifier,
            directory=directory,
            disks=(),
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
            finally:
                # Before it is saved, so that no connection is in the state: each start
                # begins with HELLO.
                await agent.close()
            await domain.save(path)
        finally:
            await domain.undefine()
            shutil.rmtree(directory, ignore_errors=True)


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
