"""The socket: who may connect, who is answered, who is dropped."""

import asyncio
import logging
import resource
import select
import socket
import stat
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from admin_client import (
    AdminError,
    Client,
    EmptyReplyError,
    frame,
    parse,
    wait_until,
)

from qubes_itests import limited_log
from qubes_itests.admin import server as server_module
from qubes_itests.admin.dispatch import METHODS, Destination, Method
from qubes_itests.admin.server import AdminServer
from qubes_itests.exc import HarnessError


def dropped(client, data):
    with pytest.raises((EmptyReplyError, ConnectionResetError)):
        parse(client.exchange(data))


def hung_up(client):
    """Tell, within five minutes, whether the other end of a socket is closed."""
    waiting = select.poll()
    waiting.register(client, 0)
    return bool(waiting.poll(300_000))


def test_owner_and_group_may_connect(server):
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o660
    assert server.path.is_socket()


def test_a_framing_error_closes_the_connection(client):
    dropped(client, b"hello")
    dropped(client, b"dom0\0admin.vm.List\0dom0\0\0")
    assert client.call("admin.vm.List")


def test_a_request_that_is_too_long_closes_the_connection(client):
    dropped(client, frame("admin.vm.List") + bytes(1 << 20))
    assert client.call("admin.vm.List")


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (("x" * 60000,), "QubesDaemonAccessError"),
        (("admin.vm.List", "x" * 60000), "QubesVMNotFoundError"),
        (("admin.vm.tag.Set", "work", "x" * 60000), "QubesDaemonAccessError"),
        (("admin.vm.Shutdown", "work", "wait+" * 12000), "QubesDaemonAccessError"),
        (("admin.vm.List", "dom0", "", b"x" * 60000), "QubesDaemonAccessError"),
        (("admin.vm.property.Get", "work", "x" * 60000), "QubesNoSuchPropertyError"),
        (
            ("admin.vm.device.block.Detach", "work", "x" * 60000),
            "QubesDaemonAccessError",
        ),
    ],
)
def test_a_field_that_is_too_long_is_answered(client, call, kind):
    with pytest.raises(AdminError) as caught:
        client.call(*call)
    assert caught.value.kind == kind


def test_an_unknown_method_is_answered(client):
    with pytest.raises(AdminError, match=r"admin\.vm\.Nonsense") as caught:
        client.call("admin.vm.Nonsense")
    assert caught.value.kind == "QubesDaemonAccessError"


def test_internal_methods_are_not_here(client):
    with pytest.raises(AdminError, match="there is no method"):
        client.call("internal.GetSystemInfo")


def test_whoever_connects_is_dom0_and_nobody_else(client):
    with pytest.raises(AdminError) as caught:
        parse(client.exchange(frame("admin.vm.List", source="work")))
    assert caught.value.kind == "QubesDaemonAccessError"


@pytest.mark.parametrize("name", ["nobody", "uuid:" + "0" * 36, "uuid:x", "@default"])
def test_a_destination_that_is_not_there_is_answered(client, name):
    with pytest.raises(AdminError) as caught:
        client.call("admin.vm.List", name)
    assert caught.value.kind in {"QubesVMNotFoundError", "QubesException"}


def test_a_destination_may_be_a_uuid(client, app):
    reply = client.call("admin.vm.List", f"uuid:{app.domains['work'].uuid}")
    assert reply.startswith(b"work ")


def test_a_defect_is_answered_and_logged_with_its_traceback(client, server, caplog):
    def fail(call):
        raise ZeroDivisionError(f"about {call.destination}")

    server.dispatcher.methods = {
        **METHODS,
        "x": Method("x", fail, Destination.ANY, None, None, saves=False, streams=False),
    }
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(AdminError, match="the server's log") as caught,
    ):
        client.call("x")
    assert caught.value.kind == "QubesException"
    assert caught.value.traceback == ""
    assert "ZeroDivisionError: about dom0" in caplog.text
    assert all(record.exc_info is None for record in caplog.records)


def test_a_method_whose_own_wait_is_cancelled_is_answered(client, server, caplog):
    """The client would wait for ever: nothing closes its connection."""

    async def wait(_call):
        waiting = asyncio.create_task(asyncio.Event().wait())
        waiting.cancel()
        await waiting

    server.dispatcher.methods = {
        "x": Method("x", wait, Destination.ANY, None, None, saves=False, streams=False)
    }
    with pytest.raises(AdminError, match="CancelledError") as caught:
        client.call("x")
    assert caught.value.kind == "QubesException"
    assert "waiting" in caplog.text


def test_debugging_shows_tracebacks(app, tmp_path, run):
    server = AdminServer(app, tmp_path / "debug.sock", debug=True)
    run(server.__aenter__())
    with pytest.raises(AdminError) as caught:
        Client(server.path).call("admin.vm.List", "nobody")
    run(server.__aexit__(None, None, None))
    assert "Traceback" in caught.value.traceback


def test_clients_that_never_end_their_request_delay_nobody(server, client):
    """Two hundred send half a request; others are answered meanwhile."""
    slow = []
    for _ in range(200):
        connection_ = socket.socket(socket.AF_UNIX)
        connection_.connect(str(server.path))
        connection_.sendall(b"admin.vm.List+ do")
        slow.append(connection_)
    for _ in range(20):
        assert client.call("admin.vm.List")
    for connection_ in slow:
        connection_.close()


