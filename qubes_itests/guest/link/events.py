"""What the frames of a guest mean, as `HostProtocol` tells it."""

from __future__ import annotations

from typing import NamedTuple

from qubes_itests.guest.link.frames import ExitKind  # noqa: TC001 - NamedTuple evaluates

__all__ = [
    "Called",
    "Credited",
    "Done",
    "Ended",
    "Event",
    "Failed",
    "Logged",
    "Ready",
    "Received",
    "ReceivedEof",
    "Stopped",
]


class Ready(NamedTuple):
    """The agent answered HELLO."""


class Done(NamedTuple):
    """The pending request was carried out."""


class Failed(NamedTuple):
    """The pending request was not carried out."""

    reason: str


class Logged(NamedTuple):
    """A line for the agent log."""

    line: str


class Called(NamedTuple):
    """The guest opened a stream: a call that comes out of it."""

    stream: int
    target: str
    service: str
    user: str


class Received(NamedTuple):
    """Bytes of a channel; the view is valid until the next event is asked for."""

    stream: int
    channel: int
    data: memoryview


class ReceivedEof(NamedTuple):
    """The guest closed a channel that it writes."""

    stream: int
    channel: int


class Stopped(NamedTuple):
    """The guest does not read a channel any more."""

    stream: int
    channel: int


class Credited(NamedTuple):
    """The guest takes more bytes on a channel."""

    stream: int
    channel: int


class Ended(NamedTuple):
    """What ran in the guest has ended, and its stream with it."""

    stream: int
    kind: ExitKind
    value: int
    text: str


Event = (
    Ready
    | Done
    | Failed
    | Logged
    | Called
    | Received
    | ReceivedEof
    | Stopped
    | Credited
    | Ended
)
