"""The scenarios, on real guests."""

from __future__ import annotations

import pytest
from memory_scenarios import DOM0, DOM0_USED, SCENARIOS, TOTAL


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario_with_vms(scenario, open_world, run):
    async def program():
        async with open_world(TOTAL, DOM0, DOM0_USED) as world:
            await scenario(world)

    run(program())
