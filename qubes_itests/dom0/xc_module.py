"""What a core imports as ``xen.lowlevel.xc``."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from qubes_itests.dom0 import modules

__all__: list[str] = []


class _PhysicalInfo(dict[str, Any]):
    """What `xc.physinfo` returns; what is free is looked up when it is asked for.

    That takes a turn of the event loop, and a core is not to wait for the rest: it
    fills in what it knows of the host line by line, and VMs that start beside one
    another, each in a thread, would find one half of it.
    """

    def __missing__(self, name: str) -> int:
        if name != "free_memory":
            raise KeyError(name)
        machine = modules.machine()
        return machine.run(machine.xen.physinfo())[name]


class xc:
    """A connection to the hypervisor."""

    def __getattr__(self, name: str) -> NoReturn:
        modules.missing(f"xen.lowlevel.xc.xc.{name}", name)

    def physinfo(self) -> dict[str, Any]:
        """Return the memory that domains share, KiB, and the CPUs of this machine."""
        return _PhysicalInfo(
            total_memory=modules.machine().memory.budget.total >> 10,
            nr_cpus=os.cpu_count() or 1,
            virt_caps=["pv", "hvm", "hap"],
        )

    def domain_getinfo(
        self, first_dom: int = 0, max_doms: int = 1024
    ) -> list[dict[str, Any]]:
        """Return what runs, from a number on."""
        machine = modules.machine()
        rows = machine.run(machine.xen.domain_getinfo())
        held = {row["domid"]: row["mem_kb"] for row in rows}
        guests = sorted(machine.guests.values(), key=lambda guest: guest.xid)
        return [
            {
                "domid": guest.xid,
                # what it is to have, until its guest begins to start
                "mem_kb": held.get(guest.xid, guest.config.memory << 10),
                "maxmem_kb": guest.config.max_memory << 10,
                "online_vcpus": guest.config.vcpus,
                "cpu_time": 0,
                "hvm": 0,
            }
            for guest in guests
            if guest.xid >= max(first_dom, 0)
        ][:max_doms]
