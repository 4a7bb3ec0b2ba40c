"""The way into runs under way, from outside of their sandboxes.

Each process that has VMs answers on the socket of a `CallServer` in its part of the
run's directory: a server of ``serve``, and whatever runs tests. The event loop does,
which no test can hold up.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.exc import HarnessError, UsageError
from qubes_itests.host import rundir
from qubes_itests.serve.place import Place
from qubes_itests.serve.wire import EXIT, HEADER, STATUS, STDOUT, connectable, frame

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qubes_itests.host.cache import Cache

__all__ = ["Reached", "under_way"]

#: Seconds that a run has to say what it does.
_TIMEOUT: Final = 10.0
#: Process, user and group of the other end of a socket; see unix(7).
_CREDENTIALS: Final = struct.Struct("3i")


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

        :raise HarnessError: when it does not answer.
        """
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_TIMEOUT)
                connection.connect(connectable(str(self.socket)))
                connection.sendall(frame(STATUS))
                stream, answer, kind = connection.makefile("rb"), b"", STATUS
                while kind != EXIT:
                    kind, length = HEADER.unpack(stream.read(HEADER.size))
                    data = stream.read(length)
                    answer += data if kind == STDOUT else b""
                # not what it says of itself: in its sandbox it has another number
                options = (socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                pid, *_owner = _CREDENTIALS.unpack(connection.getsockopt(*options))
            return {**json.loads(answer), "pid": pid}
        except (OSError, ValueError, struct.error) as error:
            reason = str(error) or type(error).__name__
            raise HarnessError(f"run {self.name} does not answer: {reason}") from error


def under_way(cache: Cache) -> Iterator[Reached]:
    """Yield what can be reached of the runs that are alive.

    :raise UsageError: when they are another user's.
    """
    try:
        for run in rundir.under_way(cache):
            # the others are those of workers
            for part in (run, *sorted(run.iterdir())):
                path = Place.of_run(part).relay_socket
                if path.is_socket():
                    yield Reached(str(part.relative_to(run.parent)), path)
    except FileNotFoundError:
        return  # the run has just ended
    except PermissionError as error:
        raise UsageError(
            f"the runs in {cache.root} are another user's: {error.strerror}"
        ) from None
