"""What recording timelines costs: runs of one suite with it and without it, in turn.

Run: ``.venv/bin/python tests/benchmarks/recorder.py [ROUNDS]``; 20 by default.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from bench import heading, row

#: A VM that starts, commands one after the other, and its end.
TESTS = ("smoke::TC_00_Commands_tiny::test_000_forms_of_run",)
ROUNDS = 20


def measured(trace, directory):
    """Return the seconds of a run, and those of CPU time of all its processes."""
    words = ["-q", f"--trace={trace}", *TESTS]
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "qubes_itests", *words],
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"a run with --trace={trace} ended with status {status}")
    return time.monotonic() - began, used.ru_utime + used.ru_stime


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    figures = {"off": [], "retain-on-failure": []}
    with tempfile.TemporaryDirectory() as directory:
        measured("off", directory)  # fills the cache
        for number in range(rounds):
            # each in turn begins: a machine gets slower and faster in the meantime
            for trace in sorted(figures, reverse=bool(number % 2)):
                figures[trace].append(measured(trace, directory))
    heading(f"{rounds} runs of {', '.join(TESTS)} each")
    for index, what in enumerate(("wall time", "CPU time")):
        without = [figure[index] for figure in figures["off"]]
        found = [figure[index] for figure in figures["retain-on-failure"]]
        row(f"{what}, --trace=off", without)
        row(f"{what}, recorded", found)
        more = [100 * (a / b - 1) for a, b in zip(found, without, strict=True)]
        row(f"{what}, more than in the run beside it", more, "%")


if __name__ == "__main__":
    main()
