"""Templates made ready before a run: afterwards there is no network."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["prepare"]

#: Seconds between two lines where there is no terminal.
_PLAIN_INTERVAL: Final = 10.0
_WIDTH: Final = 78


def prepare(names: Sequence[str]) -> None:
    """Fetch and build those templates that need a network; others are left alone.

    Blocking; what goes on is told on standard error. What is there already takes a
    few milliseconds.

    :param names: of templates; unknown ones are left to who uses them.
    :raise EnvironmentNotReadyError: one cannot be fetched.
    :raise ImageError: one does not build.
    """
    if set(names) <= {"tiny"}:
        return  # the usual case need not load what follows
    from qubes_itests.assembly import offers  # noqa: PLC0415
    from qubes_itests.bundled import registry  # noqa: PLC0415
    from qubes_itests.host.cache import Cache  # noqa: PLC0415
    from qubes_itests.host.kernel import find_kernel  # noqa: PLC0415

    plugins, cache = registry(), Cache()
    downloads, builds = offers(plugins, "downloads"), offers(plugins, "templates")
    for name in names:
        if name in downloads:
            progress = _Progress(name)
            try:
                downloads[name](cache, progress.say)
                progress.say("making its image", quiet=True)
                builds[name](cache, find_kernel(cache))
            finally:
                progress.end()


class _Progress:
    """One line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin = time.monotonic()
        self._last = float("-inf")
        self._drawn = False
        self._terminal = sys.stderr.isatty()

    def say(self, phrase: str, *, quiet: bool = False) -> None:
        """Show what goes on.

        :param quiet: show it only if something was shown before.
        """
        now = time.monotonic()
        if quiet and not self._drawn:
            return
        if not self._terminal and now - self._last < _PLAIN_INTERVAL:
            return
        self._last, self._drawn = now, True
        seconds = now - self._begin
        line = f"building template {self._name}: {phrase} ({seconds:.0f} s)"
        if self._terminal:
            sys.stderr.write(f"\r{line[:_WIDTH]}\033[K")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave a line that says how long it took, if there was something to see."""
        if self._drawn:
            start = "\r\033[K" if self._terminal else ""
            seconds = time.monotonic() - self._begin
            sys.stderr.write(f"{start}template {self._name}: {seconds:.0f} s\n")
