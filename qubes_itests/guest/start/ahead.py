"""Clones of saved states, started before the VMs that go on as them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import uuid
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from qubes_itests import timeline
from qubes_itests.exc import HarnessError
from qubes_itests.guest.link.agent import GuestAgent
from qubes_itests.guest.link.process import answer_of
from qubes_itests.host.filesystem import make_ext4
from qubes_itests.host.load import idle_cpu
from qubes_itests.hypervisor.contract import Disk, LifecycleEvent
from qubes_storage.ficlone import clone_or_copy
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from qubes_itests.guest.link.agent import Identity
    from qubes_itests.guest.start.warm import WarmState
    from qubes_itests.hypervisor.contract import Domain, DomainSpec, Hypervisor

__all__ = ["ClonesAhead", "Recent"]

log = logging.getLogger("qubes_itests.guest")

#: Seconds for each step of a clone that is made.
_LIMIT: Final = 30.0
#: Bytes of the disks that a clone has until it is a VM's.
_PRIVATE: Final = 64 << 20
_BLANK: Final = 1 << 20
#: How many rows of starts are looked at, with that under way.
_ROWS: Final = 4
_ENDS: Final = (LifecycleEvent.STOPPED, LifecycleEvent.CRASHED)


class Recent:
    """What has started lately, and so what is expected to start again.

    Starts are counted from one moment at which there were enough clones to the next:
    as many of a kind as came in a row are expected to. The first of a kind does not
    count: most runs of one test, and most shells, start a VM once.

    :param most: how many may be expected.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()
        #: The present one last.
        self._rows: deque[Counter[str]] = deque([Counter()], maxlen=_ROWS)

    def add(self, kind: str) -> None:
        """Take note of a start."""
        if kind in self._known:
            self._rows[-1][kind] += 1
        self._known.add(kind)

    def end_row(self) -> None:
        """Take note that there are enough clones."""
        if self._rows[-1]:
            self._rows.append(Counter())

    def give_up(self, kind: str) -> None:
        """Expect no start of a kind, until there is another one."""
        for row in self._rows:
            row.pop(kind, None)

    def expected(self) -> Counter[str]:
        """Return how many starts of which kind are expected, the latest kinds first."""
        found: Counter[str] = Counter()
        for row in reversed(self._rows):
            for kind, number in row.items():
                room = self._most - found.total() + found[kind]
                found[kind] = min(room, max(found[kind], number))
        return +found

    def missing(self, waiting: Counter[str]) -> str | None:
        """Return the kind of which a clone should be made next, None for enough.

        :param waiting: how many clones there are of each.
        """
        lacking = (k for k, n in self.expected().items() if n > waiting[k])
        return next(lacking, None)

    def surplus(self, waiting: Counter[str]) -> str | None:
        """Return a kind of which more clones wait than are expected, None for none."""
        expected = self.expected()
        return next((k for k, n in waiting.items() if n > expected[k]), None)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What clones of one state have in common."""

    state: WarmState
    spec: DomainSpec
    identity: Identity


@dataclass(frozen=True, slots=True)
class _Clone:
    kind: str
    domain: Domain


class ClonesAhead:
    """Keeps clones of the states that VMs have lately started from.

    Each is restored, has rehearsed the rest of a start, so that its code is translated,
    and stands still until a VM goes on as it. It has no name, no network and no data
    but a root's that its template has as well; no start depends on one.

    :param hypervisor: where they run.
    :param most: how many there may be.
    :param directory: for their sockets, and one for their disks, on a filesystem that
        shares extents with the templates' images.
    """

    def __init__(
        self, hypervisor: Hypervisor, most: int, directory: Path, disks: Path
    ) -> None:
        self._hypervisor = hypervisor
        self._recent = Recent(most)
        self._kinds: dict[str, _Kind] = {}
        self._waiting: list[_Clone] = []
        #: Those of which something is to be removed still.
        self._ended: list[_Clone] = []
        self._directory = directory
        self._disks = disks
        self._news = asyncio.Event()
        self._full = asyncio.Event()
        self._starts = 0

    async def run(self) -> None:
        """Make clones whenever some are missing, until this is cancelled."""
        unsubscribe = self._hypervisor.subscribe(self._note_end)
        try:
            while True:
                await self._fill()
                self._full.set()
                await self._news.wait()
                self._news.clear()
        finally:
            unsubscribe()

    async def settled(self) -> None:
        """Wait until there are as many as there should be, for now."""
        await self._full.wait()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Begin no clone inside: a VM starts there."""
        self._starts += 1
        self._full.clear()
        try:
            yield
        finally:
            self._starts -= 1
            self._full.clear()
            self._news.set()

    @contextlib.asynccontextmanager
    async def clone(
        self, state: WarmState, spec: DomainSpec, identity: Identity
    ) -> AsyncIterator[Domain | None]:
        """Have a clone of a state for the start of a VM, None where there is none.

        One that is not adopted inside is undefined.
        """
        writable = not any(d.read_only for d in spec.disks if d.name in state.disks)
        fits = state.root is not None and writable
        waiting = self._waiting if fits else ()
        taken = next((c for c in waiting if c.kind == state.key), None)
        if taken is not None:
            self._waiting.remove(taken)
        try:
            yield None if taken is None else taken.domain
        finally:
            if taken is not None:
                await to_its_end(self._end(taken))
            if fits:
                self._kinds[state.key] = _Kind(state, spec, identity)
                self._recent.add(state.key)

    def _count(self) -> Counter[str]:
        return Counter(clone.kind for clone in self._waiting)

    async def _fill(self) -> None:
        while self._ended:
            await self._end(self._ended.pop())
        while self._recent.missing(self._count()) is not None:
            await idle_cpu()
            # That may have taken long; and the end of a start is news.
            key = self._recent.missing(self._count())
            if self._starts or key is None:
                return
            while (kind := self._recent.surplus(self._count())) is not None:
                unwanted = next(c for c in self._waiting if c.kind == kind)
                self._waiting.remove(unwanted)
                await self._end(unwanted)
            try:
                self._waiting.append(await self._make(self._kinds[key]))
            except (HarnessError, OSError) as error:
                log.info("no clone is started ahead: %s", str(error))
                self._recent.give_up(key)
        self._recent.end_row()

    async def _make(self, kind: _Kind) -> _Clone:
        identifier = uuid.uuid4()
        name = f"ahead-{identifier.hex[:12]}"
        state = kind.state
        disks = tuple(Disk(d, self._disks / f"{name}-{d}.img") for d in state.disks)
        spec = replace(
            kind.spec,
            name=name,
            uuid=identifier,
            directory=self._directory / name,
            disks=disks,
            interfaces=(),
            spare=True,
        )
        domain = None
        try:
            await to_its_end(asyncio.to_thread(self._make_images, kind, disks))
            spec.directory.mkdir()
            domain = await self._hypervisor.define(spec)
            await domain.start(saved_state=state.path, saved_disks=state.disks)
            await _rehearse(domain, kind.identity)
            await domain.pause()
        except BaseException:
            await to_its_end(self._remove(domain, spec))
            raise
        return _Clone(state.key, domain)

    def _make_images(self, kind: _Kind, disks: tuple[Disk, ...]) -> None:
        """Make what stands for a VM's disks: a root with the same data. Blocking."""
        private = self._disks / "private.img"
        if not private.exists():
            # not under its name until it is whole
            new = private.with_suffix(".new")
            make_ext4(new, _PRIVATE)
            new.rename(private)
        images = {kind.identity.root: kind.state.root, kind.identity.private: private}
        for disk in disks:
            with disk.path.open("xb") as file:
                if (image := images.get(disk.name)) is not None:
                    with image.open("rb") as source:
                        clone_or_copy(source.fileno(), file.fileno())
                else:
                    file.truncate(_BLANK)

    async def _end(self, clone: _Clone) -> None:
        await self._remove(clone.domain, clone.domain.spec)

    async def _remove(self, domain: Domain | None, spec: DomainSpec) -> None:
        if domain is not None:
            try:
                await domain.undefine()
            except HarnessError as error:
                log.warning("%s", str(error))
        for disk in spec.disks:
            disk.path.unlink(missing_ok=True)
        shutil.rmtree(spec.directory, ignore_errors=True)

    def _note_end(self, domain: Domain, event: LifecycleEvent) -> None:
        """Forget a clone whose memory was needed, or that died."""
        ended = next((c for c in self._waiting if c.domain is domain), None)
        if ended is not None and event in _ENDS:
            self._waiting.remove(ended)
            self._ended.append(ended)
            self._recent.give_up(ended.kind)
            self._full.clear()
            self._news.set()


async def _rehearse(domain: Domain, identity: Identity) -> None:
    agent = await GuestAgent.connect(domain, timeout=_LIMIT)
    try:
        await agent.rehearse(identity, timeout=_LIMIT)
        with timeline.unrecorded():
            process = await agent.spawn("true", user=identity.default_user)
        await answer_of(process, "run a command", timeout=_LIMIT)
    finally:
        # So that none is there when the VM's own begins
        await agent.close()
