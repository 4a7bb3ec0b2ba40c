"""Saved states of guests that have no identity yet, from which VMs start."""

from __future__ import annotations

import asyncio
import contextlib
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
from qubes_itests.hypervisor.contract import Disk
from qubes_itests.hypervisor.exc import HypervisorError
from qubes_storage.ficlone import clone_or_copy, places_of_data
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from qubes_itests.guest.link.agent import Identity
    from qubes_itests.guest.start.ahead import ClonesAhead
    from qubes_itests.host.cache import Cache
    from qubes_itests.hypervisor.contract import Domain, DomainSpec, Hypervisor

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
#: Bytes of the disks that are blank: as many as VMs have by default, or a guest would
#: have to look at them again.
_PRIVATE: Final = 2 << 30
_VOLATILE: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class WarmState:
    """A saved state that fits a VM.

    :param kind: of its entry in the cache.
    :param key: likewise.
    :param path: what a domain is started from.
    :param sizes: bytes of the disks that it has, by name: the root, over which its init
        waits for an identity, and blank ones. Stage one has seen none.
    :param root: an image with the data of that root, None for stage one.
    """

    kind: str
    key: str
    path: Path
    sizes: Mapping[str, int]
    root: Path | None

    @property
    def disks(self) -> tuple[str, ...]:
        """Names of the disks that it has."""
        return tuple(self.sizes)

    def unchanged(self, disks: Iterable[Disk]) -> tuple[str, ...]:
        """Return the names of a VM's disks that a guest need not look at. Blocking.

        It knows how large these are, and that they can be written.
        """
        return tuple(
            disk.name
            for disk in disks
            if not disk.read_only
            and disk.name in self.sizes
            and self.sizes[disk.name] == _size(disk.path)
        )


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
        #: A digest of the data, and how many bytes it has with its holes.
        self._roots: dict[Path, tuple[str, int]] = {}
        #: How states are made shapes them, too.
        self._recipe = digest(Path(__file__))
        #: How often a VM was started for which a state in its root would do.
        self._starts: Counter[str] = Counter()

    def add_root(self, image: Path, content: str) -> None:
        """Have VMs start warm with what is in a root image, where it is theirs.

        Blocking.

        :param image: which nobody writes to; roots of VMs are reflinks of it.
        :param content: a digest of its data.
        """
        self._roots[image] = content, image.stat().st_size

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
        if root is not None and await self._is_worth(spec, identity, root):
            state = await self._find(spec, identity, root, timeout)
        # Where that one cannot be made, too: better than to boot.
        left = end - asyncio.get_running_loop().time()
        return state or await self._find(spec, identity, None, left)

    async def _find(
        self, spec: DomainSpec, identity: Identity, root: Path | None, timeout: float
    ) -> WarmState | None:
        """Return the state in a root like that image, or without one stage one."""
        kind = _STAGE_ONE if root is None else _IN_ROOT[identity.init]
        sizes = self._sizes(identity, root)
        key = await self._key(spec, identity, root)
        if key is None:
            return None
        found = await asyncio.to_thread(self._cache.lookup, kind, key)
        state = WarmState(kind, key, (found or Path()) / _FILE, sizes, root)
        if found is not None:
            return state
        if key not in self._making:
            limit = min(timeout, _BOOT_TIMEOUT)
            bare = replace(spec, disks=(), interfaces=())
            making = self._make(bare, identity, state, limit)
            self._making[key] = asyncio.ensure_future(making)
        # several starts may wait for it; one that gives up must not end it
        waiting = asyncio.shield(self._making[key])
        try:
            async with asyncio.timeout(timeout):
                path = await waiting
        except TimeoutError:
            log.warning("no saved state for %s within %.0f s", spec.name, timeout)
            return None
        return None if path is None else replace(state, path=path)

    async def _key(
        self, spec: DomainSpec, identity: Identity, root: Path | None
    ) -> str | None:
        """Return what tells a state from others, also from that of another init."""
        sizes = self._sizes(identity, root)
        key = await self._hypervisor.state_key(spec, saved_disks=tuple(sizes))
        inside = () if root is None else (identity.init, self._roots[root][0])
        return key and digest(key, self._recipe, *inside, str(sizes))

    def _sizes(self, identity: Identity, root: Path | None) -> dict[str, int]:
        """Return the bytes of the disks that a state in that root has, by name."""
        if root is None:
            return {}
        sizes = {identity.root: self._roots[root][1]}
        if identity.private is not None:
            sizes[identity.private] = _PRIVATE
        if identity.volatile is not None:
            sizes[identity.volatile] = _VOLATILE
        return sizes

    async def _is_worth(self, spec: DomainSpec, identity: Identity, root: Path) -> bool:
        """Tell whether a state in this root is there, or saves more than it costs."""
        if identity.init == "systemd":
            return True
        key = await self._key(spec, identity, root)
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
        self, spec: DomainSpec, identity: Identity, state: WarmState, limit: float
    ) -> Path | None:
        loop = asyncio.get_running_loop()

        def build(place: Path) -> None:
            # In a thread, which holds the lock of this key against other runs: flock(2)
            # blocks, and must not block the loop, on which the state is made meanwhile.
            made = replace(state, path=place / _FILE)
            making = self._save(spec, identity, made, limit)
            asyncio.run_coroutine_threadsafe(making, loop).result()

        try:
            place = await asyncio.to_thread(
                self._cache.entry, state.kind, state.key, build
            )
        except (HarnessError, OSError) as error:
            log.warning("no warm starts for %s: %s", spec.name, str(error))
            return None
        return place / _FILE

    async def _save(
        self, spec: DomainSpec, identity: Identity, state: WarmState, limit: float
    ) -> None:
        directory = Path(tempfile.mkdtemp(dir=spec.directory, prefix=""))
        # Another name, identity and directory than the VM's: its own domain is defined
        # already, and all that this one has been given would be in the state.
        identifier = uuid.uuid4()
        name = f"stage-one-{identifier.hex[:12]}"
        domain = None
        try:
            with contextlib.ExitStack() as made:
                making = _disks_to_save(state, name, directory)
                entering = asyncio.to_thread(made.enter_context, making)
                disks = await to_its_end(entering)
                blank = replace(
                    spec, name=name, uuid=identifier, directory=directory, disks=disks
                )
                domain = await self._hypervisor.define(blank)
                try:
                    await domain.start(to_save=state.path)
                except HypervisorError as error:
                    # such as a filesystem of the cache that files cannot be mapped from
                    words = "VMs like %s share no memory: %s"
                    log.warning(words, spec.name, str(error))
                    await domain.start()
                await self._get_ready(domain, identity, state, limit)
                await domain.save(state.path)
        finally:
            if domain is not None:
                await domain.undefine()
            shutil.rmtree(directory, ignore_errors=True)

    async def _get_ready(
        self, domain: Domain, identity: Identity, state: WarmState, limit: float
    ) -> None:
        """Have a guest do all that comes before its identity."""
        agent = await GuestAgent.connect(domain, timeout=limit)
        try:
            await _balloon_up(domain, limit)
            if state.disks:
                await agent.prepare(identity, timeout=limit)
                # so that its shell, and more, is in memory when a VM starts
                with timeline.unrecorded():
                    process = await agent.spawn(_REHEARSAL, user="root")
                await answer_of(process, "rehearse a start", timeout=limit)
        finally:
            # Before it is saved, so that no connection is in the state: each start
            # begins with HELLO.
            await agent.close()


