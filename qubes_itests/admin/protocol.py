r"""The bytes of the Admin API: requests, replies, exceptions, events.

A request is ``METHOD+ARG SRC name DEST\0PAYLOAD`` up to the end of the stream; instead
of ``name DEST`` it may say ``keyword adminvm``.  A reply begins with ``0``, ``1`` (an
event) or ``2`` (an exception), and a NUL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "LONGEST_REQUEST",
    "Request",
    "encode_event",
    "encode_exception",
    "encode_reply",
    "encode_request",
    "parse_request",
]

#: The most bytes that a request may have, header and payload.
LONGEST_REQUEST: Final = 65536

# Fields that are too long are not a matter of framing: who sent them is answered.
_HEADER: Final = re.compile(
    rb"(?P<method>[A-Za-z0-9_.-]+)(?:\+(?P<argument>[!-~]*))?"
    rb" (?P<source>[!-~]+)"
    rb" (?:name (?P<destination>[!-~]+)|keyword adminvm)"
)


@dataclass(frozen=True, slots=True)
class Request:
    """One call of a method.

    :param method: its name.
    :param argument: what follows the ``+``; empty if nothing does.
    :param source: name of the VM that calls.
    :param destination: name of the VM that it is about, or ``uuid:UUID``.
    :param payload: all the rest.
    """

    method: str
    argument: str = ""
    source: str = "dom0"
    destination: str = "dom0"
    payload: bytes = b""

    def __str__(self) -> str:
        # the payload may be a secret, and is long
        return f"{self.method}+{self.argument} {self.source} -> {self.destination}"


def parse_request(data: bytes) -> Request:
    """Read a request.

    :param data: all that a client sent.
    :raise ValueError: when it is none.
    """
    if len(data) > LONGEST_REQUEST:
        raise ValueError(f"expected {LONGEST_REQUEST} bytes at most, got {len(data)}")
    header, nul, payload = data.partition(b"\0")
    if not nul:
        raise ValueError("expected a header that ends in NUL, got none")
    match = _HEADER.fullmatch(header)
    if match is None:
        raise ValueError(
            f"expected the header METHOD+ARG SRC name DEST, got {header[:80]!r}"
        )
    method, argument, source, destination = (
        (field or b"").decode("ascii") for field in match.groups()
    )
    return Request(method, argument, source, destination or "dom0", payload)


def encode_request(request: Request) -> bytes:
    """Return the bytes of a request."""
    header = (
        f"{request.method}+{request.argument} {request.source}"
        f" name {request.destination}"
    )
    return header.encode("ascii") + b"\0" + request.payload


def encode_reply(content: str) -> bytes:
    """Return the bytes that tell of success."""
    return b"0\0" + content.encode(errors="replace")


def encode_exception(name: str, message: str, traceback: str = "") -> bytes:
    """Return the bytes that make the client raise an exception.

    :param name: of its class.
    :param message: what it says; the client takes it for a format, hence ``%%``.
    :param traceback: for debugging; what it holds may be confidential.
    """
    fields = (name, traceback, message.replace("%", "%%"))
    return b"2\0" + b"".join(_field(text) for text in fields)


def encode_event(subject: str, event: str, values: Mapping[str, object]) -> bytes:
    """Return the bytes of one event.

    :param subject: name of the VM that it was fired on; empty for the app.
    :param event: its name.
    :param values: what it carries.
    """
    pairs = b"".join(_field(key) + _field(str(value)) for key, value in values.items())
    return b"1\0" + _field(subject) + _field(event) + pairs + b"\0"


def _field(text: str) -> bytes:
    # a NUL within would begin another field
    return text.replace("\0", "\\0").encode(errors="replace") + b"\0"
