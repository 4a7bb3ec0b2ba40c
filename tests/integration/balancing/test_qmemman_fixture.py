"""The fixtures `memory_budget` and `qmemman`, on real VMs."""

from __future__ import annotations

import re

import pytest

from qubes_itests.core.exc import QubesVMStartError
from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.fixtures.memory import qmemman as qmemman_fixture
from qubes_itests.qmemman.budget import MemoryBudget
from qubes_itests.qmemman.sizes import MIB


@pytest.fixture
def memory_budget():
    return MemoryBudget(total=1500 * MIB, dom0=1500 * MIB, dom0_used=100 * MIB)


def test_vms_of_a_test_share_a_machine(vm_factory, qmemman):
    vm = vm_factory("work", memory=300, maxmem=600)
    qmemman.wait_for_target(vm, at_least=400)
    assert qmemman.holds("dom0") < 1500
    assert {"granted", "balance"} <= {record.event for record in qmemman.records()}


def test_guests_use_memory_on_command(vm_factory, qmemman):
    """What they report follows, and so do targets; giving it back is seen as well."""
    vm = vm_factory("work", memory=300, maxmem=900)
    qmemman.wait_until("report", lambda: qmemman.uses(vm) is not None)
    idle = qmemman.uses("work")
    qmemman.note("work needs 250 MiB more")
    qmemman.use(vm, 250)
    qmemman.wait_until("use", lambda: qmemman.uses(vm) > idle + 200)
    qmemman.use(vm, 0)
    # Not to what it was: the first reports leave out what the guest's kernel keeps for
    # itself. Nor less by what it took: the report of the rise may be of its middle.
    qmemman.wait_until("release", lambda: qmemman.uses(vm) < idle + 40)
    qmemman.use("dom0", 600)
    qmemman.wait_for_target("dom0", at_least=1100)
    assert 0 < qmemman.free < 1500
    assert "work needs 250 MiB more" in [r.text for r in qmemman.records()]
    with pytest.raises(DeadlineError, match=r"target of work of at most 1 MiB") as e:
        qmemman.wait_for_target(vm, at_most=1, timeout=0.1)
    assert "work: uses" in e.value.evidence


def test_memory_of_a_vm_that_was_restarted_is_used_anew(vm_factory, qmemman):
    """What an earlier run used is gone with it."""
    vm = vm_factory("work", memory=300, maxmem=900)
    qmemman.use(vm, 100)
    vm.kill()
    vm.start()
    qmemman.wait_until("report", lambda: qmemman.uses(vm) is not None)
    idle = qmemman.uses(vm)
    qmemman.use(vm, 100)
    qmemman.wait_until("use", lambda: qmemman.uses(vm) > idle + 60)


def test_a_start_without_memory_says_who_holds_it(vm_factory, qubes_app, qmemman):
    vm_factory("work", memory=300)
    with pytest.raises(QubesVMStartError) as caught:
        vm_factory("large", memory=900)
    said = str(caught.value)
    assert "could not have its memory: not enough memory: 914 MiB asked" in said
    assert "work 300 MiB" in said
    large = qubes_app.domains["large"]
    assert large.is_halted()
    assert [domain.spec.name for domain in qubes_app.hypervisor.domains()] == ["work"]
    assert not large.directory.exists()
    assert not any(volume.is_dirty() for volume in large.volumes.values())
    assert qmemman.records()[-1].event != "granted"


@pytest.mark.parametrize(
    ("budget", "error", "said"),
    [
        (900, HarnessError, "a dom0 of 900 MiB cannot use 1024 MiB"),
        ("4GiB", TypeError, "'4GiB': a number of MiB, or a MemoryBudget"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(budget, error, said, testbed, qubes_app):
    make = qmemman_fixture.__wrapped__
    with pytest.raises(error, match=re.escape(said)):
        make(qubes_app, testbed, budget)
    assert qubes_app.qmemman is None
