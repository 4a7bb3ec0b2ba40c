"""Ctrl-C ends a run in order, whatever it is at."""

import os
import pty
import sys
import time

import pytest
from leftovers import wait_for_no_leftovers
from plugin_site import FOR_TEMPLATE

PLUGIN = """
    import os, threading, time
    from pathlib import Path
    from qubes.tests.extra import ExtraTestCase

    class TC_Slow(ExtraTestCase):
        def setUp(self):
            super().setUp()
            self.app.warm_starts = None
            (self.vm,) = self.create_vms(["one"])

        def test_blocks(self):
            self.vm.start()
            Path("reached").touch()
            time.sleep(9000)

        def test_starts(self):
            def watch():
                while not hypervisor.domains():
                    time.sleep(0.01)
                time.sleep(0.3)
                Path("reached").touch()
            hypervisor = self.app.hypervisor
            threading.Thread(target=watch, daemon=True).start()
            self.vm.kernelopts = "rdinit=/nowhere panic=0"
            self.vm.start()

        def test_z(self):
            Path("went_on").touch()

    def list_tests():
        return [TC_Slow]
"""


def read(terminal):
    """Return what is on the terminal until nobody writes to it any more."""
    output = b""
    while True:
        try:
            output += os.read(terminal, 65536)
        except OSError:  # EIO is the end
            return output.decode()


@pytest.mark.parametrize("test", ["test_blocks", "test_starts"])
def test_control_c_ends_the_run_and_all_that_it_has(site, shared_cache, test):
    """The key on a terminal reaches all processes of the run at once."""
    site.install("slow", PLUGIN, FOR_TEMPLATE)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(site.work)
        command = [
            sys.executable,
            "-m",
            "qubes_itests",
            "run",
            "-k",
            f"{test} or test_z",
        ]
        os.execve(sys.executable, [*command, "slow"], site.environment)  # noqa: S606
    start = time.monotonic()
    while not (site.work / "reached").exists():
        assert time.monotonic() < start + 600
        time.sleep(0.01)
    begin = time.monotonic()
    os.write(terminal, b"\x03")
    output = read(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    assert status == 2, output
    # less than any deadline of what it ends, on a machine on which it came so far soon
    assert time.monotonic() - begin < 10 + 5 * (begin - start)
    assert "KeyboardInterrupt" in output
    assert not (site.work / "went_on").exists()
    assert wait_for_no_leftovers(shared_cache) == []
