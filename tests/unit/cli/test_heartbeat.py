"""The sign of life of several tests at once."""

from __future__ import annotations

import io
import re
import sys
import threading

from conditions import wait_until

from qubes_itests.report.heartbeat import Heartbeat


def beating():
    return [t for t in threading.enumerate() if t.name == "heartbeat"]


def test_it_tells_of_all_that_runs_until_nothing_does():
    heartbeat = Heartbeat(io.StringIO(), lambda: "")
    heartbeat.start("one")
    heartbeat.start("two")
    assert re.fullmatch(r"one  \d\.\d s\ntwo  \d\.\d s", "\n".join(heartbeat._lines()))
    heartbeat.end("one")
    assert [line[:4] for line in heartbeat._lines()] == ["two "]
    assert len(beating()) == 1
    heartbeat.end("two")
    assert beating() == []


def test_it_is_silent_while_others_write_and_then_goes_on():
    heartbeat = Heartbeat(io.StringIO(), lambda: "words")
    heartbeat.start("one")
    with heartbeat.silent():
        assert beating() == []
    assert len(beating()) == 1
    assert heartbeat._lines()[-1].endswith("  words")
    heartbeat.stop()
    assert beating() == []


def test_it_leaves_the_streams_of_python_alone_while_it_draws():
    """They are pytest's, which captures what a test writes there."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    output = Terminal()
    streams = sys.stdout, sys.stderr
    heartbeat = Heartbeat(output, lambda: "words")
    heartbeat.start("one")
    try:
        wait_until(lambda: "words" in output.getvalue(), "live line")
        assert (sys.stdout, sys.stderr) == streams
    finally:
        heartbeat.stop()
