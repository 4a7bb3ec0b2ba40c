"""The shell's session: a raw terminal on this side, a pseudo-terminal in the guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import sys
import termios
import tty
from typing import TYPE_CHECKING, Any

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.shell.telnet import TelnetClient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.portal import Portal

__all__ = ["NoTerminalError", "open_shell", "require_terminal"]

_STDIN, _STDOUT = 0, 1
_CHUNK = 65536
#: Seconds for a command that prepares the session.
_PREPARE_TIMEOUT = 20.0

_PREPARE = """
mkdir -p /dev/pts && { [ -e /dev/pts/ptmx ] || mount -t devpts devpts /dev/pts; }
cat >%(script)s && chmod 700 %(script)s
"""
_SCRIPT = """\
#!/bin/sh
export TERM=%(term)s HOME=/root
cd; /bin/sh -l
echo $? >%(script)s.status
"""
_FINISH = "cat %(script)s.status; rm -f %(script)s %(script)s.status"


class NoTerminalError(HarnessError):
    """A shell was asked for, and nobody sits at a terminal.

    :param what: the option or command that asked.
    """

    exit_code = ExitCode.USAGE_ERROR

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} opens a shell, and there is no terminal to use it on")
        self.what = what


def require_terminal(what: str) -> None:
    """Raise NoTerminalError unless input and output are a terminal."""
    if not (os.isatty(_STDIN) and os.isatty(_STDOUT)):
        raise NoTerminalError(what)


def open_shell(portal: Portal, vm: Any) -> int:
    """Let the person at the terminal use a root shell in a running VM.

    :param portal: runs the VM's loop.
    :param vm: a running VM with busybox in it, as the core knows it.
    :return: the shell's exit status.
    :raise HarnessError: when the VM cannot give one.
    """
    names = {
        "script": f"/tmp/.shell-{secrets.token_hex(4)}",  # noqa: S108 - in the guest
        "term": _terminal_type(),
    }
    script = (_SCRIPT % names).encode()
    _run(portal, vm, _PREPARE % names, script)
    client = TelnetClient(*shutil.get_terminal_size())
    with _raw_terminal():
        portal.run(_session(vm, f"telnetd -i -l {names['script']}", client))
    status = _run(portal, vm, _FINISH % names).strip()
    return int(status) if re.fullmatch(rb"[0-9]{1,3}", status) else 1


def _run(portal: Portal, vm: Any, command: str, data: bytes = b"") -> bytes:
    asked = vm.ask(command, "give a shell", input=data, timeout=_PREPARE_TIMEOUT)
    output: tuple[bytes, bytes] = portal.run(asked)
    return output[0]


def _terminal_type() -> str:
    name = os.environ.get("TERM", "")
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,40}", name) else "linux"


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    sys.stdout.flush()
    before = termios.tcgetattr(_STDIN)
    tty.setraw(_STDIN)
    try:
        yield
    finally:
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, before)


async def _session(vm: Any, command: str, client: TelnetClient) -> None:
    pipe = asyncio.subprocess.PIPE
    process = await vm.run(command, user="root", stdin=pipe, stdout=pipe)
    loop = asyncio.get_running_loop()
    ended = loop.create_task(_show(process, client))
    loop.add_reader(_STDIN, _type, process, client)
    sizes = loop.create_task(_follow_size(process, client))
    try:
        await ended
    finally:
        loop.remove_reader(_STDIN)
        sizes.cancel()
        if process.returncode is None:
            process.kill()


def _type(process: Any, client: TelnetClient) -> None:
    data = os.read(_STDIN, 1024)
    if data:
        process.stdin.write(client.typed(data))
    else:
        asyncio.get_running_loop().remove_reader(_STDIN)
        process.stdin.write_eof()


async def _show(process: Any, client: TelnetClient) -> None:
    while data := await process.stdout.read(_CHUNK):
        shown, answer = client.receive(data)
        if answer:
            process.stdin.write(answer)
        await asyncio.to_thread(_write_all, shown)
    await process.wait()


def _write_all(data: bytes) -> None:
    while data:
        data = data[os.write(_STDOUT, data) :]


async def _follow_size(process: Any, client: TelnetClient) -> None:
    # SIGWINCH reaches only the main thread, which waits; a look now and then will do.
    size = shutil.get_terminal_size()
    while True:
        await asyncio.sleep(0.3)
        if size != (size := shutil.get_terminal_size()):
            process.stdin.write(client.resized(*size))
