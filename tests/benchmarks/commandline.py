"""How quick the command line is, as it is typed.

Run: ``.venv/bin/python tests/benchmarks/commandline.py [--all]``

``--all`` also times a whole run of the bundled plugins.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from bench import heading, row, seconds

ROOT = Path(__file__).parents[2]
MODULE = [sys.executable, "-m", "qubes_itests"]
ONE_TEST = [*MODULE, "run", "smoke@once::TC_00_System::test_040_bad_names"]


def run(command):
    """Run to the end, in the checkout."""
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def until_collected(command):
    """Return the seconds until pytest has collected, and begins with the tests."""
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if line.startswith(b"collected"):
                taken = time.perf_counter() - start
        return taken


def main():
    """Measure and print."""
    heading("Command line, everything cached")
    run([*MODULE, "list"])
    row("list", [seconds(run, [*MODULE, "list"]) for _ in range(7)], bound="< 0.7 s")
    times = [until_collected(ONE_TEST) for _ in range(5)]
    row("run, until the first test starts", times, bound="< 2 s")
    row("./itests list", [seconds(run, [ROOT / "itests", "list"]) for _ in range(5)])
    if "--all" in sys.argv:
        row("./itests", [seconds(run, [ROOT / "itests"])], bound="< 90 s")


if __name__ == "__main__":
    main()
