"""Numbers of the policy: those of Qubes OS, four of them configurable."""

from __future__ import annotations

from dataclasses import dataclass

from qubes_itests.qmemman.sizes import KIB, MIB

__all__ = ["DEFAULT_POLICY", "Policy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the decisions go by; sizes in bytes, times in seconds.

    :param vm_min_mem: no VM prefers less.
    :param dom0_mem_boost: what dom0 prefers beyond a VM's measure, for the caches of
        the disks that it serves.
    :param cache_margin_factor: preferred memory per used memory.
    :param free_to_keep: what balancing leaves to the hypervisor.
    :param free_minimum: what is left even when a VM starts.
    :param overhead_factor: the part of the machine's memory that can be assigned;
        the rest goes to the hypervisor's tables of pages.
    :param step: how long donors have before somebody looks again.
    :param patience: after how many steps a donor counts as not responding.
    :param progress_period: over this time a balloon must make progress ...
    :param progress_rate: ... of so many bytes per second.
    :param smallest_transfer: moving less in total is not worth it.
    :param smallest_change: except for a VM under its preference that gains this.
    :param request_factor: asked of donors beyond what is needed, for rounding.
    :param rounding: targets are this part of the exact result.
    :param smallest_donation: donors with less to spare are left alone.
    :param guest_margin: a guest's own target is so much lower: it does not see all
        memory that its domain holds.
    :param limit_margin: the hypervisor enforces the target and this.
    :param donor_tolerance: a donor that holds so much beyond its target is late.
    :param marker_tolerance: a domain within this of its target has responded.
    :param promise_tolerance: a target less than this above what is held is no promise.
    :param log_level: of the daemon's messages, as `logging` counts: 20 shows every
        decision; None leaves it to the configuration of logging.
    """

    vm_min_mem: int = 200 * MIB
    dom0_mem_boost: int = 350 * MIB
    cache_margin_factor: float = 1.3
    free_to_keep: int = 50 * MIB
    free_minimum: int = 25 * MIB
    overhead_factor: float = 1 / 1.00781
    step: float = 0.1
    patience: int = 5
    progress_period: float = 3.0
    progress_rate: int = 100 * MIB
    smallest_transfer: int = 150 * MIB
    smallest_change: int = 15 * MIB
    request_factor: float = 1.05
    rounding: float = 0.999
    smallest_donation: int = 10 * MIB
    guest_margin: int = 16 * MIB
    limit_margin: int = MIB
    donor_tolerance: int = 50 * MIB // 4
    marker_tolerance: int = 50 * MIB // 2
    promise_tolerance: int = 200 * KIB
    log_level: int | None = None


DEFAULT_POLICY = Policy()
