"""Plugins that are broken: one failing test each, and all others run."""

import re

import pytest
from leftovers import wait_for_no_leftovers

GOOD = """
    import json, unittest

    class TC_Good(unittest.TestCase):
        def test_json(self):
            self.assertEqual(json.loads("1"), 1)

    def list_tests():
        return [TC_Good]
"""

#: By the plugin's name: its text, and what the cause of its failure says.
BAD = {
    "raises": (
        "raise RuntimeError('not today')",
        "raises:list_tests cannot be imported: RuntimeError: not today",
    ),
    "exits": (
        "raise SystemExit(0)",
        "exits:list_tests cannot be imported: SystemExit: 0",
    ),
    "nonclass": (
        "def list_tests(): return [42]",
        "42",
    ),
    "twice": (
        """
        import unittest
        class TC_Twice(unittest.TestCase):
            def test_one(self): pass
            def test_one(self): pass
        def list_tests(): return [TC_Twice]
        """,
        "TC_Twice defines test_one twice; the first definition is lost",
    ),
    "namesakes": (
        """
        import unittest
        class TC_Same(unittest.TestCase):
            def test_one(self): pass
        First = TC_Same
        class TC_Same(unittest.TestCase):
            def test_one(self): pass
        def list_tests(): return [First, TC_Same]
        """,
        "it lists two classes named TC_Same; only the first is run",
    ),
    "tampers": (
        """
        import sys, types
        sys.modules["json"] = types.ModuleType("json")
        def list_tests(): return []
        """,
        "while it loaded, it replaced or removed modules that others use: json",
    ),
}


@pytest.fixture(scope="module")
def site(make_site, tmp_path_factory):
    site = make_site(tmp_path_factory.mktemp("plugins"))
    for name, (text, _) in BAD.items():
        site.install(name, text)
    site.install("zz-good", GOOD)
    return site


@pytest.fixture(scope="module")
def done(site):
    return site.run("--hypervisor=test", *BAD, "zz-good")


@pytest.fixture(scope="module")
def causes(done, site):
    assert done.returncode == 1, done.stdout + done.stderr
    report = site.run("report").stdout
    return dict(re.findall(r"^(\w+)::plugin\S*\n  cause +(.*)$", report, re.MULTILINE))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_plugin_is_one_failing_test_with_the_cause(causes, name):
    assert BAD[name][1] in causes[name]


def test_the_others_run_and_nothing_is_left(done, causes, shared_cache):
    assert set(causes) == set(BAD)
    assert re.search(r"^PASSED +zz-good::TC_Good::test_json", done.stdout, re.MULTILINE)
    assert wait_for_no_leftovers(shared_cache) == []
