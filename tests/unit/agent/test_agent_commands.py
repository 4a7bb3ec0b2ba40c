"""Commands: their stdio, how they end, and what they find around them."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import termios
from typing import TYPE_CHECKING

import pytest
from agent_wire import (
    CREDIT,
    DATA,
    EOF,
    EXIT,
    LEAVE,
    SIGNAL,
    SPAWN,
    STOP,
    WINDOW,
    Wire,
    frame,
    pour,
    strings,
)
from conditions import wait_until

if TYPE_CHECKING:
    from agent_process import AgentProcess


def test_output_and_errors_are_told_apart(wire: Wire) -> None:
    result = wire.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")


@pytest.mark.parametrize("status", [0, 1, 126, 127, 255])
def test_exit_status_is_the_commands_own(wire: Wire, status: int) -> None:
    result = wire.run(f"exit {status}")
    assert (result.kind, result.value) == (0, status)


def test_death_by_a_signal_is_no_exit_status(wire: Wire) -> None:
    result = wire.run("kill -9 $$")
    assert (result.kind, result.value) == (1, signal.SIGKILL)


@pytest.mark.parametrize(
    ("user", "value", "text"),
    [("nobody-such", 127, "no user"), ("noshell", 127, "/does/not/exist")],
)
def test_what_cannot_start_says_why(
    wire: Wire, user: str, value: int, text: str
) -> None:
    result = wire.run("true", user=user)
    assert (result.kind, result.value) == (2, value)
    assert text in result.text


def test_environment_is_a_logins(wire: Wire, agent: AgentProcess) -> None:
    script = 'echo "$0 $HOME $USER $LOGNAME $SHELL $XDG_RUNTIME_DIR $EXTRA"; pwd; umask'
    result = wire.run(script, environment=["EXTRA=1=2", "LOGNAME=other", "bad"])
    runtime = agent.root / f"run/user/{os.getuid()}"
    assert result.stdout.decode().splitlines()[:2] == [
        f"-sh {agent.home} user other /bin/sh {runtime} 1=2",
        str(agent.home),
    ]
    assert runtime.stat().st_mode & 0o777 == 0o700


def test_command_starts_with_no_signal_blocked_or_ignored(wire: Wire) -> None:
    result = wire.run("grep -E 'Sig(Blk|Ign)' /proc/self/status")
    assert set(result.stdout.decode().split()) == {
        "SigBlk:",
        "SigIgn:",
        "0000000000000000",
    }


def test_signals_that_the_parent_of_the_agent_ignores_are_not_ignored(
    agent: AgentProcess,
) -> None:
    """As below nohup, and in the background of a shell script."""
    ignoring = "trap '' HUP INT QUIT TERM CHLD USR1; exec \"$@\""
    with agent.start("sh", "-c", ignoring, "sh") as wire:
        wire.hello()
        result = wire.run("grep SigIgn /proc/self/status; kill -HUP $$; echo alive")
        assert result.stdout.split() == [b"SigIgn:", b"0000000000000000"]
        assert (result.kind, result.value) == (1, signal.SIGHUP)
    assert (agent.process.returncode, agent.stderr) == (0, "")


def test_command_has_no_descriptor_but_its_stdio(wire: Wire) -> None:
    """Nothing of the agent leaks: 3 is the directory that ls reads."""
    assert wire.run("ls /proc/self/fd").stdout.split() == [b"0", b"1", b"2", b"3"]


def test_stdin_and_stderr_of_commands_are_pipes(wire: Wire) -> None:
    """So they can be opened by name."""
    result = wire.run("cat /dev/stdin; echo error > /dev/stderr", b"through names")
    assert (result.stdout, result.stderr) == (b"through names", b"error\n")


def test_stdout_is_no_pipe_that_a_splice_could_lock(wire: Wire) -> None:
    """A writer that splices keeps a pipe locked while it waits; the agent would too."""
    script = "test -S /proc/self/fd/1 && test -p /proc/self/fd/0"
    assert wire.run(f"/bin/sh -c '{script}'").value == 0


def test_input_reaches_its_end(wire: Wire) -> None:
    data = os.urandom(200_000)
    assert wire.run("cat", data).stdout == data


def test_big_streams_flow_both_ways_at_once(wire: Wire) -> None:
    assert pour(wire, "cat", 16 << 20).value == 0


def test_frames_may_come_byte_by_byte(wire: Wire) -> None:
    request = strings("command", "", "cat", "")
    stream = frame(SPAWN, 0, 1, request) + frame(DATA, 0, 1, b"abc") + frame(EOF, 0, 1)
    for byte in stream:
        wire.sock.sendall(bytes([byte]))
    assert wire.finish(1).stdout == b"abc"


def test_many_frames_may_come_at_once(wire: Wire) -> None:
    wire.sock.sendall(
        b"".join(
            frame(SPAWN, 0, i, strings("command", "", f"exit {i}", ""))
            for i in range(1, 51)
        )
    )
    exits = {}
    while len(exits) < 50:
        got = wire.receive()
        assert got
        if got.type == EXIT:
            exits[got.stream] = got.payload[1]
    assert exits == {i: i for i in range(1, 51)}


def test_output_stops_at_the_credit_and_others_go_on(wire: Wire) -> None:
    """A reader that takes nothing gets one window, and holds up nobody."""
    slow = wire.spawn("head -c 1000000 /dev/zero")
    received = 0
    while received < WINDOW:
        received += len(wire.expect(DATA, slow).payload)
    assert wire.run("echo fast").stdout == b"fast\n"
    assert not any(got.stream == slow for got in wire.pending)
    wire.send(CREDIT, 1, slow, struct.pack("<I", 1_000_000))
    assert len(wire.finish(slow).stdout) == 1_000_000 - received


def test_ended_command_still_sends_all_its_output(wire: Wire) -> None:
    """What exceeds the credit waits for it, though the command has ended."""
    stream = wire.spawn("head -c 400000 /dev/zero")
    received = 0
    while received < WINDOW:
        received += len(wire.expect(DATA, stream).payload)
    assert wire.run("sleep 0.1").value == 0
    wire.send(CREDIT, 1, stream, struct.pack("<I", WINDOW))
    result = wire.finish(stream)
    assert received + len(result.stdout) == 400_000


def test_input_credit_comes_back_as_the_command_reads(wire: Wire) -> None:
    stream = wire.spawn("cat >/dev/null; echo end")
    wire.write(stream, bytes(WINDOW))
    returned = 0
    while returned < WINDOW // 2:
        returned += struct.unpack("<I", wire.expect(CREDIT, stream).payload)[0]
    wire.send(EOF, 0, stream)
    assert wire.finish(stream).stdout == b"end\n"


def test_command_that_closes_its_input_stops_it(wire: Wire) -> None:
    stream = wire.spawn("exec 0<&-; sleep 9000")
    assert wire.expect(STOP, stream).channel == 0
    wire.write(stream, b"dropped")
    wire.send(SIGNAL, 0, stream, bytes([signal.SIGTERM]))
    assert wire.finish(stream).value == signal.SIGTERM


def test_stopped_output_is_a_broken_pipe(wire: Wire) -> None:
    """Be the writer writing, or waiting for room, where a socket sends no signal."""
    stream = wire.spawn("exec yes")
    wire.expect(DATA, stream)
    wire.send(STOP, 1, stream)
    result = wire.finish(stream)
    killed = (result.kind, result.value) == (1, signal.SIGPIPE)
    assert killed or b"Broken pipe" in result.stderr


def ended(wire: Wire, pid: int) -> bool:
    """Tell whether a process has ended: a signal that was sent takes its time."""
    state = wire.run(f"cat /proc/{pid}/stat 2>/dev/null").stdout
    return not state or b") Z " in state


def test_signal_reaches_the_whole_group(wire: Wire) -> None:
    stream = wire.spawn("sleep 9000 & echo $!; wait")
    child = int(wire.expect(DATA, stream).payload)
    wire.send(SIGNAL, 0, stream, bytes([signal.SIGKILL]))
    assert wire.finish(stream).kind == 1
    wait_until(lambda: ended(wire, child), f"end of process {child}")


def test_background_process_does_not_delay_the_exit(wire: Wire) -> None:
    """It holds stdout open; when it writes later, its pipe is broken."""
    script = "(trap 'exit' TERM; sleep 9000 & wait; echo late) & echo $!"
    result = wire.run(script)
    assert result.value == 0
    wire.run(f"kill {result.stdout.decode()}")


def test_eof_precedes_exit_on_both_outputs(wire: Wire) -> None:
    stream = wire.spawn("true")
    seen = []
    while not seen or seen[-1][0] != EXIT:
        got = wire.receive()
        assert got
        assert got.stream == stream
        seen.append((got.type, got.channel))
    assert sorted(set(seen[:-1]) - {(STOP, 0)}) == [(EOF, 1), (EOF, 2)]


def test_late_frames_for_an_ended_stream_are_ignored(wire: Wire) -> None:
    wire.run("true")
    wire.write(1, b"late")
    wire.send(EOF, 0, 1)
    wire.send(STOP, 1, 1)
    wire.send(SIGNAL, 0, 1, b"\x0f")
    wire.send(CREDIT, 1, 1, struct.pack("<I", 1))
    assert wire.run("echo on").stdout == b"on\n"


def test_no_more_than_128_at_once(wire: Wire) -> None:
    held = [wire.spawn("read line; exit 7") for _ in range(128)]
    refused = wire.run("true")
    assert (refused.kind, refused.value) == (2, 126)
    assert refused.text == "too many at once"
    for stream in held:
        wire.send(EOF, 0, stream)
        assert wire.finish(stream).value == 7
    assert wire.run("true").kind == 0


def test_hello_kills_what_an_earlier_connection_left(wire: Wire) -> None:
    stream = wire.spawn("echo $$; sleep 9000")
    pid = int(wire.expect(DATA, stream).payload)
    wire.hello()
    wire.last_stream = 0
    wait_until(lambda: ended(wire, pid), f"end of process {pid}")


def test_what_is_to_be_left_outlives_the_connection_once(wire: Wire) -> None:
    """It waits for its input as before, and is no stream any more."""
    stream = wire.spawn("echo $$; read line; sleep 9000")
    pid = int(wire.expect(DATA, stream).payload)
    assert wire.control(LEAVE, b"\0") is None
    assert wire.control(LEAVE, b"\1") is None
    wire.hello()
    wire.last_stream = 0
    other = wire.spawn("echo $$; sleep 9000")
    second = int(wire.expect(DATA, other).payload)
    wire.hello()
    wire.last_stream = 0
    wait_until(lambda: ended(wire, second), f"end of process {second}")
    assert not ended(wire, pid)
    # when it has ended there is as much room as before
    assert wire.run(f"kill {pid}").value == 0
    wait_until(lambda: ended(wire, pid), f"end of process {pid}")
    held = [wire.spawn("read line") for _ in range(128)]
    for each in held:
        wire.send(EOF, 0, each)
        assert wire.finish(each).kind == 0


def test_host_that_reads_late_loses_nothing(wire: Wire) -> None:
    """The agent waits with a full port, and memory stays what it is."""
    streams = [wire.spawn("head -c 250000 /dev/zero") for _ in range(40)]
    total = dict.fromkeys(streams, 0)
    done = 0
    while done < len(streams):
        got = wire.receive()
        assert got
        if got.type == DATA:
            total[got.stream] += len(got.payload)
        done += got.type == EXIT
    assert set(total.values()) == {250_000}


def pending(wire: Wire) -> int:
    """Return how many bytes wait to be read, once the agent has stopped writing."""
    size = bytearray(4)
    fcntl.ioctl(wire.sock, termios.FIONREAD, size)
    return int.from_bytes(size, "little")


def test_host_that_goes_without_reading_is_noticed(agent: AgentProcess) -> None:
    """Though the port is full then: the agent waits for room in it."""
    with agent.start() as wire:
        wire.hello()
        for _ in range(60):
            wire.spawn("exec yes")
        before = -1
        while before != (before := pending(wire)):
            select.select([], [], [], 0.2)
    assert (agent.process.returncode, agent.stderr) == (0, "")
