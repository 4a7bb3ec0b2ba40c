"""The daemon of a core under test, on a simulated machine."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qubes_itests.dom0 import core_qmemman
from qubes_itests.dom0.core_qmemman import CoreQmemman
from qubes_itests.dom0.memory_trials import try_core, try_ours
from qubes_itests.dom0.xen import Xen
from qubes_itests.exc import HarnessError
from qubes_itests.qmemman.exc import MemoryRefusedError
from qubes_itests.qmemman.simulation.machine import SimulatedMachine

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


@pytest.fixture
def hanging(core):
    """Return a file that has the number of a daemon's process once it hangs."""
    said = core / "hangs"
    daemon = core / DAEMON
    hang = f"import os, pathlib, time\nsaid = pathlib.Path({os.fspath(said)!r})\n"
    hang += "said.write_text(f'{os.getpid()}.')\ntime.sleep(10**6)\n"
    daemon.write_text(f"{hang}{daemon.read_text()}")
    return said


@pytest.mark.usefixtures("hanging")
def test_one_that_hangs_ends_and_says_where(attempt, monkeypatch):
    monkeypatch.setattr(core_qmemman, "_LONGEST", 1.0)
    # all of it: on a busy machine it may still be deep in the imports
    monkeypatch.setattr(core_qmemman, "_SHOWN", 100_000)
    trial = attempt(try_core, life)
    assert "ended:\n| Timeout (0:00:01)!\n| Thread 0x" in trial.problem


def in_real_time(place):
    """Return a daemon in real time."""
    xen = Xen(SimulatedMachine(2600 * MIB, 1000 * MIB))
    xen.introduce("0", 1000 * MIB, 2600 * MIB)
    return CoreQmemman(xen, place)


@pytest.mark.usefixtures("hanging")
def test_one_that_hangs_in_real_time_ends_too(tmp_path, monkeypatch):
    monkeypatch.setattr(core_qmemman, "_LONGEST", 1.0)

    async def program():
        async with in_real_time(tmp_path):
            pass

    with pytest.raises(HarnessError, match="Timeout"):
        asyncio.run(program())


@pytest.mark.usefixtures("core")
def test_one_that_serves_in_real_time_goes_on(tmp_path, monkeypatch):
    """The time until it serves does not limit the time that it does."""

    async def goes_on(seconds):
        monkeypatch.setattr(core_qmemman, "_LONGEST", float(seconds))
        place = tmp_path / f"{seconds}"
        place.mkdir()
        async with contextlib.AsyncExitStack() as stack:
            try:
                core = await stack.enter_async_context(in_real_time(place))
            except HarnessError:
                return False  # too slow a machine, for so short a time
            await asyncio.wait([core.ended], timeout=seconds + 0.5)
            core.check()
            return True

    assert any(asyncio.run(goes_on(seconds)) for seconds in range(1, 30))


def test_one_that_hangs_ends_with_the_process_that_started_it(hanging, tmp_path):
    program = (
        "import pathlib, sys; from qubes_itests.dom0 import memory_trials;"
        "memory_trials.try_core(None, pathlib.Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", program, tmp_path]
    with subprocess.Popen(words, env=environment) as process:
        until("hang", lambda: hanging.exists() and hanging.read_text().endswith("."))
        process.kill()
    number = int(hanging.read_text().rstrip("."))
    until("end", lambda: not Path(f"/proc/{number}").exists())


def until(what, condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)
