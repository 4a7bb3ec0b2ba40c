"""A program of dom0: hands its arguments and its streams over, and ends as told.

It is run as a file, by many: it imports what it needs and nothing else.
Its arguments are the socket, its name, and what it was called with.
"""

import json
import os
import socket
import sys


def main() -> int:
    """Return the exit status."""
    path, *words = sys.argv[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        environment = {k: v for k, v in os.environ.items() if k.startswith("QREXEC_")}
        message = json.dumps([words, environment]).encode()
        socket.send_fds(connection, [message], [0, 1, 2])
        # only the receiver holds them now, and ends them when the guest does
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        answer = connection.recv(16)
    return int(answer or b"255")


if __name__ == "__main__":
    sys.exit(main())
