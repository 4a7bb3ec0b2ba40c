"""Calls out of the guest: qrexec-client-vm, and what may ask the agent for one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
import struct
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
    Wire,
    strings,
)

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from agent_process import AgentProcess

FIRST = 0x80000001
REQUEST = strings("work", "t.S")


def call(agent: AgentProcess, *arguments: str) -> subprocess.Popen[bytes]:
    return agent.client("qrexec-client-vm", *arguments)


def call_after(
    wire: Wire, agent: AgentProcess, *arguments: str
) -> subprocess.Popen[bytes]:
    """Call when the first call has been made."""
    wire.expect(CALL, FIRST)
    return call(agent, *arguments)


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
        client.communicate(timeout=300)
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
        assert client.communicate(timeout=300) == (back, b"")
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
        assert len(client.communicate(timeout=300)[0]) == WINDOW
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
        error = client.communicate(timeout=300)[1]
        assert client.returncode == status
        assert b"because" in error


def test_ended_call_does_not_wait_for_more_input(
    wire: Wire, agent: AgentProcess
) -> None:
    with call(agent, "work", "t.S") as client:
        wire.expect(CALL, FIRST)
        answer(wire, FIRST, 0, 0)
        assert client.wait(timeout=300) == 0


def test_output_ends_while_there_may_be_more_input(
    wire: Wire, agent: AgentProcess
) -> None:
    with call(agent, "work", "t.S") as client:
        wire.expect(CALL, FIRST)
        wire.write(FIRST, b"all", 1)
        wire.send(EOF, 1, FIRST)
        assert client.stdout
        assert select.select([client.stdout], [], [], 300)[0]
        assert client.stdout.read() == b"all"
        assert client.stdin
        client.stdin.write(b"more")
        client.stdin.close()
        client.stdin = None
        assert collect(wire, FIRST) == b"more"
        answer(wire, FIRST, 0, 0)


def test_local_command_talks_to_the_service(wire: Wire, agent: AgentProcess) -> None:
    """Its stdio is the call; what was the client's is in SAVED_FD_0 and _1."""
    script = "read got; echo answer $got; cat <&$SAVED_FD_0 >&$SAVED_FD_1"
    with call(agent, "-tT", "--buffer-size=1", "w", "t.S", "sh", "-c", script) as local:
        wire.expect(CALL, FIRST)
        wire.write(FIRST, b"question\n", 1)
        assert wire.expect(DATA, FIRST).payload == b"answer question\n"
        answer(wire, FIRST, 0, 6)
        assert local.communicate(b"saved", timeout=300)[0] == b"saved"
        assert local.returncode == 6


def test_local_command_may_have_its_output_on_its_stdin(
    wire: Wire, agent: AgentProcess
) -> None:
    """One of two that run at once: it is told apart."""
    script = "kill -USR1 $QREXEC_AGENT_PID; echo hello >&0; read x; echo got $x >&0"
    with (
        call(agent, "work", "t.S", "sh", "-c", "read x; echo $x") as other,
        call_after(wire, agent, "work", "t.S", "sh", "-c", script) as client,
    ):
        wire.expect(CALL, FIRST + 1)
        assert wire.expect(DATA, FIRST + 1).payload == b"hello\n"
        wire.write(FIRST + 1, b"stdin\n", 1)
        wire.send(EOF, 1, FIRST + 1)
        assert collect(wire, FIRST + 1) == b"got stdin\n"
        wire.write(FIRST, b"as before\n", 1)
        assert collect(wire, FIRST) == b"as before\n"
        answer(wire, FIRST, 0, 0)
        answer(wire, FIRST + 1, 0, 5)
        assert client.wait(timeout=300) == 5
        assert other.wait(timeout=300) == 0


def test_local_command_may_close_its_output_alone(
    wire: Wire, agent: AgentProcess
) -> None:
    """The service sees the end of it, and what it sends then still arrives."""
    script = "echo ask; exec >&-; cat >&$SAVED_FD_1"
    with call(agent, "work", "t.S", "sh", "-c", script) as client:
        wire.expect(CALL, FIRST)
        assert collect(wire, FIRST) == b"ask\n"
        wire.write(FIRST, b"answer", 1)
        answer(wire, FIRST, 0, 4)
        assert client.communicate(timeout=300)[0] == b"answer"
        assert client.returncode == 4


