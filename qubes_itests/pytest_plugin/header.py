"""The lines at the top of a run that say what it runs in."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qubes_itests.core.policy.files import find_error
from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.fixtures.session import CONTEXT
from qubes_itests.host import sandbox
from qubes_itests.host.kernel import find_kernel
from qubes_itests.hypervisor.kvm import kvm_usable
from qubes_itests.pytest_plugin.worker import ROLE, distributes, is_worker
from qubes_itests.report.names import one_line
from qubes_itests.run.app_templates import policy_of

if TYPE_CHECKING:
    import pytest

    from qubes_itests.run.context import RunContext

__all__ = ["all_lines"]


def all_lines(config: pytest.Config) -> list[str]:
    """Return the lines at the top of a run; those of a worker would be lost."""
    if is_worker(config):
        return []
    lines = _lines(config.stash[CONTEXT])
    if distributes(config):
        lines.append(config.pluginmanager.get_plugin(ROLE).header())  # type: ignore[union-attr]
    return lines


def _lines(context: RunContext) -> list[str]:
    settings = context.settings
    result = []
    if not sandbox.active():
        why = "pytest was called by another program"
        if os.geteuid() != 0:
            why = "that takes root, and so do tests that mount or start VMs"
        result.append(f"sandbox: none: {why}")
    else:
        kinds = "mount, PID, network and IPC namespaces"
        result.append(f"sandbox: {kinds} of this run's own")
        result.append(f"cache: {context.cache.root}")
        result.append(f"hypervisor: {_hypervisor(context)}")
        templates = ", ".join(settings.templates)
        starts = "warm starts" if settings.warm else "cold starts"
        result.append(f"templates: {templates} ({starts})")
        if error := find_error(policy_of(settings)):
            result.append(f"policy: it denies all calls, for {error}")
        if size := settings.memory_budget:
            result.append(f"memory: {size} MiB for dom0 and the VMs of each test")
    return result


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
