"""Lines on the daemon's socket.

``BYTES`` asks for free memory, ``DOMID:BYTES ...`` sets targets; both are answered
``OK``, ``FAIL`` or ``INVALID_ARG``.  Two more are ours: ``READY`` is answered ``OK``
once dom0 has reported, ``STATUS`` with one line of JSON.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "FAIL",
    "INVALID",
    "LONGEST_LINE",
    "OK",
    "READY",
    "STATUS",
    "Balloon",
    "SetMemory",
    "parse_request",
]

OK, FAIL, INVALID = b"OK\n", b"FAIL\n", b"INVALID_ARG\n"
READY, STATUS = b"READY\n", b"STATUS\n"
LONGEST_LINE = 1024

_BYTES = re.compile(rb"[0-9]{1,19}", re.ASCII)
_PAIR = re.compile(rb"([0-9]{1,10}):([0-9]{1,19})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Balloon:
    """A VM starts and asks for free memory.

    :param amount: bytes.
    """

    amount: int


@dataclass(frozen=True, slots=True)
class SetMemory:
    """Somebody sets targets.

    :param wishes: domains' numbers and bytes; 0 stands for the preferred memory.
    """

    wishes: tuple[tuple[str, int], ...]


def parse_request(untrusted: bytes) -> Balloon | SetMemory | None:
    """Return what a line asks for; None when it is none of the two requests."""
    words = untrusted.split()
    if len(words) == 1 and _BYTES.fullmatch(words[0]):
        return Balloon(int(words[0]))
    pairs = [_PAIR.fullmatch(word) for word in words]
    wishes = tuple((m[1].decode(), int(m[2])) for m in pairs if m is not None)
    distinct = len({domid for domid, _ in wishes}) == len(words)
    return SetMemory(wishes) if wishes and distinct else None
