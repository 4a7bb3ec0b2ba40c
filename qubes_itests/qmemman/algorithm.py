"""Arithmetic of qmemman: pure functions, equal to the reference to the byte.

Every function takes the domains as they are and returns targets in bytes; none looks
at a clock or at the machine.  All are linear in the number of domains.  Rounding
follows the reference operation by operation: do not reorder floating point here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qubes_itests.qmemman.policy import DEFAULT_POLICY, Policy
from qubes_itests.qmemman.state import DOM0, DomainMemory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "Preferences",
    "Target",
    "balance",
    "balance_when_enough_memory",
    "balance_when_low_on_memory",
    "balloon",
    "clear_outdated_markers",
    "is_donor",
    "is_significant",
    "needed_memory",
    "preferences",
    "preferred_memory",
]

#: A domain's number, and how much it shall hold, in bytes.
Target = tuple[str, int]


def preferred_memory(domain: DomainMemory, policy: Policy = DEFAULT_POLICY) -> int:
    """Return what a domain should hold to work well, in bytes.

    :param domain: one that has reported.
    """
    wanted = (domain.used or 0) * policy.cache_margin_factor
    if domain.domid == DOM0:
        return int(min(wanted + policy.dom0_mem_boost, domain.maximum))
    return int(max(min(wanted, domain.maximum), policy.vm_min_mem))


def needed_memory(domain: DomainMemory, policy: Policy = DEFAULT_POLICY) -> int:
    """Return what a domain lacks, in bytes; negative is what it can spare."""
    return preferred_memory(domain, policy) - domain.actual


@dataclass(frozen=True, slots=True)
class Preferences:
    """The domains that take part, each with its preferred memory.

    :param each: in the order given.
    :param total: the sum of what they prefer, bytes.
    :param needed: the sum of what they lack, bytes; negative when they can spare.
    :param known: the same as `each`, by number.
    """

    each: Sequence[tuple[DomainMemory, int]]
    total: int
    needed: int
    known: Mapping[str, tuple[DomainMemory, int]]

    def available(self, free: int) -> int:
        """Return what is left over once everybody has what it prefers, bytes."""
        return free - self.needed


def preferences(
    domains: Iterable[DomainMemory], policy: Policy = DEFAULT_POLICY
) -> Preferences:
    """Return who takes part: who has reported, responds, and is not paused."""
    # preferred_memory(), spelt out: called 10,000 times it was half of a decision
    factor, floor = policy.cache_margin_factor, policy.vm_min_mem
    known = {}
    total = actual = 0
    for domain in domains:
        used = domain.used
        if used is None or domain.no_progress or domain.paused:
            continue
        if domain.domid == DOM0:
            preferred = preferred_memory(domain, policy)
        else:
            wanted, maximum = used * factor, domain.maximum
            preferred = max(int(min(wanted, maximum)), floor)
        known[domain.domid] = (domain, preferred)
        total += preferred
        actual += domain.actual
    return Preferences(tuple(known.values()), total, total - actual, known)


def balloon(
    amount: int, domains: Iterable[DomainMemory], policy: Policy = DEFAULT_POLICY
) -> list[Target]:
    """Return what donors shall go down to, so that `amount` becomes free.

    :param amount: bytes beyond what is free now.
    :return: targets of all donors, or nothing when together they cannot spare it.
    """
    donors = [
        (domain, domain.actual - preferred)
        for domain, preferred in preferences(domains, policy).each
        if domain.actual > preferred
    ]
    spare = sum(surplus for _, surplus in donors)
    if not donors or spare < amount:
        return []
    scale = 1.0 * amount / spare
    return [
        (d.domid, int(d.actual - surplus * scale * policy.request_factor))
        for d, surplus in donors
    ]


def balance(
    free: int, domains: Iterable[DomainMemory], policy: Policy = DEFAULT_POLICY
) -> list[Target]:
    """Return everybody's target, donors first.

    :param free: free memory beyond what is to be kept, bytes; may be negative.
    """
    found = preferences(domains, policy)
    if found.available(free) > 0:
        return balance_when_enough_memory(found, found.available(free), policy)
    return balance_when_low_on_memory(found, free, policy)


def balance_when_enough_memory(
    found: Preferences, available: int, policy: Policy = DEFAULT_POLICY
) -> list[Target]:
    """Return targets that share what is left over in proportion to preference.

    :param found: those who take part.
    :param available: bytes beyond the sum of what they prefer.
    """
    if not found.total:
        return []
    total, rounding = found.total, policy.rounding
    targets: list[int] = []
    surplus = takers = 0
    for domain, preferred in found.each:
        target = int(rounding * (preferred + 1.0 * preferred / total * available))
        # What a domain cannot take goes to the others (`_share_out`), for memory that
        # nobody holds is of use to nobody.
        if target > domain.maximum:
            surplus += target - domain.maximum
            target = domain.maximum
        else:
            takers += 1
        targets.append(target)
    _share_out(found, targets, surplus, takers, policy)
    donors: list[Target] = []
    acceptors: list[Target] = []
    for (domain, _), target in zip(found.each, targets, strict=True):
        side = donors if target < domain.actual else acceptors
        side.append((domain.domid, target))
    return donors + acceptors


def _share_out(
    found: Preferences, targets: list[int], surplus: int, takers: int, policy: Policy
) -> None:
    """Give what some could not take, in equal parts, to those below their maximum."""
    open_ = list(range(len(targets))) if surplus > 0 else []
    while surplus > 0 and takers > 0:
        bonus = int(policy.rounding * (surplus / takers))
        surplus = 0
        still_open = []
        for index in open_:
            maximum = found.each[index][0].maximum
            target = targets[index]
            if target >= maximum:
                continue
            target += bonus
            if target >= maximum:
                surplus += target - maximum
                target = maximum
                takers -= 1
            else:
                still_open.append(index)
            targets[index] = target
        open_ = still_open


def balance_when_low_on_memory(
    found: Preferences, free: int, policy: Policy = DEFAULT_POLICY
) -> list[Target]:
    """Return targets that bring donors to their preference, and share what is free.

    What donors are asked for is not given away in the same decision: while they hold
    it, only what is free beyond that is shared.  The next decision shares the rest.

    :param found: those who take part.
    :param free: free memory beyond what is to be kept, bytes.
    """
    donors, acceptors = [], []
    acceptors_total = 0
    for domain, preferred in found.each:
        if is_donor(domain, preferred):
            if domain.actual - preferred >= policy.smallest_donation:
                free -= domain.actual - preferred
                donors.append((domain.domid, preferred))
        else:
            acceptors_total += preferred
            acceptors.append((domain, preferred))
    # More is missing than is free: nothing to share until donors have given.
    if free < 0 or not acceptors_total:
        return donors
    for domain, preferred in acceptors:
        exact = domain.actual + 1.0 * preferred / acceptors_total * free
        target = min(int(policy.rounding * exact), domain.maximum)
        donors.append((domain.domid, target))
    return donors


def is_donor(domain: DomainMemory, preferred: int) -> bool:
    """Return whether a domain holds more than it prefers, or can take no more."""
    return preferred < domain.actual or domain.actual >= domain.maximum


def is_significant(
    targets: Iterable[Target],
    found: Preferences,
    free: int,
    policy: Policy = DEFAULT_POLICY,
) -> bool:
    """Return whether targets are worth the unrest that they cause.

    :param found: those who take part; all targets are theirs.
    :param free: all free memory, bytes, with what is to be kept.
    """
    # The hypervisor itself is short of memory: that is worth any unrest.
    if policy.free_to_keep - free > policy.smallest_change:
        return True
    known = found.known
    transfer = abs(free - policy.free_to_keep)
    for domid, target in targets:
        domain, preferred = known[domid]
        change = target - domain.last_target
        if change > policy.smallest_change and 0 < domain.last_target < preferred:
            return True
        transfer += abs(change)
    return transfer > policy.smallest_transfer


def clear_outdated_markers(
    domain: DomainMemory, policy: Policy = DEFAULT_POLICY
) -> DomainMemory:
    """Return the domain without error markers, if it has responded or lacks memory.

    The second keeps a VM from being starved because it was slow once.
    """
    marked = domain.no_progress or domain.slow_memset_react
    if not marked or domain.used is None:
        return domain
    responded = domain.actual <= domain.last_target + policy.marker_tolerance
    if responded or domain.actual < preferred_memory(domain, policy):
        return replace(domain, no_progress=False, slow_memset_react=False)
    return domain
