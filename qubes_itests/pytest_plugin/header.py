"""The lines at the top of a run that say what it runs in."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.host import sandbox
from qubes_itests.host.kernel import find_kernel
from qubes_itests.hypervisor.kvm import kvm_usable
from qubes_itests.report.names import one_line

if TYPE_CHECKING:
    from qubes_itests.run_context import RunContext

__all__ = ["lines"]


def lines(context: RunContext) -> list[str]:
    """Return the lines about sandbox, cache and templates."""
    settings = context.settings
    result = [f"sandbox: {_sandbox()}"]
    if sandbox.active():
        result.append(f"cache: {context.cache.root}")
        result.append(f"hypervisor: {_hypervisor(context)}")
        templates = ", ".join(settings.templates)
        starts = "warm starts" if settings.warm else "cold starts"
        result.append(f"templates: {templates} ({starts})")
        if size := settings.memory_budget:
            result.append(f"memory: {size} MiB for dom0 and the VMs of each test")
    return result


def _sandbox() -> str:
    if sandbox.active():
        return "mount, PID, network and IPC namespaces of this run's own"
    if os.geteuid() != 0:
        return "none: that takes root, and so do tests that mount or start VMs"
    return "none: pytest was called by another program"


def _hypervisor(context: RunContext) -> str:
    name = context.settings.hypervisor
    if name != "qemu":
        return name
    try:
        verdict = kvm_usable(context.cache, find_kernel(context.cache).image)
    except EnvironmentNotReadyError as error:
        return f"{name}, unless it is needed: {error.problem}"
    how = "KVM" if verdict.usable else "emulation"
    return f"{name}, {how} ({one_line(verdict.reason, 80)})"