@contextlib.contextmanager
def _disks_to_save(
    state: WarmState, name: str, directory: Path
) -> Iterator[tuple[Disk, ...]]:
    """Make what a saved guest has for disks: it sees no data but the root's. Blocking.

    :raise HypervisorError: at the end, when the root has been written to: the state
        would fit no VM.
    """
    if state.root is None:
        yield ()
        return
    root, *blank = state.disks
    paths = {disk: directory / f"{disk}.img" for disk in blank}
    for disk, path in paths.items():
        path.touch()
        os.truncate(path, state.sizes[disk])
    with (
        state.root.open("rb") as image,
        # Where extents are shared. It has no name: none is left, whoever is killed.
        tempfile.TemporaryFile(dir=state.root.parent) as copy,
    ):
        clone_or_copy(image.fileno(), copy.fileno())
        before = os.fstat(copy.fileno()).st_mtime_ns
        # for writing, as a VM's is
        paths[root] = Path(f"/proc/{os.getpid()}/fd/{copy.fileno()}")
        yield tuple(Disk(disk, path) for disk, path in paths.items())
        if os.fstat(copy.fileno()).st_mtime_ns != before:
            raise HypervisorError(name, "save", "its root has been written to")


def _size(path: Path) -> int | None:
    """Return the bytes of a disk's file or device, None for one that is a socket."""
    try:
        with path.open("rb") as file:
            return file.seek(0, os.SEEK_END)
    except OSError:
        return None


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
