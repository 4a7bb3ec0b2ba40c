"""The sign of life of a run."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import sys
import termios
import threading

import pytest
from conditions import wait_until

from qubes_itests.report.heartbeat import Heartbeat


def beating():
    return [t for t in threading.enumerate() if t.name == "heartbeat"]


def test_it_is_silent_while_others_write_and_then_goes_on():
    heartbeat = Heartbeat(io.StringIO(), lambda: "words")
    with heartbeat.silent():
        pass
    assert beating() == []
    heartbeat.start()
    with heartbeat.silent(), heartbeat.silent():
        assert beating() == []
    assert len(beating()) == 1
    heartbeat.stop()
    assert beating() == []


@pytest.fixture
def terminal():
    """Yield a stream to a terminal, and what reads its other end."""
    mine, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as output, os.fdopen(mine, "rb", 0) as shown:
        yield output, shown


def resize(output, columns):
    size = struct.pack("HHHH", 24, columns, 0, 0)
    fcntl.ioctl(output.fileno(), termios.TIOCSWINSZ, size)


def test_it_is_as_wide_as_the_terminal_and_follows_its_size(terminal):
    output, shown = terminal
    resize(output, 40)
    heartbeat = Heartbeat(output, lambda: "x" * 300)
    heartbeat.start()
    try:
        seen = shown.read(4096)
        assert seen.rpartition(b"\x1b[K")[2].decode() == "x" * 38 + "…"
        resize(output, 60)
        wide = "x" * 58 + "…"
        wait_until(lambda: wide.encode() in shown.read(4096), "a wider line")
        streams = sys.stdout, sys.stderr
        with heartbeat.silent():
            heartbeat.write("nothing")
        wait_until(lambda: wide.encode() in shown.read(4096), "the line again")
        heartbeat.write("a line of others")
        assert (sys.stdout, sys.stderr) == streams
    finally:
        heartbeat.stop()
    rest = b""
    while b"\r\x1b[Ka line of others\r\n" not in rest:
        rest += shown.read(4096)
    assert b"nothing" not in rest
    assert rest.endswith((b"\x1b[K", b"\n"))


def test_a_reader_that_has_gone_fails_nobody_who_reports():
    reader, writer = os.pipe()
    os.close(reader)
    output = os.fdopen(writer, "w")
    heartbeat = Heartbeat(output, str)
    heartbeat.start()
    heartbeat.write("a line")
    heartbeat.write("another")
    heartbeat.stop()
    with pytest.raises(BrokenPipeError):
        output.close()


def test_a_terminal_that_is_stopped_holds_up_nobody_who_reports(terminal):
    """Ctrl-S: the event loop reports, and must go on; Ctrl-Q shows what came."""
    output, shown = terminal
    heartbeat = Heartbeat(output, str)
    termios.tcflow(output.fileno(), termios.TCOOFF)
    heartbeat.start()
    try:
        for number in range(5000):
            heartbeat.write(f"line {number}.")
    finally:
        termios.tcflow(output.fileno(), termios.TCOON)
    ended = threading.Thread(target=heartbeat.stop)
    ended.start()
    seen = b""
    while b"line 999." not in seen:
        seen += shown.read(4096)
    ended.join(300)
    assert not ended.is_alive()
    assert b"line 0." in seen
    assert b"line 4999." not in seen
