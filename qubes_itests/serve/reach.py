"""The way into runs under way, from outside of their sandboxes.

Each process that runs tests has a `CallServer` on a socket in its part of the run's
directory, which its event loop answers, whatever the test does.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.exc import HarnessError
from qubes_itests.host import rundir
from qubes_itests.serve.place import Place
from qubes_itests.serve.program import Relay, request
from qubes_itests.serve.wire import EXIT, STATUS, STDOUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qubes_itests.host.cache import Cache

__all__ = ["SOCKET", "Reached", "under_way"]

#: The socket, from the directory of the run or of a worker.
SOCKET: Final = "reach/qrexec.sock"
#: Seconds that a run has to say what it does: its event loop never waits.
_TIMEOUT: Final = 10.0


@dataclass(frozen=True, slots=True)
class Reached:
    """A process of a run that answers.

    :param name: of the run, and that of the worker if it has several.
    :param socket: where it answers.
    """

    name: str
    socket: Path

    def status(self) -> dict[str, Any]:
        """Return what it does: see `CallServer`.

        :raise HarnessError: when it does not answer.
        """
        try:
            relay = Relay(os.fspath(self.socket), request(STATUS))
            with relay.socket:
                relay.socket.settimeout(_TIMEOUT)
                relay.socket.sendall(relay.request)
                answer = b""
                for kind, data in relay.frames():
                    if kind == EXIT:
                        break
                    answer += data if kind == STDOUT else b""
            status: dict[str, Any] = json.loads(answer)
        except (OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise HarnessError(f"run {self.name} does not answer: {reason}") from error
        return status


def under_way(cache: Cache) -> Iterator[Reached]:
    """Yield what can be reached of the runs that are alive."""
    for run in rundir.under_way(cache):
        # the second are those of workers
        for path in sorted((*run.glob(SOCKET), *run.glob(f"*/{SOCKET}"))):
            yield Reached(str(path.parent.parent.relative_to(run.parent)), path)
        relay = Place.of_run(run).relay_socket
        if relay.is_socket():
            yield Reached(run.name, relay)
