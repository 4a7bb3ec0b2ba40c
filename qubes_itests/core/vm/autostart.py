"""Start the VMs that are to start with the system."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from qubes_itests.core.exc import QubesException
from qubes_itests.exc import HarnessError

if TYPE_CHECKING:
    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.qubesvm import QubesVM

__all__ = ["start_autostart"]

log = logging.getLogger("qubes.app")


async def start_autostart(app: Qubes) -> dict[str, Exception]:
    """Start all VMs with `autostart` set: net VMs before those that they connect.

    One that does not start keeps none of the others from it.

    :return: why which VM did not start, by its name; empty if all did.
    """
    failures: dict[str, Exception] = {}

    async def start(vm: QubesVM) -> None:
        try:
            await vm.start()
        except (HarnessError, QubesException) as error:
            log.warning("autostart: %s", str(error))
            failures[vm.name] = error

    wanted = [vm for vm in app.domains.startable() if vm.autostart]
    for level in sorted({_distance(vm) for vm in wanted}):
        at_once = [start(vm) for vm in wanted if _distance(vm) == level]
        await asyncio.gather(*at_once)
    return failures


def _distance(vm: QubesVM) -> int:
    """Return by how many net VMs a VM is connected; loops are refused elsewhere."""
    return 0 if vm.netvm is None else 1 + _distance(vm.netvm)
