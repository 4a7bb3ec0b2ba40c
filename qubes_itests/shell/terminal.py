"""The terminal of a person: raw while a guest has it, and as before afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import tty
from typing import TYPE_CHECKING, NamedTuple

from qubes_itests.exc import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["RawTerminal", "raw_terminal", "require_terminal", "size"]

_STDIN, _STDOUT = 0, 1
#: What programs of a guest may have switched on, switched off again: attributes, keys
#: of applications, the other screen (1047: the cursor stays where it is), reports of
#: the mouse and of the focus, marks around what is pasted; and the cursor switched on.
_MODES_OFF = (
    b"\x1b[0m\x1b[?1l\x1b>\x1b[?7h\x1b[?1047l\x1b[?1000l\x1b[?1002l\x1b[?1003l"
    b"\x1b[?1004l\x1b[?1006l\x1b[?2004l\x1b[?25h"
)


class RawTerminal(NamedTuple):
    """Descriptors of the terminal that do not block, for as long as it is raw."""

    input: int
    output: int


def require_terminal(what: str) -> None:
    """Raise UsageError unless input and output are a terminal.

    :param what: the option or command that opens a shell.
    """
    if not (os.isatty(_STDIN) and os.isatty(_STDOUT)):
        raise UsageError(f"{what} opens a shell, and there is no terminal to use it on")


def size() -> tuple[int, int]:
    """Return the columns and rows of the terminal; 80 and 24 where it does not say."""
    try:
        columns, rows = os.get_terminal_size(_STDOUT)
    except OSError:  # it has gone
        columns = rows = 0
    return columns or 80, rows or 24


@contextlib.contextmanager
def raw_terminal(resized: Callable[[], None]) -> Iterator[RawTerminal]:
    """Have the terminal pass on every key and show every byte. In the main thread.

    On leaving, however that is, it has the modes that it had before.

    :param resized: called when its size has changed, in the midst of whatever the main
        thread does then.
    :raise OSError: the terminal has gone.
    """
    sys.stdout.flush()
    with contextlib.ExitStack() as stack:
        # Opened anew: not to block is of the open file, which others have as well (the
        # user's shell, to begin with).
        descriptors = []
        for number, mode in ((_STDIN, os.O_RDONLY), (_STDOUT, os.O_WRONLY)):
            flags = mode | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            descriptors.append(os.open(f"/proc/self/fd/{number}", flags))
            stack.callback(os.close, descriptors[-1])
        terminal = RawTerminal(*descriptors)
        try:
            modes = termios.tcgetattr(terminal.input)
        except termios.error as error:
            raise OSError(*error.args) from None
        # Before the first change, so that an interrupt finds what is to be undone.
        stack.callback(_restore, terminal, modes)
        before = signal.signal(signal.SIGWINCH, lambda *_: resized())
        stack.callback(signal.signal, signal.SIGWINCH, before or signal.SIG_DFL)
        tty.setraw(terminal.input, termios.TCSADRAIN)
        yield terminal


def _restore(terminal: RawTerminal, modes: list[object]) -> None:
    # A terminal that has gone has no modes. At once (TCSANOW), as one that is stopped
    # by a key would not be drained.
    with contextlib.suppress(termios.error):
        # What answers a query of the guest is no command to what reads next.
        termios.tcflush(terminal.input, termios.TCIFLUSH)
        termios.tcsetattr(terminal.input, termios.TCSANOW, modes)  # type: ignore[arg-type]
    if os.environ.get("TERM", "dumb") != "dumb":
        with contextlib.suppress(OSError):
            os.write(terminal.output, _MODES_OFF)
