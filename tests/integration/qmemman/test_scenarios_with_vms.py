"""The scenarios, on real guests."""

from __future__ import annotations

import pytest

from qubes_itests.qmemman.simulation.scenarios import (
    DOM0,
    DOM0_USED,
    SCENARIOS,
    TOTAL,
)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_with_vms(name, open_world, run):
    async def program():
        async with open_world(TOTAL, DOM0, DOM0_USED) as world:
            await SCENARIOS[name](world)

    run(program())
