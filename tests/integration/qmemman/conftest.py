"""An app whose VMs share a machine of numbers, balanced by qmemman."""

from __future__ import annotations

import contextlib

import pytest
from vm_world import VMWorld, oom_killed

from qubes_itests.qmemman.budget import MemoryBudget

MIB = 1 << 20


@pytest.fixture
def run(testbed):
    return testbed.portal.run


@pytest.fixture
def open_world(testbed):
    """Return a context manager that yields a `VMWorld`; sizes in MiB.

    No kernel of its VMs may have killed for memory, and none may be left.
    """

    @contextlib.asynccontextmanager
    async def opened(total, dom0=1000, dom0_used=300, **options):
        app = await testbed.make_app("tiny")
        budget = MemoryBudget(
            total=total * MIB, dom0=dom0 * MIB, dom0_used=dom0_used * MIB, **options
        )
        memory = await testbed.balance_memory(app, budget)
        world = VMWorld(app, memory)
        try:
            yield world
        finally:
            killed = [name for name, vm in world.vms.items() if oom_killed(vm)]
            problems = await testbed.close_app(app)
        assert (killed, problems) == ([], [])

    return opened
