"""Runs under way that answer as no run does: a broken one must not stop `ps`."""

import json
import socket
import threading
from contextlib import contextmanager

import pytest

from qubes_itests.exc import HarnessError
from qubes_itests.serve import reach
from qubes_itests.serve.reach import Reached
from qubes_itests.serve.wire import EXIT, HEADER, STDERR, STDOUT, frame

VM = {"name": "work", "state": "Running", "memory": 200}
TEST = {"test": "t::x", "phase": "call", "seconds": 1.5, "waits": "the test"}


@contextmanager
def answering(path, *parts):
    """Serve one client: send it the parts, and hold the connection if one is None."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        release = threading.Event()

        def serve():
            client, _ = listening.accept()
            with client:
                client.recv(100)
                for part in parts:
                    if part is None:
                        release.wait(300)
                    else:
                        client.sendall(part)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Reached("run-1", path)
        finally:
            release.set()
            thread.join(300)


def said(value):
    """Return an answer of JSON."""
    return frame(STDOUT, json.dumps(value).encode()) + frame(EXIT, b"0")


@pytest.mark.parametrize("status", [{"vms": []}, {"vms": [VM], **TEST}])
def test_what_a_run_says_is_returned_with_its_process(tmp_path, status):
    whole = frame(STDERR, b"dropped") + said(status)
    with answering(tmp_path / "s", whole[:7], whole[7:]) as reached:
        answer = reached.status()
    assert isinstance(answer.pop("pid"), int)
    assert answer == status


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP",
        HEADER.pack(STDOUT, 0xFFFFFFFF) + b"x",
        HEADER.pack(STDOUT, 10) + b"cut",
        frame(STDOUT, b"[" * 60000) + frame(EXIT, b"0"),
        frame(STDOUT, b"\xff") + frame(EXIT, b"0"),
        said([1, 2]),
        said(None),
        said({"vms": None}),
        said({"vms": ["work"]}),
        said({"vms": [{**VM, "name": 3}]}),
        said({"vms": [{**VM, "memory": "200"}]}),
        said({"vms": [], "test": "t::x"}),
        said({"vms": [], **TEST, "seconds": None}),
    ],
)
def test_what_no_run_says_is_an_error_that_names_the_run(tmp_path, answer):
    with (
        answering(tmp_path / "s", answer) as reached,
        pytest.raises(HarnessError, match="run run-1 does not answer"),
    ):
        reached.status()


def test_an_answer_without_end_is_not_waited_for(tmp_path, monkeypatch):
    """Its bytes are bounded, and all of it together has the time, not each read."""
    monkeypatch.setattr(reach, "_MOST_BYTES", 1000)
    with (
        answering(tmp_path / "s", frame(STDOUT, bytes(2000)), None) as reached,
        pytest.raises(HarnessError, match="more than 1000 bytes"),
    ):
        reached.status()
    monkeypatch.setattr(reach, "_TIMEOUT", 0.2)
    with (
        answering(tmp_path / "t", b"\3", None) as reached,
        pytest.raises(HarnessError, match="timed out"),
    ):
        reached.status()
