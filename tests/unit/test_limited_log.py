"""A source that floods a log gets a few records, and the others theirs."""

import logging

import pytest

from qubes_itests import limited_log
from qubes_itests.limited_log import LimitedLog


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(limited_log, "time", clock)
    return clock


@pytest.fixture
def limited(caplog):
    caplog.set_level(logging.INFO, "flood")
    return LimitedLog(logging.getLogger("flood"))


def test_a_flood_is_cut_and_counted(limited, clock, caplog):
    for number in range(1000):
        limited.info("work", "call %d", number)
    limited.warning("vault", "quiet")
    assert [r.getMessage() for r in caplog.records] == [
        *(f"call {number}" for number in range(30)),
        "more than 30 records about work within 10 s: others are left out",
        "quiet",
    ]
    caplog.clear()
    clock.now += 10
    limited.info("work", "call again")
    assert [r.getMessage() for r in caplog.records] == [
        "970 records about work were left out",
        "call again",
    ]


def test_records_name_who_logged_them(limited, caplog):
    limited.info("work", "call")
    assert caplog.records[0].funcName == "test_records_name_who_logged_them"


def test_any_number_of_sources_costs_little(limited, clock):
    for number in range(5000):
        clock.now += 0.1
        limited.info(f"disp{number}", "call")
    assert len(limited._windows) <= 1024
