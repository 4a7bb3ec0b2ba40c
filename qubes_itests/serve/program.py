"""The programs that the client tools call: ``qrexec-client`` and volume imports.

Run as ``program.py SOCKET qrexec-client ARGUMENTS`` or ``program.py SOCKET METHOD
VOLUME``; relays standard streams to the daemon and back, and exits as it says.  It uses
the standard library alone, and little of that, so that it starts at once.

Whoever calls it may pass on what others chose.  What is in an argument is shown as
``repr`` writes it, goes to the daemon as bytes, and is never a part of a path or of a
shell's command line; the one of ``-l`` is, which is what that option is for.
"""

from __future__ import annotations

import contextlib
import getopt
import os
import re
import signal
import socket
import subprocess
import sys
import threading

sys.path += [os.path.dirname(os.path.abspath(__file__))]

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
        read_header,
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
        read_header,
    )

USAGE = 2
NOT_FOUND = 127
#: How many files there may be that tools give to dom0 as block devices.
LOOPS = 256
GONE = 255
#: What a terminal may be sent by a VM; all else could be commands to the terminal.
SAFE = bytes(range(0x20, 0x7F)) + b"\t\n\r"
FILTER = bytes(byte if byte in SAFE else ord("_") for byte in range(256))

HELP = """\
usage: qrexec-client [OPTION]... -d VM [-e | -l COMMAND] USER:COMMAND
       qrexec-client [OPTION]... -d VM [-e | -l COMMAND] "USER:QUBESRPC SERVICE VM"
       qrexec-client [OPTION]... -d dom0 "DEFAULT:QUBESRPC SERVICE dom0"

  -d VM                    where the command runs; USER may be DEFAULT
  -e                       exit when it has been started
  -l COMMAND               connect it to this command, run by bash, and not to the
                           standard streams
  -p, --prefix-data=DATA   what it reads before anything else
  -t, -T                   replace bytes of its output, of its error output, that
                           could command a terminal by '_'
  -E, --no-exit-code       exit with 0 however it ends
  -k                       kill the VM before exiting
  -w SECONDS               taken for compatibility: a VM that runs is connected at once
  -W                       taken for compatibility: it is always waited for
  -c REQUEST,VM,ID         refused: the server connects calls between VMs by itself
  --socket-dir=DIRECTORY   where the sockets of the server are
  --use-stdin-socket       descriptor 0 is a stream socket, and takes the output too
  -h, --help               show this
"""
_LONG = ["help", "socket-dir=", "no-exit-code", "prefix-data=", "use-stdin-socket"]
#: What the daemon is told of, by option.
FLAGS = {"-e": "detach", "-E": "no-exit-code"}
_SHORT = {"--help": "-h", "--no-exit-code": "-E", "--prefix-data": "-p"}
#: As the C code counts seconds and domains.
_MOST = 2**31 - 1
_DOM0 = {"dom0", "@adminvm", "uuid:00000000-0000-0000-0000-000000000000"}
_SERVICE = re.compile(
    r"QUBESRPC (?P<name>[A-Za-z0-9_.-]+)(?P<argument>\+[!-~]*)?(?: [!-~]+)?"
)


class UsageError(Exception):
    """The arguments are not those of ``qrexec-client``."""


def main(arguments: list[str]) -> int:
    """Do what the arguments say, and return the exit status."""
    address, services, name, *rest = arguments
    if name == "qrexec-client":
        try:
            return QrexecClient(address, services, rest).run()
        except UsageError as error:
            sys.stderr.write(f"qrexec-client: {error}\n")
            return USAGE
    if name == "losetup":
        return losetup(*rest)
    target = os.environ.get("QREXEC_REQUESTED_TARGET", "")
    return Relay(address, request(IMPORT, target, *rest[:1], name)).run()


def losetup(folder: str, *words: str) -> int:
    """Do what ``losetup -f --show FILE`` does, as dom0 exposes block devices here.

    :param folder: of the links to what dom0 exposes.
    """
    if len(words) != 3 or words[:2] != ("-f", "--show"):  # noqa: PLR2004
        sys.stderr.write(f"losetup: expected -f --show FILE, got {words!r}\n")
        return USAGE
    path = os.path.abspath(words[2])
    os.stat(path)
    for number in range(LOOPS):
        link = os.path.join(folder, f"loop{number}")
        with contextlib.suppress(FileExistsError):
            os.symlink(path, link)
        if os.readlink(link) == path:
            sys.stdout.write(f"/dev/loop{number}\n")
            return 0
    sys.stderr.write(f"losetup: {folder} has {LOOPS} devices already\n")
    return 1


def request(kind: int, *fields: str) -> bytes:
    """Return the frame that asks for something; with the bytes that arguments had."""
    return frame(kind, b"\0".join(map(os.fsencode, fields)))


