"""A failed test waits for the person at the terminal, if there is one."""

import os
import pty
import subprocess
import sys

PROGRAM = """
import unittest
from qubes_itests.testcase import wait_on_fail

class Case(unittest.TestCase):
    @wait_on_fail
    def test_fails(self):
        self.fail("as it should")

    @wait_on_fail
    def test_is_skipped(self):
        self.skipTest("as it should")

    @wait_on_fail
    def test_passes(self):
        pass

unittest.main(verbosity=2)
"""
COMMAND = [sys.executable, "-c", PROGRAM]


def test_it_waits_for_return():
    pid, terminal = pty.fork()
    if pid == 0:
        plain = os.environ | {"NO_COLOR": "1"}  # unittest has colours in Python 3.14
        os.execve(COMMAND[0], COMMAND, plain)  # noqa: S606
    shown = b""
    while b"Press return" not in shown:
        shown += os.read(terminal, 1024)
    assert b"AssertionError: as it should" in shown
    os.write(terminal, b"\n")
    try:
        while True:
            shown += os.read(terminal, 1024)
    except OSError:
        pass  # EIO is the end
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    os.close(terminal)
    assert shown.count(b"Press return") == 1
    assert b"FAILED (failures=1, skipped=1)" in shown


def test_without_a_terminal_it_does_not():
    done = subprocess.run(
        COMMAND, capture_output=True, start_new_session=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert b"FAILED (failures=1, skipped=1)" in done.stderr
    assert b"Press return" not in done.stdout + done.stderr
