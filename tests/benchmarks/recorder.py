"""What recording timelines costs: runs of one suite with it and without it, in turn.

Run: ``.venv/bin/python tests/benchmarks/recorder.py [ROUNDS [systemd]]``; 20 by
default. With the second word the guests have systemd, and their journals are followed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import heading, row

#: A VM that starts, commands one after the other, and its end.
TEST = "smoke::TC_00_Commands_{}::test_000_forms_of_run"
SYSTEMD = """
[qubes_itests:template:withsystemd]
base = debian-12
init = systemd
"""
ROUNDS = 20


def suite(directory, *, systemd):
    """Return the words of a run."""
    if not systemd:
        return [TEST.format("tiny")]
    spec = Path(directory, "spec.cfg")
    spec.write_text(SYSTEMD)
    words = ["--template-spec", str(spec), "--template=withsystemd"]
    return [*words, TEST.format("withsystemd")]


def measured(trace, directory, suite):
    """Return the seconds of a run, and those of CPU time of all its processes."""
    words = ["-q", f"--trace={trace}", *suite]
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
    systemd = "systemd" in sys.argv
    recorded = "on" if systemd else "retain-on-failure"
    figures = {"off": [], recorded: []}
    with tempfile.TemporaryDirectory() as directory:
        tests = suite(directory, systemd=systemd)
        measured("off", directory, tests)  # fills the cache
        for number in range(rounds):
            # each in turn begins: a machine gets slower and faster in the meantime
            for trace in sorted(figures, reverse=bool(number % 2)):
                figures[trace].append(measured(trace, directory, tests))
    heading(f"{rounds} runs of {tests[-1]} each")
    for index, what in enumerate(("wall time", "CPU time")):
        without = [figure[index] for figure in figures["off"]]
        found = [figure[index] for figure in figures[recorded]]
        row(f"{what}, --trace=off", without)
        row(f"{what}, recorded", found)
        more = [100 * (a / b - 1) for a, b in zip(found, without, strict=True)]
        row(f"{what}, more than in the run beside it", more, "%")


if __name__ == "__main__":
    main()
