"""The scenarios, on real guests.

But for one: a guest that hangs and needs more differs for the decisions alone from one
that hangs, and `tests/unit/qmemman/test_scenarios.py` has both.
"""

from __future__ import annotations

import pytest

from qubes_itests.qmemman.simulation.scenarios import (
    DOM0,
    DOM0_USED,
    SCENARIOS,
    TOTAL,
)


@pytest.mark.parametrize(
    "name", [name for name in SCENARIOS if name != "stuck_vm_in_need"]
)
def test_scenario_with_vms(name, open_world, run):
    async def program():
        async with open_world(TOTAL, DOM0, DOM0_USED) as world:
            await SCENARIOS[name](world)

    run(program())
