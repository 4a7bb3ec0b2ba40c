"""The programs that the client tools call: ``qrexec-client`` and volume imports.

Run as ``program.py SOCKET qrexec-client ARGUMENTS`` or ``program.py SOCKET METHOD
VOLUME``; relays standard streams to the daemon and back, and exits as it says.  It uses
the standard library alone, and little of that, so that it starts at once.
"""

from __future__ import annotations

import getopt
import os
import signal
import socket
import subprocess
import sys
import threading

sys.path += [os.path.dirname(os.path.abspath(__file__))]  # noqa: PTH100, PTH120

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from qubes_itests.serve.wire import (
        CALL,
        EXIT,
        HEADER,
        IMPORT,
        LONGEST,
        STDERR,
        STDIN,
        STDOUT,
        connectable,
        frame,
    )
else:
    from wire import (
        CALL,
        EXIT,
        HEADER,
        IMPORT,
        LONGEST,
        STDERR,
        STDIN,
        STDOUT,
        connectable,
        frame,
    )

USAGE = 2
GONE = 255
#: What a terminal may be sent by a VM; all else could be commands to the terminal.
SAFE = bytes(range(0x20, 0x7F)) + b"\t\n\r"
FILTER = bytes(byte if byte in SAFE else ord("_") for byte in range(256))


def main(arguments: list[str]) -> int:
    """Do what the arguments say, and return the exit status."""
    address, name, *rest = arguments
    if name == "qrexec-client":
        return qrexec_client(address, rest)
    target = os.environ.get("QREXEC_REQUESTED_TARGET", "")
    request = "\0".join((target, *rest[:1], name))
    return Relay(address, frame(IMPORT, request.encode())).run()


def qrexec_client(address: str, arguments: list[str]) -> int:
    """Do what qrexec-client(1) of dom0 does, as far as client tools use it."""
    try:
        options, words = getopt.getopt(arguments, "d:l:w:tTeEW")
    except getopt.GetoptError as error:
        return complain(str(error))
    given = dict(options)
    if "-d" not in given or len(words) != 1:
        return complain("it takes -d VM and USER:COMMAND")
    flags = "detach" if "-e" in given else ""
    request = frame(CALL, "\0".join((given["-d"], words[0], flags)).encode())
    relay = Relay(address, request, "-t" in given, "-T" in given)
    return relay.run_with(given["-l"]) if "-l" in given else relay.run()


def complain(problem: str) -> int:
    """Say what is wrong with the arguments."""
    sys.stderr.write(f"qrexec-client: {problem}\n")
    return USAGE


class Relay:
    """A connection to the daemon, and the streams that it is relayed to.

    :param address: of the socket.
    :param request: the first frame.
    :param filter_stdout: whether to pass on only what is safe for a terminal.
    :param filter_stderr: likewise.
    """

    def __init__(
        self,
        address: str,
        request: bytes,
        filter_stdout: bool = False,  # noqa: FBT001, FBT002
        filter_stderr: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(connectable(address))
        self.request = request
        self.filters = {
            STDOUT: FILTER if filter_stdout else None,
            STDERR: FILTER if filter_stderr else None,
        }

    def run(self, source: int = 0, target: int = 1) -> int:
        """Relay until the end, and return the exit status.

        :param source: descriptor of the standard input.
        :param target: of the standard output.
        """
        self.socket.sendall(self.request)
        threading.Thread(target=self.feed, args=(source,), daemon=True).start()
        targets = {STDOUT: target, STDERR: 2}
        for kind, data in self.frames():
            if kind == EXIT:
                return int(data)
            table = self.filters[kind]
            write(targets[kind], data.translate(table) if table else data)
        return GONE

    def run_with(self, command: str) -> int:
        """Relay to the streams of a command of our own."""
        with subprocess.Popen(  # noqa: S602 - that is what -l is
            command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as local:
            assert local.stdin is not None and local.stdout is not None  # noqa: S101, PT018
            status = self.run(local.stdout.fileno(), local.stdin.fileno())
            local.stdin.close()
        return status

    def feed(self, source: int) -> None:
        """Send what is read."""
        try:
            while data := os.read(source, LONGEST):
                self.socket.sendall(frame(STDIN, data))
            self.socket.sendall(frame(STDIN))
        except OSError:
            return  # nobody listens any more, or there is no input

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Yield what the daemon sends."""
        stream: BinaryIO = self.socket.makefile("rb")
        while header := stream.read(HEADER.size):
            kind, length = HEADER.unpack(header)
            yield kind, stream.read(length)


def write(descriptor: int, data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # nobody reads our output: that ends other programs by this signal
        code = 128 + signal.SIGPIPE
    except OSError as error:
        sys.stderr.write(f"qrexec-client: {error}\n")
        code = GONE
    sys.stdout.flush()
    # the thread that reads the input may wait for ever
    os._exit(code)
