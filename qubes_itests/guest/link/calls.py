"""Calls of services that come out of a guest."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.link.frames import REFUSED, Channel, ExitKind
from qubes_itests.guest.link.streams import GuestReader, GuestWriter

if TYPE_CHECKING:
    from qubes_itests.guest.exc import GuestGoneError
    from qubes_itests.guest.link.frames import Called
    from qubes_itests.guest.link.streams import Link

__all__ = ["CallHandler", "ServiceCall", "refusal"]


#: Characters; Linux itself allows 32 for users of its own.
_USER_MAX: Final = 255
_TARGET: Final = re.compile(r"(?:@?[A-Za-z0-9][A-Za-z0-9_.:-]{0,127})?")
_SERVICE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}(?:\+[A-Za-z0-9_.+@=-]{0,128})?")


def refusal(call: Called) -> str:
    """Return what is wrong with the names in a call; empty when nothing is."""
    if not _TARGET.fullmatch(call.target):
        return "the target's name is not valid"
    if not _SERVICE.fullmatch(call.service):
        return "the service's name is not valid"
    if len(call.user) > _USER_MAX or not call.user.isprintable():
        return "the user's name is not valid"
    return ""


class ServiceCall:
    """A call of a service that a program in a guest makes.

    It is handed to the agent's `on_call`, which ends it by `finish` or `refuse`. The
    names have been checked for their form, and are the guest's word otherwise.
    """

    def __init__(self, link: Link, event: Called, vm: str) -> None:
        #: Name of the VM that calls.
        self.vm = vm
        #: Whom it calls: a VM's name, ``dom0``, ``@default`` …; empty as ``@default``.
        self.target = event.target or "@default"
        #: ``SERVICE`` or ``SERVICE+ARGUMENT``, as asked for.
        self.service = event.service
        #: The user of the guest that calls.
        self.user = event.user
        #: What the caller writes.
        self.stdin: GuestReader = GuestReader(link, event.stream, Channel.STDIN)
        #: What the caller reads.
        self.stdout = GuestWriter(link, event.stream, Channel.STDOUT)
        self._link = link
        self._stream = event.stream

    def __repr__(self) -> str:
        return f"<ServiceCall {self.service} from {self.vm} to {self.target}>"

    @property
    def ended(self) -> bool:
        """Tell whether it is over."""
        return not self._link.protocol.is_open(self._stream)

    async def finish(self, exit_code: int) -> None:
        """End the call after all that was written to `stdout` has been sent.

        :param exit_code: the service's status, 0 to 255; a negative one, a signal's
            number as `subprocess` has it, reaches the caller as 128 + that number.
        """
        if not self.stdout.is_closing():
            self.stdout.write_eof()
        # EXIT is the last frame of a stream: sent now, it would cut off what still
        # waits for credit
        await self.stdout.flushed()
        value = exit_code & 0xFF if exit_code >= 0 else (128 - exit_code) & 0xFF
        self._exit(ExitKind.EXITED, value, "")

    async def refuse(self, text: str, *, exit_code: int = REFUSED) -> None:
        """End the call because it is not allowed, or leads nowhere.

        :param text: why; the caller sees it.
        :param exit_code: 126, or 127 when there is no such service.
        """
        if not self.ended:
            self._link.hold_up()
        self._exit(ExitKind.NOT_STARTED, exit_code, text)

    def _exit(self, kind: ExitKind, value: int, text: str) -> None:
        if not self.ended:
            frame = self._link.protocol.exit(self._stream, kind, value, text)
            self._link.send(frame)
            # after it: the protocol ignores from here on what the guest still sends
            self._link.forget(self._stream)
        self.stdout.break_off(BrokenPipeError(f"{self!r} has ended"))
        self.stdin.feed_eof()

    # for the connection

    def reader(self, channel: int) -> GuestReader:
        """Return the reader of its only channel from the guest."""
        del channel
        return self.stdin

    def writer(self) -> GuestWriter:
        """Return the writer of its only channel to the guest."""
        return self.stdout

    def lose(self, error: GuestGoneError) -> None:
        """Take note that the guest went away."""
        self.stdout.break_off(error)
        self.stdin.lose(error)


CallHandler = Callable[[ServiceCall], Awaitable[None]]
