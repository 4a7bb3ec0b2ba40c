"""A shell on a real terminal in a real guest: ``shell``, ``--shell-on-failure``."""

import re
import signal
import sys

import pytest
from terminal_user import TerminalUser

PLUGIN = """
    import threading
    from qubes.tests.extra import ExtraTestCase
    from qubes_itests.pytest_plugin import watch
    from qubes_itests.pytest_plugin.deadline import Deadline

    open_shell, stop, clocks = watch.open_shell, Deadline.stopped, set()

    def stopped(deadline):
        clocks.add(deadline)
        return stop(deadline)

    def tell_and_open(*arguments):
        stands = [clock.is_stopped for clock in clocks]
        drawing = [t.name for t in threading.enumerate() if t.name == "heartbeat"]
        print("clock stands:", stands, "drawing:", drawing)
        return open_shell(*arguments)

    watch.open_shell, Deadline.stopped = tell_and_open, stopped

    class TC_VM(ExtraTestCase):
        def test_bad(self):
            vms = self.create_vms(["one", "two", "halted"])
            for vm in vms[:2]:
                vm.start()
            print("said", "before")
            self.fail("on purpose")

        def test_good(self):
            (vm,) = self.create_vms(["one"])
            vm.start()

    def list_tests():
        return [TC_VM]
"""


@pytest.fixture
def start(site):
    """Return a function that starts a command on a terminal of its own."""
    started = []

    def start(*words):
        command = [sys.executable, "-m", *words]
        user = TerminalUser(command, site.work, site.environment, site.timeout)
        started.append(user)
        return user

    yield start
    for user in started:
        user.close()


def plain(shown):
    """Return what is shown without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())


def say(user, command):
    """Run a command in the shell; return what it shows."""
    user.type(f"{command}; echo e''nd\r")
    shown = user.read_until("end\r\n")
    return shown.partition("\r\n")[2].removesuffix("end\r\n")


def test_a_shell_in_a_fresh_vm(start):
    """It has the window's size, from the first byte on and when it changes."""
    user = start("qubes_itests", "shell", "tiny")
    user.read_until("~. at the beginning of a line leaves it")
    user.read_until("# ")
    assert say(user, "stty size; hostname; id -un; echo $TERM").split() == [
        "30",
        "100",
        "shell",
        "root",
        "vt220",
    ]
    user.type("trap 'stty size' WINCH; echo re''ady; read line\r")
    user.read_until("ready")
    user.resize(132, 43)
    user.read_until("43 132")
    # a process of the job says so itself: before, the key may meet the shell alone
    user.type("\rsh -c \"echo be''gun; exec cat\"\r")
    user.read_until("begun")
    user.type("\x03")
    # what is typed before the prompt may be dropped with what the key interrupts
    user.read_until("# ")
    user.type("exit 7\r")
    assert user.finish() == 7
    assert user.present_modes() == user.modes


@pytest.mark.parametrize("end", ["escape", "power off", "signal"])
def test_a_terminal_is_as_before_however_a_shell_ends(start, end):
    user = start("qubes_itests", "shell", "tiny")
    user.read_until("# ")
    assert user.present_modes() != user.modes
    if end == "escape":
        # what runs there ignores all keys
        user.type("stty -isig; echo re''ady; sleep 1000\r")
        user.read_until("ready")
        user.type("\x03\r~.")
        user.read_until("The shell was left.")
    elif end == "power off":
        user.type("poweroff -f\r")
        user.read_until("VM shell: ")
    else:
        user.signal(signal.SIGTERM)
    assert user.finish() == {"signal": 2}.get(end, 255)
    assert user.present_modes() == user.modes


def test_a_shell_after_a_failure(site, start):
    """In each VM that runs, and what is later goes on as if nothing had been."""
    site.install("looked", PLUGIN)
    user = start("qubes_itests", "run", "--shell-on-failure", "looked")
    for vm in ("one", "two"):
        user.read_until(f"TC_VM::test_bad failed. A root shell in test-inst-{vm}")
        # no clock runs, and no live line is drawn
        user.read_until("clock stands: [True] drawing: []")
        user.read_until("# ")
        assert say(user, "hostname") == f"test-inst-{vm}\r\n"
        user.type("exit 3\r")
    assert user.finish() == 1
    shown = plain(user.shown)
    assert "1 failed, 1 passed" in shown
    assert "AssertionError: on purpose" in shown
    # what a test prints is captured, though a live line is drawn meanwhile
    assert shown.index("said before") > shown.index("Captured stdout")
    assert user.present_modes() == user.modes


def test_a_shell_after_a_failure_under_plain_pytest(site, start):
    (site.work / "test_plain.py").write_text(
        "def test_bad(vm_factory):\n"
        "    vm_factory('one').start()\n"
        "    assert False\n"
        "def test_good():\n"
        "    pass\n"
    )
    user = start("pytest", "-p", "qubes_itests", "--itests-shell-on-failure")
    user.read_until("test_bad failed. A root shell in ")
    user.read_until("# ")
    assert say(user, "id -un") == "root\r\n"
    user.type("exit\r")
    assert user.finish() == 1
    assert "1 failed, 1 passed" in plain(user.shown)


def test_a_fault_of_the_shell_is_told_and_leaves_the_failure(site, start):
    error = "KeyError('vm')"
    fault = PLUGIN.replace("return open_shell(*arguments)", f"raise {error}")
    site.install("looked", fault)
    user = start("qubes_itests", "run", "--shell-on-failure", "looked")
    user.read_until(f"No shell in test-inst-one: {error}")
    assert user.finish() == 1
    shown = plain(user.shown)
    assert "1 failed, 1 passed" in shown
    assert "AssertionError: on purpose" in shown


def test_plain_pytest_refuses_it_without_a_terminal(site):
    (site.work / "test_plain.py").write_text("def test_good(): pass\n")
    words = ("-p", "qubes_itests", "--itests-shell-on-failure")
    done = site.run(*words, program="pytest")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "there is no terminal to use it on" in done.stderr
