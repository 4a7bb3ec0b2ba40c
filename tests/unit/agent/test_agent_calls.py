"""Calls out of the guest: qrexec-client-vm, and what may ask the agent for one."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from agent_wire import (
    CALL,
    CREDIT,
    DATA,
    EOF,
    EXIT,
    STOP,
    WINDOW,
    Frame,
    Wire,
    strings,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from agent_process import AgentProcess

FIRST = 0x80000001


def call(agent: AgentProcess, *arguments: str) -> subprocess.Popen[bytes]:
    return agent.client("qrexec-client-vm", *arguments)


def answer(wire: Wire, stream: int, kind: int, value: int, text: bytes = b"") -> None:
    wire.send(EXIT, 0, stream, bytes([kind, value]) + text)


def collect(wire: Wire, stream: int) -> bytes:
    """Return a caller's input up to its end."""
    data = bytearray()
    while True:
        got = wire.receive()
        assert got
        if got.stream == stream and got.type == DATA:
            data += got.payload
            credit = struct.pack("<I", len(got.payload))
            wire.send(CREDIT, 0, stream, credit)
        elif got.stream == stream and got.type == EOF:
            return bytes(data)


def test_call_says_target_service_and_user(wire: Wire, agent: AgentProcess) -> None:
    with call(agent, "--", "work", "t.S+a") as client:
        asked = wire.expect(CALL, FIRST)
        target, service, user = asked.payload.decode().split("\0")[:3]
        assert (target, service) == ("work", "t.S+a")
        assert user in ("user", "root")
        answer(wire, FIRST, 0, 0)
        client.communicate(timeout=10)
        assert client.returncode == 0


def test_call_carries_data_both_ways(wire: Wire, agent: AgentProcess) -> None:
    sent, back = os.urandom(200_000), os.urandom(200_000)
    with call(agent, "@default", "t.S") as client:
        wire.expect(CALL, FIRST)
        wire.write(FIRST, back, 1)
        wire.send(EOF, 1, FIRST)
        assert client.stdin
        client.stdin.write(sent)
        client.stdin.close()
        client.stdin = None
        assert collect(wire, FIRST) == sent
        answer(wire, FIRST, 0, 9)
        assert client.communicate(timeout=10) == (back, b"")
        assert client.returncode == 9


def test_output_before_the_exit_reaches_a_slow_caller(
    wire: Wire, agent: AgentProcess
) -> None:
    """The status is told after the last byte, though the host has long ended."""
    with call(agent, "work", "t.S") as client:
        wire.expect(CALL, FIRST)
        wire.write(FIRST, bytes(WINDOW), 1)
        answer(wire, FIRST, 0, 3)
        assert wire.run("echo meanwhile").stdout
        assert len(client.communicate(timeout=10)[0]) == WINDOW
        assert client.returncode == 3


@pytest.mark.parametrize(
    ("kind", "value", "status"), [(2, 126, 126), (2, 127, 127), (1, 15, 143), (0, 5, 5)]
)
def test_status_of_the_call_is_the_clients(
    wire: Wire, agent: AgentProcess, kind: int, value: int, status: int
) -> None:
    with call(agent, "work", "t.S") as client:
        wire.expect(CALL, FIRST)
        answer(wire, FIRST, kind, value, b"because")
        error = client.communicate(timeout=10)[1]
        assert client.returncode == status
        assert b"because" in error


def test_ended_call_does_not_wait_for_more_input(
    wire: Wire, agent: AgentProcess
) -> None:
    with call(agent, "work", "t.S") as client:
        wire.expect(CALL, FIRST)
        answer(wire, FIRST, 0, 0)
        assert client.wait(timeout=10) == 0


def test_local_command_talks_to_the_service(wire: Wire, agent: AgentProcess) -> None:
    """Its stdio is the call; what was the client's is in SAVED_FD_0 and _1."""
    script = "read got; echo answer $got; cat <&$SAVED_FD_0 >&$SAVED_FD_1"
    with call(agent, "-tT", "--buffer-size=1", "w", "t.S", "sh", "-c", script) as local:
        wire.expect(CALL, FIRST)
        wire.write(FIRST, b"question\n", 1)
        assert wire.expect(DATA, FIRST).payload == b"answer question\n"
        answer(wire, FIRST, 0, 6)
        assert local.communicate(b"saved", timeout=10)[0] == b"saved"
        assert local.returncode == 6


