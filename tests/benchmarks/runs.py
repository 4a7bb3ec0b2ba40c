"""How long whole runs take: the bundled tests; short classes on one and two workers.

Run: ``.venv/bin/python tests/benchmarks/runs.py [ROUNDS [CHECKOUT]]``

CHECKOUT is another one of this project, with a ``.venv``: its figures are measured in
turn with those of this one, and come first. What one worker uses of the machine is the
CPU time of all processes of its run over its time; where that is more than one CPU, two
workers cannot take half the time. The least that they can take is the CPU time of their
run over the number of CPUs: the most that they could gain by that, and how near they
come to it, is in the table.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from bench import heading, row

ROOT = Path(__file__).parents[2]
CLASSES = 40
#: A class as they are in suites of apps: a VM, and a command in it.
SHORT = """
import pytest
from qubes_itests.testcase import ExtraTestCase

pytestmark = pytest.mark.usefixtures("testbed")


class Short(ExtraTestCase):
    def setUp(self):
        super().setUp()
        (self.vm,) = self.create_vms(["work"])
        self.vm.start()

    def test_output(self):
        process = self.vm.run("echo done", passio_popen=True)
        self.assertEqual(process.communicate()[0], b"done\\n")


for number in range({classes}):
    globals()[f"Test{{number}}"] = type(f"Test{{number}}", (Short,), {{}})
del Short
"""


def measured(checkout, words, directory):
    """Return seconds of a run: all of it, CPU time, and the parts of its tests."""
    python = Path(checkout, ".venv/bin/python")
    artifacts = Path(tempfile.mkdtemp(dir=directory))
    began = time.monotonic()
    # a run with no failures says in a CI alone what its tests took
    process = os.posix_spawn(
        python,
        [str(python), "-m", *(word.format(artifacts=artifacts) for word in words)],
        {**os.environ, "CI": "1"},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
        ],
    )
    _, status, used = os.wait4(process, 0)
    took = time.monotonic() - began
    if status:
        sys.exit(f"{' '.join(words)} in {checkout} ended with status {status}")
    figures = defaultdict(float)
    figures |= {"run": took, "CPU": used.ru_utime + used.ru_stime}
    for test in json.loads((artifacts / "run.json").read_bytes())["tests"]:
        for part, seconds in test["phases"].items():
            figures[part] += seconds
    return figures


def compare(title, runs, rounds, directory):
    """Measure runs in turn, print what they took; return the figures of each.

    :param runs: a checkout and the words of a run, by name.
    """
    heading(f"{title}, {rounds} rounds in turn; load {os.getloadavg()[0]:.1f}")
    figures = {name: defaultdict(list) for name in runs}
    for _ in range(rounds):
        for name, (checkout, words) in runs.items():
            for what, seconds in measured(checkout, words, directory).items():
                figures[name][what].append(seconds)
    for name, taken in figures.items():
        for what, values in taken.items():
            row(f"{name}: {what}", values)
    return figures


def main():
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    others = {"before": Path(sys.argv[2]).resolve()} if len(sys.argv) > 2 else {}
    checkouts = {**others, "now": ROOT}
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        Path("test_short.py").write_text(SHORT.format(classes=CLASSES))
        bundled = ["qubes_itests", "run", "--artifacts={artifacts}"]
        figures = compare(
            "The bundled tests",
            {name: (where, bundled) for name, where in checkouts.items()},
            rounds,
            directory,
        )
        if others:
            for what in ("setUp", "tearDown"):
                pairs = zip(figures["now"][what], figures["before"][what], strict=True)
                bound = "<= 0.55" if what == "setUp" else ""
                row(f"{what}, now / before", [a / b for a, b in pairs], "", bound)
        short = ["pytest", "-p", "qubes_itests", "-q", "test_short.py"]
        short.append("--itests-artifacts={artifacts}")
        figures = compare(
            f"{CLASSES} short classes",
            {
                f"{name}, -n {n}": (where, [*short, "-n", str(n)])
                for name, where in checkouts.items()
                for n in (1, 2)
            },
            rounds,
            directory,
        )
        for name in checkouts:
            one, two = (figures[f"{name}, -n {n}"] for n in (1, 2))
            cpus = min(2, len(os.sched_getaffinity(0)))
            least = [seconds / cpus for seconds in two["CPU"]]
            taken = zip(one["run"], two["run"], least, strict=True)
            ratios = ((a / b, a / c, b / c) for a, b, c in taken)
            gain, most, above = zip(*ratios, strict=True)
            row(f"{name}: one worker / two", gain, "", ">= 1.7")
            row(f"{name}: the most that it could be", most, "")
            row(f"{name}: two workers / their CPU time", above, "")
            used = statistics.median(one["CPU"]) / statistics.median(one["run"])
            print(f"one worker uses {used:.2f} CPUs")


if __name__ == "__main__":
    main()
