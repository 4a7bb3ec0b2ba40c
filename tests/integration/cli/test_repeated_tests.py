"""Tests that run more than once, and tests that are known to fail."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest

NO_GUESTS = ("--hypervisor", "test")
PLUGIN = """
    import pathlib, unittest

    class TC_Repeated(unittest.TestCase):
        @classmethod
        def setUpClass(cls):
            cls.set_up = True

        def setUp(self):
            assert self.set_up
            file = pathlib.Path(self._testMethodName)
            self.run_number = int(file.read_text()) + 1 if file.exists() else 1
            file.write_text(str(self.run_number))

        def test_1_good(self): pass
        def test_2_mixed(self): self.assertNotEqual(self.run_number, 2, "this time")
        def test_3_late(self): self.assertGreater(self.run_number, 1, "too early")
        def test_4_bad(self): self.fail("always")
        def test_5_skipped(self): self.skipTest("not today")

    def list_tests():
        return [TC_Repeated]
"""


@pytest.fixture
def site(site):
    site.environment["QUBES_ITESTS_CACHE"] = str(site.work / "cache")
    site.install("again", PLUGIN)
    return site


def history(site):
    tests = json.loads(site.run("history", "--json").stdout)["tests"]
    return {
        test["test"].rpartition("::")[2]: [
            (r["outcome"], r["attempts"], r["failed"]) for r in test["results"]
        ]
        for test in tests
    }


def junit(path):
    cases = ET.parse(path).getroot().iter("testcase")  # noqa: S314 - our own
    return {
        case.get("name"): [(part.tag, part.get("message")) for part in case]
        for case in cases
    }


def run_number(site, test):
    return int((site.work / test).read_text())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_one_that_passes_when_it_runs_again_is_flaky_and_no_success(site, workers):
    words = ("--rerun-failed", "2", "--junitxml=x.xml", "-n", workers)
    done = site.run(*NO_GUESTS, *words, "again")
    assert done.returncode == 1, done.stdout + done.stderr
    for count in ("1 failed", "2 passed", "1 skipped", "1 flaky", "3 rerun"):
        assert re.search(rf"[= ]{count}[, ]", done.stdout)
    assert "\nRERUN   again::TC_Repeated::test_3_late  " in done.stdout
    assert "\nFLAKY   again::TC_Repeated::test_3_late  " in done.stdout
    why = (
        "flaky: 1 of 2 attempts failed:"
        " AssertionError: 1 not greater than 1 : too early"
    )
    assert f"\n  cause       {why}\n" in done.stdout
    cases = junit(site.work / "x.xml")
    assert cases["test_1_good"] == []
    assert cases["test_3_late"] == [("failure", why)]
    assert len(cases["test_4_bad"]) == 1
    assert history(site) == {
        "test_1_good": [("passed", 1, 0)],
        "test_2_mixed": [("passed", 1, 0)],
        "test_3_late": [("flaky", 2, 1)],
        "test_4_bad": [("failed", 3, 3)],
        "test_5_skipped": [("skipped", 1, 0)],
    }
    (late,) = (site.work / "itests-artifacts").glob("*test_3_late*")
    assert "too early" in (late / "attempt-1/failure.txt").read_text()
    (bad,) = (site.work / "itests-artifacts").glob("*test_4_bad*")
    left = {str(p.relative_to(bad)) for p in bad.rglob("*.*")}
    assert {"attempt-1/timeline.jsonl", "attempt-2/failure.txt", "failure.txt"} <= left


def test_a_run_whose_only_failures_are_flaky_has_a_status_of_its_own(site):
    done = site.run(*NO_GUESTS, "--repeat", "3", "again::TC_Repeated::test_2_mixed")
    assert done.returncode == 22, done.stdout
    assert "1 of 3 attempts failed: AssertionError: 2 == 2 : this time" in done.stdout
    assert run_number(site, "test_2_mixed") == 3


def test_until_fail_ends_with_the_first_failure(site):
    test = "again::TC_Repeated::test_2_mixed"
    done = site.run(*NO_GUESTS, "--until-fail", test)
    assert done.returncode == 22, done.stdout
    assert "this time" in done.stdout
    assert run_number(site, "test_2_mixed") == 2


def test_known_issues_are_expected_and_a_pass_is_told_also_by_workers(site):
    (site.work / "known").write_text(
        "# what fails\n\n"
        "again::*::test_4_bad  https://example.org/issues/4\n"
        "again::TC_Repeated::test_1_* #1, and more\n"
    )
    words = ("--known-issues", "known", "--rerun-failed", "1", "-n", "2")
    done = site.run(*NO_GUESTS, *words, "-k", "good or bad", "again")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 xfailed, 1 xpassed" in done.stdout
    test = "again::TC_Repeated::test_"
    assert f"\n{test}4_bad: https://example.org/issues/4\n" in done.stdout
    assert f"\n{test}1_good: #1, and more (known:4)\n" in done.stdout
    assert history(site) == {
        "test_1_good": [("xpassed", 1, 0)],
        "test_4_bad": [("xfailed", 1, 0)],
    }
    assert run_number(site, "test_4_bad") == 1
