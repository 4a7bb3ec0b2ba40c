"""Machines that exist in numbers, and their dom0."""

from __future__ import annotations

import pytest

from qubes_itests.exc import HarnessError
from qubes_itests.qmemman.budget import BudgetedDom0, MemoryBudget

MIB = 1 << 20


@pytest.mark.parametrize(
    ("total", "dom0", "used", "words"),
    [
        (1000, 1001, 1, "cannot hold a dom0 of 1001 MiB"),
        (1000, -1, 0, "cannot use"),
        (1000, 500, 501, "a dom0 of 500 MiB cannot use 501 MiB"),
        (1000, 500, -1, "cannot use -1 MiB"),
    ],
)
def test_impossible_machines(total, dom0, used, words):
    with pytest.raises(HarnessError, match=words):
        MemoryBudget(total=total * MIB, dom0=dom0 * MIB, dom0_used=used * MIB)


def test_dom0_says_what_it_uses_once_it_reports():
    reports = []
    budget = MemoryBudget(
        total=2000 * MIB, dom0=1000 * MIB, dom0_used=300 * MIB, dom0_reports=False
    )
    dom0 = BudgetedDom0(budget, reports.append)
    dom0.repeat_report()
    dom0.use(400 * MIB)
    assert (reports, dom0.holds, dom0.target) == ([], 1000 * MIB, 0)
    dom0.report()
    dom0.use(500 * MIB)
    assert reports == [b"409600", b"512000"]
    with pytest.raises(ValueError, match="got -1"):
        dom0.use(-1)
    dom0.order(800 * MIB)
    assert (dom0.holds, dom0.target) == (800 * MIB, 800 * MIB)
