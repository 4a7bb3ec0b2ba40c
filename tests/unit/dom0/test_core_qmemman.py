"""The daemon of a core under test, on a simulated machine."""

import shutil
from pathlib import Path

import pytest

from qubes_itests.dom0.memory_trials import try_core, try_ours
from qubes_itests.qmemman.exc import MemoryRefusedError

MIB = 1 << 20
FAKE = Path(__file__).parents[2] / "support/fake-core"
DAEMON = "qubes/tools/qmemmand.py"


@pytest.fixture
def core(tmp_path, monkeypatch):
    """Return a core that the daemon's process imports."""
    place = tmp_path / "core"
    shutil.copytree(FAKE, place)
    monkeypatch.syspath_prepend(place)
    return place


@pytest.fixture
def attempt(tmp_path):
    """Return a function that tries a scenario in a directory of its own."""

    def tried(how, scenario):
        place = tmp_path / f"{len([*tmp_path.iterdir()])}"
        place.mkdir()
        return how(scenario, place)

    return tried


async def life(world):
    await world.start("work", memory=400 * MIB, maximum=1200 * MIB)
    await world.until("target", lambda: world.target("work") == 400 * MIB)
    await world.use("work", 300 * MIB)
    await world.until("more", lambda: world.target("work") == 600 * MIB)
    with pytest.raises(MemoryRefusedError, match="9000 MiB asked"):
        await world.start("huge", memory=9000 * MIB, maximum=9000 * MIB)
    await world.die("work")
    await world.start("next", memory=400 * MIB, maximum=1200 * MIB)
    await world.until("target", lambda: world.target("next") == 400 * MIB)


@pytest.mark.usefixtures("core")
def test_it_balances_and_each_time_in_the_same_way(attempt):
    """Its process has threads, and its time is virtual: no record differs."""
    trial = attempt(try_core, life)
    assert trial.problem is None
    assert attempt(try_core, life) == trial
    granted = [(r.event, r.amount // MIB) for r in trial.records if r.amount]
    assert granted == [("granted", 400), ("refused", 9000), ("granted", 400)]
    last = {d.name: d for d in trial.records[-1].domains.values()}
    assert last.keys() == {"dom0", "next"}
    assert (last["next"].current, last["next"].preferred) == (400 * MIB, 400 * MIB)


def test_a_changed_constant_shows(core, attempt):
    async def idle(world):
        await world.start("work", memory=400 * MIB, maximum=1200 * MIB)

    algorithm = core / "qubes/qmemman/algo.py"
    algorithm.write_text(algorithm.read_text().replace("FACTOR = 2", "FACTOR = 3"))
    trial = attempt(try_core, idle)
    targets = {d.name: d.target // MIB for d in trial.records[-1].domains.values()}
    assert targets == {"dom0": 900, "work": 600}


def test_ours_is_tried_in_the_same_way(attempt):
    async def idle(world):
        await world.start("work", memory=400 * MIB, maximum=1200 * MIB)
        world.expect("wonders", holds=False)

    trial = attempt(try_ours, idle)
    assert trial.problem.startswith("expected: wonders\ndom0: holds")
    assert trial.records


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("import socketserver", "import socketserver, none_such", "No module named"),
        ("self.handle.ls(", "self.handle.transaction_start(", "has no xen.lowlevel.xs"),
        ("int(said) << 10", "int(said) // (int(said) < 10**5)", "ZeroDivisionError"),
    ],
)
def test_one_that_ends_is_told_with_what_it_said(core, attempt, old, new, told):
    daemon = core / DAEMON
    text = daemon.read_text()
    assert old in text
    daemon.write_text(text.replace(old, new, 1))
    trial = attempt(try_core, life)
    assert "the qmemman of the core has ended:\n| " in trial.problem
    assert told in trial.problem
