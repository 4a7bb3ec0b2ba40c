"""What tools of the client say to a server: recorded, and said again without them.

A recording is a list of steps, one for each tool that ran: its command line, what it
printed, and its calls: requests to the Admin API's socket with the replies, and runs of
the programs that it called.  What differs from run to run has a name in it, like
``<uuid:1>``.  Only data is kept, nothing of the client itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admin_client import read_events

if TYPE_CHECKING:
    from served import Served

TIMEOUT = 300
PROGRAM = Path(__file__).with_name("recorded_program.py")

#: What is another thing in each run, by the name that it gets.
VARYING = {
    "uuid": re.compile(r"\b([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\b"),
    "token": re.compile(r"^0\0([A-Za-z0-9]{32})$"),
    "revision": re.compile(r"\b(\d+@\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)"),
    "disposable": re.compile(r"\b(disp\d{1,4})\b"),
    "dispid": re.compile(r"[ .+\n]dispid\b[^\n]* type=int (\d+)"),
    "time": re.compile(r"\b(1[7-9]\d{8}(?:\.\d+)?)\b"),
}
#: Figures that no tool goes by.
FIGURES = re.compile(r"\b(usage|cputime|mem|mem_static_max)=\d+")
#: A property that has its default: what that is does not concern the client.
DEFAULT = re.compile(r"(.*\bdefault=True type=\w+)(?: .*)?")
_NAME = re.compile(r"<[a-z]+:\d+>")
#: Programs that say nothing to the server by themselves.
_PASSED_ON = {"qvm-appmenus", "sudo"}
_STREAMS = ("admin.Events", "admin.vm.Stats")


class Names:
    """Stands names in for what differs from run to run, and the other way round.

    :param fixed: values that are known, by their names.
    """

    def __init__(self, fixed):
        self.values = {f"<{name}>": str(value) for name, value in fixed.items()}

    def learn(self, text):
        """Give names to what is in a text."""
        for kind, pattern in VARYING.items():
            for value in pattern.findall(text):
                if value not in self.values.values():
                    number = sum(name.startswith(f"<{kind}:") for name in self.values)
                    self.values[f"<{kind}:{number + 1}>"] = value

    def hide(self, text):
        """Return a text with names in it."""
        # the longest first: one may be a part of another
        for name, value in sorted(self.values.items(), key=lambda x: -len(x[1])):
            text = re.sub(rf"(?<![\w]){re.escape(value)}(?![\w])", name, text)
        return text

    def show(self, text):
        """Return a text with what its names stand for."""
        for name, value in self.values.items():
            text = text.replace(name, value)
        return text

    def match(self, wanted, text):
        """Tell whether a line is the one wanted; learn what its names stand for."""
        names = [name for name in _NAME.findall(wanted) if name not in self.values]
        pattern = re.escape(self.show(wanted)).replace(re.escape("=<n>"), r"=\d+")
        for number, name in enumerate(dict.fromkeys(names)):
            group = f"(?P<n{number}>.+)"
            first, *rest = pattern.split(re.escape(name))
            pattern = first + group + f"(?P=n{number})".join(rest)
        found = re.fullmatch(pattern, text)
        if found:
            for number, name in enumerate(dict.fromkeys(names)):
                self.values[name] = found[f"n{number}"]
        return bool(found)


class Recorder:
    """Stands between the tools and a server, and writes down what goes by.

    :param server: a `Served`.
    :param directory: an empty one, with a short path; the tools are pointed to it.
    """

    def __init__(self, server: Served, directory: Path, names: Names) -> None:
        self.server, self.directory, self.names = server, directory, names
        self.steps: list[dict[str, Any]] = []
        self._calls: list[tuple[float, dict[str, str]]] = []
        self._proxy: socketserver.ThreadingUnixStreamServer

    @property
    def socket(self):
        return self.directory / "qubesd.sock"

    def __enter__(self):
        place = self.server.socket.parent
        for folder in ("bin", "qubes-rpc", "dom0"):
            (self.directory / folder).mkdir()
            for program in (place / folder).iterdir():
                if program.name in _PASSED_ON:
                    (self.directory / folder / program.name).symlink_to(program)
                elif not program.name.startswith(("qvm-", "qubes-")):
                    self._wrap(folder, program)
        (self.directory / "calls").mkdir()
        self._proxy = socketserver.ThreadingUnixStreamServer(
            str(self.socket), _handler(self)
        )
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_exc):
        self._proxy.shutdown()
        self._proxy.server_close()

    def _wrap(self, folder, program):
        wrapper = self.directory / folder / program.name
        words = [sys.executable, PROGRAM, self.directory / "calls", program]
        line = " ".join(f"'{word}'" for word in words)
        wrapper.write_text(f'#!/bin/sh\nexec {line} "$@"\n')
        wrapper.chmod(0o755)

    def add(self, began, call):
        """Take note of a call: when it began, and what it was."""
        self._calls.append((began, call))

    def step(self, words, data, done):
        """Take note of a tool that has run."""
        for path in (self.directory / "calls").iterdir():
            self.add(*json.loads(path.read_text()))
            path.unlink()
        calls = [call for _, call in sorted(self._calls, key=lambda pair: pair[0])]
        self._calls = []
        texts = {
            "tool": words,
            "input": data,
            "status": done.returncode,
            "stdout": done.stdout,
            "stderr": done.stderr,
            "calls": calls,
        }
        for call in calls:
            reply = call.get("reply", "")
            self.names.learn(reply)
            self.names.learn(call.get("request", "") + reply)
        self.steps.append(self._hide(texts))

    def _hide(self, value):
        if isinstance(value, str):
            return FIGURES.sub(r"\1=<n>", self.names.hide(value))
        if isinstance(value, list):
            return [self._hide(each) for each in value]
        if isinstance(value, dict):
            return {key: self._hide(each) for key, each in value.items()}
        return value

    def write(self, path: Path, client: str) -> None:
        """Write the recording, and which client it is of."""
        path.parent.mkdir(exist_ok=True)
        text = json.dumps({"client": client, "steps": self.steps}, indent=1)
        path.write_text(text + "\n")


def _handler(recorder):
    class Handler(socketserver.BaseRequestHandler):
        """Passes a request on, and the reply back."""

        def handle(self):
            request = self.request.makefile("rb").read().decode("latin-1")
            call = {"request": request, "reply": ""}
            recorder.add(time.monotonic(), call)
            with socket.socket(socket.AF_UNIX) as upstream:
                upstream.connect(str(recorder.server.socket))
                upstream.sendall(request.encode("latin-1"))
                upstream.shutdown(socket.SHUT_WR)
                if request.startswith(_STREAMS):
                    threading.Thread(
                        target=self.wait_gone, args=(upstream,), daemon=True
                    ).start()
                while part := upstream.recv(65536):
                    call["reply"] += part.decode("latin-1")
                    with contextlib.suppress(OSError):
                        self.request.sendall(part)

        def wait_gone(self, upstream):
            """End a stream of events when the tool that reads it goes."""
            poll = select.poll()
            poll.register(self.request, 0)
            poll.poll()
            with contextlib.suppress(OSError):
                upstream.shutdown(socket.SHUT_RDWR)

    return Handler


class MismatchError(AssertionError):
    """The server says something else than when it was recorded."""


class Replay:
    """Says to a server what tools said, and compares the answers.

    :param server: a `Served`.
    :param steps: the recording.
    """

    def __init__(
        self, server: Served, steps: list[dict[str, Any]], names: Names
    ) -> None:
        self.server, self.names = server, names
        self._steps = iter(steps)
        self._messages: dict[str, str] = {}

    def run(self, words, data):
        """Do what a tool did; return what it would print, and its exit status."""
        step = next(self._steps, None)
        if step is None:
            raise MismatchError(f"no recording of {words}")
        wanted = [self.names.show(word) for word in step["tool"]]
        if (wanted, self.names.show(step["input"])) != (words, data):
            raise MismatchError(f"recorded is {wanted}, not {words}: record it anew")
        streams = []
        try:
            for call in step["calls"]:
                if "program" in call:
                    self._program(call)
                elif call["request"].startswith(_STREAMS):
                    streams.append((*self._stream(call), call))
                else:
                    self._request(call)
            for _, events, found, call in streams:
                self._events(events, found, call)
        finally:
            for connection, *_ in streams:
                connection.close()
        texts = (self.names.show(step["stdout"]), self._now(step["stderr"]))
        return subprocess.CompletedProcess(words, step["status"], *texts)

    def _now(self, text):
        """Return what a tool prints, with what the server says today."""
        text = self.names.show(text)
        for former, present in self._messages.items():
            text = text.replace(former, present)
        return text

    def _connect(self, call):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT)
        connection.connect(str(self.server.socket))
        connection.sendall(self.names.show(call["request"]).encode("latin-1"))
        connection.shutdown(socket.SHUT_WR)
        return connection

    def _request(self, call):
        with self._connect(call) as connection:
            reply = connection.makefile("rb").read().decode("latin-1")
        self._compare(call, call.get("reply", ""), reply)

    def _compare(self, call, wanted, found):
        kind = wanted[:2]
        if found[:2] != kind:
            raise MismatchError(
                f"{call['request']!r}: expected {wanted!r}, got {found!r}"
            )
        if kind == "2\0":
            self._compare_errors(call, wanted, found)
            return
        lines = found[2:].split("\n")
        for line in wanted[2:].split("\n"):
            if not any(self._same(line, each) for each in lines):
                said = f"expected a line {line!r}, got {found!r}"
                raise MismatchError(f"{call['request']!r}: {said}")

    def _compare_errors(self, call, wanted, found):
        (_, kind, _, former, _), (_, now, _, present, _) = (
            text.split("\0", 4) for text in (wanted, found)
        )
        if kind != now:
            raise MismatchError(
                f"{call['request']!r}: expected {wanted!r}, got {found!r}"
            )
        # the tool prints it; what it says may change, and the test looks at that
        former = self.names.show(former.replace("%%", "%"))
        self._messages[former] = present.replace("%%", "%")

    def _same(self, wanted, found):
        # which default a property has may change
        of_wanted, of_found = DEFAULT.fullmatch(wanted), DEFAULT.fullmatch(found)
        if of_wanted and of_found:
            return self.names.match(of_wanted[1], of_found[1])
        return self.names.match(wanted, found)

    def _stream(self, call):
        connection = self._connect(call)
        events = read_events(connection.makefile("rb"))
        # from when it has answered it has all that happens
        return connection, events, [_named(next(events))]

    def _events(self, events, found, call):
        """Wait for the events that were recorded, in their order."""
        for event in read_events(io.BytesIO(call["reply"].encode("latin-1"))):
            wanted = tuple(self.names.show(each) for each in _named(event))
            try:
                while found[-1] != wanted:
                    found.append(_named(next(events)))
            except (OSError, StopIteration):
                raise MismatchError(f"expected event {wanted}, got {found}") from None
            found.append(None)

    def _program(self, call):
        program = self.server.socket.parent / self.names.show(call["program"])
        words = [self.names.show(word) for word in call["arguments"]]
        done = subprocess.run(
            [program, *(word.encode("latin-1") for word in words)],
            input=self.names.show(call["input"]).encode("latin-1"),
            env=os.environ | call["environment"],
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
        what = f"{call['program']} {call['arguments']}"
        stdout, stderr = (x.decode("latin-1") for x in (done.stdout, done.stderr))
        if call["stdout"][1:2] == "\0":
            self._compare({"request": what}, call["stdout"], stdout)
        elif not self.names.match(call["stdout"], stdout):
            raise MismatchError(f"{what}: expected {call['stdout']!r}, got {stdout!r}")
        if (done.returncode, stderr) != (
            call["status"],
            self.names.show(call["stderr"]),
        ):
            said = f"expected {call['status']}, {call['stderr']!r}"
            raise MismatchError(f"{what}: {said}, got {done.returncode}, {stderr!r}")


def _named(event):
    return event.subject, event.name
