"""The way into runs under way, from outside of their sandboxes.

Each process that has VMs answers on the socket of a `CallServer` in its part of the
run's directory: a server of ``serve``, and whatever runs tests. The event loop does,
which no test can hold up.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.exc import HarnessError, UsageError
from qubes_itests.host import rundir
from qubes_itests.serve.place import Place
from qubes_itests.serve.wire import (
    EXIT,
    HEADER,
    LONGEST,
    STATUS,
    STDOUT,
    connectable,
    frame,
    read_header,
)
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import UnionType

    from qubes_itests.host.cache import Cache

__all__ = ["Reached", "under_way"]

#: Seconds that a run has to say what it does.
_TIMEOUT: Final = 10.0
#: That it may say: a VM takes fewer than a hundred bytes.
_MOST_BYTES: Final = 4 << 20
#: Process, user and group of the other end of a socket; see unix(7).
_CREDENTIALS: Final = struct.Struct("3i")
#: What a status has of each VM, and of a test if one runs.
_VM: Final = {"name": str, "state": str, "memory": int | None}
_TEST: Final = {"test": str, "phase": str, "seconds": int | float, "waits": str}


@dataclass(frozen=True, slots=True)
class Reached:
    """A process of a run that answers.

    :param name: of the run, and that of the worker if it has several.
    :param socket: where it answers.
    """

    name: str
    socket: Path

    def status(self) -> dict[str, Any]:
        """Return what it does, as `CallServer` tells it, and its ``pid``.

        :raise HarnessError: when it does not answer, or as no run does.
        """
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                deadline = time.monotonic() + _TIMEOUT
                connection.settimeout(_TIMEOUT)
                connection.connect(connectable(str(self.socket)))
                connection.sendall(frame(STATUS))
                answer = bytearray()
                # of all together: what sends a byte now and then could hold up `ps`
                while part := connection.recv(LONGEST):
                    answer += part
                    if len(answer) > _MOST_BYTES:
                        raise ValueError(f"it says more than {_MOST_BYTES} bytes")  # noqa: TRY301
                    connection.settimeout(max(0.001, deadline - time.monotonic()))
                # not what it says of itself: in its sandbox it has another number
                options = (socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                pid, *_owner = _CREDENTIALS.unpack(connection.getsockopt(*options))
            return {**_status(bytes(answer)), "pid": pid}
        except (OSError, ValueError) as error:
            reason = safe_text(str(error) or type(error).__name__)
            raise HarnessError(f"run {self.name} does not answer: {reason}") from error


def _status(answer: bytes) -> dict[str, Any]:
    """Return what the frames of an answer say.

    :raise ValueError: it is no status.
    """
    stream, said, kind = io.BytesIO(answer), b"", STATUS
    while kind != EXIT:
        kind, length = read_header(stream.read(HEADER.size))
        data = stream.read(length)
        said += data if kind == STDOUT else b""
    try:
        status: object = json.loads(said)
    except RecursionError:
        status = None
    match status:
        case {"vms": list(vms), **rest} if all(_has(vm, _VM) for vm in vms) and (
            not rest.get("test") or _has(rest, _TEST)
        ):
            return {str(name): value for name, value in rest.items()} | {"vms": vms}
    raise ValueError(f"expected a status, got {said[:60]!r}")


def _has(value: object, fields: Mapping[str, type | UnionType]) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), kind) for name, kind in fields.items()
    )


def under_way(cache: Cache) -> Iterator[Reached]:
    """Yield what can be reached of the runs that are alive.

    :raise UsageError: when they are another user's.
    """
    try:
        for run in rundir.under_way(cache):
            with contextlib.suppress(FileNotFoundError):  # it has just ended
                # the others are those of workers
                for part in (run, *sorted(run.iterdir())):
                    path = Place.of_run(part).relay_socket
                    if path.is_socket():
                        yield Reached(str(part.relative_to(run.parent)), path)
    except PermissionError as error:
        raise UsageError(
            f"the runs in {cache.root} are another user's: {error.strerror}"
        ) from None
