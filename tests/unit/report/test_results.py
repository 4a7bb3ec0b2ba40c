"""What came of a test, from the reports that pytest makes of it."""

from __future__ import annotations

import sys
import textwrap
import time

import pytest

from qubes_itests.report.results import ATTEMPTS, Results

SUITE = """
    import pytest, unittest

    def helper():
        raise ValueError("no such thing")

    class TC_One(unittest.TestCase):
        def test_1_good(self): pass
        def test_2_bad(self):
            x = 1
            self.assertEqual(x, 2, "numbers")
        def test_3_skipped(self): self.skipTest("not today")

    @pytest.fixture
    def broken():
        helper()

    @pytest.fixture
    def leaky():
        yield
        helper()

    def test_4_setup(broken): pass
    def test_5_teardown(leaky): pass

    @pytest.mark.xfail(reason="known")
    def test_6_expected(): helper()

    @pytest.mark.xfail(reason="known", strict=False)
    def test_7_unexpected(): pass

    def test_8_both(leaky): helper()

    def test_9_parts(subtests):
        for n in range(3):
            with subtests.test(n=n):
                assert n != 1
"""


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Return a function that runs a suite and returns its results by name."""

    def run(text=SUITE, *plugins):
        (tmp_path / "test_suite_of_results.py").write_text(textwrap.dedent(text))
        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(sys.modules, "test_suite_of_results", raising=False)
        told = []
        words = ["-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "-c", "/dev/null"]
        words += ["--rootdir=.", "--import-mode=importlib"]
        pytest.main([*words, "."], [Results(told.append), *plugins])
        return {result.test.rpartition("::")[2]: result for result in told}

    return run


def test_each_outcome_with_its_cause_and_the_line_of_the_test(results):
    told = results()
    assert {name: result.outcome for name, result in told.items()} == {
        "test_1_good": "passed",
        "test_2_bad": "failed",
        "test_3_skipped": "skipped",
        "test_4_setup": "error",
        "test_5_teardown": "error",
        "test_6_expected": "xfailed",
        "test_7_unexpected": "xpassed",
        "test_8_both": "failed",
        "test_9_parts": "failed",
    }
    bad = told["test_2_bad"]
    assert bad.cause == "AssertionError: 1 != 2 : numbers"
    assert bad.where == "test_suite_of_results.py:11"
    assert (bad.attempts, bad.failed) == (1, 1)
    assert told["test_1_good"].cause == told["test_1_good"].where == ""
    assert "not today" in told["test_3_skipped"].cause
    assert told["test_4_setup"].cause == "in setup: ValueError: no such thing"
    assert told["test_8_both"].cause == "ValueError: no such thing"


class _Repeated:
    """Has tests whose names say so fail twice, or first, as plugins repeat them."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call":
            if "again" in item.name and not vars(item).get("itests_seen"):
                item.itests_seen = True
                first = item.config.hook.pytest_runtest_makereport(item=item, call=call)
                first.outcome, first.longrepr = "rerun", "lost"
                item.ihook.pytest_runtest_logreport(report=first)
                # as pytest-rerunfailures does
                first.outcome, first.when = "passed", "teardown"
                item.ihook.pytest_runtest_logreport(report=first)
            if "mixed" in item.name:
                report.outcome, report.longrepr = "failed", "flaky: once"
                setattr(report, ATTEMPTS, (4, 1))
        return report


def test_a_test_that_failed_and_passed_is_flaky(results):
    told = results("def test_again(): pass\ndef test_mixed(): pass\n", _Repeated())
    again, mixed = told["test_again"], told["test_mixed"]
    assert (again.outcome, again.attempts, again.failed) == ("flaky", 2, 1)
    assert again.cause == "lost"
    assert (mixed.outcome, mixed.attempts, mixed.failed) == ("flaky", 4, 1)


def test_a_property_of_a_test_is_no_time_of_its_parts(results):
    told = results(
        """
        def test_own(record_property):
            record_property("time of day", "noon")
            record_property("time of call", "1.500 s")
            record_property(7, "eight")
        def test_next(): pass
        """
    )
    assert told["test_own"].phases == {"call": 1.5}
    assert told["test_next"].outcome == "passed"


def test_a_clock_that_is_put_back_makes_no_negative_time(monkeypatch):
    results = Results(lambda _result: None)
    monkeypatch.setattr(time, "time", lambda: results.started - 3600)
    assert 0 <= results.took < 60


def test_an_outcome_of_another_plugin_is_none_of_a_test(results):
    """It is counted as pytest does: as no failure; and can be read again."""

    class Other:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_makereport(self, call):
            report = yield
            if call.when == "call":
                report.outcome = "postponed"
            return report

    (told,) = results("def test_x(): pass", Other()).values()
    assert (told.outcome, told.cause) == ("skipped", "postponed")
