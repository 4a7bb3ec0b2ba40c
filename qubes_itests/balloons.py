"""Balloons of running domains: asked, moved, and believed only what can be.

libvirt's domains are the guests; dom0 and the size of the machine are made up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from qubes_itests.hypervisor.contract import DomainState, LifecycleEvent
from qubes_itests.hypervisor.exc import HypervisorError, StateError
from qubes_itests.qmemman.budget import BudgetedDom0, MemoryBudget
from qubes_itests.qmemman.contract import (
    DomainReading,
    MachineReading,
    MemoryBackend,
    Order,
)
from qubes_itests.qmemman.exc import DomainGoneError
from qubes_itests.qmemman.sizes import KIB, MIB
from qubes_itests.qmemman.state import DOM0

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qubes_itests.hypervisor.contract import Domain, Hypervisor, MemoryStatistics
    from qubes_itests.qmemman.contract import ChangeHandler, ReportHandler

__all__ = ["BalloonedGuest", "LibvirtMemory", "used_memory"]

_log = logging.getLogger(__name__)

_ENDS = (LifecycleEvent.STOPPED, LifecycleEvent.CRASHED)
#: Seconds in which a domain that nobody announced must say whether it runs.
_STATE_TIMEOUT = 0.5
#: Guests write their statistics once a second. This is how often they are looked at:
#: each look costs some milliseconds of QEMU's time and of ours.
_INTERVAL = 0.2
_INTERVAL_MOVING = 0.1
#: So near to its target, in bytes, a guest has reached it.
_PAGE = 4096
#: Seconds after which a guest that does not answer is warned about.
_PATIENCE = 5.0
_REPORT_STEP = 30_000 * KIB
_NOT_REPORTED = b""


def used_memory(statistics: MemoryStatistics, unseen: int, maximum: int) -> int | None:
    """Return what a guest uses, in bytes; None when its statistics make no sense.

    What is in a tmpfs is part of the page cache, and cannot be given away: where the
    kernel says how much it could, the less of the two counts.  Swap does not count:
    the statistics have what was ever swapped, not what is now.

    :param statistics: as the guest wrote them, so anything.
    :param unseen: what the domain holds beyond what the guest's kernel can use, bytes.
    :param maximum: the domain can never hold more, bytes.
    """
    total, unused = statistics.total, statistics.unused
    if total is None or unused is None:
        return None
    cached = statistics.cached or 0
    spare = unused + cached
    if min(total, unused, cached) < 0 or spare > total or total > maximum:
        return None
    if statistics.available is not None:
        spare = max(0, min(spare, statistics.available))
    return min(total - spare + unseen, maximum)


class BalloonedGuest:
    """One run of a domain; a task asks it and sends it its targets.

    :param domid: number of this run.
    :param domain: that runs.
    :param pass_on: gets what the guest reports.
    :param paused: its CPUs are stopped; keep it up to date.
    """

    def __init__(
        self,
        domid: str,
        domain: Domain,
        pass_on: Callable[[bytes], None],
        *,
        paused: bool = False,
    ) -> None:
        self.domid = domid
        self.paused = paused
        self._domain = domain
        self._pass_on = pass_on
        self._maximum = domain.spec.max_memory * MIB
        self._memory = self._target = self._current = domain.spec.memory * MIB
        self._limit = self._memory
        self._wanted: int | None = None
        self._settled = False
        self._unseen = 0
        self._sample: MemoryStatistics | None = None
        self._report: bytes | None = None
        self._reported = 0
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Begin to ask it."""
        self._task = asyncio.create_task(self._live())

    def end(self) -> None:
        """Ask it no more."""
        if self._task is not None:
            self._task.cancel()

    def reading(self) -> DomainReading:
        """Return what was last seen of it."""
        return DomainReading(
            domid=self.domid,
            name=self._domain.spec.name,
            current=self._current,
            maximum=self._maximum,
            target=self._target,
            paused=self.paused,
            balanced=self._domain.spec.balanced,
        )

    def order(self, target: int, limit: int) -> None:
        """Have it aim at so many bytes, as soon as it can be told.

        :param limit: what it takes beyond this is not there, bytes.
        """
        self._target = self._wanted = max(KIB, min(target, self._maximum))
        self._limit = limit
        self._news.set()

    def repeat_report(self) -> None:
        """Pass its last report on again, if there was one."""
        if self._report is not None:
            self._pass_on(self._report)

    async def _live(self) -> None:
        # One call at a time, so that a guest that hangs costs one thread and no more.
        while True:
            try:
                await self._watched(self._exchange())
            except StateError:
                pass  # it is starting or has ended: the event says which
            except HypervisorError as error:
                _log.info("%s", str(error))
            resting = self._sample and abs(self._sample.actual - self._target) < _PAGE
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_INTERVAL if resting else _INTERVAL_MOVING):
                    await self._news.wait()
            self._news.clear()

    async def _watched(self, exchange: Awaitable[None]) -> None:
        """Wait for one exchange as long as it takes, but say when it takes long."""
        message = "%s does not answer: what it had is assumed"
        loop, name = asyncio.get_running_loop(), self._domain.spec.name
        warning = loop.call_later(_PATIENCE, _log.warning, message, name)
        try:
            await exchange
        finally:
            warning.cancel()

    async def _exchange(self) -> None:
        wanted = self._wanted
        if wanted is not None:
            await self._domain.set_memory_target(wanted)
            # only if it is still what is wanted: another order may have come while the
            # guest was told this one, and must go out too
            if self._wanted == wanted:
                self._wanted = None
        self._take(await self._domain.memory_statistics())

    def _take(self, statistics: MemoryStatistics) -> None:
        held = min(max(0, statistics.actual), self._maximum)
        # A cold guest has all memory until its balloon is up, and was promised less.
        self._settled |= held <= self._memory
        if not self._settled:
            return
        # Whose balloon is unloaded takes all it can: a hypervisor with no more memory
        # than the budget has would refuse it that.
        self._current = min(held, max(self._current, self._limit))
        if self._domain.spec.balanced and self._is_new(statistics):
            # what the kernel has less than the domain shows while neither moves
            old = self._sample or statistics
            same = (old.actual, old.total) == (statistics.actual, statistics.total)
            if statistics.total and same:
                self._unseen = max(0, statistics.actual - statistics.total)
            self._sample = statistics
            self._say(used_memory(statistics, self._unseen, self._maximum))

    def _is_new(self, statistics: MemoryStatistics) -> bool:
        """Tell whether the guest has written statistics since the last sample.

        Those of more memory than it has are from before its balloon moved.
        """
        if (statistics.total or 0) > statistics.actual:
            return False
        if self._sample is None:
            return statistics.total is not None
        return replace(statistics, actual=self._sample.actual) != self._sample

    def _say(self, used: int | None) -> None:
        if used is None:
            if self._report not in (None, _NOT_REPORTED):
                self._tell(_NOT_REPORTED)
        elif self._report in (None, _NOT_REPORTED) or (
            abs(used - self._reported) >= _REPORT_STEP
        ):
            self._reported = used
            self._tell(b"%d" % (used // KIB))

    def _tell(self, report: bytes) -> None:
        self._report = report
        self._pass_on(report)


class LibvirtMemory(MemoryBackend):
    """Real guests on a machine of a given budget; an async context manager.

    It asks guests only inside the context.

    :param hypervisor: whose domains are the guests.
    :param budget: the machine, and its dom0.
    :param counts: which domains belong to this machine; by default all do.
    :param number: gives the number of the present run of a domain; by default they are
        counted.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        budget: MemoryBudget,
        *,
        counts: Callable[[Domain], bool] = lambda _domain: True,
        number: Callable[[Domain], str] | None = None,
    ) -> None:
        self.budget = budget
        self.dom0 = BudgetedDom0(budget, lambda report: self._pass_on(DOM0, report))
        self._hypervisor = hypervisor
        self._counts = counts
        numbers = itertools.count(1)
        self._number = number or (lambda _domain: str(next(numbers)))
        self._guests: dict[Domain, BalloonedGuest] = {}
        self._subscriptions: list[tuple[ReportHandler, ChangeHandler]] = []
        self._exit = contextlib.AsyncExitStack()
        self._open = False

    async def __aenter__(self) -> Self:
        """Begin to ask the domains that run, and those that will."""
        self._open = True
        self._exit.callback(self._hypervisor.subscribe(self._on_event))
        await self._find_unannounced()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Ask nobody any more; domains keep what they have."""
        # first, so that no event adds a guest whose task nobody would end
        self._open = False
        for domain in tuple(self._guests):
            self._remove(domain)
        await self._exit.aclose()

    def domid(self, domain: Domain) -> str | None:
        """Return the number of a domain's present run; None if it does not run."""
        guest = self._guests.get(domain)
        return guest.domid if guest else None

    async def read(self) -> MachineReading:
        """Return what was last seen; a guest that hangs delays nobody."""
        await self._find_unannounced()
        dom0 = DomainReading(
            domid=DOM0, name="dom0", current=self.dom0.holds, target=self.dom0.target
        )
        guests = (guest.reading() for guest in self._guests.values())
        readings = (dom0, *guests)
        held = sum(reading.current for reading in readings)
        return MachineReading(self.budget.total, self.budget.total - held, readings)

    async def set_target(self, order: Order) -> None:
        """Tell a domain what to hold, soon; see `MemoryBackend`.

        The order's `target` goes to the guest: virtio's balloon counts all memory of
        the domain, as the hypervisor does.
        """
        if order.domid == DOM0:
            self.dom0.order(order.target)
            return
        for guest in self._guests.values():
            if guest.domid == order.domid:
                guest.order(order.target, order.limit)
                return
        raise DomainGoneError(order.domid)

    def subscribe(
        self, on_report: ReportHandler, on_change: ChangeHandler
    ) -> Callable[[], None]:
        """Have these called; known reports come again at once."""
        entry = (on_report, on_change)
        self._subscriptions.append(entry)
        self.dom0.repeat_report()
        for guest in tuple(self._guests.values()):
            guest.repeat_report()
        return lambda: self._subscriptions.remove(entry)

    def _pass_on(self, domid: str, report: bytes) -> None:
        for on_report, _ in tuple(self._subscriptions):
            on_report(domid, report)

    def _changed(self) -> None:
        for _, on_change in tuple(self._subscriptions):
            on_change()

    def _on_event(self, domain: Domain, event: LifecycleEvent) -> None:
        if event is LifecycleEvent.STARTED:
            self._add(domain)
        elif event in _ENDS:
            self._remove(domain)
        # One that starts as a clone may have been found while that stood still.
        if guest := self._guests.get(domain):
            guest.paused = event is LifecycleEvent.PAUSED
        self._changed()

    def _add(self, domain: Domain, *, paused: bool = False) -> None:
        if domain in self._guests or not self._open or not self._counts(domain):
            return
        domid = self._number(domain)
        guest = BalloonedGuest(
            domid, domain, lambda report: self._pass_on(domid, report), paused=paused
        )
        self._guests[domain] = guest
        guest.begin()

    def _remove(self, domain: Domain) -> None:
        if guest := self._guests.pop(domain, None):
            guest.end()

    async def _find_unannounced(self) -> None:
        """Add domains whose start has not been announced yet: they hold memory."""
        if not self._open:
            return
        known = self._hypervisor.domains()
        for domain in self._guests.keys() - set(known):
            self._remove(domain)
        # all at once and each with a deadline: reading the machine must not wait for
        # a domain that hangs, since the starts of all others wait for that
        new = [d for d in known if d not in self._guests and self._counts(d)]
        await asyncio.gather(*(self._add_if_running(domain) for domain in new))

    async def _add_if_running(self, domain: Domain) -> None:
        try:
            async with asyncio.timeout(_STATE_TIMEOUT):
                state = await domain.state()
        except (TimeoutError, HypervisorError) as error:
            _log.debug(
                "domain %s does not tell its state: %s", domain.spec.name, str(error)
            )
            return
        if state in (DomainState.RUNNING, DomainState.PAUSED):
            self._add(domain, paused=state is DomainState.PAUSED)
