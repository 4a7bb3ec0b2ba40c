"""The socket that the client tools' programs call, without guests: who is told what."""

import contextlib
import json
import logging
import socket

import pytest
from admin_client import AdminError, parse, wait_until

from qubes_itests.core.exc import PermissionDenied
from qubes_itests.serve import calls
from qubes_itests.serve.calls import CallServer
from qubes_itests.serve.wire import (
    CALL,
    EXIT,
    HEADER,
    IMPORT,
    STATUS,
    STDERR,
    STDIN,
    STDOUT,
    TERMINAL,
    frame,
)


@pytest.fixture
def server(app, tmp_path, run):
    server = CallServer(lambda: (app,), tmp_path / "qrexec.sock")
    run(server.__aenter__())
    yield server
    run(server.__aexit__(None, None, None))


def frames(answer):
    """Return what came, by kind of frame."""
    found = {}
    while answer:
        kind, length = HEADER.unpack(answer[: HEADER.size])
        end = HEADER.size + length
        found[kind] = found.get(kind, b"") + answer[HEADER.size : end]
        answer = answer[end:]
    return found


@pytest.fixture
def call(server):
    def call(data):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(300)
            connection.connect(str(server.path))
            # one too many is answered, and the connection closed, before it is read
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(data)
            return frames(b"".join(iter(lambda: connection.recv(65536), b"")))

    return call


@pytest.fixture
def fill(call):
    """Import into the private volume of `work`; return the reply."""

    def fill(content):
        request = frame(IMPORT, b"work\0private\0admin.vm.volume.ImportWithSize")
        payload = b"%d\n%b" % (len(content), content)
        answer = call(request + frame(STDIN, payload) + frame(STDIN))
        assert answer[EXIT] == b"0"
        return parse(answer[calls.STDOUT])

    return fill


def test_content_is_imported(fill, app):
    assert fill(b"12345678") == b""
    assert app.domains["work"].volumes["private"].size == 8


def test_who_says_nothing_is_told_and_dropped(server, call, monkeypatch, caplog):
    monkeypatch.setattr(server, "timeout", 0.05)
    for data in (b"", frame(CALL, b"work\0user:id\0")[:-1]):
        answer = call(data)
        assert b"no request came in time" in answer[STDERR]
        assert answer[EXIT] == b"126"
    assert [r.message for r in caplog.records if r.levelno >= logging.ERROR] == []


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        (b"work\x0080x\0vt220", b"126", b"expected a size such as 80x24, got '80x'"),
        (b"nobody\x0080x24\0vt220", b"126", b"no VM 'nobody' that runs commands"),
        (b"work\x0080x24\0vt220", b"255", b"not running"),
        (b"work\x0080x24", b"126", b"of three fields, got a frame of kind 7 with 2"),
    ],
)
def test_a_terminal_that_is_not_opened_says_why(call, fields, status, told):
    answer = call(frame(TERMINAL, fields))
    assert told in answer[STDERR]
    assert answer[EXIT] == status


def test_calls_beyond_a_number_are_refused_and_the_others_go_on(
    server, call, fill, monkeypatch
):
    """The one that has been without a request for longest goes, else the new one."""
    monkeypatch.setattr(server, "most", 3)
    request = frame(IMPORT, b"work\0private\0admin.vm.volume.ImportWithSize")

    def refused(answer):
        return b"too many calls" in answer[STDERR] and answer[EXIT] == b"126"

    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(4)]
        for each in waiting:
            each.settimeout(300)
            each.connect(str(server.path))
        said = b"".join(iter(lambda: waiting[0].recv(65536), b""))
        assert refused(frames(said))
        for each in waiting[1:]:
            each.sendall(request)
        wait_until(lambda: len(server.clients) == 3 and not server.sending)
        assert refused(call(b""))
    wait_until(lambda: not server.clients)
    fill(b"12345678")


def test_a_full_pool_is_told_and_changes_nothing(fill, app, monkeypatch, tmp_path):
    volume = app.domains["work"].volumes["private"]
    begin = type(volume).import_data
    full = tmp_path / "full"
    full.symlink_to("/dev/full")

    async def import_data(self, size):
        await begin(self, size)
        return full

    with monkeypatch.context() as patched:
        patched.setattr(type(volume), "import_data", import_data)
        with pytest.raises(AdminError, match="No space left") as caught:
            fill(b"12345678")
    assert caught.value.kind == "StoragePoolException"
    assert volume.size == 4 << 20
    assert fill(b"12345678") == b""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionDenied("not you"), "QubesDaemonAccessError: not you"),
        (PermissionError("not so"), "QubesException: .* unexpectedly"),
    ],
)
def test_a_veto_is_answered_whatever_it_is(fill, app, caplog, error, told):
    def veto(*_args, **_kwargs):
        raise error

    app.domains["dom0"].add_handler(
        "admin-permission:admin.vm.volume.ImportWithSize", veto
    )
    with pytest.raises(AdminError, match=told):
        fill(b"12345678")
    assert app.domains["work"].volumes["private"].size == 4 << 20
    assert ("not so" in caplog.text) == (type(error) is PermissionError)


def test_a_defect_is_told_and_logged_with_its_traceback(call, app, monkeypatch, caplog):
    def fail(_name):
        raise ZeroDivisionError("by nobody")

    monkeypatch.setattr(app.domains, "get", fail)
    answer = call(frame(CALL, b"work\0user:id\0"))
    assert b"the server's log" in answer[STDERR]
    assert b"by nobody" not in answer[STDERR]
    assert answer[EXIT] == b"255"
    assert "ZeroDivisionError: by nobody" in caplog.text


def test_an_import_that_breaks_off_changes_nothing(server, app, caplog):
    volume = app.domains["work"].volumes["private"]
    ended = []
    app.domains["work"].add_handler(
        "domain-volume-import-end",
        lambda *_args, success, **_: ended.append(success),
    )
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(server.path))
        request = frame(IMPORT, b"work\0private\0admin.vm.volume.ImportWithSize")
        connection.sendall(request + frame(STDIN, b"8\n1234"))
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: ended == [False])
    assert volume.size == 4 << 20
    assert [r.message for r in caplog.records if r.levelno >= logging.ERROR] == []


def test_a_status_tells_of_vms_and_of_what_goes_on(app, tmp_path, run):
    """In as many frames as it takes."""
    doing = {"test": "x" * 100_000}
    server = CallServer(lambda: (app,), tmp_path / "qrexec.sock", lambda: doing)
    run(server.__aenter__())
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(300)
            connection.connect(str(server.path))
            connection.sendall(frame(STATUS))
            answer = frames(b"".join(iter(lambda: connection.recv(65536), b"")))
    finally:
        run(server.__aexit__(None, None, None))
    assert json.loads(answer[STDOUT]) == {**doing, "vms": []}
    assert answer[EXIT] == b"0"


def test_between_two_tests_no_vm_is_there(server, call):
    server.apps = tuple
    answer = call(frame(TERMINAL, b"work\x0080x24\0linux"))
    assert b"there is no VM 'work', as no test has any now" in answer[STDERR]
