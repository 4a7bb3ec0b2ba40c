"""What published plugins do to a run, all of them in one; each keeps to itself."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from plugin_site import FOR_TEMPLATE, ONCE

NO_GUESTS = ("--hypervisor", "test", "--tb=short")

FALLS_BACK = """
    import unittest
    try:
        from qubes.tests.extra import ExtraTestCase
    except ImportError:
        ExtraTestCase = unittest.TestCase

    class TC_Modes(unittest.TestCase):
        template = None
        def test_mode(self):
            self.assertTrue(hasattr(ExtraTestCase, "create_vms"), "outside of Qubes")
        def test_template(self):
            self.assertIn(self.template, (None, "tiny"))

    def list_tests():
        return [TC_Modes]
"""

FAKES_WHAT_IS_MISSING = """
    import sys, types, unittest
    try:
        import qubes.ext, qubes.utils
        from qubes.ext import Extension, handler
        from qubes.utils import sanitize_stderr_for_log
    except ModuleNotFoundError:
        sys.modules["qubes"] = types.ModuleType("qubes")

    class Ours(qubes.ext.Extension):
        @handler("domain-start")
        def on_start(self, vm, event, **kwargs): pass

    class TC_Fake(unittest.TestCase):
        def test_real(self):
            self.assertTrue(hasattr(sys.modules["qubes"], "Qubes"), "it is a fake")
            self.assertEqual(sanitize_stderr_for_log(b"x\\n"), "x_")

    def list_tests():
        return [TC_Fake]
"""

REPLACES_QUBES = """
    import sys, types, unittest
    import qubes, qubes.ext
    sys.modules["qubes"] = types.ModuleType("qubes")
    sys.modules["qubes.ext"] = types.ModuleType("qubes.ext")
    sys.modules["qubes.mine"] = types.ModuleType("qubes.mine")

    class TC_Replaced(unittest.TestCase):
        def test_runs(self): pass

    def list_tests():
        return [TC_Replaced]
"""

TESTS_AN_EXTENSION = """
    import qubes.tests.extra
    try:
        import qubes.qubesutils
        old = True
    except ImportError:
        old = False

    class Stand(qubes.tests.TestEmitter):
        def __init__(self, name, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.name = name

    class TC_Extension(qubes.tests.QubesTestCase):
        def test_events(self):
            stand = Stand("sys-usb")
            stand.fire_event("device-list-change:usb")
            self.assertEventFired(stand, "device-list-change:usb")
            self.loop.run_until_complete(stand.fire_event_async("later"))
            self.assertFalse(old)

    def list_tests():
        return [TC_Extension]
"""

OLD_PYTHON = """
    import string
    KEYS = ["KEY_" + x for x in string.uppercase]
    def list_tests():
        return []
"""

ASYNCHRONOUS = """
    import unittest
    class TC_Async(unittest.TestCase):
        async def test_never_runs(self): raise AssertionError
        def test_runs(self): pass
    def list_tests():
        return [TC_Async]
"""

SETUP = """
from setuptools import setup
setup(
    name="intree",
    version=open("../version").read().strip(),
    packages=["intree"],
    entry_points={"qubes.tests.extra.for_template": "intree = intree.tests:list_tests"},
)
"""

IN_TREE = """
import unittest
class TC_InTree(unittest.TestCase):
    def test_here(self):
        self.assertIn("/my-app/tests/", __file__)
def list_tests():
    return [TC_InTree]
"""


@pytest.fixture
def in_tree(site):
    """Return a directory with tests that are set up where they are."""
    tests = site.work / "my-app" / "tests"
    (tests / "intree").mkdir(parents=True)
    (tests.parent / "version").write_text("4.2.1\n")
    (tests / "setup.py").write_text(SETUP)
    (tests / "intree" / "__init__.py").touch()
    (tests / "intree" / "tests.py").write_text(IN_TREE)
    command = [sys.executable, "setup.py", "-q", "egg_info"]
    subprocess.run(command, cwd=tests, check=True)
    return tests


@pytest.fixture
def lines(site, in_tree):
    """Return the lines of a run with all of these plugins, in any order."""
    site.install("asynchronous", ASYNCHRONOUS)
    site.install("extension", TESTS_AN_EXTENSION)
    site.install("fakes", FAKES_WHAT_IS_MISSING)
    site.install("m-replaces", REPLACES_QUBES)  # between others, in their order
    site.install("modes", FALLS_BACK, ONCE, FOR_TEMPLATE)
    site.install("old", OLD_PYTHON)
    site.register("gone", "gone.tests:list_tests", FOR_TEMPLATE)
    names = "asynchronous extension fakes gone intree m-replaces modes old"
    done = site.run(
        *NO_GUESTS,
        PYTHONPATH=f"{site.site}:{in_tree}",
        QUBES_TEST_EXTRA_INCLUDE=names,
        QUBES_TEST_TEMPLATES="tiny",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_each_plugin_keeps_to_itself(lines):
    results = re.findall(
        r"^(PASSED|FAILED) +(\S+::\S+)  [0-9.]+ s", lines, re.MULTILINE
    )
    assert sorted((name, result) for result, name in results) == [
        ("asynchronous::TC_Async::test_runs", "PASSED"),
        ("asynchronous::plugin", "FAILED"),
        ("extension::TC_Extension::test_events", "PASSED"),
        ("fakes::TC_Fake::test_real", "PASSED"),
        ("gone::plugin", "FAILED"),
        ("intree::TC_InTree_tiny::test_here", "PASSED"),
        ("m-replaces::TC_Replaced::test_runs", "PASSED"),
        ("m-replaces::plugin", "FAILED"),
        ("modes::TC_Modes_tiny::test_mode", "PASSED"),
        ("modes::TC_Modes_tiny::test_template", "PASSED"),
        ("modes@once::TC_Modes::test_mode", "PASSED"),
        ("modes@once::TC_Modes::test_template", "PASSED"),
        ("old::plugin", "FAILED"),
    ]
    assert "replaced or removed modules that others use: qubes, qubes.ext;" in lines
    assert "TC_Async.test_never_runs would pass without being run" in lines
    assert "No module named 'gone'" in lines
    assert "module 'string' has no attribute 'uppercase'" in lines


LEAVES_A_THREAD = """
    import concurrent.futures, threading, unittest

    class TC_Thread(unittest.TestCase):
        def test_thread(self):
            pool = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="left")
            pool.submit(threading.Event().wait)

    def list_tests():
        return [TC_Thread]
"""


def test_a_thread_that_a_test_has_left_does_not_keep_a_run_from_ending(site):
    """It is named. Python itself waits for threads of executors for ever."""
    site.install("leaves", LEAVES_A_THREAD)
    site.timeout = 600
    done = site.run(*NO_GUESTS, "leaves")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"^left_0 hangs, and is not waited for: File", done.stderr, re.MULTILINE
    )
