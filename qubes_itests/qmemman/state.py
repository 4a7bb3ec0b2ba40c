"""State of a domain's memory, and the report of its guest."""

from __future__ import annotations

import abc
import re
from dataclasses import dataclass

from qubes_itests.qmemman.sizes import KIB

__all__ = ["DOM0", "DomainMemory", "MachineMemory", "parse_report"]

DOM0 = "0"
_DIGITS = re.compile(rb"[0-9]{1,13}", re.ASCII)
#: Up to here floating point is exact; no machine has more.
_MOST = 1 << 53


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainMemory:
    """One domain's memory at one moment; sizes in bytes.

    :param domid: the domain's number; ``"0"`` is dom0.
    :param used: what the guest says it uses; None until it has reported.
    :param actual: what it holds or may take at any time: the larger of `current`
        and `last_target`.
    :param current: what the hypervisor has given it.
    :param maximum: it can never hold more.
    :param last_target: what it was last told to hold; 0 if it never was.
    :param no_progress: it did not react to a target at all.
    :param slow_memset_react: it reacted, but gave less than it was told.
    :param paused: its CPUs are stopped, so nothing can be taken from or used by it.
    :param balanced: it takes part, so a report of it is to come.
    """

    domid: str
    used: int | None = None
    actual: int = 0
    current: int = 0
    maximum: int = 0
    last_target: int = 0
    no_progress: bool = False
    slow_memset_react: bool = False
    paused: bool = False
    balanced: bool = True


class MachineMemory(abc.ABC):
    """Memory of a machine as a daemon sees it; sizes in bytes."""

    def __init__(self) -> None:
        #: By number.
        self.domains: dict[str, DomainMemory] = {}
        #: For people, by number.
        self.names: dict[str, str] = {}
        #: What nobody holds or was promised.
        self.free = 0
        self.total = 0

    @abc.abstractmethod
    def preferred(self, domain: DomainMemory) -> int | None:
        """Return what a domain should hold; None until it has reported."""


def parse_report(untrusted: bytes | None) -> int | None:
    """Return the bytes that a guest's report says it uses; None if it says nothing.

    :param untrusted: what the guest wrote: kB as ASCII digits.  Everything else, and
        what no machine has, counts as not reported.
    """
    if untrusted is None or not _DIGITS.fullmatch(untrusted):
        return None
    used = int(untrusted) * KIB
    return used if used < _MOST else None
