"""What the agent does with frames that break the protocol: it ends, cleanly."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from agent_wire import (
    CLOCK,
    CREDIT,
    DATA,
    DB_REMOVE,
    DB_WRITE,
    DISK,
    ENTER,
    EOF,
    EXIT,
    FAILED,
    HELLO,
    LEAVE,
    POWER_OFF,
    RESIZE,
    SIGNAL,
    SPAWN,
    STOP,
    WINDOW,
    Wire,
    frame,
    strings,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from agent_process import AgentProcess

SLEEP = frame(SPAWN, 0, 1, strings("command", "", "exec sleep 9000", ""))
BROKEN = {
    "long frame": struct.pack("<BBHI", DATA, 0, 32761, 1),
    "unknown control frame": frame(0x42),
    "unknown stream frame": SLEEP + frame(0x42, 0, 1),
    "HELLO too short": frame(HELLO, payload=b"1234"),
    "POWER_OFF without an argument": frame(POWER_OFF),
    "a short time": frame(CLOCK, payload=b"1234567"),
    "strings without an end": frame(DB_WRITE, payload=b"/a\0b"),
    "SPAWN without an end": frame(SPAWN, 0, 1, b"command"),
    "SPAWN of stream 0": frame(SPAWN, 0, 0, strings("command", "", "true", "")),
    "SPAWN of a guest's number": frame(SPAWN, 0, 0x80000001, b""),
    "SPAWN twice": SLEEP + SLEEP,
    "SPAWN without a payload": frame(SPAWN, 0, 1),
    "DATA for no stream": frame(DATA, 0, 5, b"x"),
    "EOF for no stream": frame(EOF, 0, 5),
    "EXIT for no call": frame(EXIT, 0, 0x80000001, b"\0\0"),
    "DATA on stdout": SLEEP + frame(DATA, 1, 1, b"x"),
    "empty DATA": SLEEP + frame(DATA, 0, 1),
    "DATA after EOF": SLEEP + frame(EOF, 0, 1) + frame(DATA, 0, 1, b"x"),
    "EOF twice": SLEEP + frame(EOF, 0, 1) * 2,
    "EOF with a payload": SLEEP + frame(EOF, 0, 1, b"x"),
    "DATA beyond the credit": SLEEP + frame(DATA, 0, 1, bytes(32760)) * 20,
    "CREDIT on stdin": SLEEP + frame(CREDIT, 0, 1, b"\1\0\0\0"),
    "CREDIT too short": SLEEP + frame(CREDIT, 1, 1, b"\1"),
    "CREDIT too great": SLEEP + frame(CREDIT, 1, 1, struct.pack("<I", 1 << 31)),
    "CREDIT beyond four windows": SLEEP
    + frame(CREDIT, 1, 1, struct.pack("<I", 3 * WINDOW + 1)),
    "STOP of stdin": SLEEP + frame(STOP, 0, 1),
    "STOP of channel 3": SLEEP + frame(STOP, 3, 1),
    "SIGNAL without a number": SLEEP + frame(SIGNAL, 0, 1),
    "SIGNAL 65": SLEEP + frame(SIGNAL, 0, 1, b"\x41"),
    "RESIZE of a command": SLEEP + frame(RESIZE, 0, 1, b"\1\0\1\0"),
    "RESIZE too short": SLEEP + frame(RESIZE, 0, 1, b"\1\0\1"),
    "EXIT of a command": SLEEP + frame(EXIT, 0, 1, b"\0\0"),
}


@pytest.mark.parametrize("garbage", BROKEN.values(), ids=BROKEN)
def test_broken_rule_ends_the_connection(agent: AgentProcess, garbage: bytes) -> None:
    """The rule is named, commands are killed, and nothing leaks."""
    with agent.start() as wire:
        wire.hello()
        wire.sock.sendall(garbage)
        reason = wire.expect(FAILED).payload.decode()
        assert reason.startswith("the host broke the protocol: ")
    assert (agent.process.returncode, agent.stderr) == (0, "")


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (2, 1)], ids=str)
def test_types_that_are_not_the_hosts_are_unknown(
    agent: AgentProcess, place: tuple[int, int]
) -> None:
    """Each of them, on the control stream as on one that is open, empty or not."""
    ours = {HELLO, ENTER, DB_WRITE, DB_REMOVE, POWER_OFF, CLOCK, DISK, LEAVE}
    ours |= {SPAWN, DATA, EOF, STOP, CREDIT, SIGNAL, EXIT, RESIZE}
    with agent.start() as wire:
        for kind in sorted(set(range(256)) - ours):
            wire.hello()
            for payload in (b"", b"\1\0\0\0"):
                wire.sock.sendall(SLEEP + frame(kind, *place, payload))
                reason = wire.expect(FAILED).payload.decode()
                assert reason.endswith("its type is unknown, or not for this stream")
                wire.hello()
    assert (agent.process.returncode, agent.stderr) == (0, "")


def test_input_after_a_broken_rule_is_dropped(agent: AgentProcess) -> None:
    with agent.start() as wire:
        wire.hello()
        wire.sock.sendall(frame(0x42) + SLEEP + b"\xff" * 100_000)
        wire.expect(FAILED)
    assert (agent.process.returncode, agent.stderr) == (0, "")


def test_nothing_is_answered_before_hello(agent: AgentProcess) -> None:
    with agent.start() as wire:
        wire.sock.sendall(SLEEP)
        wire.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            wire.sock.recv(1)
    assert (agent.process.returncode, agent.stderr) == (0, "")


def test_exactly_the_credit_is_accepted(wire: Wire) -> None:
    stream = wire.spawn("sleep 0.2; wc -c")
    wire.write(stream, bytes(WINDOW))
    wire.send(EOF, 0, stream)
    assert int(wire.finish(stream).stdout) == WINDOW


def test_there_is_no_stage_two_outside_a_guest(wire: Wire) -> None:
    assert "no stage two" in (wire.control(ENTER, strings("name=x")) or "")


def test_disconnected_host_ends_the_agent_in_the_middle_of_a_frame(
    agent: AgentProcess,
) -> None:
    with agent.start() as wire:
        wire.hello()
        wire.sock.sendall((SLEEP + frame(DATA, 0, 1, b"abc"))[:-2])
    assert (agent.process.returncode, agent.stderr) == (0, "")


COMMANDS = st.sampled_from(
    ["true", "exec cat", "yes | head -c 70000", "echo x >&2; kill -9 $$", "exec 0<&-"]
)
#: Where an agent of a test ends at once, as it should.
OTHER_TYPES = st.integers(0, 255).filter(lambda kind: kind != POWER_OFF)
SPAWNS = st.builds(
    lambda number, kind, line, rest: frame(
        SPAWN, 0, number, strings(kind, "", line, "80x24", *rest)
    ),
    st.integers(1, 6),
    st.sampled_from(["command", "service", "terminal", "x"]),
    COMMANDS | st.text("ab+./-\n", max_size=6),
    st.lists(st.text("A=b", max_size=4), max_size=3),
)
FRAMES = st.builds(
    frame,
    OTHER_TYPES | st.sampled_from([DATA, EOF, STOP, CREDIT, SIGNAL, EXIT, RESIZE]),
    st.integers(0, 3),
    st.sampled_from([0, 1, 2, 3, 0x80000001]),
    st.binary(max_size=40) | st.sampled_from([b"\0\0\1\0", bytes(3000)]),
)


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    parts=st.lists(SPAWNS | FRAMES, max_size=12),
    tail=st.binary(max_size=60),
    step=st.sampled_from([7, 4096]),
)
def test_no_frames_whatever_harm_the_agent(
    agent: AgentProcess, parts: list[bytes], tail: bytes, step: int
) -> None:
    """Neither sanitizer complains, nothing leaks, and it ends when the host does."""
    data = b"".join(parts) + tail
    with agent.start() as wire:
        wire.hello()
        try:
            for start in range(0, len(data), step):
                wire.sock.sendall(data[start : start + step])
        except BrokenPipeError:
            pass
    assert agent.process.returncode == 0
    assert agent.stderr == ""
