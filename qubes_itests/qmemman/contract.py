"""Contract between balancing and a machine: readings, targets, reports.

Made so that xenstore and libxenctrl, libvirt's balloon statistics and a simulation
fit behind it.  All sizes are bytes.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["DomainReading", "MachineReading", "MemoryBackend", "Order"]

#: Called with a domain's number and what its guest wrote, as it wrote it.
ReportHandler = Callable[[str, bytes], None]
#: Called when a domain appeared, ended, was paused or resumed.
ChangeHandler = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainReading:
    """A domain's memory as the hypervisor sees it.

    :param domid: its number, another one after each start; ``"0"`` is dom0.
    :param name: for people.
    :param current: what it holds.
    :param maximum: it can never hold more; None where nothing but the machine's
        size limits it, as with dom0.
    :param target: what the hypervisor was last told; 0 when it was not.
    :param paused: its CPUs are stopped.
    :param balanced: it takes part, so its reports will come.
    """

    domid: str
    name: str
    current: int
    maximum: int | None = None
    target: int = 0
    paused: bool = False
    balanced: bool = True


@dataclass(frozen=True, slots=True)
class MachineReading:
    """The whole machine at one moment.

    :param total: its memory.
    :param free: what no domain holds.
    :param domains: those that exist; one that cannot be read now keeps its last
        reading.
    """

    total: int
    free: int
    domains: tuple[DomainReading, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A new target for a domain.

    :param domid: its number.
    :param target: what it shall hold, as the hypervisor counts.
    :param guest_target: the same as the guest's balloon counts; it does not see all.
    :param limit: what the hypervisor shall enforce.
    """

    domid: str
    target: int
    guest_target: int
    limit: int


class MemoryBackend(abc.ABC):
    """One machine whose memory is balanced."""

    @abc.abstractmethod
    async def read(self) -> MachineReading:
        """Return the present state; one hung domain must not delay it."""

    @abc.abstractmethod
    async def set_target(self, order: Order) -> None:
        """Tell a domain what to hold; returns before it does.

        :raise DomainGoneError: when the domain has ended.
        """

    @abc.abstractmethod
    def subscribe(
        self, on_report: ReportHandler, on_change: ChangeHandler
    ) -> Callable[[], None]:
        """Have these called on the event loop.

        What guests have reported before is reported again at once.

        :return: a function that ends the subscription.
        """