def test_local_command_that_does_not_exist(wire: Wire, agent: AgentProcess) -> None:
    with call(agent, "work", "t.S", "/does/not/exist") as client:
        wire.expect(CALL, FIRST)
        assert collect(wire, FIRST) == b""
        answer(wire, FIRST, 0, 0)
        assert b"/does/not/exist" in client.communicate(timeout=10)[1]


def test_caller_that_dies_is_an_end_and_a_stop(wire: Wire, agent: AgentProcess) -> None:
    with call(agent, "work", "t.S") as client:
        wire.expect(CALL, FIRST)
        client.kill()
        seen = set()
        while seen != {EOF, STOP}:
            got = wire.receive()
            assert got
            seen.add(got.type)
        answer(wire, FIRST, 0, 0)
    assert wire.run("true").value == 0


def test_host_that_stops_reading_is_a_broken_pipe(
    wire: Wire, agent: AgentProcess
) -> None:
    script = "exec yes"
    with call(agent, "work", "t.S", "sh", "-c", script) as client:
        wire.expect(CALL, FIRST)
        wire.expect(DATA, FIRST)
        wire.send(STOP, 0, FIRST)
        answer(wire, FIRST, 0, 2)
        assert client.wait(timeout=10) == 2


def test_host_that_disconnects_ends_calls(wire: Wire, agent: AgentProcess) -> None:
    with call(agent, "work", "t.S") as client:
        wire.expect(CALL, FIRST)
        wire.hello()
        assert client.wait(timeout=10) == 126


def test_without_a_host_calls_are_refused(agent: AgentProcess) -> None:
    with agent.start() as wire:
        while not agent.socket.exists():
            assert agent.process.poll() is None
        with call(agent, "work", "t.S") as client:
            assert b"no host" in client.communicate(timeout=10)[1]
        assert client.returncode == 126
        assert isinstance(wire, Wire)


@pytest.mark.parametrize("arguments", [[], ["work"], ["--nonsense", "work", "t.S"]])
def test_wrong_usage_is_told(agent: AgentProcess, arguments: list[str]) -> None:
    with call(agent, *arguments) as client:
        assert b"usage" in client.communicate(timeout=10)[1]
        assert client.returncode == 125


def test_missing_agent_is_told(agent: AgentProcess) -> None:
    with call(agent, "--agent-socket=/does/not/exist", "work", "t.S") as client:
        assert b"/does/not/exist" in client.communicate(timeout=10)[1]
        assert client.returncode == 125


@contextmanager
def asking(agent: AgentProcess) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(10)
        client.connect(str(agent.socket))
        yield client


@pytest.mark.parametrize(
    "request_bytes",
    [b"x", b"work\0", b"work\0t.S", b"\0t.S\0", b"work\0t.S\0more\0", bytes(600)],
)
def test_malformed_requests_are_refused(
    wire: Wire, agent: AgentProcess, request_bytes: bytes
) -> None:
    pair = socket.socketpair()
    with asking(agent) as client, pair[0], pair[1]:
        socket.send_fds(client, [request_bytes], [pair[1].fileno()])
        assert client.recv(600)[:1] == bytes([126])
    assert wire.run("true").value == 0


def test_request_must_bring_a_stream_socket(wire: Wire, agent: AgentProcess) -> None:
    with asking(agent) as client:
        client.send(strings("work", "t.S"))
        assert client.recv(600)[:1] == bytes([126])
    with asking(agent) as client:
        socket.send_fds(client, [strings("work", "t.S")], [1])
        assert client.recv(600)[:1] == bytes([126])
    assert wire.run("true").value == 0


def test_no_more_than_128_calls_at_once(wire: Wire, agent: AgentProcess) -> None:
    clients = []
    for number in range(129):
        pair = socket.socketpair()
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        clients += [client, *pair]
        client.connect(str(agent.socket))
        socket.send_fds(client, [strings("work", "t.S")], [pair[1].fileno()])
        if number < 128:
            wire.expect(CALL, FIRST + number)
    assert client.recv(600)[:1] == bytes([126])
    for each in clients:
        each.close()
    for number in range(128):
        answer(wire, FIRST + number, 0, 0)
    assert wire.run("true").value == 0


def test_idle_clients_do_not_hold_up_others(wire: Wire, agent: AgentProcess) -> None:
    with asking(agent), call(agent, "work", "t.S") as client:
        assert isinstance(wire.expect(CALL, FIRST), Frame)
        answer(wire, FIRST, 0, 0)
        assert client.wait(timeout=10) == 0
