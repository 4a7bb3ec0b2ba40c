"""Memory of a machine, by the calls of libxenctrl and the paths of the XenStore."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from qubes_itests.dom0.stores import XenStore
from qubes_itests.qmemman.contract import Order
from qubes_itests.qmemman.exc import DomainGoneError
from qubes_itests.qmemman.sizes import KIB, MIB

if TYPE_CHECKING:
    from qubes_itests.qmemman.contract import MemoryBackend

__all__ = ["Xen"]

_TARGET: Final = re.compile(r"/local/domain/([0-9]+)/memory/target")
#: What the balloon of a guest does not see of what its domain holds.
_UNSEEN: Final = 16 * MIB


class Xen:
    """Calls and paths; all of it on the event loop.

    :param memory: of the machine; its numbers are those of domains here.
    """

    def __init__(self, memory: MemoryBackend) -> None:
        self.store = XenStore()
        self.memory = memory
        #: By number, KiB: what the hypervisor was told, before the guest was.
        self._limits: dict[str, int] = {}
        self._targets: dict[str, int] = {}

    def begin(self) -> None:
        """Have the reports of guests appear in the store, as guests write them."""
        self.memory.subscribe(self._on_report, lambda: None)

    def introduce(self, domid: str, target: int, maximum: int) -> None:
        """Have a new domain in the store.

        :param target: what it begins with, bytes.
        :param maximum: to which it may grow, bytes.
        """
        place = f"/local/domain/{domid}"
        self.store.write(f"{place}/domid", domid)
        self.store.write(f"{place}/memory/target", f"{target // KIB}")
        self.store.write(f"{place}/memory/static-max", f"{maximum // KIB}")
        self.store.announce("@introduceDomain")

    def release(self, domid: str) -> None:
        """Remove a domain that has ended."""
        self._limits.pop(domid, None)
        self._targets.pop(domid, None)
        self.store.remove(f"/local/domain/{domid}")
        self.store.announce("@releaseDomain")

    def _on_report(self, domid: str, untrusted: bytes) -> None:
        # what a domain writes that is gone would bring its path back
        if self.store.read(f"/local/domain/{domid}/domid") is not None:
            self.store.write(f"/local/domain/{domid}/memory/meminfo", untrusted)

    async def physinfo(self) -> dict[str, int]:
        """Return the memory of the machine, and what no domain holds, KiB."""
        reading = await self.memory.read()
        return {
            "total_memory": reading.total // KIB,
            "free_memory": max(0, reading.free) // KIB,
        }

    async def domain_getinfo(
        self, first_dom: int = 0, max_doms: int = 1024
    ) -> list[dict[str, int]]:
        """Return what domains hold, from a number on, in order."""
        reading = await self.memory.read()
        rows = (
            {
                "domid": int(domain.domid),
                "mem_kb": domain.current // KIB,
                "maxmem_kb": self._limits.get(
                    domain.domid, (domain.maximum or reading.total) // KIB
                ),
            }
            for domain in reading.domains
        )
        chosen = [row for row in rows if row["domid"] >= first_dom]
        return sorted(chosen, key=lambda row: row["domid"])[:max_doms]

    async def domain_setmaxmem(self, domid: int, maxmem_kb: int) -> None:
        """Have a domain hold no more than so much."""
        self._limits[str(domid)] = maxmem_kb

    async def domain_set_target_mem(self, domid: int, mem_kb: int) -> None:
        """Say what a domain is to hold; its guest is told in the store."""
        self._targets[str(domid)] = mem_kb

    async def write(self, path: str, value: str) -> None:
        """Set a value; the balloon of a guest follows its ``memory/target``."""
        self.store.write(path, value)
        if (found := _TARGET.fullmatch(path)) and value.isdigit():
            domid, told = found[1], int(value) * KIB
            target = self._targets.get(domid)
            order = Order(
                domid=domid,
                target=told + _UNSEEN if target is None else target * KIB,
                guest_target=told,
                limit=self._limits.get(domid, 1 << 40) * KIB,
            )
            try:
                await self.memory.set_target(order)
            except DomainGoneError:
                self.store.remove(path)  # it ended meanwhile
