"""``repl``: a Python prompt with what a test has, on a real terminal."""

import contextlib
import sys

from terminal_user import TerminalUser


def test_the_prompt_makes_vms_and_ends_them(site):
    command = [sys.executable, "-m", "qubes_itests", "repl", "--template=tiny"]
    with contextlib.closing(
        TerminalUser(command, site.work, site.environment, site.timeout)
    ) as user:
        user.read_until(">>> ")
        user.type("vm = vm_factory('work')\r")
        user.read_until(">>> ")
        user.type("vm.run('hostname', passio_popen=True).communicate()[0]\r")
        user.read_until("b'work\\n'")
        user.read_until(">>> ")
        # a mistake ends nothing
        user.type("vm.nothing\r")
        user.read_until("AttributeError")
        user.read_until(">>> ")
        user.type("vm.name in app.domains\r")
        user.read_until("\nTrue")
        user.read_until(">>> ")
        user.type("\x04")
        user.read_until("ending: the VMs are killed")
        assert user.finish() == 0
        assert b"left behind" not in user.shown
        assert user.present_modes() == user.modes
