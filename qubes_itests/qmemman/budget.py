"""Memory of a machine that exists in numbers only, and its dom0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qubes_itests.qmemman.exc import too_small
from qubes_itests.qmemman.sizes import KIB

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BudgetedDom0", "MemoryBudget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """What VMs have to get by on; bytes.

    :param total: memory of the machine, dom0's included.
    :param dom0: what dom0 holds after boot, until it is told a target.
    :param dom0_used: what it uses of that.
    :param dom0_reports: whether it says at once what it uses; else only when told.
    :raise HarnessError: for what no machine can have.
    """

    total: int
    dom0: int
    dom0_used: int
    dom0_reports: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.dom0_used <= self.dom0 <= self.total:
            raise too_small(self.total, self.dom0, self.dom0_used)


class BudgetedDom0:
    """A dom0 that holds what it is told, as fast as it is told.

    :param budget: what it begins with.
    :param pass_on: gets its reports.
    """

    def __init__(self, budget: MemoryBudget, pass_on: Callable[[bytes], None]) -> None:
        #: What it holds, bytes.
        self.holds = budget.dom0
        #: What it was told to hold, bytes; 0 until it was.
        self.target = 0
        #: What it uses, bytes.
        self.used = budget.dom0_used
        self._reports = budget.dom0_reports
        self._pass_on = pass_on

    def order(self, target: int) -> None:
        """Hold so many bytes from now on."""
        self.holds = self.target = target

    def use(self, size: int) -> None:
        """Use so many bytes from now on, and say so if it has begun to report.

        :raise ValueError: for a negative size.
        """
        if size < 0:
            raise ValueError(f"expected 0 or more bytes for dom0 to use, got {size}")
        self.used = size
        self.repeat_report()

    def report(self) -> None:
        """Say what it uses, now and whenever that changes."""
        self._reports = True
        self.repeat_report()

    def repeat_report(self) -> None:
        """Say what it uses if it has begun to report."""
        if self._reports:
            self._pass_on(b"%d" % (self.used // KIB))
