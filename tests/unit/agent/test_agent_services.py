"""Services: which file runs, as whom, and what it is told."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest
from agent_wire import DATA, EOF, EXIT, SIGNAL, STOP

if TYPE_CHECKING:
    from collections.abc import Iterator

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


PLACES = "run/qubes-rpc", "usr/local/etc/qubes-rpc", "etc/qubes-rpc"
SETTINGS = "run/qubes/rpc-config", "usr/local/etc/qubes/rpc-config"


@pytest.mark.parametrize("name", ["t.S", "t.S+a"])
def test_directories_are_looked_up_in_order(
    wire: Wire, agent: AgentProcess, name: str
) -> None:
    for place in reversed(PLACES):
        agent.file(f"{place}/{name}", f"#!/bin/sh\necho {place}\n", 0o755)
        assert serve(wire, "t.S+a").stdout == f"{place}\n".encode()


def test_file_for_the_argument_wins_wherever_it_is(
    wire: Wire, agent: AgentProcess
) -> None:
    agent.file("run/qubes-rpc/t.S", "#!/bin/sh\necho all\n", 0o755)
    agent.service("t.S+a", "echo just a")
    agent.service("t.S+", "echo no argument")
    assert serve(wire, "t.S+a").stdout == b"just a\n"
    assert serve(wire, "t.S+b").stdout == b"all\n"
    assert serve(wire, "t.S").stdout == b"no argument\n"
    assert serve(wire, "t.S+").stdout == b"no argument\n"


def test_dangling_link_is_passed_over(wire: Wire, agent: AgentProcess) -> None:
    (agent.root / "run/qubes-rpc").mkdir(parents=True)
    (agent.root / "run/qubes-rpc/t.S").symlink_to("/does/not/exist")
    agent.service("t.S", "echo here")
    assert serve(wire, "t.S").stdout == b"here\n"


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


def forced(wire: Wire, service: str = "t.S") -> str:
    """Return whom a configuration has a service run as, who does not exist."""
    result = serve(wire, service)
    assert result.value == 127
    return result.text.removeprefix("there is no user ")


@pytest.mark.parametrize(
    "line",
    [
        "force-user=nobody-such\n",
        "force-user = 'nobody-such'",
        'force-user="nobody-such"  # a comment\n',
        "# first\r\n\r\nwait-for-session=1\r\nforce-user=nobody-such\r\n",
        "force-user='nobody-such'\r",
    ],
)
def test_configuration_may_force_the_user(
    wire: Wire, agent: AgentProcess, line: str
) -> None:
    agent.service("t.S", "true")
    agent.file("etc/qubes/rpc-config/t.S", line)
    assert forced(wire) == "nobody-such"


def test_configurations_are_looked_up_as_services_are(
    wire: Wire, agent: AgentProcess
) -> None:
    agent.service("t.S", "true")
    agent.file("run/qubes/rpc-config/t.S", "force-user=first\n")
    agent.file("usr/local/etc/qubes/rpc-config/t.S", "force-user=second\n")
    agent.file("etc/qubes/rpc-config/t.S+a", "force-user=of-a\n")
    assert [forced(wire, name) for name in ("t.S+a", "t.S+b")] == ["of-a", "first"]
    (agent.root / "run/qubes/rpc-config/t.S").unlink()
    assert forced(wire) == "second"


@pytest.mark.parametrize(
    "line", ["nonsense", "force-user=", "this is = not", "force-user='a", "a='b' c"]
)
def test_configuration_that_is_none_refuses(
    wire: Wire, agent: AgentProcess, line: str
) -> None:
    agent.service("t.S", "echo ran")
    agent.file("etc/qubes/rpc-config/t.S", f"# fine\n{line}\n")
    result = serve(wire, "t.S")
    assert (result.value, result.stdout) == (126, b"")
    assert "rpc-config/t.S" in result.text


def test_services_own_exit_status_comes_back(wire: Wire, agent: AgentProcess) -> None:
    agent.service("t.S", "cat; exit 42")
    result = wire.run("t.S", b"data", kind="service", source="dom0")
    assert (result.kind, result.value, result.stdout) == (0, 42, b"data")


def test_stdin_and_stdout_of_services_are_stream_sockets(
    wire: Wire, agent: AgentProcess
) -> None:
    agent.service(
        "t.S", "exec 3>&1; for i in 0 3 2; do readlink /proc/$$/fd/$i >&2; done"
    )
    kinds = [line.partition(b":")[0] for line in serve(wire, "t.S").stderr.split()]
    assert kinds == [b"socket", b"socket", b"pipe"]


def test_service_may_open_its_stderr(wire: Wire, agent: AgentProcess) -> None:
    """A socket cannot be opened; scripts write to /dev/stderr."""
    agent.service("t.S", "echo one >/dev/stderr; echo two >>/proc/self/fd/2")
    assert serve(wire, "t.S").stderr == b"one\ntwo\n"


#: Says that its output comes by its stdin, as a program does that has one socket.
ONE_SOCKET = """
kill -USR1 $QREXEC_AGENT_PID
echo hello >&0
read x
echo received $x >&0
"""


@pytest.mark.parametrize("again", ["", "kill -USR1 $QREXEC_AGENT_PID\n"])
def test_service_may_have_its_output_on_its_stdin(
    wire: Wire, agent: AgentProcess, again: str
) -> None:
    agent.service("t.S", ONE_SOCKET + again)
    for _ in range(2):
        stream = wire.spawn("t.S", kind="service", source="work")
        assert wire.expect(DATA, stream).payload == b"hello\n"
        wire.write(stream, b"stdin\n")
        wire.send(EOF, 0, stream)
        result = wire.finish(stream)
        assert (result.value, result.stdout) == (0, b"received stdin\n")


def test_service_whose_input_has_ended_may_have_its_output_there(
    wire: Wire, agent: AgentProcess
) -> None:
    agent.service(
        "t.S",
        "cat; exec 3<&0; kill -USR1 $QREXEC_AGENT_PID; echo on >&3; read x <$0.fifo",
    )
    os.mkfifo(agent.root / "etc/qubes-rpc/t.S.fifo")
    stream = wire.spawn("t.S", kind="service", source="work")
    wire.send(EOF, 0, stream)
    assert wire.expect(DATA, stream).payload == b"on\n"
    (agent.root / "etc/qubes-rpc/t.S.fifo").write_text("go\n")
    assert wire.finish(stream).value == 0


def test_nobody_says_so_for_the_service_of_another(
    wire: Wire, agent: AgentProcess
) -> None:
    """Only who is in its session does: another user's process is in none of it."""
    agent.service("t.S", "read x; echo $x")
    stream = wire.spawn("t.S", kind="service", source="work")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect(str(agent.socket))
        for text in (
            b"",
            b"\0",
            b"use-stdin",
            b"use-stdin\0",
            b"use-stdin\0x\0",
            b"use-stdin\0" + str(os.getpid()).encode() + b"\0",
        ):
            client.send(text)
    wire.write(stream, b"as before\n")
    assert wire.finish(stream).stdout == b"as before\n"


