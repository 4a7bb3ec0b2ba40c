"""Results that may be awaited although they are there already.

Part of the old interface is synchronous, part of it returns coroutines, and plugins do
not agree on which is which: ``p.wait()`` and ``loop.run_until_complete(p.wait())`` are
both written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["Done", "ExitStatus"]


class Done:
    """The end of something that returns nothing."""

    def __await__(self) -> Generator[None]:
        yield from ()


class ExitStatus(int):
    """An exit status; awaiting it gives the same number."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, int]:
        yield from ()
        return int(self)
