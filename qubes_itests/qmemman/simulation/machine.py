"""Machine with simulated guests: any number, good and bad, in the loop's time.

With `virtual_time` an hour of it takes moments.  Nothing runs in the background: what
a guest holds follows from its last order and from the time that has passed.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from qubes_itests.qmemman.contract import (
    DomainReading,
    MachineReading,
    MemoryBackend,
    Order,
)
from qubes_itests.qmemman.exc import DomainGoneError, MemoryRefusedError, too_small
from qubes_itests.qmemman.sizes import KIB, MIB
from qubes_itests.qmemman.state import DOM0

if TYPE_CHECKING:
    from collections.abc import Callable

    from qubes_itests.qmemman.contract import ChangeHandler, ReportHandler

__all__ = ["SimulatedGuest", "SimulatedMachine"]

_UNSEEN = 16 * MIB
_REPORT_STEP = 30_000 * KIB
_REPORT_INTERVAL = 0.1


class SimulatedGuest:
    """One domain; change what it does through its attributes and methods.

    :param machine: it belongs to.
    :param domid: its number.
    :param name: for people.
    :param memory: what it holds at first, bytes.
    :param maximum: what it can hold, bytes; None for dom0.
    """

    def __init__(
        self,
        machine: SimulatedMachine,
        domid: str,
        name: str,
        memory: int,
        maximum: int | None,
    ) -> None:
        self.domid = domid
        self.name = name
        self.maximum = maximum
        #: Seconds from an order to the first page that moves.
        self.delay = 0.05
        #: Bytes per second that its balloon moves.
        self.rate = 2048 * MIB
        #: The balloon does not move at all.
        self.stuck = False
        #: The most that it ever lacked for what it used, bytes: 0 is well.
        self.squeezed = 0
        self.paused = False
        self.used = 0
        self._machine = machine
        self._held = memory
        self._aim = memory
        self._moves_from = 0.0
        self._last_report: bytes | None = None
        self._reported = 0
        self._timer: asyncio.TimerHandle | None = None

    def holds(self) -> int:
        """Return what it holds now, bytes."""
        self._settle()
        return self._held

    def room(self) -> int:
        """Return what it could use now without lacking memory, bytes."""
        return self.holds() - _UNSEEN

    def use(self, size: int) -> None:
        """Use so many bytes from now on, and report it as its agent does."""
        self.used = size
        if self._last_report is None or abs(size - self._reported) >= _REPORT_STEP:
            now = self._machine.now()
            if self._timer is None or self._timer.when() <= now:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(_REPORT_INTERVAL, self._report_now)

    def report(self, untrusted: bytes) -> None:
        """Write any bytes as the guest's report: lies too."""
        self._last_report = untrusted
        self._machine.pass_on(self.domid, untrusted)

    def repeat_report(self) -> None:
        """Write the last report again, if there was one."""
        if self._last_report is not None:
            self._machine.pass_on(self.domid, self._last_report)

    def stop(self) -> None:
        """Forget the report that is due."""
        if self._timer is not None:
            self._timer.cancel()

    def order(self, target: int) -> None:
        """Aim at so many bytes."""
        self._settle()
        self._aim = target
        self._moves_from = self._machine.now() + self.delay

    def _report_now(self) -> None:
        self._timer = None
        if not self.paused:
            self._reported = self.used
            self.report(b"%d" % (self.used // KIB))

    def _settle(self) -> None:
        now = self._machine.now()
        passed = now - self._moves_from
        if passed <= 0:
            return
        self._moves_from = now
        if self.stuck or self.paused:
            return
        step = int(passed * self.rate)
        if self._aim < self._held:
            self._held = max(self._aim, self._held - step)
        else:
            room = self._machine.free_without(self)
            self._held = min(self._aim, self._held + step, max(self._held, room))
        self.squeezed = max(self.squeezed, self.used - (self._held - _UNSEEN))


class SimulatedMachine(MemoryBackend):
    """A machine with a dom0 and guests; needs a running event loop.

    :param total: its memory, bytes.
    :param dom0: what dom0 holds after boot, bytes.
    :raise HarnessError: when dom0 does not fit.
    """

    def __init__(self, total: int, dom0: int) -> None:
        if dom0 > total:
            raise too_small(total, dom0)
        self.total = total
        self.guests: dict[str, SimulatedGuest] = {}
        self._numbers = itertools.count(1)
        self._subscriptions: list[tuple[ReportHandler, ChangeHandler]] = []
        self.dom0 = SimulatedGuest(self, DOM0, "dom0", dom0, None)
        self.guests[DOM0] = self.dom0

    def now(self) -> float:
        """Return the loop's time, seconds."""
        return asyncio.get_running_loop().time()

    def free(self) -> int:
        """Return what no guest holds, bytes."""
        return self.total - sum(guest.holds() for guest in self.guests.values())

    def free_without(self, guest: SimulatedGuest) -> int:
        """Return what a guest could hold at most now, bytes."""
        others = (g for g in self.guests.values() if g is not guest)
        return self.total - sum(other._held for other in others)  # noqa: SLF001

    def start(self, name: str, memory: int, maximum: int) -> SimulatedGuest:
        """Start a guest; its memory must be free.

        :param memory: what it holds at first, bytes.
        :param maximum: what it can hold, bytes.
        :raise MemoryRefusedError: when it is not free: nobody was asked before.
        """
        if memory > self.free():
            held = {guest.name: guest.holds() for guest in self.guests.values()}
            raise MemoryRefusedError(memory, self.free(), held)
        domid = str(next(self._numbers))
        guest = SimulatedGuest(self, domid, name, memory, maximum)
        self.guests[domid] = guest
        self.changed()
        return guest

    def stop(self, guest: SimulatedGuest) -> None:
        """End a guest as pulling its plug does."""
        guest.stop()
        self.guests.pop(guest.domid, None)
        self.changed()

    def pause(self, guest: SimulatedGuest) -> None:
        """Stop its CPUs."""
        guest.holds()
        guest.paused = True
        self.changed()

    def resume(self, guest: SimulatedGuest) -> None:
        """Let its CPUs run."""
        guest.holds()
        guest.paused = False
        self.changed()

    def changed(self) -> None:
        """Tell subscribers that the domains are others now."""
        for _, on_change in tuple(self._subscriptions):
            on_change()

    def pass_on(self, domid: str, untrusted: bytes) -> None:
        """Give a guest's report to subscribers."""
        for on_report, _ in tuple(self._subscriptions):
            on_report(domid, untrusted)

    async def read(self) -> MachineReading:
        """Return the present state."""
        readings = tuple(
            DomainReading(
                domid=guest.domid,
                name=guest.name,
                current=guest.holds(),
                maximum=guest.maximum,
                target=guest._aim,  # noqa: SLF001 - one machine, two classes
                paused=guest.paused,
            )
            for guest in self.guests.values()
        )
        held = sum(reading.current for reading in readings)
        return MachineReading(self.total, self.total - held, readings)

    async def set_target(self, order: Order) -> None:
        """Tell a guest what to hold: its balloon counts without what it cannot see."""
        if (guest := self.guests.get(order.domid)) is None:
            raise DomainGoneError(order.domid)
        guest.order(order.guest_target + _UNSEEN)

    def subscribe(
        self, on_report: ReportHandler, on_change: ChangeHandler
    ) -> Callable[[], None]:
        """Have these called; known reports come again at once."""
        entry = (on_report, on_change)
        self._subscriptions.append(entry)
        for guest in tuple(self.guests.values()):
            guest.repeat_report()
        return lambda: self._subscriptions.remove(entry)