@contextlib.contextmanager
def listening(agent: AgentProcess, name: str) -> Iterator[socket.socket]:
    """Listen where a service of that name is looked for."""
    directory = agent.root / "etc/qubes-rpc"
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / name))
        server.listen()
        server.settimeout(300)
        yield server


def received(connection: socket.socket) -> bytes:
    connection.settimeout(300)
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_socket_serves(wire: Wire, agent: AgentProcess) -> None:
    """It is told who calls what, reads to the end of input, and answers."""
    with listening(agent, "t.S") as server:
        stream = wire.spawn("t.S+a", kind="service", source="work")
        wire.write(stream, b"question")
        wire.send(EOF, 0, stream)
        with server.accept()[0] as connection:
            assert received(connection) == b"t.S+a work\0question"
            connection.sendall(b"answer")
        result = wire.finish(stream)
    assert (result.kind, result.value, result.stdout) == (0, 0, b"answer")


def test_socket_that_is_done_with_its_output_still_reads(
    wire: Wire, agent: AgentProcess
) -> None:
    with listening(agent, "t.S") as server:
        stream = wire.spawn("t.S", kind="service", source="dom0")
        with server.accept()[0] as connection:
            connection.shutdown(socket.SHUT_WR)
            assert wire.expect(EOF, stream).channel == 1
            wire.write(stream, b"more")
            wire.send(EOF, 0, stream)
            assert received(connection) == b"t.S dom0\0more"
        assert wire.expect(EXIT, stream).payload == bytes(2)