class QrexecClient:
    """What qrexec-client(1) of dom0 does.

    :param address: of the daemon's socket.
    :param services: the folder of the services of dom0.
    :param arguments: its own.
    :raise UsageError: when these are none of it.
    """

    def __init__(self, address: str, services: str, arguments: list[str]) -> None:
        self.services = services
        try:
            options, words = getopt.gnu_getopt(arguments, "hd:l:eEc:p:tTw:Wk", _LONG)
        except getopt.GetoptError as error:
            raise UsageError(f"{error.msg!r}; --help shows its options") from None
        pairs = [(_SHORT.get(option, option), value) for option, value in options]
        self.given = dict(pairs)
        self.words = words
        self.address = address
        if "--socket-dir" in self.given:
            name = os.path.basename(address)
            self.address = os.path.join(self.given["--socket-dir"], name)
        if "-h" not in self.given:
            if [option for option, _ in pairs].count("-p") > 1:
                raise UsageError("-p can be given once only")
            self._check()

    def _check(self) -> None:
        given = self.given
        if "-c" in given:
            if len(fields := given["-c"].split(",")) != 3:  # noqa: PLR2004
                raise UsageError(f"-c: expected REQUEST,VM,ID, got {given['-c']!r}")
            _number("-c", fields[2])
            raise UsageError(
                f"-c: no call waits as {fields[0]!r}: the server connects VMs by itself"
            )
        if "-w" in given:
            _number("-w", given["-w"])
        if "-e" in given and "-l" in given:
            raise UsageError("expected one of -e and -l, got both")
        if "--use-stdin-socket" in given:
            if "-l" in given:
                raise UsageError("expected one of -l and --use-stdin-socket, got both")
            _check_stdin()
        if "-d" not in given or len(self.words) != 1:
            raise UsageError(
                f"expected -d VM and one USER:COMMAND, got {self.words!r};"
                " --help shows its options"
            )

    def run(self) -> int:
        """Do it, and return the exit status."""
        given = self.given
        if "-h" in given:
            sys.stdout.write(HELP)
            return 0
        if given["-d"] in _DOM0:
            status = self._run_in_dom0(self.words[0])
        else:
            status = self._call(given["-d"])
        if "-k" in given:
            kill(self.address, given["-d"])
        return status

    def _call(self, vm: str) -> int:
        given = self.given
        words = [word for option, word in FLAGS.items() if option in given]
        relay = Relay(
            self.address,
            request(CALL, vm, self.words[0], " ".join(words)),
            os.fsencode(given.get("-p", "")),
            "-t" in given,
            "-T" in given,
        )
        if "-l" in given:
            text = given["-l"]
            shell = ["/bin/bash", "-c", text]
            is_service = text.startswith("QUBESRPC ")
            return relay.run_with(self._service(text) if is_service else shell, vm)
        return relay.run(target=0 if "--use-stdin-socket" in given else 1)

    def _service(self, text: str) -> list[str]:
        match = _SERVICE.fullmatch(text)
        if match is None:
            raise UsageError(f"expected QUBESRPC SERVICE VM, got {text!r}")
        path = os.path.join(self.services, match["name"])
        argument = (match["argument"] or "+")[1:]
        return [path, *([argument] if argument else [])]

    def _run_in_dom0(self, text: str) -> int:
        """Run a service of dom0, which is the machine of the caller."""
        user, _, rest = text.partition(":")
        if user != "DEFAULT" or not rest.startswith("QUBESRPC "):
            raise UsageError(
                f"in dom0 expected 'DEFAULT:QUBESRPC SERVICE dom0', got {text!r}"
            )
        if "-l" in self.given:
            raise UsageError("-l cannot be used with a service of dom0")
        command = self._service(rest)
        if not os.path.isfile(command[0]):
            sys.stderr.write(f"qrexec-client: dom0 has no service {rest.split()[1]}\n")
            return NOT_FOUND
        prefix = os.fsencode(self.given.get("-p", ""))
        status = run_service(command, prefix, "-t" in self.given, "-T" in self.given)
        return 0 if "-E" in self.given else status


def _number(option: str, text: str) -> None:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > _MOST:
        raise UsageError(f"{option}: expected a number up to {_MOST}, got {text!r}")


def _check_stdin() -> None:
    try:
        kind = socket.socket(fileno=os.dup(0)).type
    except OSError as error:
        raise UsageError(
            f"--use-stdin-socket: stdin is no socket: {error.strerror}"
        ) from None
    if kind != socket.SOCK_STREAM:
        raise UsageError(f"--use-stdin-socket: expected a stream socket, got {kind!r}")


def kill(address: str, vm: str) -> None:
    """Have the VM killed by the Admin API."""
    admin = os.path.join(os.path.dirname(address), "qubesd.sock")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(connectable(admin))
        connection.sendall(b"admin.vm.Kill+ dom0 name " + os.fsencode(vm) + b"\0")
        connection.shutdown(socket.SHUT_WR)
        reply = connection.makefile("rb").read()
    if not reply.startswith(b"0\0"):
        sys.stderr.write(f"qrexec-client: -k: {vm!r} could not be killed\n")


