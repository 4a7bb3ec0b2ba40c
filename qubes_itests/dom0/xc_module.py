"""What a core imports as ``xen.lowlevel.xc``."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from qubes_itests.dom0 import modules

__all__: list[str] = []


class xc:
    """A connection to the hypervisor."""

    def __getattr__(self, name: str) -> NoReturn:
        modules.missing(f"xen.lowlevel.xc.xc.{name}", name)

    def physinfo(self) -> dict[str, Any]:
        """Return the memory of this machine, KiB, and its CPUs."""
        page = os.sysconf("SC_PAGE_SIZE") >> 10
        return {
            "total_memory": os.sysconf("SC_PHYS_PAGES") * page,
            "free_memory": os.sysconf("SC_AVPHYS_PAGES") * page,
            "nr_cpus": os.cpu_count() or 1,
            "virt_caps": ["pv", "hvm", "hap"],
        }

    def domain_getinfo(
        self, first_dom: int = 0, max_doms: int = 1024
    ) -> list[dict[str, Any]]:
        """Return what runs, from a number on."""
        guests = sorted(modules.machine().guests.values(), key=lambda guest: guest.xid)
        return [
            {
                "domid": guest.xid,
                "mem_kb": guest.config.memory << 10,
                "maxmem_kb": guest.config.max_memory << 10,
                "online_vcpus": guest.config.vcpus,
                "cpu_time": 0,
                "hvm": 0,
            }
            for guest in guests
            if guest.xid >= max(first_dom, 0)
        ][:max_doms]
