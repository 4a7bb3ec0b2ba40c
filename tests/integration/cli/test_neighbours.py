"""Beside widely used plugins of pytest, all of them at once: each does what it does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

#: `./run-tests` installs them there.
NEIGHBOURS = Path(__file__).parents[3] / "build/neighbours"
PLUGIN = """
    import pathlib, unittest

    class TC_Beside(unittest.TestCase):
        def test_1_good(self):
            pass

        def test_2_late(self):
            file = pathlib.Path("seen")
            seen, _ = file.exists(), file.touch()
            self.assertTrue(seen, "too early")

    def list_tests():
        return [TC_Beside]
"""
SUITE = """
import its_time
import time
import pytest

@pytest.mark.parametrize("number", range(3))
def test_good(number, portal):
    pass

@pytest.mark.timeout(50)
def test_hangs(portal):
    its_time.is_nearly_over()
    time.sleep(100)
"""


@pytest.fixture
def site(site):
    assert NEIGHBOURS.is_dir(), "they are not there: begin with ./run-tests -k NAME"
    environment = site.environment
    environment["PYTHONPATH"] = os.pathsep.join([str(site.site), str(NEIGHBOURS)])
    environment["QUBES_ITESTS_CACHE"] = str(site.work / "cache")
    del environment["PYTEST_ADDOPTS"]  # that of hypothesis is one of them
    site.install("beside", PLUGIN)
    return site


def history(site):
    return {
        test["test"].rpartition("::")[2]: test["results"][-1]["outcome"]
        for test in json.loads(site.run("history", "--json").stdout)["tests"]
    }


REPORTS = ("--html=x.html", "--self-contained-html", "--cov-report=term")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_tests_of_plugins_run_with_all_of_them(site, workers):
    words = ("--hypervisor=test", "-n", workers, "--reruns=1", "--cov=beside")
    done = site.run(*words, *REPORTS, "-p", "randomly", "beside")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed, 1 rerun in" in done.stdout
    assert "beside.py" in done.stdout[done.stdout.index("tests coverage") :]
    page = (site.work / "x.html").read_text()
    assert "beside::TC_Beside::test_2_late" in page
    # it calls the test passed; the history knows better
    assert history(site) == {"test_1_good": "passed", "test_2_late": "flaky"}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_suite_of_plain_pytest_runs_with_all_of_them(site, workers):
    (site.work / "test_suite.py").write_text(SUITE)
    words = ("-p", "qubes_itests", "-n", workers, "--count=2", "--cov=test_suite")
    more = ("--reruns=1", "--timeout=60")
    done = site.run(*words, *REPORTS, *more, program="pytest")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 6 passed, 2 rerun in" in done.stdout
    assert "no end within 50 s" in done.stdout
    assert "Using --randomly-seed=" in done.stdout
    assert "test_suite.py::test_good[" in (site.work / "x.html").read_text()
    assert sorted(history(site).values()) == ["failed"] * 2 + ["passed"] * 6


def test_two_that_do_the_same_are_refused_with_a_sentence(site):
    done = site.run("--hypervisor=test", "--reruns=1", "--rerun-failed=1", "beside")
    assert done.returncode == 4
    assert "--rerun-failed and --reruns of pytest-rerunfailures do the same" in (
        done.stderr
    )
