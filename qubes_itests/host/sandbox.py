"""A run's sandbox: separate mount, PID, network and IPC namespaces.

When its first process goes, the system itself ends every other process in it and
drops every mount, and with the mounts their loop devices. Others are detached by a
process that waits outside for that. So nothing survives a run, even one that was
killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.program import typed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

__all__ = [
    "active",
    "command",
    "enter_outer_network",
    "ignored_signals",
    "interrupt_once",
    "interruptible",
    "last_words",
    "reexec",
    "require",
    "require_root",
]

_MARK = "QUBES_ITESTS_SANDBOX"
_NAMESPACES = ("mnt", "pid", "net", "ipc")
_INIT = Path(__file__).with_name("sandbox_init.py")
_ECHO = 0.5
#: As in sandbox_init.py.
_OUTER_NETWORK = "QUBES_ITESTS_OUTER_NETWORK"
_LAST_WORDS = "QUBES_ITESTS_LAST_WORDS"
#: Bytes of the file for them, all written at once: it never has half a text.
_WORDS = 1024
_CLONE_NEWNET = 0x40000000
#: The network that this process is to come back to.
_left: list[int] = []
#: The descriptor of the file for last words, once this process has used it.
_words: list[int] = []
#: Those that a process may be started to ignore; two more Python itself ignores, and
#: has children start with the default.
_INHERITED = signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def active() -> bool:
    """Return whether this process is in a sandbox.

    The mark in the environment must name this very process's namespaces: a mark that
    leaked to somewhere else does not count.
    """
    mark = os.environ.get(_MARK)
    return mark is not None and mark == _identity()


def require() -> None:
    """Demand to be in a sandbox.

    :raises EnvironmentNotReadyError: this process is not in one.
    """
    if not active():
        raise EnvironmentNotReadyError(
            "This makes mounts and processes, and would leave them on this machine.",
            f"Run it by {typed()}, or by pytest -p qubes_itests.",
            ExitCode.NO_SANDBOX,
        )


def require_root() -> None:
    """Demand to be root.

    :raises EnvironmentNotReadyError: this process is not.
    """
    if os.geteuid() != 0:
        raise EnvironmentNotReadyError(
            "Tests mount filesystems and make namespaces, which only root may.",
            "Run the same command with sudo.",
            ExitCode.NOT_ROOT,
        )


def reexec(argv: Sequence[str | Path] | None = None) -> None:
    """Go on in a sandbox: replace this process by its own command in a new one.

    Inside a sandbox it only arranges that SIGTERM and SIGHUP, like Ctrl-C, raise
    KeyboardInterrupt, and returns. Otherwise it does not return; the exit status is
    the command's (128 + number if a signal ended it), and signals are passed on.

    :param argv: the command to run inside; by default this process's own.
    :raises EnvironmentNotReadyError: only root may make the namespaces.
    """
    if active():
        _interrupt_on_signals()
        return
    require_root()
    _replace(argv or [sys.executable, *sys.orig_argv[1:]])


def command(argv: Sequence[str | Path], *, outer_network: bool = False) -> list[str]:
    """Return the command line that runs a command in a new sandbox.

    :param argv: the command to run inside.
    :param outer_network: whether the command may call `enter_outer_network`.
    """
    # Without site and without our package, the process that waits starts in a few
    # milliseconds and keeps little memory.
    launcher = [sys.executable, "-I", "-S", str(_INIT), _MARK]
    if outer_network:
        launcher.append("--outer-network")
    return launcher + [str(word) for word in argv]


def enter_outer_network() -> Callable[[], None]:
    """Have this thread be in the network outside of the sandbox until further notice.

    Its sockets stay where they were made.  Once: the way there is closed behind it.

    :return: a function that brings the thread back.
    """
    outer = os.environ.pop(_OUTER_NETWORK, None)
    if outer is None:
        return lambda: None
    # Not /proc/self, which is the main thread: each thread has namespaces, and this one
    # alone goes out.
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    _left.append(own)
    try:
        _set_network(int(outer))
    finally:
        os.close(int(outer))

    def back() -> None:
        _set_network(own)
        _left.remove(own)
        os.close(own)

    return back


def last_words(text: str) -> str:
    """Set what is said if this process ends before that is taken back.

    A test may end the process that it runs in, by os._exit, a signal or a crash. Then
    who waits outside says "exit status N TEXT", and the run fails, whatever N is. In
    processes that are not a sandbox's first command nothing is said.

    :param text: follows the status; empty to take back what was set.
    :return: what was set before.
    """
    if (inherited := os.environ.pop(_LAST_WORDS, None)) is not None:
        _words[:] = [int(inherited)]
        os.set_inheritable(_words[0], False)
    if not _words:
        return ""
    before = os.pread(_words[0], _WORDS, 0).rstrip(b"\0").decode(errors="replace")
    os.pwrite(_words[0], text.encode(errors="replace")[:_WORDS].ljust(_WORDS, b"\0"), 0)
    return before


def _set_network(namespace: int) -> None:
    # os.setns is there from Python 3.12 on
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")


def _replace(argv: Sequence[str | Path]) -> NoReturn:
    # exec drops what is buffered
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os.execv(sys.executable, command(argv))  # noqa: S606


def _identity() -> str:
    places = {name: f"/proc/self/ns/{name}" for name in _NAMESPACES}
    if _left:
        places["net"] = f"/proc/self/fd/{_left[-1]}"
    return ",".join(
        f"{name}:{os.stat(place).st_ino}"  # noqa: PTH116
        for name, place in places.items()
    )


def ignored_signals() -> list[int]:
    """Return the signals that this process was started to ignore.

    As nohup(1) does, and a shell for what runs in the background of a script.
    """
    ways = (signal.SIG_IGN, _stay)
    return sorted(int(n) for n in _INHERITED if signal.getsignal(n) in ways)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM and SIGHUP, like Ctrl-C, raise KeyboardInterrupt for a while.

    So what is half done is undone; without this the process ends at once. Nothing
    changes in a thread other than the main one.
    """
    changed = {*_ENDING, *ignored_signals()}
    before = {number: signal.getsignal(number) for number in changed}
    _interrupt_on_signals()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def interrupt_once() -> None:
    """Have only the first signal that ends a process raise KeyboardInterrupt.

    For a process that nobody sits at: who began it and ends it has the second word.
    """
    _interrupt_on_signals(echo=math.inf)


def _interrupt_on_signals(echo: float = _ECHO) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    ignored = ignored_signals()
    for number in ignored:
        # SIG_IGN would be passed on to all that we start, tests' commands included;
        # a function is not, and they begin with the default
        signal.signal(number, _stay)
    interrupt = _Interrupt(echo)
    for number in _ENDING:
        if number not in ignored:
            signal.signal(number, interrupt)


def _stay(_number: int, _frame: FrameType | None) -> None:
    """Ignore a signal."""


class _Interrupt:
    """Raises KeyboardInterrupt, once for one act of who wants the run to end.

    A signal to a whole process group comes twice: directly, and passed on by the
    sandbox's parent. The second must not break the clean-up that the first began.

    :param echo: seconds within which another signal is that of the same act.
    """

    def __init__(self, echo: float) -> None:
        self._echo = echo
        self._last = -math.inf

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        repeated = now - self._last < self._echo
        self._last = now
        if not repeated:
            raise KeyboardInterrupt
