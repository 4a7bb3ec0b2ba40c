"""Replay of a trace against the policy alone, and a verdict on it.

No daemon and no sockets: guests obey within a second, and each second has at most one
decision.  So thousands of VMs over hours show what the policy does, as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qubes_itests.qmemman.algorithm import preferred_memory
from qubes_itests.qmemman.decision import decide_balance
from qubes_itests.qmemman.policy import DEFAULT_POLICY, Policy
from qubes_itests.qmemman.sizes import KIB
from qubes_itests.qmemman.state import DomainMemory

if TYPE_CHECKING:
    from memory_traces import Trace

__all__ = ["Verdict", "replay"]

_REPORT_STEP = 30_000 * KIB


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a policy made of a trace.

    :param fairness: Jain's index of what VMs hold per preferred memory, on average
        over time: 1 is all alike.
    :param thrash: bytes moved per byte that VMs came to lack.
    :param below: the part of all VMs' time that was below 90 % of the preference.
    :param decisions: how many changed something.
    """

    fairness: float
    thrash: float
    below: float
    decisions: int


class _Machine:
    """Domains that obey at once, as far as memory is there."""

    def __init__(self, total: int, trace: Trace, policy: Policy) -> None:
        share = (total - policy.free_to_keep) // max(1, len(trace.maxima))
        self.policy = policy
        self.domains = {
            str(index): DomainMemory(
                domid=str(index),
                actual=(held := min(share, maximum)),
                current=held,
                maximum=maximum,
                last_target=held,
            )
            for index, maximum in enumerate(trace.maxima, 1)
        }
        self.free = total - sum(domain.actual for domain in self.domains.values())
        self.moved = self.lacked = self.decisions = 0

    def use(self, index: int, used: int) -> bool:
        """Note a report; False when it is too small a change to be one."""
        domid = str(index + 1)
        domain = self.domains[domid]
        if domain.used is not None and abs(used - domain.used) < _REPORT_STEP:
            return False
        before = preferred_memory(domain, self.policy) if domain.used else 0
        domain = self.domains[domid] = replace(domain, used=used)
        lack = preferred_memory(domain, self.policy) - max(domain.actual, before)
        self.lacked += max(0, lack)
        return True

    def balance(self) -> bool:
        """Decide once and obey; False when nothing was to be done."""
        targets = decide_balance(self.free, self.domains.values(), self.policy)
        for domid, target in targets:
            domain = self.domains[domid]
            change = target - domain.actual
            self.free -= change
            self.moved += abs(change)
            self.domains[domid] = replace(
                domain, actual=target, current=target, last_target=target
            )
        self.decisions += bool(targets)
        return bool(targets)

    def judge(self) -> tuple[float, float]:
        """Return fairness now, and the part of the domains that lack memory."""
        count, total, squares, below = 0, 0.0, 0.0, 0
        for domain in self.domains.values():
            if domain.used is None:
                continue
            wanted = min(preferred_memory(domain, self.policy), domain.maximum)
            ratio = domain.actual / wanted if wanted else 1.0
            count += 1
            total += ratio
            squares += ratio * ratio
            below += ratio < 0.9
        return (
            total * total / (count * squares) if squares else 1.0,
            below / (count or 1),
        )


def replay(
    trace: Trace, total: int, policy: Policy = DEFAULT_POLICY, *, judge_every: int = 10
) -> Verdict:
    """Return what the policy makes of a trace.

    :param trace: what the VMs use.
    :param total: the memory that they share, bytes.
    :param judge_every: seconds between two looks at fairness and lack.
    """
    machine = _Machine(total, trace, policy)
    fairness, below = [], []
    position, busy = 0, False
    for second in range(trace.seconds):
        while position < len(trace.changes) and trace.changes[position][0] <= second:
            _, index, used = trace.changes[position]
            busy |= machine.use(index, used)
            position += 1
        busy = busy and machine.balance()
        if second % judge_every == judge_every - 1:
            fair, lack = machine.judge()
            fairness.append(fair)
            below.append(lack)
    looks = max(1, len(below))
    return Verdict(
        fairness=sum(fairness) / looks,
        thrash=machine.moved / max(1, machine.lacked),
        below=sum(below) / looks,
        decisions=machine.decisions,
    )
