"""The frames between the daemon and the programs that the client tools call.

Frames: each is a kind, a length and so many bytes.  A program sends one `CALL`,
`IMPORT`, `TERMINAL` or `STATUS`, then `STDIN`, the last one empty, and for a terminal
`RESIZE` among them; the daemon sends `STDOUT` and `STDERR`, then `EXIT`.
This module uses the standard library alone, for it is a part of those programs too.
"""

import os
import struct

__all__ = [
    "CALL",
    "EXIT",
    "HEADER",
    "IMPORT",
    "LONGEST",
    "RESIZE",
    "STATUS",
    "STDERR",
    "STDIN",
    "STDOUT",
    "TERMINAL",
    "connectable",
    "frame",
    "read_header",
]

#: Kind and length.
HEADER = struct.Struct(">BI")
#: The most bytes that a frame carries.
LONGEST = 65536

#: VM, user, what to run and flags, with NULs between.
CALL = 1
#: VM, volume and Admin API method, likewise.
IMPORT = 2
STDIN = 3
STDOUT = 4
STDERR = 5
#: The exit status, as text.
EXIT = 6
#: VM, size (`80x24`) and type of a terminal on which a root shell runs, likewise.
TERMINAL = 7
#: Its new size, in the same form.
RESIZE = 8
#: Asks what goes on; the answer is JSON.
STATUS = 9


def frame(kind: int, data: bytes = b"") -> bytes:
    """Return the bytes of a frame."""
    return HEADER.pack(kind, len(data)) + data


def read_header(data: bytes) -> tuple[int, int]:
    """Return the kind and the length of a frame, of which this is the beginning.

    :raise ValueError: it is cut, or the frame is longer than any.
    """
    if len(data) < HEADER.size:
        raise ValueError(f"expected {HEADER.size} bytes of a header, got {len(data)}")
    kind, length = HEADER.unpack(data)
    if length > LONGEST:
        raise ValueError(f"expected {LONGEST} bytes at most, got a frame of {length}")
    return kind, length


#: Bytes that the path of a Unix socket may have; see unix(7).
_LONGEST_PATH = 107


def connectable(path: str) -> str:
    """Return a path of a socket that is short enough to connect to.

    Through a descriptor of its directory, if need be: that one is good for this process
    alone, for as long as it lives.
    """
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        return path
    directory, _, name = path.rpartition("/")
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{descriptor}/{name}"
