"""Terminals: what a person's keys and window do to a command, and how either side ends.

What comes is what the command wrote: the line discipline between is the kernel's.
"""

from __future__ import annotations

import os
import re
import signal
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from agent_wire import (
    CREDIT,
    DATA,
    EOF,
    EXIT,
    FAILED,
    RESIZE,
    SIGNAL,
    STOP,
    WINDOW,
    Wire,
)
from conditions import wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from agent_process import AgentProcess


def terminal(wire: Wire, line: str, size: str = "80x24") -> int:
    """Open a terminal; return its stream."""
    return wire.spawn(line, kind="terminal", source=size)


def read_until(wire: Wire, stream: int, text: bytes) -> bytes:
    """Return what the command wrote, when that text has come."""
    got = b""
    while text not in got:
        got += wire.expect(DATA, stream).payload
    return got


def resize(wire: Wire, stream: int, columns: int, rows: int) -> None:
    wire.send(RESIZE, 0, stream, struct.pack("<HH", columns, rows))


def ended(pid: int) -> bool:
    """Tell whether a process has ended."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # gone before or while it is read
        return True


def test_stdio_is_the_controlling_terminal_of_a_session(wire: Wire) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && tty && echo here > /dev/tty"
    result = wire.finish(terminal(wire, script))
    assert result.value == 0
    name, said = result.stdout.split()
    assert name.startswith(b"/dev/pts/")
    assert (said, result.stderr) == (b"here", b"")


def test_the_terminal_is_the_users_own(wire: Wire) -> None:
    result = wire.finish(terminal(wire, "stat -c %u $(tty); ls /proc/self/fd"))
    owner, *descriptors = result.stdout.split()
    assert int(owner) == os.getuid()
    assert descriptors == [b"0", b"1", b"2", b"3"]


def test_without_a_command_it_is_the_users_shell_as_a_login(wire: Wire) -> None:
    stream = terminal(wire, "")
    wire.write(stream, b'echo "<$0 $->"; exit 7\r')
    result = wire.finish(stream)
    assert (result.kind, result.value) == (0, 7)
    assert re.search(rb"<-sh \w*i\w*>", result.stdout)


@pytest.mark.parametrize("size", ["80x24", "1x1", "65535x65535"])
def test_the_size_is_there_from_the_beginning(wire: Wire, size: str) -> None:
    columns, _, rows = size.partition("x")
    result = wire.finish(terminal(wire, "stty size", size))
    assert result.stdout.decode().split() == [rows, columns]


def test_a_new_size_is_signalled(wire: Wire) -> None:
    script = "trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.02; done"
    stream = terminal(wire, script)
    read_until(wire, stream, b"ready")
    resize(wire, stream, 132, 43)
    result = wire.finish(stream)
    assert (result.stdout.split(), result.value) == ([b"43", b"132"], 3)


@pytest.mark.parametrize(
    "size", ["", "80", "80x", "x24", "0x24", "80x0", "65536x24", "80x24x", "-1x24", "a"]
)
def test_what_is_no_size_opens_nothing(wire: Wire, size: str) -> None:
    result = wire.finish(terminal(wire, "true", size))
    assert (result.kind, result.value) == (2, 126)
    assert result.text.startswith("it gets no terminal: ")


@pytest.mark.parametrize(
    ("kind", "size"),
    [("terminal", (0, 24)), ("terminal", (80, 0)), ("command", (80, 24))],
)
def test_no_size_or_no_terminal_breaks_the_protocol(
    agent: AgentProcess, kind: str, size: tuple[int, int]
) -> None:
    with agent.start() as wire:
        wire.hello()
        stream = wire.spawn("exec sleep 1000", kind=kind, source="80x24")
        resize(wire, stream, *size)
        assert "no terminal, or no size" in wire.expect(FAILED).payload.decode()
    assert (agent.process.returncode, agent.stderr) == (0, "")


def test_a_late_size_is_ignored(wire: Wire) -> None:
    stream = terminal(wire, "true")
    wire.finish(stream)
    resize(wire, stream, 80, 24)
    assert wire.run("echo on").stdout == b"on\n"


def test_the_interrupt_key_reaches_the_foreground(wire: Wire) -> None:
    stream = terminal(wire, "")
    wire.write(stream, b"sh -c 'echo rea''dy; exec sleep 1000'\r")
    read_until(wire, stream, b"ready")
    wire.write(stream, b"\x03")
    wire.write(stream, b"exit $?\r")
    assert wire.finish(stream).value == 128 + signal.SIGINT


def test_input_is_echoed_and_output_is_raw_bytes(wire: Wire) -> None:
    """The agent changes nothing of what a command writes."""
    stream = terminal(wire, "stty -opost; printf '\\033]0;x\\007\\377\\n'; read x")
    assert read_until(wire, stream, b"\n") == b"\x1b]0;x\x07\xff\n"
    wire.write(stream, b"abc\r")
    assert wire.finish(stream).stdout.startswith(b"abc")


def test_erasing_takes_a_character_not_a_byte(wire: Wire) -> None:
    stream = terminal(wire, "stty -echo; echo ready; read x; printf '<%s>' \"$x\"")
    read_until(wire, stream, b"ready")
    wire.write(stream, "aé\x7fb\r".encode())
    assert wire.finish(stream).stdout.split()[-1] == b"<ab>"


@pytest.mark.parametrize("size", [3_000, 200_000])
def test_all_output_comes_before_the_exit(wire: Wire, size: int) -> None:
    """Also what was on its way in the kernel, and though a child has it open yet."""
    script = f"stty -opost; sleep 1000 & head -c {size} /dev/zero; exit 5"
    result = wire.finish(terminal(wire, script))
    assert (len(result.stdout), result.value) == (size, 5)


def test_output_stops_at_the_credit_and_the_rest_comes_later(wire: Wire) -> None:
    stream = terminal(wire, "stty -opost; head -c 400000 /dev/zero")
    received = 0
    while received < WINDOW:
        received += len(wire.expect(DATA, stream).payload)
    assert wire.run("echo fast").stdout == b"fast\n"
    assert not any(got.stream == stream for got in wire.pending)
    wire.send(CREDIT, 1, stream, struct.pack("<I", WINDOW))
    assert received + len(wire.finish(stream).stdout) == 400_000


def test_one_that_writes_for_ever_in_the_background_does_not_delay_the_exit(
    wire: Wire,
) -> None:
    script = "(trap '' HUP; exec yes) & sleep 0.1; exit 4"
    assert wire.finish(terminal(wire, script)).value == 4


@pytest.mark.parametrize("kind", [EOF, STOP], ids=["input", "output"])
def test_a_host_that_goes_hangs_it_up(wire: Wire, kind: int) -> None:
    """As a line that drops: the shell and what runs in the foreground are told."""
    stream = terminal(wire, "")
    script = b"sh -c 'echo $$; trap \"exit 9\" HUP; while :; do sleep 0.02; done'\r"
    wire.write(stream, b"stty -echo\r" + script)
    child = 0
    while not child:
        words = wire.expect(DATA, stream).payload.split()
        child = next((int(w) for w in words if w.isdigit()), 0)
    wire.send(kind, kind == STOP, stream)
    result = wire.finish(stream)
    assert (result.kind, result.value) in [(1, signal.SIGHUP), (0, 129), (0, 9)]
    wait_until(lambda: ended(child), f"end of process {child}")


def test_a_guest_that_closes_it_is_a_host_that_reads_an_end(wire: Wire) -> None:
    """The session goes with its terminal, if it does not look after itself."""
    stream = terminal(wire, "printf last; exec <&- >&- 2>&-; sleep 1000; exit 3")
    assert read_until(wire, stream, b"last") == b"last"
    assert wire.expect(EOF, stream).channel == 1
    assert wire.expect(EXIT, stream).payload == bytes([1, signal.SIGHUP])


def test_a_signal_reaches_the_foreground_too(wire: Wire) -> None:
    """It is a process group of its own, which a shell that is killed leaves behind."""
    stream = terminal(wire, "")
    wire.write(stream, b"sh -c 'trap \"\" HUP; echo pid $$; exec sleep 1000'\r")
    got = b""
    while not (words := [w for w in got.split() if w.isdigit()]):
        got += wire.expect(DATA, stream).payload
    wire.send(SIGNAL, 0, stream, bytes([signal.SIGKILL]))
    result = wire.finish(stream)
    assert (result.kind, result.value) == (1, signal.SIGKILL)
    wait_until(lambda: ended(int(words[-1])), "end of the foreground")


def test_hello_ends_the_terminals_of_an_earlier_connection(wire: Wire) -> None:
    stream = terminal(wire, "echo $$; trap '' HUP; exec sleep 1000")
    pid = int(read_until(wire, stream, b"\n"))
    wire.hello()
    wire.last_stream = 0
    wait_until(lambda: ended(pid), f"end of process {pid}")


def test_input_that_nobody_reads_costs_a_window(wire: Wire) -> None:
    """What the kernel takes comes back as credit, what waits in the agent does not."""
    stream = terminal(wire, "stty raw -echo; echo ready; sleep 1000")
    read_until(wire, stream, b"ready")
    wire.write(stream, bytes(WINDOW))
    assert wire.run("echo on").stdout == b"on\n"
    wire.send(SIGNAL, 0, stream, bytes([signal.SIGKILL]))
    assert wire.finish(stream).kind == 1


@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    line=st.sampled_from(
        ["", "cat", "exec 0<&- 1>&- 2>&-", "yes | head -c 70000", "stty raw; exec cat"]
    ),
    steps=st.lists(
        st.sampled_from(
            [
                (DATA, 0, b"\x03"),
                (DATA, 0, b"echo x\r"),
                (DATA, 0, bytes(5000)),
                (DATA, 0, b"\x04"),
                (RESIZE, 0, b"\1\0\1\0"),
                (RESIZE, 0, b"\0\0\1\0"),
                (RESIZE, 1, b"\1\0\1\0"),
                (RESIZE, 0, b"\1\0\1"),
                (EOF, 0, b""),
                (STOP, 1, b""),
                (STOP, 2, b""),
                (CREDIT, 1, b"\0\0\1\0"),
                (SIGNAL, 0, b"\1"),
                (SIGNAL, 0, b"\x09"),
            ]
        ),
        max_size=12,
    ),
)
def test_no_order_of_frames_harms_the_agent(
    agent: AgentProcess, line: str, steps: list[tuple[int, int, bytes]]
) -> None:
    """Neither sanitizer complains, nothing leaks, and it ends when the host does."""
    with agent.start() as wire:
        wire.hello()
        stream = terminal(wire, line)
        try:
            for kind, channel, payload in steps:
                wire.send(kind, channel, stream, payload)
        except BrokenPipeError:
            pass
    assert (agent.process.returncode, agent.stderr) == (0, "")
