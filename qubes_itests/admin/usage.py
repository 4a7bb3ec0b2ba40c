"""The memory and CPU time that VMs use."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_itests.hypervisor.exc import HypervisorError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qubes_itests.core.vm.base import BaseVM

__all__ = ["Usage", "cpu_percent", "usage_of"]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a VM uses.

    :param memory: bytes that it holds.
    :param cpu_time: seconds that its CPUs have run since its start.
    :param at: when that was, in seconds of the event loop's clock.
    """

    memory: int = 0
    cpu_time: float = 0.0
    at: float = 0.0


_NOTHING: Final = Usage()
#: Seconds that one VM has to tell.
_PATIENCE: Final = 5.0


async def usage_of(vm: BaseVM, at: float = 0.0) -> Usage:
    """Return what a VM uses; nothing of dom0, and when it does not run, or hangs."""
    if not isinstance(vm, QubesVM) or vm.domain is None or not vm.is_running():
        return _NOTHING
    try:
        async with asyncio.timeout(_PATIENCE):
            statistics = await vm.domain.memory_statistics()
            return Usage(statistics.actual, await vm.domain.cpu_time(), at)
    except (HypervisorError, TimeoutError):
        # it ended meanwhile, or its QEMU does not answer
        return _NOTHING


def cpu_percent(before: Mapping[str, Usage], name: str, now: Usage) -> int:
    """Return how much of one CPU a VM had since it was looked at before, in percent."""
    then = before.get(name)
    if then is None or now.at <= then.at or now.cpu_time < then.cpu_time:
        return 0
    return round(100 * (now.cpu_time - then.cpu_time) / (now.at - then.at))
