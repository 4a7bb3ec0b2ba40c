"""Saves of an app: who asks while one is under way shares the next."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from qubes_itests.core.app import Qubes

__all__ = ["save"]


class _Saves:
    """The saves of one app; it is handed in, so that this does not keep it alive."""

    def __init__(self) -> None:
        self._current: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    def join(self, app: Qubes) -> asyncio.Task[None]:
        """Return a save that has not begun yet."""
        if self._next is None:
            self._next = asyncio.create_task(self._run(app, self._current))
            self._next.add_done_callback(_retrieve)
        return self._next

    async def _run(self, app: Qubes, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._current, self._next = self._next, None
        try:
            await app.save_async()
        finally:
            self._current = None


def _retrieve(task: asyncio.Task[None]) -> None:
    # who asked for it may be gone
    if not task.cancelled():
        task.exception()


_saves: Final[WeakKeyDictionary[Qubes, _Saves]] = WeakKeyDictionary()


async def save(app: Qubes) -> None:
    """Save an app; what it is now is on the disk when this returns.

    :raise StoreError: when it cannot be.
    """
    saves = _saves.setdefault(app, _Saves())
    await asyncio.shield(saves.join(app))