def test_socket_that_closes_ends_the_service(wire: Wire, agent: AgentProcess) -> None:
    with listening(agent, "t.S") as server:
        stream = wire.spawn("t.S", kind="service", source="work")
        server.accept()[0].close()
        assert wire.expect(EXIT, stream).payload == bytes(2)


def test_nobody_who_listens_is_a_refusal(wire: Wire, agent: AgentProcess) -> None:
    with listening(agent, "t.S"):
        pass
    result = serve(wire, "t.S")
    assert (result.kind, result.value) == (2, 126)
    assert "refused" in result.text


def test_signal_to_a_socket_hangs_up(wire: Wire, agent: AgentProcess) -> None:
    with listening(agent, "t.S") as server:
        stream = wire.spawn("t.S", kind="service", source="work")
        with server.accept()[0] as connection:
            wire.send(SIGNAL, 0, stream, bytes([signal.SIGTERM]))
            assert received(connection) == b"t.S work\0"
        assert wire.expect(EXIT, stream).payload == bytes(2)


@pytest.mark.parametrize(
    ("settings", "shut"),
    [("exit-on-service-eof", socket.SHUT_WR), ("exit-on-client-eof", None)],
)
def test_either_end_may_be_the_end_of_all(
    wire: Wire, agent: AgentProcess, settings: str, shut: int | None
) -> None:
    text = f"skip-service-descriptor=true\n{settings}=true\n"
    agent.file("etc/qubes/rpc-config/t.S", text)
    with listening(agent, "t.S") as server:
        stream = wire.spawn("t.S", kind="service", source="work")
        wire.write(stream, b"bare")
        with server.accept()[0] as connection:
            assert connection.recv(100) == b"bare"
            if shut is None:
                wire.send(EOF, 0, stream)
            else:
                connection.shutdown(shut)
            assert wire.expect(EXIT, stream).payload == bytes(2)


@pytest.mark.parametrize(
    ("target", "argument"),
    [("/127.0.0.1/{port}", ""), ("/127.0.0.1", "+{port}"), ("", "+127.0.0.1+{port}")],
)
def test_link_to_a_port_serves(
    wire: Wire, agent: AgentProcess, target: str, argument: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(300)
        port = server.getsockname()[1]
        (agent.root / "etc/qubes-rpc").mkdir(parents=True)
        link = agent.root / "etc/qubes-rpc/t.S"
        link.symlink_to("/dev/tcp" + target.format(port=port))
        service = "t.S" + argument.format(port=port)
        stream = wire.spawn(service, kind="service", source="work")
        wire.write(stream, b"question")
        wire.send(EOF, 0, stream)
        with server.accept()[0] as connection:
            got = received(connection)
            connection.sendall(b"answer")
        assert got == f"{service} work\0question".encode()
        assert wire.finish(stream).stdout == b"answer"


@pytest.mark.parametrize(
    ("target", "argument"),
    [
        ("", ""),
        ("", "+127.0.0.1"),
        ("/127.0.0.1", ""),
        ("/127.0.0.1", "+0"),
        ("/127.0.0.1", "+65536"),
        ("/127.0.0.1", "+22x"),
        ("/127.0.0.1", "+-1"),
        ("/127.0.0.1/1", "+2"),
        ("/localhost", "+22"),
        ("/127.0.0.1/", ""),
        ("/", "+22"),
    ],
)
def test_link_to_no_port_is_refused(
    wire: Wire, agent: AgentProcess, target: str, argument: str
) -> None:
    (agent.root / "etc/qubes-rpc").mkdir(parents=True)
    (agent.root / "etc/qubes-rpc/t.S").symlink_to("/dev/tcp" + target)
    result = serve(wire, f"t.S{argument}")
    assert (result.kind, result.value) == (2, 126)
    assert "not an address" in result.text


def test_port_where_nobody_listens_is_a_refusal(
    wire: Wire, agent: AgentProcess
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (agent.root / "etc/qubes-rpc").mkdir(parents=True)
    (agent.root / "etc/qubes-rpc/t.S").symlink_to(f"/dev/tcp/127.0.0.1/{port}")
    result = serve(wire, "t.S")
    assert (result.kind, result.value) == (2, 126)
    assert "refused" in result.text


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
