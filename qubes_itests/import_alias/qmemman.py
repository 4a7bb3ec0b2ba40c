"""The arithmetic of qmemman, with the names and the arguments of Qubes OS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypedDict

from qubes_itests.qmemman import algorithm
from qubes_itests.qmemman.policy import DEFAULT_POLICY
from qubes_itests.qmemman.state import DomainMemory, parse_report

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from qubes_itests.qmemman.algorithm import Target

__all__ = [
    "CACHE_FACTOR",
    "DOM0_MEM_BOOST",
    "MIN_PREFMEM",
    "REQ_SAFETY_NET_FACTOR",
    "DomainState",
    "balance",
    "balance_when_enough_mem",
    "balance_when_low_on_mem",
    "balloon",
    "mem_info",
    "needed_mem",
    "pref_mem",
    "refresh_meminfo_for_domain",
    "sanitize_and_parse_meminfo",
]

#: See `qubes_itests.qmemman.policy.Policy`; sizes in bytes.
CACHE_FACTOR: Final = DEFAULT_POLICY.cache_margin_factor
MIN_PREFMEM: Final = DEFAULT_POLICY.vm_min_mem
DOM0_MEM_BOOST: Final = DEFAULT_POLICY.dom0_mem_boost
REQ_SAFETY_NET_FACTOR: Final = DEFAULT_POLICY.request_factor


class MemInfo(TypedDict):
    """What a decision is based on, sizes in bytes; donors and acceptors by number."""

    dom_dict: Mapping[str, DomainState]
    total_available_mem: int
    xen_free_mem: int
    total_mem_pref: int
    total_mem_pref_acceptors: int
    donors: list[str]
    acceptors: list[str]


@dataclass
class DomainState:
    """What is known of a domain's memory, and may change; sizes in bytes.

    See `qubes_itests.qmemman.state.DomainMemory`, which is what is decided on.
    """

    domid: str
    mem_current: int = 0
    mem_actual: int | None = None
    mem_max: int | None = None
    mem_used: int | None = None
    last_target: int = 0
    use_hotplug: bool = False
    no_progress: bool = False
    slow_memset_react: bool = False

    def memory(self) -> DomainMemory:
        """Return it as it is now."""
        return DomainMemory(
            domid=self.domid,
            used=self.mem_used,
            actual=self.mem_actual or 0,
            current=self.mem_current,
            maximum=self.mem_max or 0,
            last_target=self.last_target,
            no_progress=self.no_progress,
            slow_memset_react=self.slow_memset_react,
        )


def _memories(domains: Iterable[DomainState]) -> list[DomainMemory]:
    return [domain.memory() for domain in domains]


def sanitize_and_parse_meminfo(untrusted_meminfo: bytes | None) -> int | None:
    """Return the bytes that a guest's report says it uses; see `parse_report`."""
    return parse_report(untrusted_meminfo)


def refresh_meminfo_for_domain(
    dom: DomainState, untrusted_xenstore_key: bytes | None
) -> None:
    """Take note of a guest's report."""
    dom.mem_used = parse_report(untrusted_xenstore_key)


def pref_mem(dom: DomainState) -> int:
    """Return what a domain should hold to work well, in bytes."""
    return algorithm.preferred_memory(dom.memory())


def needed_mem(dom: DomainState) -> int:
    """Return what a domain lacks, in bytes; negative is what it can spare."""
    return algorithm.needed_memory(dom.memory())


def balloon(mem_size: int, dom_dict: Mapping[str, DomainState]) -> list[Target]:
    """Return what donors shall go down to, so that `mem_size` bytes become free."""
    return algorithm.balloon(mem_size, _memories(dom_dict.values()))


def mem_info(xen_free_mem: int, dom_dict: Mapping[str, DomainState]) -> MemInfo:
    """Return what `balance` would base its decision on.

    :param xen_free_mem: bytes beyond what is to be kept.
    """
    found = algorithm.preferences(_memories(dom_dict.values()))
    donors = [
        d.domid for d, preferred in found.each if algorithm.is_donor(d, preferred)
    ]
    acceptors = {d.domid: pref for d, pref in found.each if d.domid not in donors}
    return {
        "dom_dict": dom_dict,
        "total_available_mem": found.available(xen_free_mem),
        "xen_free_mem": xen_free_mem,
        "total_mem_pref": found.total,
        "total_mem_pref_acceptors": sum(acceptors.values()),
        "donors": donors,
        "acceptors": list(acceptors),
    }


def balance(xen_free_mem: int, dom_dict: Mapping[str, DomainState]) -> list[Target]:
    """Return everybody's target, donors first; see `algorithm.balance`."""
    return algorithm.balance(xen_free_mem, _memories(dom_dict.values()))


def balance_when_enough_mem(
    dom_dict: Mapping[str, DomainState],
    xen_free_mem: int,
    total_mem_pref: int,
    total_available_mem: int,
) -> list[Target]:
    """Return targets that share what is left over in proportion to preference.

    :param xen_free_mem: not looked at, as in Qubes OS.
    :param total_mem_pref: the sum of what the domains prefer, bytes.
    :param total_available_mem: bytes beyond that.
    """
    del xen_free_mem
    found = algorithm.preferences(_memories(dom_dict.values()))
    return algorithm.balance_when_enough_memory(
        replace(found, total=total_mem_pref), total_available_mem
    )


def balance_when_low_on_mem(
    dom_dict: Mapping[str, DomainState],
    xen_free_mem: int,
    total_mem_pref_acceptors: int,
    donors: Collection[str],
    acceptors: Collection[str],
) -> list[Target]:
    """Return targets that bring donors to their preference, and share what is free.

    :param xen_free_mem: bytes beyond what is to be kept.
    :param total_mem_pref_acceptors: not looked at: it follows from the domains.
    :param donors: who may be asked to give.
    :param acceptors: who may be given.
    """
    del total_mem_pref_acceptors
    named = [dom_dict[domid] for domid in (*donors, *acceptors)]
    found = algorithm.preferences(_memories(named))
    return algorithm.balance_when_low_on_memory(found, xen_free_mem)
