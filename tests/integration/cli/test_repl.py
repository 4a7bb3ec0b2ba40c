"""``repl``: a Python prompt with what a test has, on a real terminal."""

from __future__ import annotations

import contextlib
import sys
import textwrap

from terminal_user import TerminalUser

APP = {
    "setup.py": """
        from setuptools import setup

        setup(
            name="app-tests",
            version="1",
            packages=["app_tests"],
            package_dir={"app_tests": "tests"},
            entry_points={"qubes.tests.extra": ["app = app_tests.suite:list_tests"]},
        )
    """,
    "tests/__init__.py": "",
    "tests/words.py": "WORD = 'before'\n",
    "tests/suite.py": """
        from qubes.tests.extra import ExtraTestCase
        from app_tests.words import WORD

        class TC_00_App(ExtraTestCase):
            def test_word(self):
                (vm,) = self.create_vms(["work"])
                self.assertEqual((vm.name, WORD), ("test-inst-work", "after"))

        def list_tests():
            return [TC_00_App]
    """,
}


class Prompt(TerminalUser):
    def enter(self, line, answer):
        """Type a line, and read up to an answer and the next prompt."""
        self.type(f"{line}\r")
        self.read_until(answer)
        self.read_until(">>> ")


def prompt(site, *words):
    command = [sys.executable, "-m", "qubes_itests", "repl", *words]
    user = Prompt(command, site.work, site.environment, site.timeout)
    user.read_until(">>> ")
    return contextlib.closing(user)


def test_the_prompt_makes_vms_and_ends_them(site):
    with prompt(site, "--template=tiny") as user:
        user.enter("vm = vm_factory('work')", "\n")
        user.enter(
            "vm.run('hostname', passio_popen=True).communicate()[0]", r"b'work\n'"
        )
        # a mistake ends nothing
        user.enter("vm.nothing", "AttributeError")
        user.enter("vm.name in app.domains", "\nTrue")
        user.type("\x04")
        user.read_until("ending: the VMs are killed")
        assert user.finish() == 0
        assert b"left behind" not in user.shown
        assert user.present_modes() == user.modes


def test_the_tests_of_an_app_are_there_and_loaded_again_after_an_edit(site):
    app = site.work / "app"
    (app / "tests").mkdir(parents=True)
    for name, text in APP.items():
        (app / name).write_text(textwrap.dedent(text))
    with prompt(site, "--app=app", "--hypervisor=test") as user:
        user.enter("one, two = create_vms(['one', 'two'])", "\n")
        user.enter("one.name, two.is_halted()", "('one', True)")
        user.enter("list(tests)", "['app::TC_00_App::test_word']")
        user.enter("run_test('app::TC')", "FAILED (failures=1)")
        user.enter("run_test('app::TD')", "no test's id begins with 'app::TD'")
        user.enter("import sys; sys.modules['blocked'] = None", "\n")
        (app / "tests/words.py").write_text("WORD = 'after'\n")
        user.enter("reload()", "\n1 tests")
        user.enter("run_test('app::TC')", "\nOK")
        # what is wrong is said, and mended while one is there
        (app / "tests/words.py").write_text("WORD = after\n")
        user.enter("reload()", "name 'after' is not defined")
        (app / "tests/words.py").write_text("WORD = 'after'\n")
        user.enter("reload()", "\n1 tests")
        user.type("exit(3)\r")
        assert user.finish() == 3
    # what was typed is there the next time: the last line but one
    with prompt(site, "--app=app", "--hypervisor=test") as user:
        user.enter("\x1b[A\x1b[A", "\n1 tests")
        user.type("\x04")
        assert user.finish() == 0
        assert b"left behind" not in user.shown
