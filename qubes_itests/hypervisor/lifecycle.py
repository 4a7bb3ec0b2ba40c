"""libvirt's life-cycle events and states in the contract's words."""

from __future__ import annotations

import libvirt

from qubes_itests.hypervisor.contract import DomainState, LifecycleEvent

__all__ = ["is_panic", "lifecycle_event", "lifecycle_state"]

_EVENTS = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: LifecycleEvent.STARTED,
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: LifecycleEvent.PAUSED,
    libvirt.VIR_DOMAIN_EVENT_RESUMED: LifecycleEvent.RESUMED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED: LifecycleEvent.STOPPED,
}

#: How a domain stops that nobody stopped: its guest panicked, or its process died.
_CRASHES = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED,
}

_PANICS = {
    (libvirt.VIR_DOMAIN_EVENT_CRASHED, libvirt.VIR_DOMAIN_EVENT_CRASHED_PANICKED),
    (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED),
}

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: DomainState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: DomainState.DYING,
    libvirt.VIR_DOMAIN_SHUTOFF: DomainState.HALTED,
    libvirt.VIR_DOMAIN_CRASHED: DomainState.CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: DomainState.SUSPENDED,
}


def lifecycle_event(event: int, detail: int) -> LifecycleEvent | None:
    """Return the contract's event for one of libvirt's, None if it has none."""
    if event == libvirt.VIR_DOMAIN_EVENT_STOPPED and detail in _CRASHES:
        return LifecycleEvent.CRASHED
    return _EVENTS.get(event)


def is_panic(event: int, detail: int) -> bool:
    """Tell whether libvirt says that the guest's kernel panicked.

    It learns that from QEMU's pvpanic device, and stops the domain then, which is an
    event of its own. Of a QEMU that dies it says that it failed.
    """
    return (event, detail) in _PANICS


def lifecycle_state(state: int) -> DomainState:
    """Return the contract's state for one of libvirt's."""
    return _STATES.get(state, DomainState.HALTED)
