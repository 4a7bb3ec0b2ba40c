"""The parts of one start, as a timeline has them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from qubes_itests.timeline import begin

if TYPE_CHECKING:
    from qubes_itests.timeline import Value

__all__ = ["StartRecord"]


class StartRecord:
    """A start under way.

    :param vm: name of the VM that starts.
    """

    def __init__(self, vm: str) -> None:
        self._span = begin("start", vm)
        self._began = time.monotonic()
        #: What each part took, in seconds; the last one is under way.
        self._times: list[tuple[str, float]] = []

    def part(self, name: str) -> None:
        """Begin the next part, in words that follow "could not"."""
        self._times.append((name, time.monotonic()))
        self._span.update(steps=self._steps())

    def _steps(self, end: float | None = None) -> list[Value]:
        ends = [*(begun for _, begun in self._times[1:]), end]
        return [
            [name, None if end is None else round(end - begun, 6)]
            for (name, begun), end in zip(self._times, ends, strict=False)
        ]

    def succeeded(self) -> float:
        """Take note that the VM has started; return how many seconds that took."""
        end = time.monotonic()
        # one whose saved state does not load, boots
        booted = any(name == "start its domain" for name, _ in self._times)
        self._span.end(ok=True, warm=not booted, steps=self._steps(end))
        return end - self._began

    def failed(self) -> None:
        """Take note that it has not, unless it has before."""
        self._span.end(ok=False, steps=self._steps(time.monotonic()))
