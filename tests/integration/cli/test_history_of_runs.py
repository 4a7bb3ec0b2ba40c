"""Runs whose results are kept, and what later runs make of them."""

from __future__ import annotations

import json

import pytest

NO_GUESTS = ("--hypervisor", "test")
PLUGIN = """
    import os, signal, unittest

    class TC_One(unittest.TestCase):
        def test_1(self): pass
        def test_2(self): self.assertEqual(1, 2, "numbers")
        def test_3(self):
            if "KILL" in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)

    class TC_Two(unittest.TestCase):
        def test_1(self): self.skipTest("not today")

    def list_tests():
        return [TC_One, TC_Two]
"""
SUITE = "def test_one(): pass\ndef test_two(): assert 0, 'nothing'\n"


@pytest.fixture
def site(site):
    site.environment["QUBES_ITESTS_CACHE"] = str(site.work / "cache")
    site.install("kept", PLUGIN)
    return site


def history(site):
    done = site.run("history", "--json")
    return {
        (test["suite"], test["test"]): [
            (r["outcome"], r["cause"], r["where"]) for r in test["results"]
        ]
        for test in json.loads(done.stdout)["tests"]
    }


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_is_kept_with_and_without_workers(site, workers):
    done = site.run(*NO_GUESTS, "-n", workers, "kept")
    assert done.returncode == 1, done.stdout + done.stderr
    kept = history(site)
    cause = "AssertionError: 1 != 2 : numbers"
    ((outcome, why, where),) = kept["", "kept::TC_One::test_2"]
    assert (outcome, why) == ("failed", cause)
    assert where.endswith("kept.py:6")
    assert kept["", "kept::TC_One::test_1"] == [("passed", "", "")]
    ((outcome, why, _),) = kept["", "kept::TC_Two::test_1"]
    assert outcome == "skipped"
    assert "not today" in why


def test_a_run_that_was_killed_is_kept_up_to_there(site):
    done = site.run(*NO_GUESTS, "kept::TC_One", KILL="yes")
    assert done.returncode == 3, done.stdout + done.stderr
    kept = history(site)
    assert kept["", "kept::TC_One::test_1"] == [("passed", "", "")]
    assert ("", "kept::TC_One::test_3") not in kept


def test_a_suite_of_plain_pytest_is_kept_under_the_name_of_its_directory(site):
    (site.work / "test_suite.py").write_text(SUITE)
    words = ("-p", "qubes_itests", "--rootdir", str(site.work))
    assert site.run(*words, program="pytest").returncode == 1
    kept = history(site)
    assert kept == {
        ("work", "test_suite.py::test_one"): [("passed", "", "")],
        ("work", "test_suite.py::test_two"): [
            ("failed", "AssertionError: nothing", "test_suite.py:2")
        ],
    }


def test_a_history_that_cannot_be_written_fails_no_run(site):
    (site.work / "cache").mkdir()
    (site.work / "cache/history").write_text("a file in its place")
    done = site.run(*NO_GUESTS, "kept::TC_One::test_1")
    assert done.returncode == 0, done.stdout
    assert "\nhistory: the rest of this run is not kept: " in done.stdout
