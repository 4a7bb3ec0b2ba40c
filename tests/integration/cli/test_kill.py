"""Nothing survives a run that is killed, at whatever moment."""

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_cache
from leftovers import leftovers, processes

SEED = 20
MOMENTS = 20
#: Runs at a time; no divisor of the number of kinds, or each lane had but one kind.
AT_ONCE = 3
#: In this share of them VMs and loop devices must have been there to be left.
SEEN = 4
#: Seconds; a run of the plugin below takes longer.
LONGEST = 4.0
#: Seconds in which it must have a VM.
FIRST_VM = 600.0


def _alive(cache):
    """Return what is left but for directories: the next run removes those."""
    return [what for what in leftovers(cache) if not what.startswith("directory")]


def _wait_for_nothing(cache, timeout):
    deadline = time.monotonic() + timeout
    while (left := _alive(cache)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


WITH_CLONES = """
import asyncio, time
from pathlib import Path
from qubes_itests.guest.start import warm
from qubes_itests.host import load

def test_it_waits(testbed, vm_factory, portal, monkeypatch):
    monkeypatch.setattr(warm, "_WORTH", 1)
    monkeypatch.setattr(load, "running", lambda: 0)
    vm = vm_factory()
    vm.kill()
    vm.start()
    portal.run(asyncio.wait_for(testbed.warm_starts.ahead.settled(), 600))
    assert len(testbed.hypervisor.domains(spare=True)) == 1
    Path("ready").touch()
    time.sleep(600)
"""


@pytest.fixture
def caches(tmp_path):
    """Have caches of our own, so that what is left can be told from the rest."""
    # runs are told by this name: that of the cache of these tests must be another
    caches = [tmp_path / f"cache-of-killed-runs-{number}" for number in range(AT_ONCE)]
    for cache in caches:
        cache.mkdir()
        tiny_cache.fill(cache)
    return caches


def _wait_for_vms(cache, process):
    deadline = time.monotonic() + FIRST_VM
    while "qemu" not in " ".join(processes(cache)) and process.poll() is None:
        assert time.monotonic() < deadline, "no VM has started"
        time.sleep(0.05)


def _kill_a_run(cache, number, moment):
    """Tell whether there were VMs and loop devices when it was killed."""
    environment = os.environ | {"QUBES_ITESTS_CACHE": str(cache)}
    environment.pop("QUBES_ITESTS_SANDBOX", None)
    workers = ("-n", "2") if number % 4 > 1 else ()
    process = subprocess.Popen(
        [sys.executable, "-m", "qubes_itests", *workers, "run", "smoke"],
        cwd=cache.parent,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    seen_running = False
    with_vms = number % 2 == 1
    try:
        if with_vms:
            _wait_for_vms(cache, process)
        process.wait(moment)
    except subprocess.TimeoutExpired:
        left = " ".join(_alive(cache))
        seen_running = "qemu" in left and "loop device" in left
    finally:
        process.kill()
        process.wait()
    since = "its first VM" if with_vms else "its start"
    assert _wait_for_nothing(cache, 300) == [], f"{moment:.2f} s from {since}"
    return seen_running


def test_nothing_survives_kill_at_any_moment(caches):
    """Killed at 20 moments: from its first breath on, and from its first VM on.

    Half of the runs have two workers. Several runs at once, for most of the time is
    that until the moments; each has a cache of its own.
    """
    moments = random.Random(SEED)  # noqa: S311
    runs = [(number, moments.uniform(0, LONGEST)) for number in range(MOMENTS)]

    def kill_some(lane):
        return [_kill_a_run(caches[lane], *run) for run in runs[lane::AT_ONCE]]

    with ThreadPoolExecutor(AT_ONCE) as lanes:
        seen_running = sum(map(sum, lanes.map(kill_some, range(AT_ONCE))))
    # else the moments were badly chosen and the test proves nothing
    assert seen_running >= MOMENTS // SEEN


def test_no_clone_survives_either(caches, tmp_path):
    """Killed while one stands still that was started ahead."""
    (tmp_path / "test_waits.py").write_text(WITH_CLONES)
    environment = os.environ | {"QUBES_ITESTS_CACHE": str(caches[0])}
    environment.pop("QUBES_ITESTS_SANDBOX", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "qubes_itests", "test_waits.py"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 2 * FIRST_VM
        while not (tmp_path / "ready").exists():
            assert process.poll() is None, "it has failed"
            assert time.monotonic() < deadline, "no clone has started"
            time.sleep(0.05)
        assert "guest=ahead-" in " ".join(processes(caches[0]))
    finally:
        process.kill()
        process.wait()
    assert _wait_for_nothing(caches[0], 300) == []
