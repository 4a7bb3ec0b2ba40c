"""Decisions: the arithmetic, and what keeps guests safe from its rounding.

The reference's arithmetic leaves four corners in which a guest would be told to go
where it must not, or nobody would ever rest; here they are cut off:

- rounding down may take up to 0.1 % from a VM that is under its preference already;
- a balloon asks donors for 5 % more than it needs, which may be more than they spare,
  and with a large surplus is even below what the guest uses;
- a VM that holds more than its maximum may be told to go on doing so;
- a VM whose maximum is below the least preference lacks for ever what it cannot hold,
  and others give it up and get it back, again and again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.qmemman import algorithm
from qubes_itests.qmemman.policy import DEFAULT_POLICY, Policy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qubes_itests.qmemman.algorithm import Preferences, Target
    from qubes_itests.qmemman.state import DomainMemory

__all__ = ["decide_balance", "decide_balloon", "obtainable"]


def decide_balance(
    free: int, domains: Iterable[DomainMemory], policy: Policy = DEFAULT_POLICY
) -> list[Target]:
    """Return the targets to set now, donors first; nothing when all is well.

    :param free: all free memory, bytes, with what is to be kept.
    """
    found = _attainable(algorithm.preferences(domains, policy))
    spare = free - policy.free_to_keep
    available = found.available(spare)
    if available > 0:
        targets = algorithm.balance_when_enough_memory(found, available, policy)
    else:
        targets = algorithm.balance_when_low_on_memory(found, spare, policy)
    if not algorithm.is_significant(targets, found, free, policy):
        return []
    late = policy.donor_tolerance
    return [
        (domid, target)
        for domid, target in _safe(targets, found)
        # a donor that has its order already and does not give is to be found out
        if target != (domain := found.known[domid][0]).last_target
        or domain.actual > target + late
    ]


def decide_balloon(
    amount: int, domains: Iterable[DomainMemory], policy: Policy = DEFAULT_POLICY
) -> list[Target]:
    """Return what donors shall go down to, so that `amount` becomes free.

    :param amount: bytes beyond what is free now.
    :return: nothing when donors cannot spare it; donors that have their order already
        and have not moved yet are among them.
    """
    domains = tuple(domains)
    found = algorithm.preferences(domains, policy)
    targets = algorithm.balloon(amount, domains, policy)
    return _safe([(d, max(target, found.known[d][1])) for d, target in targets], found)


def obtainable(
    free: int, domains: Iterable[DomainMemory], policy: Policy = DEFAULT_POLICY
) -> int:
    """Return what a starting VM could have at most, in bytes.

    :param free: all free memory, bytes.
    """
    found = algorithm.preferences(domains, policy).each
    spare = sum(max(0, domain.actual - preferred) for domain, preferred in found)
    return max(0, free - policy.free_minimum, free + spare - policy.free_to_keep)


def _attainable(found: Preferences) -> Preferences:
    """Return preferences that are within each domain's maximum."""
    if all(preferred <= domain.maximum for domain, preferred in found.each):
        return found
    each = [(d, min(preferred, d.maximum)) for d, preferred in found.each]
    total = sum(preferred for _, preferred in each)
    needed = found.needed - (found.total - total)
    known = {pair[0].domid: pair for pair in each}
    return algorithm.Preferences(each, total, needed, known)


def _safe(targets: Iterable[Target], found: Preferences) -> list[Target]:
    kept = []
    for domid, wanted in targets:
        domain, preferred = found.known[domid]
        target = min(wanted, domain.maximum)
        lacks = domain.actual < min(preferred, domain.maximum)
        if not (lacks and target < domain.actual):
            kept.append((domid, target))
    return kept
