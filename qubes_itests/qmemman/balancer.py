"""Execution of decisions, one at a time, whatever single domains do.

Orders are promises. What a domain was told to hold counts as taken at once (`actual`),
though its guest may take it a second later, or never; what a donor was told to give
counts as free only when the hypervisor has it. So the sum of all that was promised
never exceeds the machine, at any moment between two steps.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qubes_itests.exc import HarnessError
from qubes_itests.qmemman import algorithm
from qubes_itests.qmemman.contract import Order
from qubes_itests.qmemman.decision import decide_balance, decide_balloon, obtainable
from qubes_itests.qmemman.exc import DomainGoneError, too_small
from qubes_itests.qmemman.policy import DEFAULT_POLICY, Policy
from qubes_itests.qmemman.state import (
    DOM0,
    DomainMemory,
    MachineMemory,
    parse_report,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qubes_itests.qmemman.algorithm import Target
    from qubes_itests.qmemman.contract import DomainReading, MemoryBackend
    from qubes_itests.qmemman.timeline import Recorder

__all__ = ["Balancer", "Refusal"]

_log = logging.getLogger(__name__)
#: Seconds a back end has for one domain: one that hangs must not stop the others.
_CALL_TIMEOUT = 2.0
#: Donors first free memory, then it is shared: this needs a few rounds.
_MOST_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a VM got no memory; bytes.

    :param asked: what it asked for.
    :param obtainable: what could have been had.
    :param holders: what each domain held, by name.
    """

    asked: int
    obtainable: int
    holders: dict[str, int]


