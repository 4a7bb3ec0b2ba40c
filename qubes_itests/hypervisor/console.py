"""Console of a guest, in a file that cannot fill the disk."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import TYPE_CHECKING

from qubes_itests.timeline import lines
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.hypervisor.contract import Domain

__all__ = ["Console", "console_tail"]

#: Bytes of a console log's beginning and of its end that are always kept.
_HEAD = 128 << 10
_TAIL = 256 << 10
#: What the file may grow to before its middle is dropped.
_LIMIT = 1 << 20

_CHUNK = 64 << 10
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND

#: Of the log's end so much is looked at, and so many lines are shown in errors.
_SHOWN_BYTES = 16384
_SHOWN_LINES = 20

#: What Linux prints when it gives up; registers and stacks follow.
_PANIC = b"Kernel panic - not syncing"


class Console:
    """Collects what comes out of a named pipe, in its own thread.

    The pipe exists before the hypervisor opens it, so that nothing is lost; it ends
    when the last writer does.  The log holds the beginning and the end of what was
    printed, at most 1 MiB; where it dropped something a line says so.

    :param vm: whose it is.
    :param pipe: path of the two named pipes, less their `.in` and `.out`.
    :param log: the file; added to if it exists.
    """

    def __init__(self, vm: str, pipe: Path, log: Path) -> None:
        self._vm = vm
        self._paths = [pipe.with_name(pipe.name + end) for end in (".in", ".out")]
        self._log = log
        self._thread: threading.Thread | None = None
        self._last = b""
        self._dropped = 0
        #: Held while the thread writes, so that the log can be exchanged.
        self._writing = threading.Lock()
        self._target = -1
        #: Whether what is printed is the kernel's word, since nobody else could.
        self.trusted = True
        #: Whether the kernel has said, since `open`, that it panicked.
        self.panicked = False

    def open(self) -> None:
        """Make the pipes and begin to collect. Blocking."""
        self._unlink()  # those of a run that ended badly
        self._last, self.panicked, self.trusted = b"", False, True
        for path in self._paths:
            os.mkfifo(path, 0o600)
        # without blocking, or it would wait for QEMU, which is started after this
        source = os.open(self._paths[1], os.O_RDONLY | os.O_NONBLOCK)
        self._target = os.open(self._log, _APPEND, 0o600)
        self._thread = threading.Thread(
            target=self._collect, args=(source,), name="console", daemon=True
        )
        self._thread.start()

    def move(self, vm: str, pipe: Path, log: Path) -> None:
        """Go on as the console of another VM, to whose log it adds. Blocking.

        Both ends of the pipes are open; they are moved, too.

        :param vm: as for the constructor, and so are the others.
        """
        with self._writing:
            self._vm, self._log = vm, log
            if self._target >= 0:  # else QEMU has gone
                os.close(self._target)
                self._target = os.open(log, _APPEND, 0o600)
            for path in self._paths:
                path.rename(pipe.with_name(pipe.name + path.suffix))
            self._paths = [pipe.with_name(pipe.name + end) for end in (".in", ".out")]

    def close(self, timeout: float = 5.0) -> None:
        """Wait until all that was printed is in the log; drop the pipes. Blocking."""
        thread, self._thread = self._thread, None
        if thread is not None:
            # The thread ends with the last writer. Where QEMU never opened the pipe
            # there was none, and it would wait for ever: be one that comes and goes.
            with contextlib.suppress(OSError):
                os.close(os.open(self._paths[1], os.O_WRONLY | os.O_NONBLOCK))
            # with a time limit: a process that QEMU left behind may hold the pipe
            thread.join(timeout)
        self._unlink()

    def _unlink(self) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _collect(self, source: int) -> None:
        poll = select.poll()
        poll.register(source, select.POLLIN)
        line = b""
        try:
            while True:
                poll.poll()
                try:
                    data = os.read(source, _CHUNK)
                except BlockingIOError:
                    continue
                if not data:
                    return
                if self.trusted:
                    # the words may be cut between two reads
                    recent = self._last + data
                    self.panicked |= _PANIC in recent
                    self._last = recent[-len(_PANIC) :]
                with self._writing:
                    self._append(data)
                line = lines("console", self._vm, line + data)
        finally:
            os.close(source)
            with self._writing:
                os.close(self._target)
                self._target = -1

    def _append(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk must not stop the guest
            os.write(self._target, data)
            if os.fstat(self._target).st_size > _LIMIT:
                self._shorten()

    def _shorten(self) -> None:
        """Replace the log by its beginning and its end."""
        short = self._log.with_name(self._log.name + ".short")
        with self._log.open("rb") as log:
            head = log.read(_HEAD)
            size = log.seek(0, os.SEEK_END)
            log.seek(size - _TAIL)
            tail = log.read(_TAIL)
        self._dropped += size - _HEAD - _TAIL
        gap = f"\n[about {self._dropped} bytes dropped]\n"
        short.write_bytes(head + gap.encode() + tail)
        short.chmod(0o600)
        # opened before the rename, closed after: there is a whole log under its name
        # all the time, for those who read it meanwhile
        replacement = os.open(short, os.O_WRONLY | os.O_APPEND)
        short.replace(self._log)
        os.close(self._target)
        self._target = replacement


def console_tail(domain: Domain) -> str:
    """Return the last lines of a domain's console log; empty when there is none.

    After a kernel panic those are the lines around its beginning.
    """
    try:
        with domain.console_log().open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _SHOWN_BYTES))
            data = file.read(_SHOWN_BYTES)
    except OSError:
        return ""
    shown = safe_text(data, lines=True, limit=None).splitlines()
    begin = last = max(0, len(shown) - _SHOWN_LINES)
    if domain.panicked:
        words = _PANIC.decode()
        panics = (number for number, line in enumerate(shown) if words in line)
        begin = min(max(0, next(panics, last) - _SHOWN_LINES // 2), last)
    return "\n".join(shown[begin : begin + _SHOWN_LINES]).strip()