class Relay:
    """A connection to the daemon, and the streams that it is relayed to.

    :param address: of the socket.
    :param request: the first frame.
    :param prefix: input that goes before what is read.
    :param filter_stdout: whether to pass on only what is safe for a terminal.
    :param filter_stderr: likewise.
    """

    def __init__(
        self,
        address: str,
        request: bytes,
        prefix: bytes = b"",
        filter_stdout: bool = False,  # noqa: FBT001, FBT002
        filter_stderr: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(connectable(address))
        self.request = request
        self.prefix = prefix
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
        # Each direction has a thread, as either may block: with one for both a command
        # that writes much before it reads would wait for us, and we for it. The one
        # that feeds may wait for input for ever, which must not keep us from ending.
        threading.Thread(target=self.feed, args=(source,), daemon=True).start()
        targets = {STDOUT: target, STDERR: 2}
        for kind, data in self.frames():
            if kind == EXIT:
                return int(data)
            table = self.filters[kind]
            write(targets[kind], data.translate(table) if table else data)
        return GONE

    def run_with(self, command: list[str], vm: str) -> int:
        """Relay to the streams of a command of our own, which is told of the VM."""
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"QREXEC_REMOTE_DOMAIN": vm},
        ) as local:
            assert local.stdin is not None and local.stdout is not None  # noqa: S101, PT018
            status = self.run(local.stdout.fileno(), local.stdin.fileno())
            # the end of its input; what it does with that is waited for
            local.stdin.close()
        return status

    def feed(self, source: int) -> None:
        """Send what is read."""
        try:
            for start in range(0, len(self.prefix), LONGEST):
                part = self.prefix[start : start + LONGEST]
                self.socket.sendall(frame(STDIN, part))
            while data := os.read(source, LONGEST):
                self.socket.sendall(frame(STDIN, data))
            # The end of the input; the connection stays open, as its end means that
            # this program is gone, and with that the command.
            self.socket.sendall(frame(STDIN))
        except OSError:
            return  # nobody listens any more, or there is no input

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Yield what the daemon sends."""
        stream: BinaryIO = self.socket.makefile("rb")
        while header := stream.read(HEADER.size):
            kind, length = read_header(header)
            yield kind, stream.read(length)


def run_service(
    command: list[str],
    prefix: bytes,
    filter_stdout: bool,  # noqa: FBT001
    filter_stderr: bool,  # noqa: FBT001
) -> int:
    """Run a service of dom0 on the standard streams, and return its exit status.

    :param command: its words.
    :param prefix: input that goes before what is read.
    :param filter_stdout: whether to pass on only what is safe for a terminal.
    :param filter_stderr: likewise.
    """
    argument = command[1] if len(command) > 1 else ""
    settings = {
        "QREXEC_REMOTE_DOMAIN": "dom0",
        "QREXEC_REQUESTED_TARGET_TYPE": "name",
        "QREXEC_REQUESTED_TARGET": "dom0",
        "QREXEC_SERVICE_FULL_NAME": f"{os.path.basename(command[0])}+{argument}",
        "QREXEC_SERVICE_ARGUMENT": argument,
    }
    with subprocess.Popen(
        command,
        bufsize=0,
        env=os.environ | settings,
        stdin=subprocess.PIPE if prefix else None,
        stdout=subprocess.PIPE if filter_stdout else None,
        stderr=subprocess.PIPE if filter_stderr else None,
    ) as process:
        # the one that feeds may wait for input for ever
        if process.stdin is not None:
            words = (process.stdin, prefix)
            threading.Thread(target=feed, args=words, daemon=True).start()
        outputs = [
            threading.Thread(target=pass_filtered, args=(stream.fileno(), target))
            for stream, target in ((process.stdout, 1), (process.stderr, 2))
            if stream is not None
        ]
        for thread in outputs:
            thread.start()
        # before its status: what it has written is shown first
        for thread in outputs:
            thread.join()
        status = process.wait()
    return status if status >= 0 else 128 - status


def feed(target: BinaryIO, prefix: bytes) -> None:
    """Write the prefix, and then what is read."""
    try:
        write(target.fileno(), prefix)
        while data := os.read(0, LONGEST):
            write(target.fileno(), data)
        target.close()
    except (OSError, ValueError):
        return  # nobody reads any more, or there is no input


def pass_filtered(source: int, target: int) -> None:
    """Pass on what is safe for a terminal."""
    while data := os.read(source, LONGEST):
        write(target, data.translate(FILTER))


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
        reason = error.strerror or str(error)
        about = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"{sys.argv[3]}: {reason}{about}\n")
        code = GONE
    except ValueError as error:
        sys.stderr.write(f"{sys.argv[3]}: the server is none of ours: {error}\n")
        code = GONE
    sys.stdout.flush()
    # the thread that reads the input may wait for ever
    os._exit(code)
