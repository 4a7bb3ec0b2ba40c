"""What the benchmarks share: a sandbox with a testbed, and tables of figures."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from pathlib import Path

from qubes_itests.host import sandbox
from qubes_itests.run.context import RunContext
from qubes_itests.run.hooks import registry
from qubes_itests.run.settings import Settings

# for those that import from there after this
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))


@contextlib.contextmanager
def testbed(**settings):
    """Yield a testbed in a sandbox; the script starts over in it."""
    sandbox.reexec()
    context = RunContext(Settings(**settings), registry())
    try:
        yield context.testbed
    finally:
        context.close()


@contextlib.contextmanager
def app_on(testbed, *templates):
    """Yield an app with these templates."""
    run = testbed.portal.run
    app = run(testbed.make_app(*(templates or ("tiny",))))
    try:
        yield app
    finally:
        problems = run(testbed.close_app(app))
        if problems:
            sys.exit(f"left behind: {problems}")


def seconds(function, *args):
    """Return how long a call takes."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def row(name, values, unit="s", bound=""):
    """Print one line of a table: minimum, median, maximum."""
    low, middle, high = min(values), statistics.median(values), max(values)
    digits = 1 if unit == "ms" else 2
    cells = "".join(f" {value:8.{digits}f}" for value in (low, middle, high))
    print(f"{name:<44}{cells} {unit:<6} {bound}", flush=True)
    return middle


def heading(title):
    """Print the head of a table."""
    print(f"\n{title}\n{'':<44} {'min':>8} {'median':>8} {'max':>8}", flush=True)
