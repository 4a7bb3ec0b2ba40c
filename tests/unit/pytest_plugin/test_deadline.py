"""The deadline of a test: it stands still while somebody looks at the test."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from qubes_itests.exit_codes import ExitCode
from qubes_itests.pytest_plugin.deadline import Deadline

LIMIT = 0.3
HANGING = """
import ctypes, signal, time
from types import SimpleNamespace
from qubes_itests.pytest_plugin import deadline

deadline._GRACE = 0.1
#: Another limit is not reached though the machine may be slow.
LIMITS = {"a::good": 60, "a::hangs": 0.5}
watch = deadline.Deadline(lambda item: LIMITS[item.nodeid], lambda _test: None)
for name in ("a::good", "a::hangs"):
    item = SimpleNamespace(nodeid=name)
    for phase in (watch.pytest_runtest_setup(item), watch.pytest_runtest_call(item)):
        next(phase)
        if name == "a::hangs":
            if AFTER:  # a TestCase goes on with its tearDown
                try:
                    time.sleep(60)
                except deadline.pytest.fail.Exception:
                    pass
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            ctypes.CDLL(None).pause()
        next(phase, None)
"""


def test_it_stands_still_until_the_last_of_those_who_look_has_gone():
    expired: list[str] = []
    deadline = Deadline(lambda _item: LIMIT, expired.append)
    one, other = deadline.stopped(), deadline.stopped()
    phase = deadline.pytest_runtest_setup(SimpleNamespace(nodeid="a::b"))
    # on the event loop of the run, while the test is in the main thread
    with ThreadPoolExecutor(1) as loop:
        loop.submit(one.__enter__).result()
        next(phase)
        loop.submit(other.__enter__).result()
        loop.submit(one.__exit__, None, None, None).result()
        time.sleep(3 * LIMIT)
        assert expired == []
        assert deadline.is_stopped

        def go_on():
            loop.submit(other.__exit__, None, None, None).result()
            time.sleep(60)

        # it may be over as soon as the clock goes
        with pytest.raises(pytest.fail.Exception, match=r"within 0.3 s \(--timeout"):
            go_on()
    assert not deadline.is_stopped
    assert expired == ["a::b"]
    phase.close()


@pytest.mark.parametrize("after", [False, True])
def test_a_test_that_never_comes_back_to_python_ends_the_run(after):
    """Also one whose time was over before."""
    done = subprocess.run(
        [sys.executable, "-c", f"AFTER = {after}\n{HANGING}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == ExitCode.INTERNAL_ERROR
    assert ": a::hangs hangs outside Python; the run ends here" in done.stderr
    assert done.stdout == ""
