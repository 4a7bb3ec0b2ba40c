"""A small client of the Admin API: the bytes, and the errors they stand for."""

import contextlib
import socket
import threading
from dataclasses import dataclass, field


class AdminError(Exception):
    """An exception that the server answered with, as clients evaluate it."""

    def __init__(self, kind, text, traceback=""):
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text
        self.traceback = traceback


class EmptyReplyError(Exception):
    """The server closed the connection without a word."""


def frame(method, destination="dom0", argument="", payload=b"", source="dom0"):
    """Return the bytes of a request."""
    header = f"{method}+{argument} {source} name {destination}\0"
    return header.encode() + payload


def parse(reply):
    """Return the content of a reply, or raise what it says."""
    if not reply:
        raise EmptyReplyError
    if reply.startswith(b"0\0"):
        return reply[2:]
    if not reply.startswith(b"2\0"):
        raise ValueError(f"invalid reply {reply!r}")
    _, kind, traceback, text, arguments = reply.split(b"\0", 4)
    values = tuple(
        int(value) if value.isdigit() else value
        for value in (each.decode() for each in arguments.split(b"\0")[:-1])
    )
    raise AdminError(kind.decode(), text.decode() % values, traceback.decode())


@dataclass
class Event:
    subject: str
    name: str
    values: dict[str, str] = field(default_factory=dict)


class Client:
    """Calls over the socket, one connection each; blocking."""

    def __init__(self, path, timeout=300):
        self.path = str(path)
        self.timeout = timeout

    def exchange(self, data):
        """Send bytes, and return all that comes back."""
        with self._connection(data) as connection:
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def call(self, method, destination="dom0", argument="", payload=b""):
        """Call a method; return its content, or raise AdminError."""
        return parse(self.exchange(frame(method, destination, argument, payload)))

    @contextlib.contextmanager
    def events(self, destination="dom0", method="admin.Events"):
        """Give an iterator over events, until its block ends."""
        with (
            self._connection(frame(method, destination)) as connection,
            connection.makefile("rb") as stream,
        ):
            yield read_events(stream)

    @contextlib.contextmanager
    def _connection(self, data):
        with socket.socket(socket.AF_UNIX) as connection:
            # With a timeout, connect(2) does not wait for a place in a full backlog.
            connection.connect(self.path)
            connection.settimeout(self.timeout)
            # who is refused early sees it in the answer, or in its absence
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            yield connection


def _fields(stream):
    field_ = bytearray()
    while byte := stream.read(1):
        if byte == b"\0":
            yield field_.decode()
            field_.clear()
        else:
            field_ += byte


def read_events(stream):
    """Yield the events of a stream; AdminError if it is an exception instead."""
    fields = _fields(stream)
    for kind in fields:
        if kind != "1":
            raise AdminError(*[next(fields), next(fields), next(fields)][::2])
        event = Event(next(fields), next(fields))
        while key := next(fields):
            event.values[key] = next(fields)
        yield event


def wait_until(condition):
    """Wait until something is so; five minutes are the most."""
    pause = threading.Event()
    for _ in range(30_000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come to be")