def test_a_client_that_never_ends_its_request_is_dropped(server, monkeypatch):
    monkeypatch.setattr(server, "timeout", 0.05)
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(server.path))
        slow.sendall(b"admin.vm.List+ do")
        assert hung_up(slow)


def test_the_oldest_that_sends_goes_when_there_are_too_many(
    server, client, monkeypatch
):
    monkeypatch.setattr(server, "most", 3)
    slow = [socket.socket(socket.AF_UNIX) for _ in range(6)]
    for each in slow:
        each.settimeout(300)
        each.connect(str(server.path))
    assert client.call("admin.vm.List")
    assert slow[0].recv(1) == b""
    for each in slow:
        each.close()


def test_a_client_that_does_not_read_its_answer_is_dropped(server, monkeypatch):
    monkeypatch.setattr(server, "timeout", 0.3)
    server.dispatcher.methods = {
        "big": Method(
            "big",
            lambda _call: "x" * (8 << 20),
            Destination.ANY,
            None,
            None,
            saves=False,
            streams=False,
        )
    }
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(server.path))
        slow.sendall(frame("big"))
        slow.shutdown(socket.SHUT_WR)

        assert hung_up(slow)


def test_many_clients_at_once_are_all_answered(client):
    replies = []

    def ask():
        replies.extend(client.call("admin.vm.List") for _ in range(20))

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 200
    assert len(set(replies)) == 1


def test_a_second_server_is_refused_and_a_dead_socket_replaced(
    server, app, run, tmp_path
):
    with pytest.raises(HarnessError, match="is served already"):
        run(AdminServer(app, server.path).__aenter__())
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    other = AdminServer(app, dead)
    run(other.__aenter__())
    assert Client(dead).call("admin.vm.List")
    run(other.__aexit__(None, None, None))
    assert not dead.exists()


def test_a_file_in_place_of_the_socket_is_left_alone(app, run, tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="in use"):
        run(AdminServer(app, path).__aenter__())
    assert path.read_text() == "data"


def test_clients_that_go_without_reading_leave_nothing(server, client, caplog):
    """Not a record in the log, not a descriptor, whatever they sent."""

    def descriptors():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    caplog.set_level(logging.INFO)
    for number in range(300):
        with socket.socket(socket.AF_UNIX) as hasty:
            hasty.connect(str(server.path))
            if number % 3:
                hasty.sendall(frame("admin.vm.property.GetAll", "work"))
            if number % 2:
                hasty.shutdown(socket.SHUT_WR)
    assert client.call("admin.vm.List")
    wait_until(lambda: not server.clients)
    wait_until(lambda: descriptors() <= before)
    assert [r.getMessage() for r in caplog.records if r.name == "asyncio"] == []


def connect(server):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(300)
    client.connect(str(server.path))
    return client


def test_streams_leave_room_for_calls(server, client, monkeypatch, caplog):
    """As many as may wait for events do, calls are answered, one more is refused."""
    monkeypatch.setattr(server, "most", 6)
    monkeypatch.setattr(server_module, "_MOST_STREAMS", 3)
    with ExitStack() as stack:
        for _ in range(3):
            assert next(stack.enter_context(client.events())).name
        with (
            client.events() as refused,
            pytest.raises(AdminError, match="3 clients wait for events"),
        ):
            next(refused)
        slow = [stack.enter_context(connect(server)) for _ in range(5)]
        assert client.call("admin.vm.List")
        assert slow[0].recv(1) == b""
    assert "3 clients wait for events" in caplog.text
    wait_until(lambda: not server._streams)
    with client.events() as again:
        assert next(again).name == "connection-established"


def test_never_more_clients_than_the_limit(server, client, monkeypatch):
    """Although many are accepted in one go: not one too many is kept for a moment."""
    monkeypatch.setattr(server, "most", 5)
    most = []

    class Counted(set):
        def add(self, client):
            super().add(client)
            most.append(len(self))

    monkeypatch.setattr(server, "clients", Counted())
    slow = [connect(server) for _ in range(40)]
    wait_until(lambda: len(most) == 40)
    assert max(most) == 5
    assert client.call("admin.vm.List")
    for each in slow:
        each.close()


MANY = """
import resource, socket, sys
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
clients = []
for _ in range(300):
    clients.append(socket.socket(socket.AF_UNIX))
    clients[-1].connect(sys.argv[1])
print("connected", flush=True)
sys.stdin.read()
"""


def test_clients_leave_descriptors_to_all_else(server, client):
    """Of a process that may have few, 300 clients do not take the last one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (250, hard))
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", MANY, str(server.path)]
    try:
        with subprocess.Popen(command, stdin=pipe, stdout=pipe) as many:
            assert many.stdout.readline() == b"connected\n"
            assert client.call("admin.vm.List")
            assert len(server.clients) <= server.capacity() == 125
            many.communicate()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def unknown(client):
    with pytest.raises(AdminError):
        client.call("admin.vm.Nonsense")


def malformed(client):
    dropped(client, b"hello")


def too_long(client):
    dropped(client, frame("admin.vm.List") + bytes(1 << 17))


@pytest.mark.parametrize("refused", [unknown, malformed, too_long])
def test_refusals_are_logged_with_a_limit(client, caplog, monkeypatch, refused):
    # a slow machine has time for more than one of it
    monkeypatch.setattr(limited_log, "_INTERVAL", 1000)
    caplog.set_level(logging.INFO, "qubes.admin")
    for _ in range(200):
        refused(client)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) < 100
    assert any("others are left out" in message for message in messages)
