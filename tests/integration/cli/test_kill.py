"""Nothing survives a run that is killed, at whatever moment."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_cache
from leftovers import leftovers

SEED = 20
MOMENTS = 20
#: In this share of them VMs and loop devices must have been there to be left.
SEEN = 4
#: Seconds; a run of the plugin below takes longer.
LONGEST = 4.0
#: Seconds in which it must have a VM.
FIRST_VM = 60.0


def _alive(cache):
    """Return what is left but for directories: the next run removes those."""
    return [what for what in leftovers(cache) if not what.startswith("directory")]


def _wait_for_nothing(cache, timeout):
    deadline = time.monotonic() + timeout
    while (left := _alive(cache)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


@pytest.fixture
def cache(tmp_path):
    """Have a cache of our own, so that what is left can be told from the rest."""
    # runs are told by this name: that of the cache of these tests must be another
    cache = tmp_path / "cache-of-killed-runs"
    cache.mkdir()
    tiny_cache.fill(cache)
    return cache


def _wait_for_vms(cache, process):
    deadline = time.monotonic() + FIRST_VM
    while "qemu" not in " ".join(_alive(cache)) and process.poll() is None:
        assert time.monotonic() < deadline, "no VM has started"
        time.sleep(0.02)


def test_nothing_survives_kill_at_any_moment(cache, tmp_path):
    """Killed at 20 moments: from its first breath on, and from its first VM on.

    Half of the runs have two workers.
    """
    moments = random.Random(SEED)  # noqa: S311
    environment = os.environ | {"QUBES_ITESTS_CACHE": str(cache)}
    environment.pop("QUBES_ITESTS_SANDBOX", None)
    seen_running = 0
    for number in range(MOMENTS):
        moment = moments.uniform(0, LONGEST)
        workers = ("-n", "2") if number % 4 > 1 else ()
        process = subprocess.Popen(
            [sys.executable, "-m", "qubes_itests", *workers, "run", "smoke"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        with_vms = number % 2 == 1
        if with_vms:
            _wait_for_vms(cache, process)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            left = " ".join(_alive(cache))
            seen_running += "qemu" in left and "loop device" in left
            process.send_signal(signal.SIGKILL)
        process.wait()
        since = "its first VM" if with_vms else "its start"
        assert _wait_for_nothing(cache, 10) == [], f"{moment:.2f} s from {since}"
    # else the moments were badly chosen and the test proves nothing
    assert seen_running >= MOMENTS // SEEN