class Balancer(MachineMemory):
    """The state of one machine's memory, and the two acts that change it.

    The caller sees to it that only one act is under way at a time.

    :param backend: the machine.
    :param policy: the numbers to go by.
    :param recorder: gets a record of every decision.
    """

    def __init__(
        self,
        backend: MemoryBackend,
        policy: Policy = DEFAULT_POLICY,
        *,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.refusal: Refusal | None = None
        self._backend = backend
        self._recorder = recorder
        self._has_ordered = False
        self._reports: dict[str, int | None] = {}

    def note_report(self, domid: str, untrusted: bytes) -> None:
        """Remember what a guest reported, for the next reading."""
        self._reports[domid] = parse_report(untrusted)

    def preferred(self, domain: DomainMemory) -> int | None:
        """Return what a domain should hold; None until it has reported."""
        if domain.used is None:
            return None
        return algorithm.preferred_memory(domain, self.policy)

    def reported(self, domid: str) -> bool:
        """Return whether a domain has said what it uses."""
        return self._reports.get(domid) is not None

    async def refresh(self) -> None:
        """Read the machine.

        :raise HarnessError: when dom0 holds more than there is.
        """
        try:
            async with asyncio.timeout(_CALL_TIMEOUT):
                reading = await self._backend.read()
        except TimeoutError:
            # with what was known last: the numbers are old by one step, and a start
            # that is under way must not fail for it
            _log.warning("the machine's memory cannot be read now")
            return
        self.total = reading.total
        self.names = {domain.domid: domain.name for domain in reading.domains}
        self.domains = {r.domid: self._state(r) for r in reading.domains}
        for domid in self._reports.keys() - self.domains.keys():
            del self._reports[domid]
        dom0 = self.domains.get(DOM0)
        if dom0 is not None and dom0.current > self.total:
            raise too_small(self.total, dom0.current)
        assignable = int(reading.free * self.policy.overhead_factor)
        promised = sum(max(0, d.last_target - d.current) for d in self.domains.values())
        # Before the first target dom0 holds what it booted with, which may be all: that
        # is no news, and nobody has given away what is not there.
        if self._has_ordered and assignable < promised + self.policy.free_minimum:
            _log.warning("free memory %d is low: %d are promised", assignable, promised)
        # Less what others may still take: a VM that starts with memory that an earlier
        # target gives to another one would have it taken away while it boots.
        self.free = assignable - promised

    def _state(self, reading: DomainReading) -> DomainMemory:
        old = self.domains.get(reading.domid)
        target = old.last_target if old else reading.target
        maximum = reading.maximum
        if maximum is None:
            maximum = int(self.total * self.policy.overhead_factor)
        return DomainMemory(
            domid=reading.domid,
            used=self._reports.get(reading.domid),
            actual=max(reading.current, target),
            current=reading.current,
            maximum=maximum,
            last_target=target,
            no_progress=bool(old and old.no_progress),
            slow_memset_react=bool(old and old.slow_memset_react),
            paused=reading.paused,
            balanced=reading.balanced,
        )

    async def balance(self) -> None:
        """Give everybody the memory it should have, as far as it can be had now."""
        for _ in range(_MOST_ROUNDS):
            await self.refresh()
            self._update(
                algorithm.clear_outdated_markers(domain, self.policy)
                for domain in self.domains.values()
            )
            targets = decide_balance(self.free, self.domains.values(), self.policy)
            self._record("balance" if targets else "look", targets)
            # again, since what donors have just freed can be shared only now
            if not targets or not await self._carry_out(targets):
                break

    async def _carry_out(self, targets: list[Target]) -> bool:
        """Set targets; False when donors were late and the rest was left."""
        before = dict(self.domains)
        # Donors come first in it. An acceptor that was told first would take memory
        # which nobody has given yet: the hypervisor would have none left, and the
        # guest would find out in the middle of a page fault.
        for domid, target in targets:
            domain = self.domains.get(domid)
            if domain is None:
                continue
            if target > domain.actual and not await self._wait_for(domid, target):
                # Donors that give nothing are left out of the next decision. The rest
                # of this one counted on them, so it is dropped; but the acceptor gets
                # what is there, or it would wait for donors that never come.
                self._mark_late(targets, before)
                if domain := self.domains.get(domid):
                    there = self.free + domain.actual - self.policy.free_to_keep
                    if min(there, target) > domain.actual:
                        await self._set(domid, min(there, target))
                return False
            await self._set(domid, target)
        # until donors have given, so that it can be shared in the next round
        before = dict(self.domains)
        for _ in range(self.policy.patience):
            if not self._late(targets):
                return True
            await self._pause()
        self._mark_late(targets, before)
        return True

    async def _wait_for(self, domid: str, target: int) -> bool:
        """Wait until others have freed what this domain is to get."""
        for _ in range(self.policy.patience):
            domain = self.domains.get(domid)
            if domain is None or self._fits(domain, target):
                return True
            await self._pause()
        domain = self.domains.get(domid)
        return domain is None or self._fits(domain, target)

    def _fits(self, domain: DomainMemory, target: int) -> bool:
        # a tenth less than is kept, for rounding
        rest = self.free - (target - domain.actual)
        return rest >= 0.9 * self.policy.free_to_keep

    def _late(self, targets: list[Target]) -> list[DomainMemory]:
        tolerance = self.policy.donor_tolerance
        donors = (self.domains.get(domid) for domid, _ in targets)
        return [d for d in donors if d and d.actual > d.last_target + tolerance]

    def _mark_late(
        self, targets: list[Target], before: dict[str, DomainMemory]
    ) -> None:
        for domain in self._late(targets):
            old = before.get(domain.domid)
            if old is not None and old.actual == domain.actual:
                _log.warning("%s does not give memory", self._called(domain.domid))
                self._update([replace(domain, no_progress=True)])
            else:
                _log.warning("%s gives memory slowly", self._called(domain.domid))
                self._update([replace(domain, slow_memset_react=True)])

    async def balloon(self, amount: int) -> bool:
        """Free `amount` bytes for a VM that starts; False when they cannot be had."""
        # A donor that hung a minute ago may give now, and a VM that starts is worth
        # asking it: without it the start may be refused for good.
        self._update(replace(d, no_progress=False) for d in self.domains.values())
        await self.refresh()
        needed = amount + self.policy.free_minimum
        seen: deque[int] = deque()
        silent: dict[str, tuple[int, int]] = {}
        while self.free < needed:
            self._note_silence(silent)
            targets = self._balloon_targets(amount, seen)
            self._record("balloon", targets, amount)
            if not targets:
                # What donors have given up to here stays free: the next balance, which
                # the server begins as soon as the client is gone, shares it out again.
                holders = {
                    self._called(d.domid): d.actual for d in self.domains.values()
                }
                could = obtainable(self.free, self.domains.values(), self.policy)
                self.refusal = Refusal(amount, could, holders)
                self._record("refused", [], amount)
                return False
            for domid, target in targets:
                if (domain := self.domains.get(domid)) is None:
                    continue
                silent.setdefault(domid, (domain.actual, 0))
                if target != domain.last_target:
                    await self._set(domid, target)
            await self._pause()
        # Others may have targets above what they hold, from the last balance. They must
        # not grow into what this VM was just given and has not taken yet.
        tolerance = self.policy.promise_tolerance
        found = algorithm.preferences(self.domains.values(), self.policy)
        for domain, preferred in found.each:
            keep = max(domain.current, preferred)
            if keep + tolerance < domain.last_target:
                await self._set(domain.domid, keep)
        self._record("granted", [], amount)
        return True

    def _balloon_targets(self, amount: int, seen: deque[int]) -> list[Target]:
        policy = self.policy
        # Refused for lack of progress rather than after a time: donors that free
        # gigabytes slowly but steadily are waited for, a machine that stands still is
        # told at once.
        seen.append(self.free)
        if len(seen) > policy.progress_period / policy.step:
            progress = self.free - seen.popleft()
            if progress < policy.progress_rate * policy.progress_period:
                return []
        missing = amount + policy.free_to_keep - self.free
        return decide_balloon(missing, self.domains.values(), policy)

    def _note_silence(self, silent: dict[str, tuple[int, int]]) -> None:
        """Exclude donors that have held the same for too many steps."""
        for domid, (held, steps) in tuple(silent.items()):
            domain = self.domains.get(domid)
            if domain is None or domain.actual != held:
                del silent[domid]
            elif steps + 1 >= self.policy.patience:
                _log.warning("%s does not give memory", self._called(domid))
                self._update([replace(domain, no_progress=True)])
            else:
                silent[domid] = (held, steps + 1)

    async def set_memory(self, wishes: Iterable[Target]) -> bool:
        """Set targets that somebody asks for; 0 stands for a VM's preferred memory.

        :return: False when one of them is not possible; then none is set.
        """
        await self.refresh()
        targets = []
        for domid, wish in wishes:
            domain = self.domains.get(domid)
            if domain is None or domain.used is None:
                return False
            target = wish or algorithm.preferred_memory(domain, self.policy)
            if not domain.used <= target <= domain.maximum:
                return False
            targets.append((domid, target))
        growth = sum(target - self.domains[domid].actual for domid, target in targets)
        if growth > max(0, self.free - self.policy.free_minimum):
            return False
        self._record("set", targets)
        for domid, target in targets:
            await self._set(domid, target)
        return True

    async def _set(self, domid: str, target: int) -> None:
        domain = self.domains.get(domid)
        if domain is None:
            return
        policy = self.policy
        order = Order(
            domid=domid,
            target=target,
            guest_target=max(0, target - policy.guest_margin),
            limit=target + policy.limit_margin,
        )
        # Before the order goes out, for between the two others run: a report that
        # comes meanwhile must find the promise made.
        self.free -= max(domain.current, target) - domain.actual
        actual = max(domain.current, target)
        self._update([replace(domain, last_target=target, actual=actual)])
        self._has_ordered = True
        try:
            async with asyncio.timeout(_CALL_TIMEOUT):
                await self._backend.set_target(order)
        except DomainGoneError:
            self.domains.pop(domid, None)
        except (OSError, HarnessError) as error:
            # The order counts as given all the same: whether it arrived is not known,
            # and memory that is given twice is worse than some that lies idle.
            called = self._called(domid)
            _log.warning("%s cannot be told its target: %s", called, repr(error))

    async def _pause(self) -> None:
        await asyncio.sleep(self.policy.step)
        await self.refresh()
        self._record("step", [])

    def _update(self, states: Iterable[DomainMemory]) -> None:
        self.domains.update({state.domid: state for state in tuple(states)})

    def _called(self, domid: str) -> str:
        return self.names.get(domid, f"domain {domid}")

    def _record(self, event: str, targets: list[Target], amount: int = 0) -> None:
        for state in self.domains.values() if targets else ():
            _log.info("%s %s: %s", event, self._called(state.domid), state)
        if self._recorder is not None:
            try:
                self._recorder.record(self, event, targets, amount)
            except OSError as error:  # a full disk is no reason to stop balancing
                _log.warning("the timeline is not written: %s", str(error))

    def subscribe(self, on_news: Callable[[], None]) -> Callable[[], None]:
        """Note reports from now on, and call `on_news` for them and for changes.

        :return: a function that ends it.
        """

        def on_report(domid: str, untrusted: bytes) -> None:
            self.note_report(domid, untrusted)
            on_news()

        return self._backend.subscribe(on_report, on_news)