def test_local_command_may_close_its_input_alone(
    wire: Wire, agent: AgentProcess
) -> None:
    with call(agent, "work", "t.S", "sh", "-c", "exec <&-; cat <&$SAVED_FD_0") as local:
        wire.expect(CALL, FIRST)
        assert wire.expect(STOP, FIRST).channel == 1
        assert local.stdin
        local.stdin.write(b"on")
        local.stdin.close()
        assert collect(wire, FIRST) == b"on"
        answer(wire, FIRST, 0, 0)


def test_local_command_that_does_not_exist(wire: Wire, agent: AgentProcess) -> None:
    with call(agent, "work", "t.S", "/does/not/exist") as client:
        wire.expect(CALL, FIRST)
        assert collect(wire, FIRST) == b""
        answer(wire, FIRST, 0, 0)
        assert b"/does/not/exist" in client.communicate(timeout=300)[1]


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
        assert client.wait(timeout=300) == 2


def test_host_that_disconnects_ends_calls(wire: Wire, agent: AgentProcess) -> None:
    with call(agent, "work", "t.S") as client:
        wire.expect(CALL, FIRST)
        wire.hello()
        assert client.wait(timeout=300) == 126


def test_without_a_host_calls_are_refused(agent: AgentProcess) -> None:
    with agent.start() as wire:
        while not agent.socket.exists():
            assert agent.process.poll() is None
        with call(agent, "work", "t.S") as client:
            assert b"no host" in client.communicate(timeout=300)[1]
        assert client.returncode == 126
        assert isinstance(wire, Wire)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["work"],
        ["--nonsense", "work", "t.S"],
        ["-p", "a", "--prefix-data=b", "work", "t.S"],
        ["--use-stdin-socket", "work", "t.S"],  # it is a pipe
        ["--use-stdin-socket", "work", "t.S", "true"],
    ],
)
def test_wrong_usage_is_told(agent: AgentProcess, arguments: list[str]) -> None:
    with call(agent, *arguments) as client:
        assert b"usage" in client.communicate(timeout=300)[1]
        assert client.returncode == 2


def test_help_is_no_error(agent: AgentProcess) -> None:
    with call(agent, "--help") as client:
        out, error = client.communicate(timeout=300)
        assert b"--prefix-data" in out
        assert (client.returncode, error) == (0, b"")


def test_keywords_are_written_in_the_old_way_too(
    wire: Wire, agent: AgentProcess
) -> None:
    with call(agent, "$dispvm:work", "t.S"):
        assert wire.expect(CALL, FIRST).payload.startswith(b"@dispvm:work\0")
        answer(wire, FIRST, 0, 0)


@pytest.mark.parametrize("local", [[], ["cat"]])
def test_prefix_comes_before_all_input(
    wire: Wire, agent: AgentProcess, local: list[str]
) -> None:
    with call(agent, "-p", "first", "work", "t.S", *local) as client:
        wire.expect(CALL, FIRST)
        if local:
            wire.write(FIRST, b" second", 1)
            wire.send(EOF, 1, FIRST)
        else:
            assert client.stdin
            client.stdin.write(b" second")
            client.stdin.close()
            client.stdin = None
        assert collect(wire, FIRST) == b"first second"
        answer(wire, FIRST, 0, 0)
        client.communicate(timeout=300)


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ("-t", b"a\t_[1m__\n"),
        ("--no-filter-escape-chars-stdout", b"a\t\x1b[1m\xff\0\n"),
    ],
)
def test_bytes_that_command_a_terminal_are_replaced(
    wire: Wire, agent: AgentProcess, option: str, shown: bytes
) -> None:
    with call(agent, option, "work", "t.S") as client:
        wire.expect(CALL, FIRST)
        wire.write(FIRST, b"a\t\x1b[1m\xff\0\n", 1)
        answer(wire, FIRST, 0, 0)
        assert client.communicate(timeout=300)[0] == shown


def test_stdin_may_be_a_socket_for_both_ways(wire: Wire, agent: AgentProcess) -> None:
    ours, theirs = socket.socketpair()
    with (
        ours,
        agent.client(
            "qrexec-client-vm", "--use-stdin-socket", "work", "t.S", stdin=theirs
        ),
    ):
        theirs.close()
        wire.expect(CALL, FIRST)
        ours.sendall(b"question")
        ours.shutdown(socket.SHUT_WR)
        assert collect(wire, FIRST) == b"question"
        wire.write(FIRST, b"answer", 1)
        answer(wire, FIRST, 0, 0)
        ours.settimeout(300)
        assert b"".join(iter(lambda: ours.recv(100), b"")) == b"answer"


