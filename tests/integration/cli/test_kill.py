"""Nothing survives a run that is killed, at whatever moment."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from leftovers import leftovers

from qubes_itests.host.cache import Cache

SEED = 20
MOMENTS = 20
#: In this share of them VMs and loop devices must have been there to be left.
SEEN = 4
#: Seconds; by then a run of the plugin below has its VMs running.
LONGEST = 6.0


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
    """Have a cache of our own, so that what is left can be told from the rest.

    What is dear to build comes from the real one.
    """
    cache = tmp_path / "cache"
    subprocess.run(
        ["cp", "-a", "--reflink=auto", Cache().root, cache],
        check=True,
    )
    for run in (cache / "runs").glob("*"):
        subprocess.run(["rm", "-rf", run], check=True)
    return cache


def test_nothing_survives_kill_at_any_moment(cache, tmp_path):
    """Killed at 20 moments between its first breath and running VMs."""
    moments = random.Random(SEED)  # noqa: S311
    environment = os.environ | {"QUBES_ITESTS_CACHE": str(cache)}
    environment.pop("QUBES_ITESTS_SANDBOX", None)
    seen_running = 0
    for _ in range(MOMENTS):
        moment = moments.uniform(0, LONGEST)
        process = subprocess.Popen(
            [sys.executable, "-m", "qubes_itests", "run", "smoke"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            left = " ".join(_alive(cache))
            seen_running += "qemu" in left and "loop device" in left
            process.send_signal(signal.SIGKILL)
        process.wait()
        assert _wait_for_nothing(cache, 10) == [], f"killed after {moment:.2f} s"
    # else the moments were badly chosen and the test proves nothing
    assert seen_running >= MOMENTS // SEEN
