"""Memory of running domains, as balancing sees and changes it.

libvirt's domains are the guests; dom0 and the size of the machine are made up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from typing import TYPE_CHECKING, Self

from qubes_itests.balancing.guest_balloon import BalloonedGuest
from qubes_itests.hypervisor.contract import DomainState, LifecycleEvent
from qubes_itests.hypervisor.exc import HypervisorError
from qubes_itests.qmemman.budget import BudgetedDom0, MemoryBudget
from qubes_itests.qmemman.contract import (
    DomainReading,
    MachineReading,
    MemoryBackend,
    Order,
)
from qubes_itests.qmemman.exc import DomainGoneError
from qubes_itests.qmemman.state import DOM0

if TYPE_CHECKING:
    from collections.abc import Callable

    from qubes_itests.hypervisor.contract import Domain, Hypervisor
    from qubes_itests.qmemman.contract import ChangeHandler, ReportHandler

__all__ = ["LibvirtMemory"]

_log = logging.getLogger(__name__)

_ENDS = (LifecycleEvent.STOPPED, LifecycleEvent.CRASHED)
#: Seconds in which a domain that nobody announced must say whether it runs.
_STATE_TIMEOUT = 0.5


class LibvirtMemory(MemoryBackend):
    """Real guests on a machine of a given budget; an async context manager.

    It asks guests only inside the context.

    :param hypervisor: whose domains are the guests.
    :param budget: the machine, and its dom0.
    :param counts: which domains belong to this machine; by default all do.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        budget: MemoryBudget,
        *,
        counts: Callable[[Domain], bool] = lambda _domain: True,
    ) -> None:
        self.budget = budget
        self.dom0 = BudgetedDom0(budget, lambda report: self._pass_on(DOM0, report))
        self._hypervisor = hypervisor
        self._counts = counts
        self._numbers = itertools.count(1)
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
        elif guest := self._guests.get(domain):
            guest.paused = event is LifecycleEvent.PAUSED
        self._changed()

    def _add(self, domain: Domain, *, paused: bool = False) -> None:
        if domain in self._guests or not self._open or not self._counts(domain):
            return
        domid = str(next(self._numbers))
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
