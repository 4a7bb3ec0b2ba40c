"""Nothing survives a run that is killed, at whatever moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qubes_itests.host.cache import Cache

SEED = 20
MOMENTS = 20
#: In this share of them VMs and loop devices must have been there to be left.
SEEN = 4
#: Seconds; by then a run of the plugin below has its VMs running.
LONGEST = 6.0


def _command_lines():
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            yield int(entry.name), line.replace(b"\0", b" ").decode(errors="replace")


def _left(cache):
    """Return what a run with this cache has left on the machine."""
    processes = [
        f"process {pid}: {line[:200]}"
        for pid, line in _command_lines()
        if str(cache) in line
    ]
    mounts = [
        f"mount {line}"
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if str(cache) in line
    ]
    return processes + mounts + _loop_devices(cache)


def _loop_devices(cache):
    """Return those over files in the cache, by inode: a name is one namespace's own."""
    status = [path.stat() for path in (cache / "runs").rglob("*")]
    files = {
        (f"{os.major(s.st_dev)}:{os.minor(s.st_dev)}", str(s.st_ino)) for s in status
    }
    columns = "NAME,BACK-MAJ:MIN,BACK-INO"
    listed = subprocess.run(
        ["losetup", "--list", "--json", "--output", columns],
        check=True,
        capture_output=True,
    )
    devices = json.loads(listed.stdout or "{}").get("loopdevices", ())
    return [
        f"loop device {device['name']}"
        for device in devices
        if (str(device["back-maj:min"]).strip(), str(device["back-ino"])) in files
    ]


def _wait_for_nothing(cache, timeout):
    deadline = time.monotonic() + timeout
    while left := _left(cache):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.02)
    return []


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
            left = " ".join(_left(cache))
            seen_running += "qemu" in left and "loop device" in left
            process.send_signal(signal.SIGKILL)
        process.wait()
        assert _wait_for_nothing(cache, 10) == [], f"killed after {moment:.2f} s"
    # else the moments were badly chosen and the test proves nothing
    assert seen_running >= MOMENTS // SEEN
