"""Event loop of libvirt on asyncio, safe to be called from any thread.

libvirt calls its event loop from whatever thread it happens to be in, and the QEMU
driver has its own threads.  libvirtaio alone would touch asyncio from there; a
timer armed by such a thread would then sleep until something else wakes the loop.
Here every change is carried out by the loop's own thread.

libvirt takes one implementation for the life of a process, tests have a loop each:
so the one implementation moves to the running loop when a connection is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import libvirt
import libvirtaio

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EventLoop", "register_event_loop"]


class _Timer(libvirtaio.Callback):  # type: ignore[misc]
    """A timer without a task: that of libvirtaio looks like one that a test has left.

    And whoever cancels such a task stops the timer for good.
    """

    timeout = -1
    _next: asyncio.TimerHandle | None = None

    def update(self, timeout: int) -> None:
        """Go off every `timeout` milliseconds from now on; not at all if negative."""
        self.timeout = timeout
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if timeout >= 0:
            self._next = self.impl.loop.call_later(timeout / 1000, self._go_off)

    def _go_off(self) -> None:
        # first, as what libvirt does then may be to update or to close this
        self.update(self.timeout)
        self.cb(self.iden, self.opaque)

    def close(self) -> None:
        self.update(-1)
        super().close()


class EventLoop(libvirtaio.virEventAsyncIOImpl):  # type: ignore[misc]
    """libvirtaio's implementation, carried over to the loop's own thread."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._numbers = itertools.count(1)
        # By number. libvirt's threads and the loop's own change it without a lock:
        # each change is one call of a dict or of the counter, which the interpreter
        # does not interrupt. A lock would be held while libvirt holds its own, and
        # libvirt calls us with those held: that could be taken in both orders.
        self._entries: dict[int, libvirtaio.Callback] = {}

    def move(self, loop: asyncio.AbstractEventLoop) -> None:
        """Go on on another loop, with all that is still registered."""
        self.loop = loop
        for callback in list(self._entries.values()):
            if isinstance(callback, _Timer):
                callback.update(callback.timeout)
        for descriptor in list(self.descriptors.values()):
            descriptor.update()

    def _submit(self, call: Callable[..., Any], *args: Any) -> None:
        # Never carried out here, even in the loop's own thread: libvirt holds locks
        # when it calls, and what is registered may call straight back into it.
        # A closed loop gets no events; `move` registers again what is still wanted.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(call, *args)

    def schedule_ff_callback(self, iden: int, opaque: Any) -> None:
        """Let libvirt free what it had registered with an entry."""
        # In a later turn of the loop. libvirt may be dispatching the very entry that it
        # removes: freed in here, its memory would be used after.
        self._submit(libvirt.virEventInvokeFreeCallback, opaque)
        self._entries.pop(iden, None)

    def _add_handle(self, fd: int, event: int, cb: Any, opaque: Any) -> int:
        callback = libvirtaio.FDCallback(self, cb, opaque, descriptor=None, event=event)
        self._enter(callback)
        self._submit(self._watch, callback, fd)
        return int(callback.iden)

    def _watch(self, callback: libvirtaio.FDCallback, fd: int) -> None:
        # libvirt may have removed it before the loop came to this. A descriptor that is
        # watched all the same would be that of whatever has its number by then.
        if callback.iden in self._entries:
            callback.descriptor = self.descriptors[fd]
            callback.descriptor.add_handle(callback)

    def _update_handle(self, watch: int, event: int) -> None:
        self._submit(self._entries[watch].update, event)

    def _remove_handle(self, watch: int) -> int:
        callback = self._entries.pop(watch, None)
        if callback is None:
            return -1

        def unwatch() -> None:
            descriptor = callback.descriptor
            if descriptor is not None:
                descriptor.remove_handle(callback.iden)
                if not descriptor.callbacks:
                    self.descriptors.pop(descriptor.fd, None)
            # this has libvirt free what belongs to the entry, which is why it comes
            # last and in the loop's thread: its callback cannot be running there
            callback.close()

        self._submit(unwatch)
        return 0

    def _add_timeout(self, timeout: int, cb: Any, opaque: Any) -> int:
        callback = _Timer(self, cb, opaque)
        self._enter(callback)
        self._submit(callback.update, timeout)
        return int(callback.iden)

    def _update_timeout(self, timer: int, timeout: int) -> None:
        # gone if libvirt removed the timer in another thread meanwhile
        callback = self._entries.get(timer)
        if callback is not None:
            self._submit(callback.update, timeout)

    def _remove_timeout(self, timer: int) -> int:
        callback = self._entries.pop(timer, None)
        if callback is None:
            return -1
        self._submit(callback.close)
        return 0

    def _enter(self, callback: libvirtaio.Callback) -> None:
        callback.iden = next(self._numbers)
        self._entries[callback.iden] = callback


_registered: EventLoop | None = None


def register_event_loop() -> EventLoop:
    """Have libvirt's events dispatched by the running loop; return the implementation.

    The first call in a process must come before its first libvirt connection.
    """
    global _registered  # noqa: PLW0603 - libvirt itself has one per process
    loop = asyncio.get_running_loop()
    if _registered is None:
        _registered = EventLoop(loop).register()
    elif _registered.loop is not loop:
        _registered.move(loop)
    return _registered
