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
        heartbeat.write("a line of others")
        assert (sys.stdout, sys.stderr) == streams
    finally:
        heartbeat.stop()
    rest = shown.read(4096)
    assert b"\r\x1b[Ka line of others\r\n" in rest
    assert b"nothing" not in rest
    assert rest.endswith((b"\x1b[K", b"\n"))


def test_a_reader_that_has_gone_fails_nobody_who_reports():
    reader, writer = os.pipe()
    os.close(reader)
    output = os.fdopen(writer, "w")
    Heartbeat(output, str).write("a line")
    with pytest.raises(BrokenPipeError):
        output.close()
