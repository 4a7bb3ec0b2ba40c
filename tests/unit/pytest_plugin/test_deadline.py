"""The deadline of a test: it stands still while somebody looks at the test."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from qubes_itests.pytest_plugin.deadline import Deadline

LIMIT = 0.3


def test_it_stands_still_until_the_last_of_those_who_look_has_gone():
    expired: list[str] = []
    deadline = Deadline(lambda _item: LIMIT, expired.append)
    one, other = deadline.stopped(), deadline.stopped()
    phase = deadline.pytest_runtest_setup(SimpleNamespace(nodeid="a::b"))
    # on the event loop of the run, while the test is in the main thread
    with ThreadPoolExecutor(1) as loop:
        loop.submit(one.__enter__).result()
        next(phase)
        loop.submit(other.__enter__).result()
        loop.submit(one.__exit__, None, None, None).result()
        time.sleep(3 * LIMIT)
        assert expired == []
        assert deadline.is_stopped
        loop.submit(other.__exit__, None, None, None).result()
    assert not deadline.is_stopped
    with pytest.raises(pytest.fail.Exception, match=r"no end within 0.3 s \(--timeout"):
        time.sleep(60)
    assert expired == ["a::b"]
    phase.close()
