"""Which step of a start is under way, for the error that names it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from qubes_itests.core.exc import QubesVMStartError
from qubes_itests.guest.exc import BootError
from qubes_itests.guest.start.record import StartRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.core.vm.qubesvm import QubesVM

__all__ = ["Step"]

log = logging.getLogger("qubes.vm")


class Step:
    """The present step of one start; called with the next one, as a context.

    :param vm: the VM that starts.
    """

    def __init__(self, vm: QubesVM) -> None:
        self.vm = vm
        self._record = StartRecord(vm.name)
        #: In words that follow "could not"; empty before the first.
        self.name = ""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Begin the next step: `name` follows "could not" in the error."""
        self.name = name
        self.part(name)
        yield

    def part(self, name: str) -> None:
        """Begin a part of the step."""
        log.debug("VM %s starts: %s", self.vm.name, name)
        self._record.part(name)

    def succeeded(self) -> float:
        """Take note that the VM has started; return how many seconds that took."""
        return self._record.succeeded()

    async def failed(self, _cls: object, error: object, _traceback: object) -> None:
        """Announce that the start failed, and raise an error that names the step.

        For `contextlib.AsyncExitStack.push_async_exit`. What the handlers of
        `domain-pre-start` raise is their veto, and goes on as it is.
        """
        if not isinstance(error, BaseException):
            return
        self._record.failed()
        self.vm.life.halted_by_failure()
        named = self._named(error)
        try:
            await self.vm.fire_event_async(
                "domain-start-failed", reason=str(named or error)
            )
        except Exception as failure:  # noqa: BLE001 - the first error is the one to see
            self.vm.note_problem(failure)
        if named is not None:
            raise named from error

    def _named(self, error: BaseException) -> QubesVMStartError | None:
        step, reason = self.name or "begin", str(error)
        if isinstance(error, BootError):
            # the steps of a boot say more than that it was one
            step, reason = error.step, error.told
        elif isinstance(error, asyncio.CancelledError):
            reason = "it was killed"
        elif not self.name or not isinstance(error, Exception):
            return None
        return QubesVMStartError(self.vm, step, reason)
