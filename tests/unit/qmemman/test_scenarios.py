"""The scenarios, on simulated guests."""

from __future__ import annotations

import pytest
from memory_machine import trial

from qubes_itests.exc import DeadlineError
from qubes_itests.qmemman.simulation import virtual_time
from qubes_itests.qmemman.simulation.scenario import SimulatedWorld
from qubes_itests.qmemman.simulation.scenarios import (
    DOM0,
    DOM0_USED,
    SCENARIOS,
    TOTAL,
)


def _run(scenario, directory):
    async def program():
        async with trial(directory, TOTAL, DOM0, DOM0_USED) as t:
            await scenario(SimulatedWorld(t.machine, t.balancer, t.client))

    virtual_time.run(program())


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name, tmp_path):
    _run(SCENARIOS[name], tmp_path)


def test_what_does_not_come_is_an_error_with_evidence(tmp_path):
    async def hopeless(world):
        await world.until("miracle", lambda: False, timeout=3)

    with pytest.raises(DeadlineError, match=r"no miracle within 3 s(?s:.)*dom0: holds"):
        _run(hopeless, tmp_path)
