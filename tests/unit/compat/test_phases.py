"""How long the parts of a test took."""

import unittest

import pytest

from qubes_itests.testcase.outcomes import TimedTestCase


class Timed(TimedTestCase):
    """Each part takes time on a clock of its own."""

    __test__ = False  # for the tests below alone

    clock = 0.0

    def spend(self, seconds):
        type(self).clock += seconds

    def setUp(self):
        self.addCleanup(self.spend, 0.5)
        self.spend(3)

    def test_passes(self):
        self.spend(5)

    def test_fails(self):
        self.spend(5)
        self.fail()

    def tearDown(self):
        self.spend(7)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: Timed.clock)

    def run(test):
        test.run(unittest.TestResult())
        return test.phases

    return run


def test_each_part_has_its_time_whether_the_test_passes_or_not(run):
    for name in ("test_passes", "test_fails"):
        assert run(Timed(name)) == {"setUp": 3, "test": 5, "tearDown": 7.5}


def test_a_test_that_is_not_reached_has_no_times(run):
    class Broken(Timed):
        def setUp(self):
            super().setUp()
            self.skipTest("not today")

    assert run(Broken("test_passes")) == {}


def test_a_test_may_run_twice(run):
    test = Timed("test_passes")
    assert run(test) == run(test)
