"""What a process holds after many starts and stops of one VM, and whether that grows.

Run: ``.venv/bin/python tests/benchmarks/soak.py [STARTS]``

Starts are warm, and each is followed by a command and a stop.  The first starts fill
what is kept once, so that growth counts from the end of the first tenth, at least of
ten starts; memory's is the slope of the line that fits best, so that no single figure
decides.  Ctrl-C ends it early.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench import app_on, testbed

STARTS = 1000
ROWS = 20


class Held(NamedTuple):
    """What this process holds after some starts; its resident memory in KiB."""

    starts: int
    memory: int
    descriptors: int
    threads: int
    processes: int


def held(starts):
    """Look at this process, and count those of the sandbox."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        starts,
        pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        sum(1 for _ in Path("/proc/self/fd").iterdir()),
        sum(1 for _ in Path("/proc/self/task").iterdir()),
        sum(path.name.isdecimal() for path in Path("/proc").iterdir()),
    )


async def live(vm):
    """Start a VM, have it do something, and stop it."""
    await vm.start()
    await vm.run_for_stdio("true")
    await vm.kill()


def soak(run, vm, starts):
    """Return what was held after each of many starts, as far as they came."""
    every = max(1, starts // ROWS)
    print(
        f"{'starts':>7} {'KiB':>8} {'fds':>5} {'threads':>8} {'processes':>9}",
        flush=True,
    )
    found = []
    began = time.monotonic()
    try:
        for number in range(1, starts + 1):
            run(live(vm))
            found.append(held(number))
            if number % every == 0 or number == 1:
                print("{:>7} {:>8} {:>5} {:>8} {:>9}".format(*found[-1]), flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    taken = time.monotonic() - began
    print(f"{len(found)} starts and stops in {taken:.0f} s", flush=True)
    return found


def show_growth(found):
    """Print how much more was held at the end, and the slope of memory."""
    settled = found[max(10, len(found) // 10) :]
    if len(settled) < 2:
        sys.exit("expected more starts, to tell growth from what is kept once")
    first, last = settled[0], settled[-1]
    slope = statistics.linear_regression(
        [one.starts for one in settled], [one.memory for one in settled]
    ).slope
    print(
        f"from start {first.starts} to {last.starts}:"
        f" memory {last.memory - first.memory:+} KiB, slope {slope:+.2f} KiB a start;"
        f" descriptors {last.descriptors - first.descriptors:+},"
        f" threads {last.threads - first.threads:+},"
        f" processes {last.processes - first.processes:+}"
    )


def main(starts=STARTS):
    with testbed() as bed, app_on(bed) as app:
        run = bed.portal.run
        vm = app.add_new_vm("AppVM", name="soaked", label="red")
        run(vm.create_on_disk())
        found = soak(run, vm, int(starts))
    show_growth(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
