"""Services: which file runs, as whom, and what it is told."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from agent_wire import DATA, STOP

if TYPE_CHECKING:
    from agent_process import AgentProcess
    from agent_wire import Result, Wire


def serve(wire: Wire, service: str, **options: str) -> Result:
    return wire.run(service, kind="service", source="work", **options)


def test_service_is_told_who_calls_and_why(wire: Wire, agent: AgentProcess) -> None:
    names = "REMOTE_DOMAIN", "SERVICE_FULL_NAME", "SERVICE_ARGUMENT"
    agent.service("t.S", "".join(f"echo $QREXEC_{name};" for name in names) + "echo $1")
    assert serve(wire, "t.S+a").stdout == b"work\nt.S+a\na\na\n"


def test_service_without_argument_has_none(wire: Wire, agent: AgentProcess) -> None:
    agent.service("t.S", 'echo "$# <$QREXEC_SERVICE_ARGUMENT>"')
    assert serve(wire, "t.S").stdout == b"0 <>\n"
    assert serve(wire, "t.S+").stdout == b"0 <>\n"


def test_file_for_the_argument_wins(wire: Wire, agent: AgentProcess) -> None:
    agent.service("t.S", "echo all $1")
    agent.service("t.S+a", "echo just $1")
    assert serve(wire, "t.S+a").stdout == b"just a\n"
    assert serve(wire, "t.S+b").stdout == b"all b\n"


def test_local_services_win(wire: Wire, agent: AgentProcess) -> None:
    agent.service("t.S", "echo system")
    agent.file("usr/local/etc/qubes-rpc/t.S", "#!/bin/sh\necho local\n", 0o755)
    assert serve(wire, "t.S").stdout == b"local\n"


def test_missing_service_is_127(wire: Wire) -> None:
    result = serve(wire, "t.None+x")
    assert (result.kind, result.value) == (2, 127)
    assert "t.None+x" in result.text


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_file_that_cannot_execute_is_refused(
    wire: Wire, agent: AgentProcess, mode: int
) -> None:
    agent.service("t.S", "true", mode)
    result = serve(wire, "t.S")
    assert (result.kind, result.value) == (2, 126)
    assert "executable" in result.text


def test_directory_is_refused(wire: Wire, agent: AgentProcess) -> None:
    (agent.root / "etc/qubes-rpc/t.S").mkdir(parents=True)
    assert serve(wire, "t.S").value == 126


@pytest.mark.parametrize(
    "name", ["", "+a", ".", "..", ".hidden", "../x", "a/b", "a b", "a\nb", "a;b", "é"]
)
def test_bad_names_are_refused(wire: Wire, agent: AgentProcess, name: str) -> None:
    agent.file("etc/x", "#!/bin/sh\necho escaped\n", 0o755)
    result = serve(wire, name)
    assert (result.kind, result.value, result.stdout) == (2, 126, b"")


def test_configuration_may_force_the_user(wire: Wire, agent: AgentProcess) -> None:
    agent.service("t.S", "echo $USER")
    agent.file("etc/qubes/rpc-config/t.S", "wait-for-session=1\nforce-user=root\n")
    agent.file("etc/qubes/rpc-config/t.S+b", "force-user = 'nobody-such'\n")
    agent.file("etc/passwd", (agent.root / "etc/passwd").read_text())
    assert serve(wire, "t.S+b").value == 127
    if "user:x:0:" in (agent.root / "etc/passwd").read_text():
        assert serve(wire, "t.S").stdout == b"root\n"


def test_services_own_exit_status_comes_back(wire: Wire, agent: AgentProcess) -> None:
    agent.service("t.S", "cat; exit 42")
    result = wire.run("t.S", b"data", kind="service", source="dom0")
    assert (result.kind, result.value, result.stdout) == (0, 42, b"data")


def test_stdio_of_services_are_stream_sockets(wire: Wire, agent: AgentProcess) -> None:
    agent.service("t.S", "for i in 0 1 2; do readlink /proc/self/fd/$i; done | cat")
    assert serve(wire, "t.S").stdout.count(b"socket:") == 2


def test_stopped_output_of_a_service_is_a_broken_pipe(
    wire: Wire, agent: AgentProcess
) -> None:
    """A writer that waits for room in a socket gets an error, another a signal."""
    agent.service("t.S", "exec yes")
    stream = wire.spawn("t.S", kind="service", source="work")
    wire.expect(DATA, stream)
    wire.send(STOP, 1, stream)
    result = wire.finish(stream)
    killed = (result.kind, result.value) == (1, signal.SIGPIPE)
    assert killed or b"yes:" in result.stderr


def test_unknown_kind_of_stream_is_refused(wire: Wire) -> None:
    result = wire.run("true", kind="other")
    assert (result.kind, result.value) == (2, 126)
