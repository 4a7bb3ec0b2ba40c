"""``--pdb``: at the prompt there is what the test had, and afterwards nothing."""

from __future__ import annotations

import re
import subprocess
import sys

from terminal_user import TerminalUser

PLUGIN = """
    from qubes.tests.extra import ExtraTestCase

    class TC_VM(ExtraTestCase):
        def setUp(self):
            if "early" in self.id():
                self.skipTest("before there was anything")
            super().setUp()
            self.addCleanup(self.tell, "first added")
            (self.vm,) = self.create_vms(["one"])
            if "unready" in self.id():
                self.fail("not set up")
        def tell(self, what):
            print("clean-up", what, hasattr(self, "app"))
            if "ugly" in self.id():
                raise OSError("first")
        def tearDown(self):
            print("tear-down", self.vm.name in self.app.domains)
            super().tearDown()
        def test_bad(self):
            self.fail("on purpose")
        def test_early(self): pass
        def test_stops(self): breakpoint()
        def test_good(self):
            self.addCleanup(self.addCleanup, self.tell, "added late")
        def test_ugly(self):
            self.addCleanup(self.tell, "second")
        def test_unready(self): pass

    def list_tests():
        return [TC_VM]
"""


def debug(site, *words, say):
    site.install("debugged", PLUGIN)
    command = [sys.executable, "-m", "qubes_itests", "--hypervisor=test", "-s", "--pdb"]
    done = subprocess.run(
        [*command, *words],
        cwd=site.work,
        env=site.environment,
        input=say,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    told = re.findall(r"(?:tear-down|clean-up) .*", done.stdout)
    return done, told


def test_at_the_prompt_there_is_what_the_test_had(site):
    words = [f"debugged::TC_VM::test_{name}" for name in ("good", "bad", "early")]
    prompts = "p 'it is there:', self.vm.name in self.app.domains\nc\n"
    done, told = debug(site, *words, say=prompts)
    assert "1 failed, 1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1
    assert "('it is there:', True)" in done.stdout
    assert told == [
        "tear-down True",
        "clean-up first added True",
        "tear-down True",
        "clean-up added late True",
        "clean-up first added True",
    ]


def test_what_fails_on_the_way_out_is_told(site):
    """Each clean-up is called, and no tearDown where setUp failed, as in unittest."""
    words = [f"debugged::TC_VM::test_{name}" for name in ("ugly", "unready")]
    done, told = debug(site, *words, say="c\nc\n")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 1 error" in done.stdout
    assert told == [
        "tear-down True",
        "clean-up second True",
        "clean-up first added True",
        "clean-up first added True",
    ]


WATCHED = """
    import threading
    from _pytest import debugging

    enter = debugging._enter_pdb

    def tell_and_enter(*arguments):
        names = [thread.name for thread in threading.enumerate()]
        print("drawing:", "heartbeat" in names)
        return enter(*arguments)

    debugging._enter_pdb = tell_and_enter
"""


def test_the_prompt_is_alone_on_the_terminal(site):
    """No live line is drawn over it, though output is captured, nor over what leads."""
    site.install("debugged", WATCHED + PLUGIN)
    words = ("--hypervisor=test", "--pdb", "debugged::TC_VM::test_bad")
    command = [sys.executable, "-m", "qubes_itests", *words]
    user = TerminalUser(command, site.work, site.environment, site.timeout)
    try:
        user.read_until("drawing: False")
        # not in the method of unittest that raises, where there is nothing of the test
        user.read_until('-> self.fail("on purpose")\r\n(Pdb) ')
        user.type("import threading; [t.name for t in threading.enumerate()]\r")
        user.read_until("\n['MainThread'")
        assert "heartbeat" not in user.read_until("(Pdb) ")
        user.type("down\r")
        user.read_until("-> raise self.failureException(msg)")
        user.read_until("(Pdb) ")
        user.type("c\r")
        assert user.finish() == 1
    finally:
        user.close()


def test_a_worker_says_that_it_has_no_prompt(site):
    site.install("debugged", PLUGIN)
    done = site.run("--hypervisor=test", "-n1", "debugged::TC_VM::test_stops")
    assert done.returncode == 1, done.stdout + done.stderr
    said = "a breakpoint() needs a terminal, which workers lack: leave -n out"
    assert said in done.stdout


STOPPED = """
    import signal
    from qubes.tests.extra import ExtraTestCase

    class TC_Stops(ExtraTestCase):
        def setUp(self):
            super().setUp()
            (self.vm,) = self.create_vms(["one"])
            self.vm.start()
        def test_stops(self):
            breakpoint()
            print("clock", signal.getitimer(signal.ITIMER_REAL))
        def test_goes_on(self):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 0

    def list_tests():
        return [TC_Stops]
"""


def test_at_a_breakpoint_no_time_runs_and_the_vm_does(site):
    site.install("stopped", STOPPED)
    command = [sys.executable, "-m", "qubes_itests", "--timeout=100", "-rP"]
    names = [f"stopped::TC_Stops::test_{name}" for name in ("stops", "goes_on")]
    user = TerminalUser([*command, *names], site.work, site.environment, site.timeout)
    try:
        user.read_until("(Pdb) ")
        user.type("import threading; [t.name for t in threading.enumerate()]\r")
        user.read_until("\n['MainThread'")
        assert "heartbeat" not in user.read_until("(Pdb) ")
        user.type("signal.getitimer(signal.ITIMER_REAL)\r")
        user.read_until("\n(0.0, 0.0)")
        user.read_until("(Pdb) ")
        user.type("self.vm.run('hostname', passio_popen=True).communicate()\r")
        user.read_until("(b'test-inst-one\\n', ")
        user.read_until("(Pdb) ")
        user.type("c\r")
        assert user.finish() == 0
        assert b"2 passed" in user.shown
        assert b"clock (0.0, 0.0)" in user.shown
    finally:
        user.close()