def test_socket_is_read_on_when_the_service_has_closed_its_output(
    wire: Wire, agent: AgentProcess
) -> None:
    ours, theirs = socket.socketpair()
    with (
        ours,
        agent.client(
            "qrexec-client-vm", "--use-stdin-socket", "work", "t.S", stdin=theirs
        ),
    ):
        theirs.close()
        wire.expect(CALL, FIRST)
        wire.send(EOF, 1, FIRST)
        ours.settimeout(300)
        assert ours.recv(1) == b""
        for part in (b"one", b"two", b"three"):
            ours.sendall(part)
            assert wire.expect(DATA, FIRST).payload == part
        ours.shutdown(socket.SHUT_WR)
        wire.expect(EOF, FIRST)
        answer(wire, FIRST, 0, 0)


def test_local_command_has_stream_sockets(wire: Wire, agent: AgentProcess) -> None:
    script = "exec 3>&1; readlink /proc/$$/fd/0 /proc/$$/fd/3 >&2"
    with call(agent, "work", "t.S", "sh", "-c", script) as client:
        wire.expect(CALL, FIRST)
        answer(wire, FIRST, 0, 0)
        assert client.communicate(timeout=300)[1].count(b"socket:") == 2


def test_missing_agent_is_told(agent: AgentProcess) -> None:
    with call(agent, "--agent-socket=/does/not/exist", "work", "t.S") as client:
        assert b"/does/not/exist" in client.communicate(timeout=300)[1]
        assert client.returncode == 125


@dataclasses.dataclass
class Caller:
    """What is left to one that has asked for a call: its ends of three pipes."""

    stdin: int
    stdout: int
    status: int

    def close(self) -> None:
        for end in (self.stdin, self.stdout, self.status):
            os.close(end)

    def answer(self) -> bytes:
        """Return the message that ends the call, nothing if there is none."""
        assert select.select([self.status], [], [], 300)[0]
        return os.read(self.status, 1000)


def ask(agent: AgentProcess, request: bytes, *more: int) -> Caller:
    """Ask for a call, handing over the agent's ends of three pipes and some more."""
    pipes = [os.pipe() for _ in range(3)]
    given = [pipes[0][0], pipes[1][1], pipes[2][1]]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect(str(agent.socket))
        socket.send_fds(client, [request], [*given, *more])
    for fd in given:
        os.close(fd)
    return Caller(pipes[0][1], pipes[1][0], pipes[2][0])


@pytest.mark.parametrize(
    "request_bytes",
    [b"x", b"work\0", b"work\0t.S", b"\0t.S\0", b"work\0t.S\0more\0", bytes(600)],
)
def test_malformed_requests_are_refused(
    wire: Wire, agent: AgentProcess, request_bytes: bytes
) -> None:
    with contextlib.closing(ask(agent, request_bytes)) as caller:
        assert caller.answer()[:1] == bytes([126])
    assert wire.run("true").value == 0


def test_request_must_bring_three_descriptors(wire: Wire, agent: AgentProcess) -> None:
    """With more or fewer there is none to answer on; all that came are closed."""
    for number in (1, 2, 5):
        with contextlib.closing(ask(agent, REQUEST, *[1] * number)) as caller:
            assert caller.answer() == b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect(str(agent.socket))
        client.send(REQUEST)
        ours, theirs = socket.socketpair()
        socket.send_fds(client, [REQUEST], [theirs.fileno()])
        theirs.close()
        with ours:
            assert ours.recv(1) == b""
    assert wire.run("true").value == 0


def test_request_must_bring_pipes_or_sockets(
    wire: Wire, agent: AgentProcess, tmp_path: Path
) -> None:
    """What may block the agent, or cannot be waited for, is refused."""
    status, theirs = os.pipe()
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client,
        (tmp_path / "file").open("wb") as file,
    ):
        client.connect(str(agent.socket))
        socket.send_fds(client, [REQUEST], [file.fileno(), file.fileno(), theirs])
    os.close(theirs)
    assert os.read(status, 1000)[:1] == bytes([126])
    os.close(status)
    assert wire.run("true").value == 0


def test_no_more_than_128_calls_at_once(wire: Wire, agent: AgentProcess) -> None:
    callers = []
    for number in range(128):
        callers.append(ask(agent, REQUEST))
        wire.expect(CALL, FIRST + number)
    callers.append(ask(agent, REQUEST))
    assert callers[-1].answer()[:1] == bytes([126])
    for number in range(128):
        answer(wire, FIRST + number, 0, 7)
    assert {caller.answer() for caller in callers[:128]} == {b"\7"}
    for caller in callers:
        caller.close()
    assert wire.run("true").value == 0
